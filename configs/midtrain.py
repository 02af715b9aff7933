"""Stage `midtrain`: the catalog in words, its users in IDs, and pointing."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `midtrain` as the target."""
  return common.compose('midtrain', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `midtrain`."""
  config = common.training(
    steps=10 if test else 150,
    batch_size=16 if test else 32,
    learning_rate=2e-3,
    eval_every=5 if test else 75,
  )
  config.mixture = mixture()
  config.sequence_items = 12  # items of a history in one row
  config.caption_tokens = 64  # tokens of a row of captions
  config.pointers = 3  # columns asked for on one slate
  config.eval_batches = 1 if test else 4  # per task, for held-out losses
  return config


def mixture() -> ConfigDict:
  """Shares of the batches."""
  config = ConfigDict()
  config.pointing = 0.4  # candidates sorted by a named evidence column
  config.sequence = 0.4  # semantic IDs in the order of engagement
  config.caption = 0.2  # semantic ID <-> title
  return config
