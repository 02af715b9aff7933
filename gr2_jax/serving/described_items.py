"""Items that the catalog lacks, shown in a prompt by their description.

The trained tokenizer fits the first codes of a semantic ID to the item's text,
as it does where it extends a catalog. The codes behind them are chosen so that
no item of the catalog has the same ID. A description that is equal to that of a
catalog item, word for word, gets the codes of that item.

Each item is read by itself: nothing depends on the other described items.

Axes: M items, I items of the catalog, F fitted levels, L levels, T taken IDs.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import ml_collections
import numpy as np
from jax.sharding import Mesh

from gr2_jax.data import log as log_lib
from gr2_jax.pipeline import artifacts
from gr2_jax.policy import policy
from gr2_jax.prompts import prompt
from gr2_jax.semantic_ids import assignment, ids, text_encoders, tfidf, training
from gr2_jax.semantic_ids import tokenizer as tokenizer_lib

CHUNK = 64  # items that the tokenizer reads at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
  """Reads described items for the prompts of one policy; made by `load`.

  Attributes:
    prompter: shows the items of the catalog.
    title_tokens: the most of a title, and of a category path.
    room: fields of a line -> text tokens of the catalog's longest such line.
    space: of the text vectors.
    tokenizer: trained, with static batches of CHUNK.
    codes: int32 [I, L], semantic IDs of the catalog.
    keys: int64 [T], sorted keys of the IDs that are taken.
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
    """Compiles the tokenizer now rather than with the first item."""
    self.tokenizer.fitted_codes(np.zeros((1, self.space.dim), np.float32))

  def prompts_of(self, items: log_lib.Catalog) -> prompt.Prompter:
    """A prompter that has these items behind those of the catalog.

    A line that is longer than the catalog's longest is cut.
    """
    tokens = prompt.item_tokens(
      self.prompter.vocabulary, items, self.name(items), self.title_tokens
    )
    lines = [
      _cut(dict(zip(tokens, parts, strict=True)), self.room)
      for parts in zip(*tokens.values(), strict=True)
    ]
    return self.prompter.beside(
      {field: tuple(line[field] for line in lines) for field in tokens}
    )

  def name(self, items: log_lib.Catalog) -> np.ndarray:
    """Semantic IDs of items, int32 [M, L]; equal texts have equal IDs."""
    columns = items.titles, items.categories, items.years
    fitted = self.tokenizer.fitted_codes(tfidf.embed(self.space, *columns))
    texts, of_item = tfidf.distinct(*columns)
    first = np.unique(of_item, return_index=True)[1]
    codes = self._complete(fitted[first])
    for row, text in enumerate(texts):
      if text in self.known:
        codes[row] = self.codes[self.known[text]]
    return codes[of_item]

  def _complete(self, fitted_MxF: np.ndarray) -> np.ndarray:
    """Appends free codes to the fitted ones: int32 [M, L]."""
    config = self.tokenizer.config
    prefixes = ids.prefix_keys(fitted_MxF, config.codebook_size)
    # Codes of kind 'uniform' would be drawn for all items together.
    kind = 'unused' if config.last_level == 'uniform' else config.last_level
    codes_MxL = np.zeros((len(fitted_MxF), config.levels), np.int32)
    left = np.arange(len(fitted_MxF))
    while len(left):  # Items of one prefix must not see each other.
      rows = left[np.unique(prefixes[left], return_index=True)[1]]
      codes_MxL[rows] = assignment.complete(
        fitted_MxF[rows],
        np.asarray(self.tokenizer.params['vectors']),
        self.tokenizer.latents,
        levels=config.levels,
        kind=kind,
        seed=config.seed,
        taken=self._taken(prefixes[rows]),
      )[0]
      left = np.setdiff1d(left, rows)
    return codes_MxL

  def _taken(self, prefixes: np.ndarray) -> np.ndarray:
    """Taken IDs, int64 [., L], under those prefixes that are not full."""
    config = self.tokenizer.config
    size, levels = config.codebook_size, np.arange(config.levels)[::-1]
    tail = size ** training.completed_levels(config)
    ends = np.searchsorted(self.keys, np.stack([prefixes, prefixes + 1]) * tail)
    keys = [self.keys[begin:end] for begin, end in ends.T if end - begin < tail]
    return (
      np.concatenate([self.keys[:0], *keys])[:, None] // size**levels % size
    )


def load(
  spec: policy.PolicySpec, mesh: Mesh, home: pathlib.Path, title_tokens: int
) -> tuple[Reader | None, str]:
  """Loads the reader of a policy, from its tokenizer's artifact.

  Returns:
    The reader and '', or None and the reason: the tokenizer's text encoder is a
    language model, or files are missing from its folder.
  """
  try:
    config = ml_collections.ConfigDict(artifacts.read_config(home)['tokenizer'])
    if config.text_encoder != 'tfidf':
      return None, (
        f'{home.name}: tokenizer.text_encoder={config.text_encoder!r} is a '
        "language model; descriptions need 'tfidf'"
      )
    space = tfidf.load(home / text_encoders.SPACE)
    tokenizer = training.load(config, home / training.PARAMS, space.dim, mesh)
  except (KeyError, AttributeError, OSError, ValueError) as e:
    return None, f'{home.name}: no whole tokenizer in it ({e})'
  chunk = -(-CHUNK // mesh.size) * mesh.size
  catalog, known = spec.catalog, {}
  columns = catalog.titles, catalog.categories, catalog.years.tolist()
  for item, text in enumerate(zip(*columns, strict=True)):
    known.setdefault(text, item)
  sids = ids.load(home)
  return Reader(
    spec.prompter,
    title_tokens,
    _room(spec.prompter),
    space,
    dataclasses.replace(tokenizer, chunk=chunk),
    sids.codes,
    np.unique(ids.prefix_keys(sids.taken, sids.codebook_size)),
    known,
  ), ''


def _room(prompter: prompt.Prompter) -> dict[tuple[str, ...], int]:
  """Text tokens of the catalog's longest line, by the fields it shows."""
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
  """Cuts the texts of a line that is too long, the last text first."""
  line = dict(line)
  for fields, longest in room.items():
    excess = sum(len(line[field]) for field in fields) - longest
    for field in reversed([field for field in fields if field != 'sid']):
      kept = max(0, len(line[field]) - max(0, excess))
      excess -= len(line[field]) - kept
      line[field] = line[field][:kept]
  return line
