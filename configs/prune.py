"""Stage `prune`: fewer layers, by their effect, and distillation after it."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config; compares depths once the policies are distilled."""
  return common.compose('prune', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `prune`."""
  config = common.on_policy(test, steps=300, learning_rate=1e-3, eval_every=100)
  config.thinking = False
  config.group_size = 4
  config.refills = 0  # A group without variance still has a teacher.
  config.start = 'internalize'  # stage whose layers go: internalize rl opd sft
  config.layers = 2  # that are left; of every preset two thirds
  config.measured = 64 if test else 256  # validation slates that tell effects
  config.kl_weight = 1.0  # b of Eq. 4
  config.kl_kind = 'forward'  # exact: reverse forward; sampled: k1 k2 k3
  # Of KL(teacher || policy) between the scores at their slots, for one pass.
  config.readout_weight = 1.0
  return config
