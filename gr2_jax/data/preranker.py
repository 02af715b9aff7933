"""The pre-ranker: a decayed item kNN, and the statistics behind it.

Two items that stand d places apart in one history are co-engaged with weight
decay^(d - 1). Directed weights record which item came first; the kNN uses
their symmetric sum, divided by the square root of both items' counts.

Axes: I items, U users, n slates, K candidates, H history.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse

from gr2_jax.data import log as log_lib

ROWS = 1024  # Slates scored at once: bounds the dense [ROWS, I] block.


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Co-engagement in one set of rows of the log."""

  directed: sparse.csr_array  # float32 [I, I], (a, b): weight of b after a
  similarity: sparse.csr_array  # float32 [I, I], symmetric, scaled: the kNN
  counts: np.ndarray  # float32 [I], rows per item
  rows: np.ndarray  # int64, indices of the log's rows fitted on


def fit(
  log: log_lib.Log,
  keep: np.ndarray,
  decay: float,
  window: int,
  neighbours: int,
) -> Statistics:
  """Counts co-engagement over the kept rows alone.

  Args:
    log: the log.
    keep: bool [rows of the log].
    decay: factor per place of distance.
    window: largest distance counted.
    neighbours: most neighbors that an item keeps in `similarity`.
  """
  rows = np.flatnonzero(keep)
  users, items = log.users[rows], log.items[rows]
  n_items = len(log.catalog)
  first, second, weight = [], [], []
  for lag in range(1, window + 1):
    pair = (users[lag:] == users[:-lag]) & (items[lag:] != items[:-lag])
    first.append(items[:-lag][pair])
    second.append(items[lag:][pair])
    weight.append(np.full(pair.sum(), decay ** (lag - 1), np.float32))
  directed = sparse.coo_array(
    (np.concatenate(weight), (np.concatenate(first), np.concatenate(second))),
    shape=(n_items, n_items),
  ).tocsr()
  directed.sum_duplicates()
  counts = np.bincount(items, minlength=n_items).astype(np.float32)
  scale = sparse.diags_array(1.0 / np.sqrt(np.maximum(counts, 1.0)))
  similarity = sparse.csr_array(scale @ (directed + directed.T) @ scale)
  similarity = prune(similarity.astype(np.float32), neighbours)
  return Statistics(directed, similarity, counts, rows)


def prune(matrix: sparse.csr_array, most: int) -> sparse.csr_array:
  """Returns the matrix with only the `most` largest entries of each row."""
  matrix = sparse.csr_array(matrix)
  row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
  order = np.lexsort((matrix.indices, -matrix.data, row))
  rank = np.arange(len(row)) - matrix.indptr[row]
  kept = order[rank < most]
  pruned = sparse.csr_array(
    (matrix.data[kept], (row[kept], matrix.indices[kept])), shape=matrix.shape
  )
  pruned.sort_indices()
  return pruned


def score(
  log: log_lib.Log,
  statistics: Statistics,
  users: np.ndarray,
  positions: np.ndarray,
  k: int,
  decay: float,
  reach: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the K items nearest to each history: score = sum_h w_h S[h, item].

  Args:
    log: the log.
    statistics: fitted without these slates.
    users: int [n].
    positions: int [n], how many of the user's first items are the history.
    k: K.
    decay: factor per step back into the history.
    reach: number of last items that count.

  Returns:
    candidates int32 [n, K], best first, -1 pads where fewer items have a
    positive score, none of them in the history; scores float32 [n, K].
  """
  start = log.offsets()[users]
  # A fixed draw breaks ties, since catalog order can leak age.
  draw = np.random.default_rng(len(log.catalog)).random(len(log.catalog))
  nudge = (1.0 + 1e-5 * draw).astype(np.float32)
  candidates = np.full((len(users), k), -1, np.int32)
  scores = np.zeros((len(users), k), np.float32)
  for low in range(0, len(users), ROWS):
    part = slice(low, low + ROWS)
    begin, end = start[part], start[part] + positions[part]
    block = _history_matrix(log, begin, end, decay, reach)
    dense = (block @ statistics.similarity).toarray() * nudge
    row, column = _spread(np.zeros_like(begin), end - begin)
    dense[row, log.items[begin[row] + column]] = 0.0
    width = min(k, dense.shape[1])
    top = np.argpartition(-dense, width - 1, axis=1)[:, :width]
    top.sort(axis=1)
    value = np.take_along_axis(dense, top, axis=1)
    order = np.argsort(-value, axis=1, kind='stable')
    top, value = (np.take_along_axis(x, order, axis=1) for x in (top, value))
    candidates[part, :width] = np.where(value > 0, top, -1)
    scores[part, :width] = np.maximum(value, 0)
  return candidates, scores


def _history_matrix(
  log: log_lib.Log,
  begin: np.ndarray,
  end: np.ndarray,
  decay: float,
  reach: int,
) -> sparse.csr_array:
  """Returns [rows, I]: decay^age on each row's last `reach` items."""
  row, column = _spread(np.maximum(end - begin - reach, 0), end - begin)
  age = (end - begin)[row] - 1 - column
  return sparse.csr_array(
    (
      np.float32(decay) ** age.astype(np.float32),
      (row, log.items[begin[row] + column]),
    ),
    shape=(len(begin), len(log.catalog)),
  )


def _spread(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns all (i, j) with low[i] <= j < high[i], as two flat arrays."""
  size = high - low
  row = np.repeat(np.arange(len(size)), size)
  step = np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)
  return row, step + low[row]
