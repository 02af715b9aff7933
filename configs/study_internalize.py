"""Study `internalize`: with reasoning, without it, and after internalizing it.

`configs/internalize.py` ends with it.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `study_internalize` as the target."""
  return common.compose('study_internalize', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `study_internalize`."""
  config = ConfigDict()
  config.test_slates = 64 if test else 2048  # test slates, fixed sample
  config.resamples = 200 if test else 2000  # bootstrap samples
  return config
