"""Items that the catalog lacks, as a prompt shows items: from their text alone.

The fitted codes of an item's semantic ID are what the trained tokenizer gives
for its text, as where it extends a catalog (`stages/tokenizer.py`); the codes
behind them are such as no item of the catalog has with them. An item that is,
word for word, one of the catalog has that one's codes.

Each item is read by itself: nothing depends on what else is described.

Axes: M items, L levels, T tuples taken.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import ml_collections
import numpy as np

from gr2_jax.data import log as log_lib
from gr2_jax.pipeline import artifacts
from gr2_jax.policy import policy
from gr2_jax.prompts import prompt
from gr2_jax.semantic_ids import assignment, ids, text_encoders, tfidf, training
from gr2_jax.semantic_ids import tokenizer as tokenizer_lib

CHUNK = 64  # items that the tokenizer reads at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
  """Reads items for the prompts of one policy; made by `load`.

  Attributes:
    prompter: that shows the catalog.
    title_tokens: of a title, and of a category path, at most.
    room: fields of a line -> text tokens of the longest one of the catalog.
    space: of the text vectors.
    tokenizer: trained, with static batches of CHUNK.
    codes: int32 [I, L] of the catalog.
    keys: int64 [T], sorted, of the tuples taken.
    known: text -> the first item of the catalog that has it.
  """

  prompter: prompt.Prompter
  title_tokens: int
  room: Mapping[tuple[str, ...], int]
  space: tfidf.Space
  tokenizer: tokenizer_lib.SidTokenizer
  codes: np.ndarray
  keys: np.ndarray
  known: Mapping[tfidf.Text, int]

  def compile(self) -> None:
    """Compiles what reads text; without it, the first item that comes does."""
    self.tokenizer.fitted_codes(np.zeros((1, self.space.dim), np.float32))

  def prompts_of(self, items: log_lib.Catalog) -> prompt.Prompter:
    """The prompter that knows items, at indices behind the catalog's.

    A line that is longer than the catalog's longest is cut.
    """
    found = prompt.item_tokens(
      self.prompter.vocabulary, items, self.name(items), self.title_tokens
    )
    lines = [
      _cut(dict(zip(found, parts, strict=True)), self.room)
      for parts in zip(*found.values(), strict=True)
    ]
    return self.prompter.beside(
      {field: tuple(line[field] for line in lines) for field in found}
    )

  def name(self, items: log_lib.Catalog) -> np.ndarray:
    """Semantic IDs of items.

    Returns:
      int32 [M, L]; the same for the same text, whatever else is asked for.
    """
    columns = items.titles, items.categories, items.years
    vectors = tfidf.embed(self.space, *columns)
    fitted = self.tokenizer.fitted_codes(vectors)
    texts, of_item = tfidf.distinct(*columns)
    first = np.unique(of_item, return_index=True)[1]
    codes = self._whole(fitted[first])
    for row, key in enumerate(texts):
      if key in self.known:
        codes[row] = self.codes[self.known[key]]
    return codes[of_item]

  def _whole(self, fitted_MxF: np.ndarray) -> np.ndarray:
    """Fitted codes, and behind them some that are free: int32 [M, L]."""
    config = self.tokenizer.config
    prefixes = ids.prefix_keys(fitted_MxF, config.codebook_size)
    kind = config.last_level  # Codes of 'uniform' are drawn for all at once.
    whole = np.zeros((len(fitted_MxF), config.levels), np.int32)
    left = np.arange(len(fitted_MxF))
    while len(left):  # Those of one prefix must not see each other.
      rows = left[np.unique(prefixes[left], return_index=True)[1]]
      whole[rows] = assignment.complete(
        fitted_MxF[rows],
        np.asarray(self.tokenizer.params['vectors']),
        self.tokenizer.latents,
        levels=config.levels,
        kind='unused' if kind == 'uniform' else kind,
        seed=config.seed,
        taken=self._taken(prefixes[rows]),
      )[0]
      left = np.setdiff1d(left, rows)
    return whole

  def _taken(self, prefixes: np.ndarray) -> np.ndarray:
    """Tuples int64 [., L] that are taken under prefixes which are not full."""
    config = self.tokenizer.config
    size, levels = config.codebook_size, np.arange(config.levels)[::-1]
    tail = size ** training.appended(config)
    ends = np.searchsorted(self.keys, np.stack([prefixes, prefixes + 1]) * tail)
    keys = [self.keys[begin:end] for begin, end in ends.T if end - begin < tail]
    return (
      np.concatenate([self.keys[:0], *keys])[:, None] // size**levels % size
    )


def load(
  setup: policy.Setup, home: pathlib.Path, title_tokens: int
) -> tuple[Reader | None, str]:
  """What reads items outside the catalog of a policy.

  Args:
    setup: the policy's.
    home: artifact of its tokenizer.
    title_tokens: `prompt.title_tokens`.

  Returns:
    The reader, and ''. Or None, and why: the tokenizer's text encoder is a
    language model, or its folder lacks what is needed.
  """
  try:
    config = ml_collections.ConfigDict(artifacts.read_config(home)['tokenizer'])
    if config.text_encoder != 'tfidf':
      return None, (
        f'{home.name}: tokenizer.text_encoder={config.text_encoder!r} is a '
        "language model; only 'tfidf' reads text at once"
      )
    space = tfidf.load(home / text_encoders.SPACE)
    tokenizer = training.load(
      config, home / training.PARAMS, space.dim, setup.mesh
    )
  except (KeyError, AttributeError, OSError, ValueError) as e:
    return None, f'{home.name}: no whole tokenizer in it ({e})'
  parts = setup.mesh.size
  tokenizer = dataclasses.replace(tokenizer, chunk=-(-CHUNK // parts) * parts)
  catalog, known = setup.catalog, {}
  columns = catalog.titles, catalog.categories, catalog.years.tolist()
  for item, key in enumerate(zip(*columns, strict=True)):
    known.setdefault(key, item)
  sids = ids.load(home)
  keys = ids.prefix_keys(sids.taken, sids.codebook_size)
  return Reader(
    setup.prompter,
    title_tokens,
    _room(setup.prompter),
    space,
    tokenizer,
    sids.codes,
    np.unique(keys),
    known,
  ), ''


def _room(prompter: prompt.Prompter) -> dict[tuple[str, ...], int]:
  """Text tokens of the catalog's longest line, of the fields of each block."""
  context = prompter.context
  lines = {
    tuple(field for field in fields if field in prompter.items)
    for fields in (
      prompter.fields,
      prompter.history_fields,
      context.fields('candidates', prompter.fields),
      context.fields('history', prompter.history_fields),
    )
  }
  return {
    fields: max(
      sum(map(len, line))
      for line in zip(*(prompter.items[field] for field in fields), strict=True)
    )
    for fields in lines
    if fields
  }


def _cut(
  line: dict[str, tuple[int, ...]], room: Mapping[tuple[str, ...], int]
) -> dict[str, tuple[int, ...]]:
  """Cuts what is too long, from the end of the line's last text on."""
  line = dict(line)
  for fields, most in room.items():
    over = sum(len(line[field]) for field in fields) - most
    for field in reversed([field for field in fields if field != 'sid']):
      kept = max(0, len(line[field]) - max(0, over))
      over -= len(line[field]) - kept
      line[field] = line[field][:kept]
  return line
