"""A training step without data: arrays with a shape and a sharding, no content.

The step is that of stage `rl`: the same rollouts and the same update, under the
same sharding rules, lowered for any devices.

Axes: P prompts, K candidates.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from gr2_jax.aot import costs, topologies
from gr2_jax.distributed import sharding
from gr2_jax.policy import policy, sampling
from gr2_jax.prompts import vocabulary
from gr2_jax.train import learner, policy_gradient, rollouts


@dataclasses.dataclass(frozen=True)
class Load:
  """Sizes of a step that a data set or a pretrained model would give."""

  slates: int = 128  # P, of a step
  prompt_tokens: int = 1024
  text_rows: int = 151_936  # of the embedding, without this project's symbols


@dataclasses.dataclass(frozen=True)
class Step:
  """A step of stage `rl` on a mesh."""

  stage: ml_collections.ConfigDict  # section `rl`; `load` has its batch size
  spec: policy.PolicySpec
  mesh: jax.sharding.Mesh
  load: Load

  @property
  def sampling(self) -> sampling.SamplingOptions:
    """How the step samples completions."""
    stage = self.stage
    return self.spec.sampling(
      stage.group_size, stage.thinking, stage.temperature, stage.constrained
    )

  @property
  def batch_shards(self) -> int:
    """Parts that the mesh splits a batch into."""
    return self.mesh.shape['data'] * self.mesh.shape['fsdp']

  @property
  def updates(self) -> int:
    """Updates of the parameters in a step."""
    return self.stage.epochs * self.stage.minibatches

  @property
  def optimizer(self) -> optax.GradientTransformation:
    """The optimizer of stage `rl`."""
    options = learner.OptimizerOptions.from_config(self.stage)
    return learner.make_optimizer(options, self.updates)

  def state(self) -> tuple[learner.TrainState, Any]:
    """The abstract training state, and the frozen parameters beside it."""
    optimizer = self.optimizer
    key = jax.random.key(0)
    if self.spec.adapters.rank:
      frozen = self.spec.abstract_params(self.mesh)
      params = jax.eval_shape(self.spec.adapters.start, frozen, key)
      opt_state = jax.eval_shape(optimizer.init, params)
      state = learner.TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, opt_state
      )
      replicated = sharding.replicated(self.mesh)
      return jax.tree.map(lambda x: _placed(x, replicated), state), frozen
    shardings = []

    def init(key: jax.Array) -> learner.TrainState:
      state, places = learner.init_state(
        self.spec.model, optimizer, key, self.mesh
      )
      shardings.append(places)
      return state

    shapes = jax.eval_shape(init, key)
    return jax.tree.map(_placed, shapes, shardings[0]), {}

  def rows(self) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `examples.generation_rows`.

    Raises:
      ValueError: the mesh does not split the slates.
    """
    P, K = self.load.slates, self.spec.prompter.num_candidates
    if P % self.batch_shards:
      raise ValueError(
        f'--slates={P} does not split over the {self.batch_shards} chips of '
        'mesh.data x mesh.fsdp'
      )
    fields = {
      'prompt': ((P, self.load.prompt_tokens), jnp.int32),
      'prompt_length': ((P,), jnp.int32),
      'slots': ((P, K), jnp.int32),
      'grades': ((P, K), jnp.float32),
      'incoming': ((P, K), jnp.int32),
      'count': ((P,), jnp.int32),
    }
    place = sharding.batch_sharding(self.mesh)
    return {
      name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
      for name, (shape, dtype) in fields.items()
    }

  def min_update_bytes(self) -> int:
    """Lower bound of the bytes that an update takes on one chip.

    Beside the training state lie first the layers' inputs, which the backward
    pass needs, and then all gradients, because their norm is clipped.
    """
    state, frozen = self.state()
    itemsize = jnp.dtype(self.spec.model.dtype).itemsize
    gradients = bytes_per_chip(state.params) * itemsize // 4
    tokens = (
      self.load.prompt_tokens + self.stage.group_size * self.sampling.max_tokens
    )
    tokens *= self.load.slates // self.stage.minibatches // self.batch_shards
    model = self.spec.model
    inputs = model.num_layers * tokens * model.d_model * itemsize
    return bytes_per_chip((state, frozen)) + max(gradients, inputs)


@dataclasses.dataclass(frozen=True)
class Lowered:
  """A program of a step, ready to be compiled."""

  name: str
  program: jax.stages.Lowered
  flops: float  # of one chip
  unknown_trips: int = 1  # upper bound for loops that depend on the data
  resident: int = 0  # bytes on a chip that are not its arguments
  runs: int = 1  # in a step


