"""On-policy distillation (Eq. 4): the student samples, a teacher scores.

The loss is RL's surrogate, on the same rewards, plus the divergence of the
student from its teacher at every token that the student wrote. The teacher is
another artifact's policy (`opd.policy`), or the student's own start, whose
prompt shows more (`opd.view`).
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from gr2_jax.ops import kl
from gr2_jax.policy import policy
from gr2_jax.stages import rl
from gr2_jax.train import distillation


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains from the stage `opd.start`; validation selects the step.

  Raises:
    ValueError: a field is invalid.
    ArtifactError: the teacher's artifact cannot be used.
  """
  stage = config.opd
  check(stage)
  spec, mesh = policy.load_with_mesh(config, inputs, stage.context)
  if stage.policy:
    teacher = distillation.restore(
      stage.policy, spec, inputs, config.mesh, stage.view, stage.sharpness
    )
  else:
    start = spec.load_params(stage.init_from or inputs[stage.start], mesh)
    teacher = distillation.self_teacher(
      spec, mesh, start, stage.view, stage.sharpness
    )
  return rl.train('opd', config, inputs, workdir, spec, mesh, teacher)


def check(stage: ConfigDict) -> None:
  """Raises a ValueError that names an invalid field of `opd`."""
  if stage.view not in distillation.VIEWS:
    raise ValueError(
      f'opd.view={stage.view!r}: must be one of {", ".join(distillation.VIEWS)}'
    )
  if stage.view == 'same' and not stage.policy:
    raise ValueError(
      "opd.view='same' without a policy teaches nothing: name the folder of a "
      'finished artifact as opd.policy, or another view'
    )
  if stage.view == 'whole' and stage.context == 'full':
    raise ValueError(
      "opd.view='whole' is for a student that reads less: name a form of the "
      'context as opd.context, such as memory:16'
    )
  if stage.view == 'thinking' and stage.thinking:
    raise ValueError(
      "opd.view='thinking' is for a student that answers at once: set "
      'opd.thinking=False'
    )
  if stage.view == 'readout' and stage.kl_kind not in kl.EXACT:
    raise ValueError(
      f'opd.kl_kind={stage.kl_kind!r}: the view readout compares all '
      f'candidates at once; it must be one of {", ".join(kl.EXACT)}'
    )
  if stage.kl_weight <= 0:
    raise ValueError(
      f'opd.kl_weight={stage.kl_weight}: must be above 0; without a teacher '
      'the stage is rl'
    )
