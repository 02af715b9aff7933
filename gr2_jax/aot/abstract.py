"""A training step without data: arrays with a shape and a place, no content.

The step is the one of stage `rl`: the same functions (rollouts, update with its
optimizer and donation) under the same sharding rules, lowered for any devices.
What a data set would say is said by a `Load`.

Axes: P prompts, G group, T completion time, K candidates.
"""

import dataclasses
import math
import types
from typing import Any

import jax
import jax.numpy as jnp

from gr2_jax.aot import topologies
from gr2_jax.distributed import sharding
from gr2_jax.models import lora, transformer
from gr2_jax.policy import grammar, policy
from gr2_jax.prompts import prompt, vocabulary
from gr2_jax.train import learner, policy_gradient, rollouts


@dataclasses.dataclass(frozen=True)
class Load:
  """What a step has to do, where the data or the user would say so."""

  slates: int = 128  # P, of a step
  prompt_tokens: int = 1024
  text_rows: int = 151_936  # of the embedding, before our symbols: Qwen3's


@dataclasses.dataclass(frozen=True)
class Lowered:
  """A program of a step, ready to be compiled."""

  name: str
  program: jax.stages.Lowered
  unknown_trips: int = 1  # of loops that end when the data says so, at most
  beside: int = 0  # bytes on a chip that are none of its arguments
  runs: int = 1  # in a step


