"""Stage `evaluate`: the results table on the test split."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `evaluate` as the target."""
  return common.compose('evaluate', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `evaluate`."""
  config = ConfigDict()
  config.batch_size = 64 if test else 256  # slates at a time
  config.thinking = True  # reason before the ranking
  config.resamples = 200 if test else 2000  # bootstrap samples
  config.presentation_seed = 1  # seed of the candidates' order in prompts
  return config
