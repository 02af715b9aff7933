"""Study `prune`: how many layers a policy needs.

What `configs/prune.py` ends with.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `study_prune` as the target."""
  return common.compose('study_prune', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `study_prune`."""
  config = ConfigDict()
  config.layers = (2, 1)  # depths that are tried; two thirds and one
  config.test_slates = 64 if test else 2048  # of the test split, a fixed draw
  config.resamples = 200 if test else 2000  # of the bootstrap
  return config
