"""Stage `rl`: DAPO on verifiable ranking rewards, the main job."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config; ends with stage `evaluate`."""
  return common.compose('rl', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `rl`."""
  config = common.on_policy(test, steps=100, learning_rate=5e-5, eval_every=50)
  config.start = 'sft'  # stage of the initial policy: sft opd midtrain
  config.kl_weight = 0.0  # weight of the divergence from the start; 0: none
  config.kl_kind = 'k3'  # sampled tokens: k1 k2 k3; exact: reverse forward
  return config
