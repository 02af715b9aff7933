"""Stage `midtrain`: the catalog in words, its users in IDs, and pointing."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `midtrain` as the target."""
  return common.compose('midtrain', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `midtrain`."""
  config = common.training(
    steps=10 if test else 1500,
    batch_size=16 if test else 8,
    learning_rate=2e-3,
    eval_every=5 if test else 500,
  )
  config.mixture = mixture()
  config.text_file = ''  # general text, a document a line, or .jsonl of `text`
  config.rows = 16  # packed rows an update; batch_size is of slates
  config.row_tokens = 150  # of a row that documents are packed into
  config.sequence_items = 12  # last items of a history in a document, at most
  config.pointers = 3  # columns asked for on one slate
  config.context = 'full'  # of those prompts: see gr2_jax/prompts/context.py
  config.warm_rows = 100  # first steps in which added rows alone train, a
  # quarter at most; where the backbone is pretrained
  config.eval_batches = 1 if test else 4  # per task, for held-out losses
  config.retrieval_histories = 64 if test else 256  # held out; a fixed draw
  config.beams = 20  # of the search for the next item
  return config


def mixture() -> ConfigDict:
  """Shares: pointing's of the batches, the others' of the packed tokens.

  The others stand in the proportions 65.7 : 24.3 : 4.9 : 5.0 of GR2 (arXiv
  2606.31984). Where one is left out, its share goes to all.
  """
  config = ConfigDict()
  config.pointing = 0.7  # candidates sorted by a named evidence column
  config.sequence = 0.197  # semantic IDs in the order of engagement
  config.persona = 0.073  # a history <-> its user in words
  config.caption = 0.015  # semantic ID <-> title, categories
  config.text = 0.015  # general text; left out where there is no text_file
  return config
