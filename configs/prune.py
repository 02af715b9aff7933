"""Stage `prune`: removes the layers of least effect, then distills."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config; ends with study `prune`."""
  return common.compose('prune', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `prune`."""
  config = common.on_policy(test, steps=300, learning_rate=1e-3, eval_every=100)
  config.thinking = False
  config.group_size = 4
  config.refills = 0  # A group without variance still has a teacher.
  config.start = 'internalize'  # stage to prune: internalize rl opd sft
  config.layers = 2  # layers to keep; two thirds in every preset
  config.measured = 64 if test else 256  # validation slates of the effects
  config.kl_weight = 1.0  # b of Eq. 4
  config.kl_kind = 'forward'  # exact: reverse forward; sampled: k1 k2 k3
  # Weight of KL(teacher || policy) of the read-outs.
  config.readout_weight = 1.0
  return config
