"""RL: a group of answers to every slate, rewards, and a policy gradient.

With `kl_weight` the policy is held to its start.
"""

import pathlib
from typing import Any

from jax.sharding import Mesh

from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.policy import policy, ranking
from gr2_jax.prompts import examples
from gr2_jax.train import distillation, on_policy, rollouts


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains from the parameters of the stage before; validation chooses.

  Args:
    config: sections prompt, model, mesh, rl; seed.
    inputs: slates, tokenizer, backbone, and the stage that `rl.start` names.
    workdir: of this stage.

  Returns:
    The best step, its validation metrics, and why training stopped.
  """
  return reinforce('rl', config, inputs, workdir)


def reinforce(
  name: str, config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """`run`, by the section of that name."""
  stage = config[name]
  spec = policy.load(config, inputs, stage.context)
  mesh = sharding.make_mesh(**config.mesh)
  reference = None
  if stage.kl_weight:
    start = spec.load_params(stage.init_from or inputs[stage.start], mesh)
    reference = distillation.self_teacher(spec, mesh, start)
  return train(name, config, inputs, workdir, spec, mesh, reference)


def train(
  name: str,
  config,
  inputs: dict[str, pathlib.Path],
  workdir: pathlib.Path,
  spec: policy.PolicySpec,
  mesh: Mesh,
  teacher: distillation.TeacherPolicy | None,
) -> dict[str, Any]:
  """Trains a ranker on its own rollouts, for every stage that does.

  Args:
    name: of the stage and its section.
    config: sections prompt, mesh, and that one; seed.
    inputs: slates, and the stage named by the section's `start`.
    workdir: of this stage.
    spec: tokens and shapes.
    mesh: devices of the state.
    teacher: the policy that `kl_weight` holds this one to; None for none.

  Returns:
    The best step, its validation metrics, and why training stopped.

  Raises:
    ValueError: a field of the section has no meaning.
  """
  stage = config[name]
  options = on_policy.OnPolicyOptions.from_config(stage, name)
  reward = rollouts.RewardOptions.from_config(stage, name)
  control = '<think>' if stage.thinking else '<answer>'
  render = examples.generation_rows(spec.prompter, control, config.prompt.order)
  if teacher is not None and teacher.own_prompts:
    render = distillation.render_for_both(
      render, teacher, control, config.prompt.order
    )
  # Sampler and learner share the temperature and the masks.
  sampler = spec.sampling(
    stage.group_size, stage.thinking, stage.temperature, stage.constrained
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
    rollout_step=rollouts.make_rollout_step(
      spec, sampler, reward, options.gradient.advantage
    ),
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
    views=reward.views,
  )
