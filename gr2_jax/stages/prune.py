"""Prune: a policy with fewer layers, distilled from the full one.

Validation slates decide which layers are removed (`pruning`); then the smaller
policy learns from the full one by on-policy distillation (Eq. 4).
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gr2_jax.distributed import sharding
from gr2_jax.pipeline import checkpoint
from gr2_jax.policy import policy, ranking
from gr2_jax.prompts import examples
from gr2_jax.stages import rl
from gr2_jax.train import distillation, on_policy, pruning, rollouts
from gr2_jax.train.policy_gradient import PolicyBatch, Teacher

# Kept in the workdir, so that a run that continues is the same run.
CHOSEN = 'chosen'
CUT = 'cut'


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Removes layers and distills; validation chooses the step.

  Args:
    config: sections prompt, model, mesh, prune; seed.
    inputs: slates, tokenizer, backbone, and the stage that `prune.start` names.
    workdir: of this stage.

  Returns:
    The best step, its validation metrics, and why training stopped; `kept`, the
    layers; and `effects`, one list a removed layer: the effect of removing each
    layer, None of one that was removed before.

  Raises:
    ValueError: a number of layers, or another field, has no meaning.
  """
  stage = config.prune
  on_policy.OnPolicyOptions.from_config(stage, 'prune')
  if not stage.kl_weight:
    raise ValueError(
      'prune.kl_weight=0: must be above 0; without its teacher the pruned '
      'policy recovers nothing'
    )
  full = policy.load(config, inputs, stage.context)
  mesh = sharding.make_mesh(**config.mesh)
  params = full.load_params(inputs[stage.start], mesh)
  teacher = distillation.self_teacher(full, mesh, params)
  chosen = _chosen(config, full, mesh, teacher, inputs, workdir)
  if not (workdir / CUT).is_dir():
    checkpoint.save_params(
      workdir / CUT, pruning.take(full, mesh, params, chosen.kept)
    )
  results = rl.train(
    'prune',
    config,
    inputs | {stage.start: workdir / CUT},
    workdir,
    pruning.shallower(full, stage.layers),
    mesh,
    teacher,
  )
  effects = [
    [None if np.isnan(x) else float(x) for x in row] for row in chosen.effects
  ]
  return results | {'kept': chosen.kept.tolist(), 'effects': effects}


def _chosen(
  config,
  full: policy.PolicySpec,
  mesh: Mesh,
  source: distillation.TeacherPolicy,
  inputs: dict[str, pathlib.Path],
  workdir: pathlib.Path,
) -> pruning.Chosen:
  """The layers that stay; decided once."""
  stage, total = config.prune, full.model.num_layers
  home = workdir / CHOSEN
  if home.is_dir():
    like = pruning.Chosen(
      jax.ShapeDtypeStruct((stage.layers,), jnp.int32),
      jax.ShapeDtypeStruct((total - stage.layers, total), jnp.float32),
    )
    saved = checkpoint.load_params(home, like._asdict())
    return pruning.Chosen(**jax.tree.map(np.asarray, saved))
  sampler = full.sampling(
    stage.group_size, stage.thinking, stage.temperature, stage.constrained
  )
  gradient = on_policy.OnPolicyOptions.from_config(stage, 'prune').gradient
  teacher = distillation.make_teacher(source, full.grammar, sampler, gradient)
  rollout_step = rollouts.make_rollout_step(
    full,
    sampler,
    rollouts.RewardOptions.from_config(stage, 'prune'),
    gradient.advantage,
  )
  measure = pruning.make_measure(full, sampler, gradient, teacher)
  with sharding.activate(mesh):
    batches = _rollouts(config, source.policy, inputs, rollout_step, teacher)
    chosen = pruning.choose(
      full,
      mesh,
      source.policy.params,
      stage.layers,
      lambda pruned: measure(pruned, batches),
    )
  checkpoint.save_params(home, chosen._asdict())
  return chosen


def _rollouts(
  config,
  full: policy.Policy,
  inputs: dict[str, pathlib.Path],
  rollout_step: on_policy.RolloutStep,
  teacher: Teacher,
) -> list[PolicyBatch]:
  """Rollouts of the full policy on validation slates, with its own scores."""
  stage = config.prune
  render = examples.generation_rows(
    full.spec.prompter,
    '<think>' if stage.thinking else '<answer>',
    config.prompt.order,
  )
  source = policy.source(inputs, 'validation', stage.context)
  drawn = np.random.default_rng(0).permutation(len(source))
  size = stage.batch_size
  most = max(size, min(len(drawn), stage.measured) // size * size)
  chosen = ranking.Chosen(source, drawn[:most])
  batches = []
  for i, (_, rows) in enumerate(examples.in_order(chosen, render, size, 0)):
    rows = sharding.shard_batch(rows, full.mesh)
    batch, _ = rollout_step(full.params, rows, jax.random.key(i))
    batches.append(teacher.score(batch)[0])
  return batches
