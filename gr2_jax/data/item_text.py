"""Title, category and year features of items, for the evidence.

The features are fitted on a catalog. Items outside it get features with the
catalog's weights, as if they were rows of the catalog: a category that the
catalog lacks matches nothing and weighs as much as the rarest.

Axes: I catalog items, M described items (outside the catalog), C categories,
W words, n slates, R history items, K candidates.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from scipy import sparse

from gr2_jax.data import hashed_text, preranker
from gr2_jax.data import log as log_lib

NEAREST = 100  # neighbors kept per title
ROWS = 2048  # titles compared at a time
TEXT_BUCKETS = 1 << 18
COMMON = 0.1  # words in more than this share of the titles get no weight


@dataclasses.dataclass(frozen=True)
class Rows:
  """Features of some items.

  Attributes:
    words: int64 [W], sorted hashes of words and word pairs.
    titles: float32 csr [., W], their TF-IDF, unit rows.
    genres: float32 [., C + 1], unit rows in which rare categories weigh more;
      the last column marks items without a category.
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
  """Features of a catalog, and of described items with indices I, I + 1, ...

  Attributes:
    rows: of the catalog.
    neighbors: float32 csr [I, I], title cosines of each row's nearest 100.
    least: float32 [I], the smallest cosine of a row with 100 neighbors, else 0.
    idf: float64 [W] of the catalog's words.
    categories: name -> column of `genres`.
    weights: float32 [C + 1] of these columns.
    leaves: last category -> its id.
    more: of the described items; None for none.
  """

  rows: Rows
  neighbors: sparse.csr_array
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
    """These features and those of described items [M]."""
    leaves = dict(self.leaves)
    counts, words = _counts(items)
    place, known = _find(words, self.rows.words)
    idf = np.where(known, self.idf[place], np.log(1 + len(self)))
    return dataclasses.replace(
      self,
      more=Rows(
        words,
        hashed_text.weigh(counts, idf),
        _weigh_categories(items, self.categories, self.weights),
        _leaf(items, leaves),
        items.years.astype(np.float32),
      ),
    )

  def genres(self, items: np.ndarray) -> np.ndarray:
    """Category rows of items: float32 [..., C + 1]."""
    return self._pick(self.rows.genres, self.more and self.more.genres, items)

  def leaf(self, items: np.ndarray) -> np.ndarray:
    """Ids of the last categories of items: int [...]."""
    return self._pick(self.rows.leaf, self.more and self.more.leaf, items)

  def years(self, items: np.ndarray) -> np.ndarray:
    """Years of items: float32 [...]."""
    return self._pick(self.rows.years, self.more and self.more.years, items)

  def cosine(self, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Cosine of titles, 0 where a candidate is not among the nearest 100.

    A described item has no list of neighbors, so its row keeps every cosine.

    Args:
      history: int [n, R], -1 pads.
      candidates: int [n, K], -1 pads.

    Returns:
      float32 [n, R, K], 0 at pads.
    """
    size = len(self)
    cosine = lookup(
      self.neighbors,
      np.where(history < size, history, -1),
      np.where(candidates < size, candidates, -1),
    )
    if self.more is None:
      return cosine
    row = np.broadcast_to(history[:, :, None], cosine.shape)
    column = np.broadcast_to(candidates[:, None, :], cosine.shape)
    outside = (np.maximum(row, column) >= size) & (np.minimum(row, column) >= 0)
    row, column = row[outside], column[outside]
    items, place = np.unique(np.stack([row, column]), return_inverse=True)
    row_place, column_place = place.reshape(2, -1)
    known = self.rows.titles[items[items < size]]
    column_of, both = _find(self.rows.words[known.indices], self.more.words)
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
    cosine[outside] = np.where(value >= least, value, 0)
    return cosine

  def _pick(
    self, catalog: np.ndarray, described: np.ndarray | None, items: np.ndarray
  ) -> np.ndarray:
    """Rows of catalog items and of described items."""
    if described is None:
      return catalog[items]
    rows = catalog[np.minimum(items, len(catalog) - 1)]
    outside = items >= len(catalog)
    rows[outside] = described[items[outside] - len(catalog)]
    return rows


def fit(catalog: log_lib.Catalog) -> Content:
  """Features of a catalog, with words and categories weighted by rarity."""
  n = len(catalog)
  counts, words = _counts(catalog)
  frequency = np.bincount(counts.indices, minlength=len(words))
  idf = np.log((1 + n) / (1 + frequency))
  idf[frequency > max(COMMON * n, 5)] = 0.0
  titles = hashed_text.weigh(counts, idf)
  parts = []
  for low in range(0, n, ROWS):
    block = sparse.csr_array(titles[low : low + ROWS] @ titles.T)
    parts.append(preranker.prune(block, NEAREST))
  neighbors = sparse.csr_array(sparse.vstack(parts))
  least = np.zeros(n, np.float32)
  full = np.flatnonzero(np.diff(neighbors.indptr) == NEAREST)
  kept = neighbors.indptr[full][:, None] + np.arange(NEAREST)
  least[full] = neighbors.data[kept].min(axis=1)

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
  return Content(rows, neighbors, least, idf, categories, weights, leaves)


def lookup(
  matrix: sparse.csr_array, history: np.ndarray, candidates: np.ndarray
) -> np.ndarray:
  """Entries of a matrix [I, I] at every pair of items.

  Args:
    matrix: float32.
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
  """Which words and word pairs titles have, float32 [., W]; hashes [W]."""

  def columns(title: str) -> list[int]:
    words = re.findall(r'[a-z0-9]+', title.lower())
    pairs = {f'{a} {b}' for a, b in zip(words, words[1:], strict=False)}
    return [hashed_text.bucket(x, TEXT_BUCKETS) for x in pairs.union(words)]

  counts = hashed_text.count(map(columns, catalog.titles), TEXT_BUCKETS)
  words = np.union1d(counts.indices, [0])  # So that there is a word.
  return counts[:, words], words


def _find(
  words: np.ndarray, sorted_words: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Place of each word among sorted ones, and whether it is there."""
  place = np.searchsorted(sorted_words, words)
  place = np.minimum(place, len(sorted_words) - 1)
  return place, sorted_words[place] == words


def _incidence(
  catalog: log_lib.Catalog, categories: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
  """0/1 for each known category, and the number of unknown ones.

  Returns float32 [., C + 1], whose last column is 1 for items without any
  category, and float32 [., 1].
  """
  matrix = np.zeros((len(catalog), len(categories) + 1), np.float32)
  unknown = np.zeros((len(catalog), 1), np.float32)
  for item, path in enumerate(catalog.categories):
    known = [categories[name] for name in path if name in categories]
    matrix[item, known] = 1.0
    matrix[item, -1] = not path
    unknown[item] = len(set(path) - categories.keys())
  return matrix, unknown


def _weigh_categories(
  catalog: log_lib.Catalog, categories: Mapping[str, int], weights: np.ndarray
) -> np.ndarray:
  """`Rows.genres`; an unknown category weighs as one that a single item has."""
  matrix, unknown = _incidence(catalog, categories)
  matrix *= weights
  unmatched = np.sqrt(unknown) * weights.max()
  norm = np.hypot(np.linalg.norm(matrix, axis=1, keepdims=True), unmatched)
  return matrix / np.maximum(norm, 1e-6)


def _last(catalog: log_lib.Catalog) -> list[str]:
  return [''.join(path[-1:]) for path in catalog.categories]


def _leaf(catalog: log_lib.Catalog, leaves: dict[str, int]) -> np.ndarray:
  """Ids of last categories, int [.]; adds new ones to `leaves`."""
  return np.array(
    [leaves.setdefault(name, len(leaves)) for name in _last(catalog)], int
  )
