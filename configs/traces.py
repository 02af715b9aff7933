"""Stage `traces`: what a teacher says about the training slates."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `traces` as the target."""
  return common.compose('traces', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `traces`."""
  del test
  config = ConfigDict()
  config.kind = 'rejection'  # rejection (Eq. 2) or targeted (Eq. 1)
  config.tries = 8  # answers per slate before it is dropped
  config.believes = (  # evidence columns that the heuristic teacher reads
    'co_short',
    'directed',
    'genre',
    'text_mean',
    'popularity',
  )
  config.noise = 1.0  # standard deviation of its error, in column units
  return config
