"""Prune: a policy with fewer layers, distilled from the full one.

Validation slates decide which layers are removed (`pruning`); then the smaller
policy learns from the full one by on-policy distillation (Eq. 4).
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gr2_jax.distributed import sharding
from gr2_jax.pipeline import checkpoint
from gr2_jax.policy import policy, ranking
from gr2_jax.prompts import examples
from gr2_jax.stages import rl
from gr2_jax.train import distillation, on_policy, pruning
from gr2_jax.train.policy_gradient import PolicyBatch

# Folders in the workdir, so that a resumed run uses the same layers.
CHOSEN = 'chosen'
CUT = 'cut'  # the pruned parameters, before they are trained


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Removes layers and distills; validation selects the step.

  Returns:
    Those of `rl.train`; `kept`, the layers that stay; and `effects`, a list per
    removed layer: the effect of removing each layer, None if already removed.

  Raises:
    ValueError: a field is invalid.
  """
  stage = config.prune
  on_policy.OnPolicyOptions.from_config(stage, 'prune')
  if not stage.kl_weight:
    raise ValueError(
      'prune.kl_weight=0: must be above 0; the pruned policy recovers only '
      'by learning from the full one'
    )
  full, mesh = policy.load_with_mesh(config, inputs, stage.context)
  params = full.load_params(inputs[stage.start], mesh)
  teacher = distillation.self_teacher(full, mesh, params)
  chosen = _chosen(config, teacher, inputs, workdir)
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
  config: ConfigDict,
  source: distillation.TeacherPolicy,
  inputs: dict[str, pathlib.Path],
  workdir: pathlib.Path,
) -> pruning.Chosen:
  """The layers that stay, selected once and then read from the workdir."""
  stage, full, mesh = config.prune, source.policy.spec, source.policy.mesh
  params, total = source.policy.params, full.model.num_layers
  path = workdir / CHOSEN
  if path.is_dir():
    like = pruning.Chosen(
      jax.ShapeDtypeStruct((stage.layers,), jnp.int32),
      jax.ShapeDtypeStruct((total - stage.layers, total), jnp.float32),
    )
    saved = checkpoint.load_params(path, like._asdict())
    return pruning.Chosen(**jax.tree.map(np.asarray, saved))
  render, sampler, rollout_step = rl.sampling_of('prune', config, full)
  gradient = on_policy.OnPolicyOptions.from_config(stage, 'prune').gradient
  teacher = distillation.make_teacher(source, full.grammar, sampler, gradient)
  measure = pruning.make_measure(full, sampler, gradient, teacher)
  slates = policy.source(inputs, 'validation', stage.context)
  draw = np.random.default_rng(0).permutation(len(slates))
  size = stage.batch_size
  count = max(size, min(len(draw), stage.measured) // size * size)
  drawn = ranking.Chosen(slates, draw[:count])
  batches: list[PolicyBatch] = []  # the full policy's, with its own scores
  with sharding.activate(mesh):
    for i, (_, rows) in enumerate(examples.in_order(drawn, render, size, 0)):
      rows = sharding.shard_batch(rows, mesh)
      batch, _ = rollout_step(params, rows, jax.random.key(i))
      batches.append(teacher.score(batch)[0])
    chosen = pruning.choose(
      full, mesh, params, stage.layers, lambda cut: measure(cut, batches)
    )
  checkpoint.save_params(path, chosen._asdict())
  return chosen
