"""RL: a group of answers to every slate, rewards, and a policy gradient.

With `kl_weight` the divergence from the starting policy is part of the loss.
"""

import pathlib
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from gr2_jax.policy import policy, sampling
from gr2_jax.prompts import examples
from gr2_jax.stages import sft
from gr2_jax.train import distillation, on_policy, rollouts


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains from the stage `rl.start`; validation selects the step."""
  return reinforce('rl', config, inputs, workdir)


def reinforce(
  name: str,
  config: ConfigDict,
  inputs: dict[str, pathlib.Path],
  workdir: pathlib.Path,
) -> dict[str, Any]:
  """Runs RL by the section `name`."""
  stage = config[name]
  spec, mesh = policy.load_with_mesh(config, inputs, stage.context)
  reference = None
  if stage.kl_weight:
    start = spec.load_params(stage.init_from or inputs[stage.start], mesh)
    reference = distillation.self_teacher(spec, mesh, start)
  return train(name, config, inputs, workdir, spec, mesh, reference)


def train(
  name: str,
  config: ConfigDict,
  inputs: dict[str, pathlib.Path],
  workdir: pathlib.Path,
  spec: policy.PolicySpec,
  mesh: Mesh,
  teacher: distillation.TeacherPolicy | None,
) -> dict[str, Any]:
  """Trains a ranker on its own rollouts, for rl, opd, prune and internalize.

  `kl_weight` holds the policy to the `teacher`, if any. Raises a ValueError if
  a field of the section `name` is invalid.

  Returns:
    The best step, its validation metrics, and why training stopped.
  """
  stage = config[name]
  options = on_policy.OnPolicyOptions.from_config(stage, name)
  render, sampler, rollout_step = sampling_of(name, config, spec)
  if teacher is not None and teacher.own_prompts:
    render = distillation.render_for_both(
      render, teacher, control(stage), config.prompt.order
    )
  return on_policy.learn(
    name,
    options,
    spec=spec,
    mesh=mesh,
    grammar=spec.grammar,
    workdir=workdir,
    seed=config.seed,
    slates=policy.source(inputs, 'train', stage.context),
    render=render,
    sampler=sampler,
    rollout_step=rollout_step,
    validate=sft.validator(name, config, inputs, spec, mesh, stage.context),
    start=inputs[stage.start],
    teacher=teacher,
    views=rollouts.RewardOptions.from_config(stage, name).views,
  )


def sampling_of(
  name: str, config: ConfigDict, spec: policy.PolicySpec
) -> tuple[Callable[..., Any], sampling.SamplingOptions, on_policy.RolloutStep]:
  """How to render prompts, the sampling options, and the rollout step."""
  stage = config[name]
  gradient = on_policy.OnPolicyOptions.from_config(stage, name).gradient
  reward = rollouts.RewardOptions.from_config(stage, name)
  sampler = spec.sampling(
    stage.group_size, stage.thinking, stage.temperature, stage.constrained
  )
  return (
    examples.generation_rows(
      spec.prompter, control(stage), config.prompt.order
    ),
    sampler,
    rollouts.make_rollout_step(spec, sampler, reward, gradient.advantage),
  )


def control(stage: ConfigDict) -> str:
  """The last token of a prompt, which requests reasoning or an answer."""
  return '<think>' if stage.thinking else '<answer>'
