"""Stage `internalize`: further RL, without reasoning."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config; ends with study `internalize`."""
  return common.compose('internalize', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `internalize`."""
  config = common.on_policy(test, steps=100, learning_rate=5e-5, eval_every=50)
  config.thinking = False
  config.start = 'rl'  # stage of the initial policy: rl opd sft
  config.kl_weight = 0.0  # weight of the divergence from the start; 0: none
  config.kl_kind = 'k3'  # sampled tokens: k1 k2 k3; exact: reverse forward
  return config
