"""Stage `rl`: DAPO on verifiable ranking rewards. The main job."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config; evaluates once the policy is trained."""
  return common.compose('rl', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `rl`."""
  config = common.on_policy(test, steps=100, learning_rate=5e-5, eval_every=50)
  config.start = (
    'sft'  # stage whose parameters it starts from: sft opd midtrain
  )
  config.kl_weight = 0.0  # of a divergence from the start, 0: none
  config.kl_kind = 'k3'  # on sampled tokens: k1 k2 k3; exact: reverse forward
  return config
