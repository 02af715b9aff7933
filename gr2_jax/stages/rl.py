"""RL: a group of answers to every slate, rewards, and a policy gradient.

With `kl_weight` the policy is held to its start.
"""

import pathlib
from typing import Any

from gr2_jax.distributed import sharding
from gr2_jax.policy import policy
from gr2_jax.train import distillation, on_policy


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains from the parameters of the stage before; validation chooses.

  Args:
    config: sections prompt, model, mesh, rl; seed.
    inputs: slates, tokenizer, backbone, and the stage that `rl.start` names.
    workdir: of this stage.

  Returns:
    The chosen step, its validation numbers, and why training stopped.
  """
  return train('rl', config, inputs, workdir)


def train(
  name: str, config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """`run`, by the section of that name."""
  stage = config[name]
  spec = policy.load(config, inputs, stage.context)
  mesh = sharding.make_mesh(**config.mesh)
  reference = None
  if stage.kl_weight:
    start = spec.load_params(stage.init_from or inputs[stage.start], mesh)
    reference = distillation.itself(spec, mesh, start)
  return on_policy.train(name, config, inputs, workdir, spec, mesh, reference)
