"""Stage `rerank`: ranks a JSONL file of slates."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `rerank` as the target."""
  return common.compose('rerank', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `rerank`."""
  config = ConfigDict()
  config.input = ''  # JSONL of slates; '': the test slates
  config.batch_size = 64 if test else 256  # slates at a time
  config.chunk = 256 if test else 2048  # slates between two writes
  config.start = 'rl'  # stage of the policy: rl internalize prune opd sft
  config.thinking = True  # reason before the ranking
  config.presentation_seed = 0  # seed of the candidates' order in prompts
  return config