def open_mesh(
  config: ml_collections.ConfigDict, topology: str, slates: int
) -> jax.sharding.Mesh:
  """The config's mesh; by default the one that splits the batch the most.

  Args:
    config: section `mesh`.
    topology: of `topologies.slices`.
    slates: of a step; the axes data and fsdp split them.
  """
  sizes = config.mesh.to_dict()
  devices = topologies.devices(topology)
  if sizes == {'data': -1, 'fsdp': 1, 'tensor': 1}:
    shards = math.gcd(len(devices), slates)
    sizes = {'data': 1, 'fsdp': shards, 'tensor': len(devices) // shards}
  return sharding.make_mesh(**sizes, devices=devices)


class _Words:
  """The ids of a vocabulary, without its text."""

  eos = 2

  def __init__(self, layout: vocabulary.Layout, text_rows: int):
    symbols = (vocabulary.PAD, *layout.symbols())
    ids = {symbol: text_rows + i for i, symbol in enumerate(symbols)}
    self.layout, self._size = layout, text_rows + len(ids)
    self.first_symbol, self.pad = text_rows, ids[vocabulary.PAD]
    self.control = {name: ids[name] for name in vocabulary.CONTROLS}
    self.slot_base, self.sid_base = ids['<slot0>'], ids['<a0>']
    self.memory_base = ids.get('<memory0>', 0)

  def __len__(self) -> int:
    return self._size


def make_step(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, load: Load
) -> Step:
  """Builds a step from the sections data, tokenizer, prompt, model and rl."""
  layout = policy.layout_of(config.prompt, config.tokenizer)
  spec = policy.build(
    config,
    _Words(layout, load.text_rows),
    num_candidates=config.data.candidates,
  )
  return Step(config.rl, spec, mesh, load)


def lower(step: Step) -> list[Lowered]:
  """Lowers the rollouts (`act`) and the `update` of a step, in this order.

  Raises:
    ValueError: the slates cannot be split as the config says, or the step
      needs the reference policy.
  """
  stage, mesh = step.stage, step.mesh
  if stage.kl_weight:
    raise ValueError(
      f'rl.kl_weight={stage.kl_weight}: the step is compiled without a '
      'reference; set --config.rl.kl_weight=0'
    )
  if step.load.slates % stage.minibatches:
    raise ValueError(
      f'rl.minibatches={stage.minibatches} does not divide the '
      f'{step.load.slates} slates of a step'
    )
  state, frozen = step.state()
  params = step.spec.abstract_params(mesh)
  rows = step.rows()
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = _placed(key, sharding.replicated(mesh))
  act = rollouts.make_rollout_step(
    step.spec,
    step.sampling,
    rollouts.RewardOptions.from_config(stage, 'rl'),
    stage.advantage,
  )
  update = policy_gradient.make_update(
    step.spec,
    step.spec.grammar,
    step.sampling,
    policy_gradient.PolicyGradientOptions.from_config(stage, 'rl'),
    step.optimizer,
  )

  def minibatch(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    shape = (x.shape[0] // stage.minibatches, *x.shape[1:])
    x = jax.ShapeDtypeStruct(shape, x.dtype)
    return _placed(x, sharding.batch_sharding(mesh))

  with sharding.activate(mesh):
    batch, _ = jax.eval_shape(act, params, rows, key)
    traced_act = act.trace(params, rows, key)
    traced_update = update.trace(state, frozen, jax.tree.map(minibatch, batch))
    lowered = traced_act.lower(), traced_update.lower()
  trips = step.sampling.max_tokens - 1
  adapted = step.spec.adapters.rank > 0  # Rollouts use a merged copy.
  return [
    Lowered(
      'act',
      lowered[0],
      flops=costs.flops(traced_act.jaxpr.jaxpr, trips) / mesh.size,
      unknown_trips=trips,
      resident=bytes_per_chip((state, frozen) if adapted else state.opt_state),
    ),
    Lowered(
      'update',
      lowered[1],
      flops=costs.flops(traced_update.jaxpr.jaxpr) / mesh.size,
      resident=bytes_per_chip(params) if adapted else 0,
      runs=step.updates,
    ),
  ]


def bytes_per_chip(tree: Any) -> int:
  """Bytes of a tree of abstract arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _placed(x: Any, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
