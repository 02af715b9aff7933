"""What evidence reads of an item's text: title, categories, year.

Fitted on a catalog. Items from outside it are put beside it with the same
weights, as items that one more row of the catalog would be: a category that
the catalog lacks matches nothing and weighs as the rarest do.

Axes: I items of the catalog, M items beside it, C categories, W words that some
items have, n slates, R history items read, K candidates.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping

import numpy as np
from scipy import sparse

from gr2_jax.data import log as log_lib
from gr2_jax.data import preranker

NEAREST = 100  # titles that count as like another
ROWS = 2048
TEXT_BUCKETS = 1 << 18
COMMON = 0.1  # Words in more than this share of the titles say nothing.


@dataclasses.dataclass(frozen=True)
class Rows:
  """Of some items, int or float arrays whose first axis is the items'.

  Attributes:
    words: int64 [W], hashes of words and word pairs, sorted.
    titles: float32 csr [., W], their TF-IDF, unit rows.
    genres: float32 [., C + 1], unit rows, rare categories weighing more; the
      last column is of items without any.
    leaf: int [.], id of the last category.
    years: float32 [.], 0 where unknown.
  """

  words: np.ndarray
  titles: sparse.csr_array
  genres: np.ndarray
  leaf: np.ndarray
  years: np.ndarray


@dataclasses.dataclass(frozen=True)
class Content:
  """Of a catalog, and of items beside it, whose indices are I, I + 1, ..

  Attributes:
    rows: of the catalog.
    neighbours: float32 csr [I, I], title cosine, nearest 100 of each row.
    least: float32 [I], the smallest cosine kept of a full row, else 0.
    idf: float64 [W] of the catalog's words.
    categories: name -> column of `genres`.
    weights: float32 [C + 1] of these columns.
    leaves: last category -> its id.
    more: of the items beside it; None for none.
  """

  rows: Rows
  neighbours: sparse.csr_array
  least: np.ndarray
  idf: np.ndarray
  categories: Mapping[str, int]
  weights: np.ndarray
  leaves: Mapping[str, int]
  more: Rows | None = None

  def __len__(self) -> int:
    """Items of the catalog, I."""
    return len(self.rows.leaf)

  def beside(self, items: log_lib.Catalog) -> Content:
    """The same, that knows items [M] which the catalog lacks."""
    leaves = dict(self.leaves)
    counts, words = _counts(items)
    place, known = _find(self.rows.words, words)
    idf = np.where(known, self.idf[place], np.log(1 + len(self)))
    return dataclasses.replace(
      self,
      more=Rows(
        words,
        _weigh(counts, idf),
        _weigh_categories(items, self.categories, self.weights),
        _leaf(items, leaves),
        items.years.astype(np.float32),
      ),
    )

  def genres(self, items: np.ndarray) -> np.ndarray:
    """float32 [..., C + 1] of items int [...]."""
    return self._pick(self.rows.genres, self.more and self.more.genres, items)

  def leaf(self, items: np.ndarray) -> np.ndarray:
    """Ids of the last categories of items, both int [...]."""
    return self._pick(self.rows.leaf, self.more and self.more.leaf, items)

  def years(self, items: np.ndarray) -> np.ndarray:
    """float32 [...] of items int [...]."""
    return self._pick(self.rows.years, self.more and self.more.years, items)

  def cosine(self, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Cosine of titles; of a candidate that is not among the nearest 100, 0.

    An item of the history that is not in the catalog has no list of nearest
    ones, and the cosine is whatever it is.

    Args:
      history: int [n, R], -1 pads.
      candidates: int [n, K], -1 pads.

    Returns:
      float32 [n, R, K], 0 at pads.
    """
    size = len(self)
    found = lookup(
      self.neighbours,
      np.where(history < size, history, -1),
      np.where(candidates < size, candidates, -1),
    )
    if self.more is None:
      return found
    row = np.broadcast_to(history[:, :, None], found.shape)
    column = np.broadcast_to(candidates[:, None, :], found.shape)
    beside = (np.maximum(row, column) >= size) & (np.minimum(row, column) >= 0)
    row, column = row[beside], column[beside]
    items, place = np.unique(np.stack([row, column]), return_inverse=True)
    row_place, column_place = place.reshape(2, -1)
    known = self.rows.titles[items[items < size]]
    column_of, both = _find(self.more.words, self.rows.words[known.indices])
    known = sparse.csr_array(
      (np.where(both, known.data, 0), column_of, known.indptr),
      shape=(known.shape[0], len(self.more.words)),
    )
    titles = sparse.vstack(
      [known, self.more.titles[items[items >= size] - size]], 'csr'
    )
    new = np.cumsum(items >= size) - 1
    dense = (titles[items >= size] @ titles.T).toarray()
    value = np.where(
      column >= size,
      dense[new[column_place], row_place],
      dense[new[row_place], column_place],
    )
    least = np.where(row < size, self.least[np.minimum(row, size - 1)], 0)
    found[beside] = np.where(value >= least, value, 0)
    return found

  def _pick(self, own, more, items: np.ndarray) -> np.ndarray:
    """Rows of the catalog's items, and of those beside it."""
    if more is None:
      return own[items]
    found = own[np.minimum(items, len(own) - 1)]
    beside = items >= len(own)
    found[beside] = more[items[beside] - len(own)]
    return found