def open_mesh(config, topology: str, slates: int) -> jax.sharding.Mesh:
  """The config's mesh, or where it says nothing the one that splits most.

  Args:
    config: section `mesh`.
    topology: of `topologies.slices`.
    slates: of a step; the axes data and fsdp split them.
  """
  sizes = config.mesh.to_dict()
  devices = topologies.devices(topology)
  if sizes == {'data': -1, 'fsdp': 1, 'tensor': 1}:
    split = math.gcd(len(devices), slates)
    sizes = {'data': 1, 'fsdp': split, 'tensor': len(devices) // split}
  return sharding.make_mesh(**sizes, devices=devices)


def make_setup(config, mesh: jax.sharding.Mesh, text_rows: int) -> policy.Setup:
  """What `policy.load` returns, without a data set.

  Args:
    config: sections data, tokenizer, prompt, model.
    mesh: of `open_mesh`.
    text_rows: of the embedding, before our symbols.
  """
  layout = vocabulary.Layout(
    evidence=tuple(config.prompt.evidence),
    bins=config.prompt.bins,
    num_slots=config.prompt.num_slots,
    num_memory=config.prompt.num_memory,
    levels=config.tokenizer.levels,
    codebook_size=config.tokenizer.codebook_size,
  )
  ids = {
    symbol: text_rows + place
    for place, symbol in enumerate((vocabulary.PAD, *layout.symbols()))
  }
  words = types.SimpleNamespace(
    layout=layout,
    control={name: ids[name] for name in vocabulary.CONTROLS},
    slot_base=ids['<slot0>'],
    sid_base=ids['<a0>'],
  )
  prompter = prompt.Prompter(
    vocabulary=words,
    bins=None,
    items={},
    opening=(),
    closing=(),
    asks={},
    layout=tuple(config.prompt.layout),
    fields=tuple(config.prompt.fields),
    history=config.prompt.history,
    history_fields=tuple(config.prompt.history_fields),
    num_candidates=config.data.candidates,
    reasoning=config.prompt.reasoning_tokens,
  )
  own = config.model.to_dict()
  del own['source'], own['new_rows']
  trained = lora.Adapters(
    rank=own.pop('lora_rank'),
    targets=tuple(own.pop('lora_targets')),
    first_row=text_rows,
  )
  return policy.Setup(
    catalog=None,
    prompter=prompter,
    grammar=grammar.Ranking(
      slot_base=words.slot_base,
      num_slots=layout.num_slots,
      num_candidates=config.data.candidates,
      think_end=words.control['</think>'],
      eos=2,
      pad=ids[vocabulary.PAD],
    ),
    model=transformer.TransformerConfig(vocab_size=text_rows + len(ids), **own),
    mesh=mesh,
    adapters=trained,
  )


def make_state(
  setup: policy.Setup, optimizer
) -> tuple[learner.TrainState, Any]:
  """Shapes and places of a training state and of what is frozen beside it."""
  key = jax.random.key(0)
  if setup.adapters.rank:
    frozen = setup.abstract_params()
    params = jax.eval_shape(setup.adapters.start, frozen, key)
    state = learner.TrainState(
      jax.ShapeDtypeStruct((), jnp.int32),
      params,
      jax.eval_shape(optimizer.init, params),
    )
    whole = sharding.replicated(setup.mesh)
    return jax.tree.map(lambda x: _at(x, whole), state), frozen
  places = []

  def init(key):
    state, shardings = learner.init_state(
      setup.model, optimizer, key, setup.mesh
    )
    places.append(shardings)
    return state

  shapes = jax.eval_shape(init, key)
  return jax.tree.map(_at, shapes, places[0]), {}


def lower(stage, setup: policy.Setup, load: Load) -> list[Lowered]:
  """Lowers the programs of a step of stage `rl`.

  Args:
    stage: section `rl`, its batch sizes aside.
    setup: of `make_setup`.
    load: slates of a step, tokens of a prompt.

  Returns:
    The rollouts (`act`) and the update, in the order in which they run.

  Raises:
    ValueError: a batch that the mesh does not split, or a step with a teacher.
  """
  if stage.kl_weight:
    raise ValueError(
      f'rl.kl_weight={stage.kl_weight}: the step is compiled without a '
      'reference; set --config.rl.kl_weight=0'
    )
  if load.slates % stage.minibatches:
    raise ValueError(
      f'rl.minibatches={stage.minibatches} does not divide the {load.slates} '
      'slates of a step'
    )
  sampler = setup.sampling(
    stage.group_size, stage.thinking, stage.temperature, stage.constrained
  )
  optimizer = learner.make_optimizer(stage, stage.epochs * stage.minibatches)
  state, frozen = make_state(setup, optimizer)
  params = setup.abstract_params()
  rows = _rows(setup, load)
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = _at(key, sharding.replicated(setup.mesh))
  act = rollouts.make_act(setup, sampler, stage)
  update = policy_gradient.make_update(setup, sampler, stage, optimizer)

  def part(x):
    """Of a batch leaf: what one update sees."""
    shape = (x.shape[0] // stage.minibatches, *x.shape[1:])
    return _at(
      jax.ShapeDtypeStruct(shape, x.dtype), sharding.batch_sharding(setup.mesh)
    )

  with sharding.activate(setup.mesh):
    batch, _ = jax.eval_shape(act, params, rows, key)
    lowered_act = act.lower(params, rows, key)
    lowered_update = update.lower(state, frozen, jax.tree.map(part, batch))
  # Adapters are joined for the rollouts: a copy of what is frozen.
  joined = setup.adapters.rank > 0
  return [
    Lowered(
      'act',
      lowered_act,
      unknown_trips=sampler.max_tokens - 1,
      beside=held((state, frozen) if joined else state.opt_state),
    ),
    Lowered(
      'update',
      lowered_update,
      beside=held(params) if joined else 0,
      runs=stage.epochs * stage.minibatches,
    ),
  ]


def state_bytes(stage, setup: policy.Setup) -> int:
  """Bytes of parameters and optimizer on one chip."""
  optimizer = learner.make_optimizer(stage)
  return held(make_state(setup, optimizer))


def least_bytes(stage, setup: policy.Setup, load: Load) -> int:
  """Bytes that an update takes on one chip, whatever the compiler does.

  Beside the state, first what stands between layers, which the loop over them
  keeps for its way back; later all gradients, whose norm is clipped before the
  first of them is used.

  Args:
    stage: section `rl`.
    setup: of `make_setup`.
    load: a step.
  """
  state, frozen = make_state(setup, learner.make_optimizer(stage))
  item = jnp.dtype(setup.model.dtype).itemsize
  gradients = held(state.params) * item // 4
  chips = setup.mesh.shape['data'] * setup.mesh.shape['fsdp']
  sampler = setup.sampling(
    stage.group_size, stage.thinking, stage.temperature, stage.constrained
  )
  tokens = load.prompt_tokens + stage.group_size * sampler.max_tokens
  tokens *= load.slates // stage.minibatches // chips
  between = setup.model.num_layers * tokens * setup.model.d_model * item
  return held((state, frozen)) + max(gradients, between)


def held(tree: Any) -> int:
  """Bytes of a tree of abstract arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _rows(setup: policy.Setup, load: Load) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch of `batches.requests`, on the mesh."""
  place = sharding.batch_sharding(setup.mesh)
  P, K = load.slates, setup.grammar.num_candidates
  chips = setup.mesh.shape['data'] * setup.mesh.shape['fsdp']
  if P % chips:
    raise ValueError(
      f'--slates={P} does not split over the {chips} chips of mesh.data x '
      'mesh.fsdp'
    )
  fields = {
    'prompt': ((P, load.prompt_tokens), jnp.int32),
    'prompt_length': ((P,), jnp.int32),
    'slots': ((P, K), jnp.int32),
    'grades': ((P, K), jnp.float32),
    'incoming': ((P, K), jnp.int32),
    'count': ((P,), jnp.int32),
  }
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for name, (shape, dtype) in fields.items()
  }


def _at(x: Any, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
