"""Stage `opd`: on-policy distillation."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `opd` as the target."""
  return common.compose('opd', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `opd`."""
  config = common.on_policy(test, steps=300, learning_rate=1e-3, eval_every=100)
  config.group_size = 4
  config.refills = 0  # A group without variance still has a teacher.
  config.start = 'sft'  # stage of the initial policy: sft midtrain
  config.policy = ''  # artifact of the teacher; '': the initial policy itself
  # What the teacher sees: same, privileged, thinking, readout, whole.
  config.view = 'readout'
  config.kl_weight = 1.0  # b of Eq. 4
  config.kl_kind = 'reverse'  # exact: reverse forward; sampled: k1 k2 k3
  config.sharpness = 4.0  # factor on the teacher's read-out scores
  # Weight of KL(teacher || policy) of the read-outs.
  config.readout_weight = 0.0
  return config
