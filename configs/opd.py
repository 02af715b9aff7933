"""Stage `opd`: on-policy distillation from a teacher that knows more."""

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
  config.start = 'sft'  # stage whose parameters it starts from: sft midtrain
  config.policy = ''  # artifact of the teacher; empty: the start itself
  # The teacher's: same, privileged, thinking, readout, whole.
  config.view = 'readout'
  config.kl_weight = 1.0  # b of Eq. 4
  config.kl_kind = 'reverse'  # exact: reverse forward; sampled: k1 k2 k3
  config.sharpness = 4.0  # factor on read-out scores that teach
  # Of KL(teacher || policy) between the scores at their slots, for one pass.
  config.readout_weight = 0.0
  return config
