"""Prune: fewer layers, and what they did taught to those that are left.

Validation slates say which layers go (`pruning`); then the policy that is left
learns by on-policy distillation (Eq. 4) from the whole one.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.distributed import sharding
from gr2_jax.ops import kl
from gr2_jax.pipeline import checkpoint
from gr2_jax.policy import policy, ranking
from gr2_jax.prompts import examples
from gr2_jax.train import (
  distillation,
  on_policy,
  policy_gradient,
  pruning,
  rollouts,
)

# What is kept in the workdir, so that a run that goes on is the same run.
CHOSEN = 'chosen'
CUT = 'cut'


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Leaves layers out, and distils; validation chooses.

  Args:
    config: sections prompt, model, mesh, prune; seed.
    inputs: slates, tokenizer, backbone, and the stage that `prune.start` names.
    workdir: of this stage.

  Returns:
    The chosen step, its validation numbers, and why training stopped; `kept`,
    the layers, and `effects`, one list a layer that went: of every layer what
    its removal would have cost, None of one that was gone already.

  Raises:
    ValueError: a number of layers, or another field, that cannot be.
  """
  stage = config.prune
  on_policy.check('prune', stage)
  if not stage.kl_weight:
    raise ValueError(
      'prune.kl_weight=0: must be above 0; without its teacher the policy that '
      'is left wins nothing back'
    )
  whole = policy.load(config, inputs, stage.context)
  mesh = sharding.make_mesh(**config.mesh)
  params = whole.load_params(inputs[stage.start], mesh)
  teacher = distillation.itself(whole, mesh, params)
  chosen = _chosen(config, whole, mesh, params, teacher, inputs, workdir)
  if not (workdir / CUT).is_dir():
    checkpoint.save_params(
      workdir / CUT, pruning.take(whole, mesh, params, chosen.kept)
    )
  found = on_policy.train(
    'prune',
    config,
    inputs | {stage.start: workdir / CUT},
    workdir,
    pruning.shallower(whole, stage.layers),
    mesh,
    teacher,
  )
  effects = [
    [None if np.isnan(x) else float(x) for x in row] for row in chosen.effects
  ]
  return found | {'kept': chosen.kept.tolist(), 'effects': effects}


def _chosen(
  config,
  whole: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  params: Any,
  teacher: distillation.Teacher,
  inputs: dict[str, pathlib.Path],
  workdir: pathlib.Path,
) -> pruning.Chosen:
  """Which layers stay; decided once."""
  stage, total = config.prune, whole.model.num_layers
  home = workdir / CHOSEN
  if home.is_dir():
    like = pruning.Chosen(
      jax.ShapeDtypeStruct((stage.layers,), jnp.int32),
      jax.ShapeDtypeStruct((total - stage.layers, total), jnp.float32),
    )
    found = checkpoint.load_params(home, like._asdict())
    return pruning.Chosen(**jax.tree.map(np.asarray, found))
  sampler = whole.sampling(
    stage.group_size, stage.thinking, stage.temperature, stage.constrained
  )
  act = rollouts.make_act(whole, sampler, stage)
  look = distillation.make_look(
    teacher,
    whole.grammar,
    sampler,
    stage.kl_kind,
    readout=stage.readout_weight > 0,
  )
  said = teacher.rows if stage.kl_kind in kl.EXACT else ()
  measure = pruning.make_measure(whole, sampler, stage)
  with sharding.activate(mesh):
    looked_at = _rollouts(config, whole, mesh, params, inputs, act, look)
    found = pruning.choose(
      whole,
      mesh,
      params,
      stage.layers,
      lambda fewer: measure(fewer, looked_at, *said),
    )
  checkpoint.save_params(home, found._asdict())
  return found


def _rollouts(
  config, whole: policy.PolicySpec, mesh, params: Any, inputs, act, look
) -> list[policy_gradient.PolicyBatch]:
  """The whole policy's on validation slates, with what it says of them."""
  stage = config.prune
  render = examples.generation_rows(
    whole.prompter,
    '<think>' if stage.thinking else '<answer>',
    config.prompt.order,
  )
  source = policy.source(inputs, 'validation', stage.context)
  drawn = np.random.default_rng(0).permutation(len(source))
  size = stage.batch_size
  most = max(size, min(len(drawn), stage.measured) // size * size)
  chosen = ranking.Chosen(source, drawn[:most])
  found = []
  for i, (_, rows) in enumerate(examples.in_order(chosen, render, size, 0)):
    rows = sharding.shard_batch(rows, mesh)
    batch, _ = act(params, rows, jax.random.key(i))
    found.append(look(batch)[0])
  return found
