"""The loop of every stage whose policy learns from its own rollouts.

What happens in a step, all of it on the device but the loop itself:

  sample -> parse -> reward -> advantage      `rollouts`
  refill groups whose rewards are all equal   `collect`
  what a teacher says of every token          `distillation`
  importance weights                          `make_weigh`
  one or several clipped updates              `policy_gradient`

`rl` and `opd` differ in their teacher alone: the policy's own start, if any,
against one that knows more.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.ops import advantages, gates, kl, losses, masking, rewards
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import policy, ranking, sampling
from gr2_jax.prompts import examples
from gr2_jax.train import distillation, learner, loop, policy_gradient, rollouts

# Fields of a section that are one of a few names.
CHOICES = {
  'reward': rewards.KINDS,
  'gate': gates.GATES,
  'advantage': advantages.KINDS,
  'average': losses.AVERAGES,
  'credit': ('answer', 'placement'),
  'kl_kind': policy_gradient.DIVERGENCES,
}


def train(
  name: str,
  config,
  inputs: dict[str, pathlib.Path],
  workdir: pathlib.Path,
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  teacher: distillation.Teacher | None,
) -> dict[str, Any]:
  """Trains from the parameters of the stage before; validation chooses.

  Args:
    name: of the stage and its section.
    config: sections prompt, mesh, and that one; seed.
    inputs: slates, and the stage named by the section's `start`.
    workdir: of this stage.
    spec: tokens and shapes.
    teacher: whom the policy is held to with `kl_weight`; None for nobody.

  Returns:
    The chosen step, its validation numbers, and why training stopped.
  """
  stage = config[name]
  check_rewards(name, stage)
  control = '<think>' if stage.thinking else '<answer>'
  render = examples.generation_rows(spec.prompter, control, config.prompt.order)
  if teacher is not None and teacher.reads_its_own:
    render = distillation.beside(render, teacher, control, config.prompt.order)
  # Sampler and learner: the same temperature, the same masks.
  sampler = spec.sampling(
    stage.group_size, stage.thinking, stage.temperature, stage.constrained
  )
  return learn(
    name,
    config,
    workdir,
    spec,
    mesh,
    spec.grammar,
    slates=policy.source(inputs, 'train', stage.context),
    render=render,
    sampler=sampler,
    act=rollouts.make_act(spec, sampler, stage),
    validate=ranking.validator(
      spec,
      mesh,
      policy.source(inputs, 'validation', stage.context),
      slates_lib.read(inputs['slates'], 'validation'),
      thinking=stage.thinking,
      order=config.prompt.order,
      num_slates=stage.eval_slates,
      batch_size=stage.eval_batch_size,
    ),
    start=inputs[stage.start],
    teacher=teacher,
  )


def learn(
  name: str,
  config,
  workdir: pathlib.Path,
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  grammar: grammar_lib.Grammar,
  *,
  slates: Any,
  render: Callable[..., dict[str, np.ndarray]],
  sampler: sampling.SamplingOptions,
  act: Callable[..., tuple[policy_gradient.PolicyBatch, dict[str, Any]]],
  validate: Callable[[Any], dict[str, float]],
  start: pathlib.Path,
  teacher: distillation.Teacher | None,
) -> dict[str, Any]:
  """Trains on rollouts of any grammar, by any rewards; validation chooses.

  Args:
    name: of the stage and its section.
    config: section mesh, and that one; seed.
    workdir: of this stage.
    spec: tokens, shapes, and the grammar.
    render: `(slate, rng) -> row`.
    sampler: how to roll out.
    act: `(params, rows, key) -> (PolicyBatch, watches)`.
    validate: whole parameters to named numbers, on held-out data.
    start: artifact whose parameters training starts from.
    teacher: whom the policy is held to with `kl_weight`; None for nobody.

  Returns:
    The chosen step, its validation numbers, and why training stopped.
  """
  stage = config[name]
  check(name, stage)

  # Input: rows of slates, each in one presentation or, where the order itself
  # is watched, in two.
  render = examples.several(render, views(stage))
  drawn = stage.refill_size
  data = loop.dataset(mesh, slates, render, drawn // views(stage), config.seed)
  iterator = examples.iterate(data)

  look, said = None, ()
  if teacher is not None:
    look = distillation.make_look(
      teacher,
      grammar,
      sampler,
      stage.kl_kind,
      readout=stage.get('readout_weight', 0.0) > 0,
    )
    said = teacher.rows if stage.kl_kind in kl.EXACT else ()
  weigh = make_weigh(spec.model, grammar, sampler, stage)
  optimizer = learner.make_optimizer(stage, stage.epochs * stage.minibatches)
  update = policy_gradient.make_update(
    spec,
    grammar,
    sampler,
    stage,
    optimizer,
    kl_weight=stage.kl_weight if teacher is not None else 0.0,
  )
  join = spec.adapters.joiner()
  split = jax.jit(policy_gradient.minibatches, static_argnums=(1, 2))
  join_parts = jax.jit(
    lambda parts: jax.tree.map(lambda *x: jnp.concatenate(x), *parts),
    out_shardings=sharding.batch_sharding(mesh),
  )

  def draw(size: int):
    """The next `size` rows, from as many of the iterator's as they take."""
    parts = [
      {k: v.reshape(-1, *v.shape[2:]) for k, v in next(iterator).items()}
      for _ in range(size // drawn)
    ]
    return join_parts([sharding.shard_local_rows(p, mesh) for p in parts])

  def take_step(state, frozen, step):
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    params = join(state.params, frozen)
    batch, watches = collect(functools.partial(act, params), draw, key, stage)
    for add in filter(None, (look, functools.partial(weigh, params))):
      batch, watched = add(batch)
      watches |= watched
    gap = None
    for part in split(batch, stage.epochs, stage.minibatches, key):
      state, found = update(state, frozen, part, *said)
      gap = found['sampler_gap'] if gap is None else gap
    # After the first update the policy is no longer the one that sampled.
    return state, found | {'sampler_gap': gap} | watches

  return loop.fit(
    stage,
    spec=spec,
    mesh=mesh,
    workdir=workdir,
    seed=config.seed,
    optimizer=optimizer,
    take_step=take_step,
    iterator=iterator,
    validate=validate,
    choose=stage.choose,
    inherited=start,
    desc=name,
    start_counts=True,
  )


def check(section: str, stage) -> None:
  """Raises a ValueError that names the field of a section that cannot be."""
  size, drawn = stage.batch_size, stage.refill_size
  if drawn < 1 or size % drawn:
    raise ValueError(
      f'{section}.refill_size={drawn} does not divide '
      f'{section}.batch_size={size}'
    )
  if drawn % views(stage):
    raise ValueError(
      f'{section}.order_cost={stage.order_cost} shows each slate twice: '
      f'{section}.refill_size={drawn} must be even'
    )
  if size % stage.minibatches:
    raise ValueError(
      f'{section}.minibatches={stage.minibatches} does not divide '
      f'{section}.batch_size={size}'
    )
  for name in ('kl_weight', 'readout_weight'):
    if stage.get(name, 0.0) < 0:
      raise ValueError(f'{section}.{name}={stage[name]}: must not be below 0')
  for name, known in CHOICES.items():
    if name in stage and stage[name] not in known:
      raise ValueError(
        f'{section}.{name}={stage[name]!r}: must be one of {", ".join(known)}'
      )


def check_rewards(section: str, stage) -> None:
  """The same, of the fields that a stage has which learns to rank."""
  if stage.order_cost > stage.format_weight and not stage.constrained:
    raise ValueError(
      f'{section}.order_cost={stage.order_cost} is more than '
      f'{section}.format_weight={stage.format_weight}: an invalid answer, '
      'which is not charged, would be the cheaper one'
    )
  if stage.judge_weight and not stage.thinking:
    raise ValueError(
      f'{section}.judge_weight={stage.judge_weight} judges reasoning, but '
      f'{section}.thinking is False: set one of them otherwise'
    )


def views(stage) -> int:
  """How many presentations of a slate a batch holds, side by side."""
  return 2 if stage.get('order_cost', 0) else 1


def collect(
  act: Callable[..., tuple[policy_gradient.PolicyBatch, dict[str, Any]]],
  draw: Callable[[int], Any],
  key: jax.Array,
  stage,
) -> tuple[policy_gradient.PolicyBatch, dict[str, Any]]:
  """Dynamic sampling: a batch of groups that have something to teach.

  Groups whose rewards are all equal are replaced by fresh ones, `refill_size`
  slates at a time, `refills` times at most; what is flat then is masked. The
  batch keeps its shape, so nothing is compiled again.

  Args:
    act: `(rows, key) -> (batch, watches)`.
    draw: number of rows to rows.
    key: of this step; each refill folds its number in.
    stage: batch_size, refill_size, refills.

  Returns:
    The batch, and the watches of its first, unselected rows, beside `refills`
    and `used_groups`.
  """
  batch, watches = act(draw(stage.batch_size), jax.random.fold_in(key, 0))
  refills = 0
  while refills < stage.refills and not bool(batch.use.all()):
    refills += 1
    fresh, _ = act(draw(stage.refill_size), jax.random.fold_in(key, refills))
    batch = _top_up(batch, fresh)
  counted = {'refills': refills, 'used_groups': batch.use.mean()}
  return batch, watches | counted


_top_up = jax.jit(policy_gradient.top_up)


def make_weigh(
  model: transformer.TransformerConfig,
  grammar: grammar_lib.Grammar,
  sampler: sampling.SamplingOptions,
  stage,
) -> Callable[..., tuple[policy_gradient.PolicyBatch, dict[str, Any]]]:
  """Compiles the importance weights of learner against sampler.

  Args:
    spec: tokens and shapes.
    sampler: how the batch was sampled.
    stage: importance_cap; 0 leaves batches as they are.

  Returns:
    `(params, batch) -> (batch, watches)`.
  """
  if not stage.importance_cap:
    return lambda params, batch: (batch, {})

  @jax.jit
  def weigh(params, batch):
    """The learner's own log-probabilities, and what they differ by."""
    logp = policy_gradient.score(model, params, batch, grammar, sampler).logp
    written = masking.length_mask(batch.length, batch.tokens.shape[-1])
    importance = losses.importance_weights(
      logp, batch.logp, written, cap=stage.importance_cap
    )
    gap = jnp.abs(masking.keep(logp - batch.logp, written)).max()
    watches = {
      'sampler_gap': gap,
      'importance': masking.masked_mean(importance, written),
    }
    return batch.replace(logp=logp, importance=importance), watches

  return weigh
