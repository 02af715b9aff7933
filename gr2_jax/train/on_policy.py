"""Training of a policy on its own rollouts: RL and on-policy distillation.

`take_step` reads as the papers do. `rl` and `opd` differ in their teacher
alone: the policy's own start, if any, against a policy that knows more.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gr2_jax.distributed import sharding
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import policy, sampling
from gr2_jax.prompts import examples
from gr2_jax.train import distillation, learner, loop, policy_gradient
from gr2_jax.train.policy_gradient import PolicyBatch

# (params, rows, key) -> (batch, metrics)
RolloutStep = Callable[..., tuple[PolicyBatch, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class OnPolicyOptions:
  """The fields of a section whose policy learns from its own rollouts."""

  gradient: policy_gradient.PolicyGradientOptions
  optimizer: learner.OptimizerOptions
  loop: loop.LoopOptions
  selection_metric: str  # validation metric of the best parameters, or last

  @classmethod
  def from_config(cls, section: Any, name: str) -> 'OnPolicyOptions':
    """Reads and checks a config section; raises a ValueError with its name."""
    return cls(
      policy_gradient.PolicyGradientOptions.from_config(section, name),
      learner.OptimizerOptions.from_config(section),
      loop.LoopOptions.from_config(section),
      section.selection_metric,
    )


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """The compiled parts of a step."""

  options: policy_gradient.PolicyGradientOptions
  join: Callable[..., Any]  # trainable and frozen parameters to whole ones
  draw_rows: Callable[[int], Any]  # the next prompts
  rollout_step: RolloutStep
  teacher: policy_gradient.Teacher | None
  importance_weights: Callable[..., tuple[PolicyBatch, dict[str, Any]]]
  update: Callable[..., tuple[learner.TrainState, dict[str, Any]]]


def take_step(
  algorithm: Algorithm, state: learner.TrainState, frozen: Any, key: jax.Array
) -> tuple[learner.TrainState, dict[str, Any]]:
  """One step of RL (Eq. 7-9) or of on-policy distillation (Eq. 4)."""
  options, teacher = algorithm.options, algorithm.teacher
  params = algorithm.join(state.params, frozen)

  # Sample a group of answers to each prompt, parse them, reward them, and
  # compare the rewards within each group: one compiled function, of `rollouts`.
  # Groups whose rewards are all equal are replaced by fresh ones.
  batch, metrics = sample_with_refills(
    functools.partial(algorithm.rollout_step, params),
    algorithm.draw_rows,
    key,
    options,
  )

  # The teacher scores what the policy wrote.
  if teacher is not None:
    batch, teacher_metrics = teacher.score(batch)
    metrics |= teacher_metrics

  # Weigh tokens by how much the learner and the sampler disagree.
  batch, weight_metrics = algorithm.importance_weights(params, batch)
  metrics |= weight_metrics

  # Update the policy, once or several times, by a clipped surrogate plus the
  # divergence from the teacher.
  sampler_gap, update_metrics = None, {}
  vocabulary = () if teacher is None else teacher.vocabulary
  for part in _split(batch, options.epochs, options.minibatches, key):
    state, update_metrics = algorithm.update(state, frozen, part, *vocabulary)
    if sampler_gap is None:  # Later, the policy differs from its sampler.
      sampler_gap = update_metrics['sampler_gap']
  return state, update_metrics | {'sampler_gap': sampler_gap} | metrics


def sample_with_refills(
  rollout_step: RolloutStep,
  draw_rows: Callable[[int], Any],
  key: jax.Array,
  options: policy_gradient.PolicyGradientOptions,
) -> tuple[PolicyBatch, dict[str, Any]]:
  """Dynamic sampling: a batch of groups whose rewards differ.

  Groups without variance are replaced, `refill_size` prompts at a time, at most
  `refills` times; those that are left do not count. The batch keeps its shape,
  so nothing is compiled again. The metrics are of the first, unselected
  rollouts, with `refills` and `used_groups`.
  """
  batch, metrics = rollout_step(
    draw_rows(options.batch_size), jax.random.fold_in(key, 0)
  )
  refills = 0
  while refills < options.refills and not bool(batch.use.all()):
    refills += 1
    fresh, _ = rollout_step(
      draw_rows(options.refill_size), jax.random.fold_in(key, refills)
    )
    batch = _replace_flat_groups(batch, fresh)
  counts = {'refills': refills, 'used_groups': batch.use.mean()}
  return batch, metrics | counts


_split = jax.jit(policy_gradient.minibatches, static_argnums=(1, 2))
_replace_flat_groups = jax.jit(policy_gradient.replace_flat_groups)


def learn(
  desc: str,
  options: OnPolicyOptions,
  *,
  spec: policy.PolicySpec,
  mesh: Mesh,
  grammar: grammar_lib.Grammar,
  workdir: pathlib.Path,
  seed: int,
  slates: Any,
  render: Callable[..., dict[str, np.ndarray]],
  sampler: sampling.SamplingOptions,
  rollout_step: RolloutStep,
  validate: Callable[[Any], dict[str, float]],
  start: pathlib.Path,
  teacher: distillation.TeacherPolicy | None = None,
  views: int = 1,
) -> dict[str, Any]:
  """Trains on rollouts of any grammar, with any rewards.

  Rows come from `slates` by `render`, `(slate, rng) -> row`, with `views`
  presentations of a slate side by side. Training starts from the parameters of
  the artifact `start`; `kl_weight` holds the policy to the `teacher`, if any.
  `validate` maps whole parameters to metrics on held-out data.

  Returns:
    The best step, its validation metrics, and why training stopped.
  """
  gradient = options.gradient
  drawn = gradient.refill_size
  iterator = examples.iterate(
    loop.dataset(
      mesh, slates, examples.several(render, views), drawn // views, seed
    )
  )
  join_parts = jax.jit(
    lambda parts: jax.tree.map(lambda *x: jnp.concatenate(x), *parts),
    out_shardings=sharding.batch_sharding(mesh),
  )

  def draw_rows(size: int) -> Any:
    """The next `size` prompts, as batches of `refill_size`, joined."""
    parts = [
      {k: v.reshape(-1, *v.shape[2:]) for k, v in next(iterator).items()}
      for _ in range(size // drawn)
    ]
    return join_parts([sharding.shard_local_rows(p, mesh) for p in parts])

  scorer = None
  if teacher is not None:
    scorer = distillation.make_teacher(teacher, grammar, sampler, gradient)
  optimizer = learner.make_optimizer(
    options.optimizer, gradient.epochs * gradient.minibatches
  )
  algorithm = Algorithm(
    options=gradient,
    join=spec.adapters.joiner(),
    draw_rows=draw_rows,
    rollout_step=rollout_step,
    teacher=scorer,
    importance_weights=policy_gradient.make_importance_weights(
      spec.model, grammar, sampler, gradient.importance_cap
    ),
    update=policy_gradient.make_update(
      spec, grammar, sampler, gradient, optimizer, scorer
    ),
  )

  def seeded_step(state: learner.TrainState, frozen: Any, step: int):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return take_step(algorithm, state, frozen, key)

  return loop.fit(
    options.loop,
    spec=spec,
    mesh=mesh,
    workdir=workdir,
    seed=seed,
    optimizer=optimizer,
    take_step=seeded_step,
    iterator=iterator,
    validate=validate,
    selection_metric=options.selection_metric,
    inherited=start,
    desc=desc,
    start_counts=True,
  )
