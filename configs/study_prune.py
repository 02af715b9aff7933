"""Study `prune`: how many layers a policy needs.

`configs/prune.py` ends with it.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `study_prune` as the target."""
  return common.compose('study_prune', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `study_prune`."""
  config = ConfigDict()
  config.layers = (2, 1)  # depths to compare; two thirds and one third
  config.test_slates = 64 if test else 2048  # test slates, fixed sample
  config.resamples = 200 if test else 2000  # bootstrap samples
  return config
