"""Stage `export`: the trained policy as a Hugging Face checkpoint."""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `export` as the target."""
  return common.compose('export', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `export`."""
  del test  # The cost depends on the size of the model alone.
  config = ConfigDict()
  config.dtype = 'F32'  # of the weights: F32, BF16, F16
  config.max_shard_bytes = 5_000_000_000  # largest file
  config.start = 'rl'  # stage of the policy: rl internalize prune opd sft
  # Reason before the ranking; None: as in the policy's training.
  config.thinking = config_dict.placeholder(bool)
  return config
