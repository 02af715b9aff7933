"""Stage `midtrain`: semantic IDs and words, histories, and pointing."""

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
  config.text_file = ''  # general text: one document per line, or .jsonl
  config.rows = 16  # packed rows per update (batch_size counts slates)
  config.row_tokens = 150  # tokens of a packed row
  config.sequence_items = 12  # most items of a history in a document
  config.pointers = 3  # columns to sort by on one slate
  config.context = 'full'  # form of the context, see gr2_jax/prompts/context.py
  # First steps that train only the added embeddings of a pretrained backbone;
  # at most a quarter of all.
  config.warm_rows = 100
  config.eval_batches = 1 if test else 4  # batches per task for held-out losses
  config.retrieval_histories = 64 if test else 256  # held out, fixed sample
  config.beams = 20  # beam width of the search for the next item
  return config


def mixture() -> ConfigDict:
  """Shares of the tasks: pointing's of the batches, others' of packed tokens.

  The others have the proportions 65.7 : 24.3 : 4.9 : 5.0 of GR2 (arXiv
  2606.31984). The share of a missing task is split among all.
  """
  config = ConfigDict()
  config.pointing = 0.7  # candidates sorted by a named evidence column
  config.sequence = 0.197  # semantic IDs in order of engagement
  config.persona = 0.073  # history <-> description of the user
  config.caption = 0.015  # semantic ID <-> title, categories
  config.text = 0.015  # general text, if there is a text_file
  return config
