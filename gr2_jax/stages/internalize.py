"""Internalize: a second RL pass, in which the policy answers at once.

Reasoning helps training, but a served policy need not write it. The pass starts
from the policy that reasons and trains its direct answers.
"""

import pathlib
from typing import Any

from gr2_jax.stages import rl


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains from the parameters of the policy that reasons; validation chooses.

  Args:
    config: sections prompt, model, mesh, internalize; seed.
    inputs: slates, tokenizer, backbone, and the stage that
      `internalize.start` names.
    workdir: of this stage.

  Returns:
    The best step, its validation metrics, and why training stopped.

  Raises:
    ValueError: the policy would reason.
  """
  if config.internalize.thinking:
    raise ValueError(
      'internalize.thinking=True: the reasoning is what goes; a second pass '
      'with it is stage rl with rl.init_from'
    )
  return rl.reinforce('internalize', config, inputs, workdir)