def fit(catalog: log_lib.Catalog) -> Content:
  """Weighs words and categories by how rare they are in the catalog."""
  n = len(catalog)
  counts, words = _counts(catalog)
  frequency = np.bincount(counts.indices, minlength=len(words))
  idf = np.log((1 + n) / (1 + frequency))
  idf[frequency > max(COMMON * n, 5)] = 0.0
  titles = _weigh(counts, idf)
  parts = []
  for low in range(0, n, ROWS):
    block = sparse.csr_array(titles[low : low + ROWS] @ titles.T)
    parts.append(preranker.prune(block, NEAREST))
  neighbours = sparse.csr_array(sparse.vstack(parts))
  least = np.zeros(n, np.float32)
  full = np.flatnonzero(np.diff(neighbours.indptr) == NEAREST)
  kept = neighbours.indptr[full][:, None] + np.arange(NEAREST)
  least[full] = neighbours.data[kept].min(axis=1)

  names = sorted({name for path in catalog.categories for name in path})
  categories = {name: column for column, name in enumerate(names)}
  frequency = _incidence(catalog, categories)[0].sum(axis=0)
  weights = np.log(1 + n / np.maximum(frequency, 1))
  leaves = {name: i for i, name in enumerate(sorted(set(_last(catalog))))}
  rows = Rows(
    words,
    titles,
    _weigh_categories(catalog, categories, weights),
    _leaf(catalog, leaves),
    catalog.years.astype(np.float32),
  )
  return Content(rows, neighbours, least, idf, categories, weights, leaves)


def lookup(
  matrix: sparse.csr_array, history: np.ndarray, candidates: np.ndarray
) -> np.ndarray:
  """Entries of a matrix at every pair.

  Args:
    matrix: float32 [I, I].
    history: int [n, R], -1 pads.
    candidates: int [n, K], -1 pads.

  Returns:
    float32 [n, R, K], 0 at pads.
  """
  shape = (*history.shape, candidates.shape[1])
  row = np.broadcast_to(history[:, :, None], shape)
  column = np.broadcast_to(candidates[:, None, :], shape)
  real = (row >= 0) & (column >= 0)
  out = np.zeros(shape, np.float32)
  out[real] = np.asarray(matrix[row[real], column[real]]).ravel()
  return out


def _counts(catalog: log_lib.Catalog) -> tuple[sparse.csr_array, np.ndarray]:
  """Words and word pairs of titles, float32 [., W], and their hashes [W]."""
  row, column = [], [0]  # So that there is a word.
  for index, title in enumerate(catalog.titles):
    words = re.findall(r'[a-z0-9]+', title.lower())
    grams = set(words) | {
      f'{a} {b}' for a, b in zip(words[:-1], words[1:], strict=True)
    }
    row += [index] * len(grams)
    column += [zlib.crc32(gram.encode()) % TEXT_BUCKETS for gram in grams]
  words, column = np.unique(column, return_inverse=True)
  counts = sparse.csr_array(
    (np.ones(len(row), np.float32), (row, column[1:])),
    shape=(len(catalog), len(words)),
  )
  return counts, words


def _find(
  words: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Where among sorted words each of some is, and whether it is there."""
  place = np.minimum(np.searchsorted(words, wanted), len(words) - 1)
  return place, words[place] == wanted


def _weigh(counts: sparse.csr_array, idf: np.ndarray) -> sparse.csr_array:
  """Unit rows of the words' counts times their idf, float32 [., W]."""
  matrix = sparse.csr_array(counts @ sparse.diags_array(idf))
  norm = np.sqrt(matrix.multiply(matrix).sum(axis=1))
  scale = sparse.diags_array(1 / np.maximum(norm, 1e-6))
  return sparse.csr_array(scale @ matrix).astype(np.float32)


def _incidence(
  catalog: log_lib.Catalog, categories: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Which categories items have: float32 [., C + 1], and how many others."""
  matrix = np.zeros((len(catalog), len(categories) + 1), np.float32)
  strange = np.zeros((len(catalog), 1), np.float32)
  for item, path in enumerate(catalog.categories):
    known = [categories[name] for name in path if name in categories]
    matrix[item, known] = 1.0
    matrix[item, -1] = not path
    strange[item] = len(set(path) - categories.keys())
  return matrix, strange


def _weigh_categories(
  catalog: log_lib.Catalog, categories: Mapping[str, int], weights: np.ndarray
) -> np.ndarray:
  """`Rows.genres`; a strange category weighs as that of a single item."""
  matrix, strange = _incidence(catalog, categories)
  matrix *= weights
  apart = np.sqrt(strange) * weights.max()
  norm = np.hypot(np.linalg.norm(matrix, axis=1, keepdims=True), apart)
  return matrix / np.maximum(norm, 1e-6)


def _last(catalog: log_lib.Catalog) -> list[str]:
  return [''.join(path[-1:]) for path in catalog.categories]


def _leaf(catalog: log_lib.Catalog, leaves: dict[str, int]) -> np.ndarray:
  """Ids of last categories, int [.]; new ones are added to the ids."""
  return np.array(
    [leaves.setdefault(name, len(leaves)) for name in _last(catalog)], int
  )
