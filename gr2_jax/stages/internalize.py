"""Internalize: a second RL pass, in which the policy answers at once.

Reasoning helps training, but a served policy need not write it. The pass starts
from the policy that reasons and trains its direct answers.
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from gr2_jax.stages import rl


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains direct answers; a ValueError if the policy is set to reason."""
  if config.internalize.thinking:
    raise ValueError(
      'internalize.thinking=True: this stage trains answers without reasoning; '
      'for another pass with it, run stage rl with rl.init_from'
    )
  return rl.reinforce('internalize', config, inputs, workdir)
