"""Stage `export`: the trained policy as a Hugging Face checkpoint."""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `export` as the target."""
  return common.compose('export', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `export`."""
  del test  # It takes as long as the weights are large.
  config = ConfigDict()
  config.dtype = 'F32'  # of the weights in the files: F32, BF16, F16
  config.max_shard_bytes = 5_000_000_000  # the most that one file holds
  config.start = 'rl'  # whose policy it is: rl internalize prune opd sft
  # Reason before the ranking; None: as the policy was trained to answer.
  config.thinking = config_dict.placeholder(bool)
  return config
