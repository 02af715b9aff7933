"""What every source delivers: a catalog, a log of interactions, impressions.

Axes: I items, U users, n rows, K candidates.
"""

from __future__ import annotations

import dataclasses

import numpy as np


class DataError(ValueError):
  """Bad input; the message names file, line, field, finding and cure."""


@dataclasses.dataclass(frozen=True)
class Catalog:
  """The items.

  Attributes:
    item_ids: names outside this program [I]; they never reach a model.
    titles: [I], may be empty.
    categories: genres, or a path from wide to narrow [I].
    years: int32 [I], 0 where unknown.
  """

  item_ids: tuple[str, ...]
  titles: tuple[str, ...]
  categories: tuple[tuple[str, ...], ...]
  years: np.ndarray

  def __len__(self) -> int:
    return len(self.item_ids)

  def take(self, rows: np.ndarray) -> Catalog:
    """The catalog of some items, in the order of `rows`, int [n]."""
    return Catalog(
      item_ids=tuple(self.item_ids[row] for row in rows),
      titles=tuple(self.titles[row] for row in rows),
      categories=tuple(self.categories[row] for row in rows),
      years=self.years[rows],
    )


@dataclasses.dataclass(frozen=True)
class Impressions:
  """Slates that an upstream ranker showed.

  Attributes:
    users: int32 [n].
    times: int64 [n].
    candidates: int32 [n, K] catalog indices, -1 pads at the end.
    scores: float32 [n, K] of the upstream ranker.
    grades: int8 [n, K] in 0..2.
    utility: float32 [n, K], the true expected gain, or None.
  """

  users: np.ndarray
  times: np.ndarray
  candidates: np.ndarray
  scores: np.ndarray
  grades: np.ndarray
  utility: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Log:
  """Interactions, sorted by user, then time, then a seeded random number.

  Attributes:
    catalog: the items.
    user_ids: names outside this program [U].
    users: int32 [n].
    items: int32 [n] catalog indices.
    times: int64 [n], in seconds, or any unit that orders.
    grades: int8 [n], 1 or 2.
    impressions: the slates shown, or None where the pre-ranker makes them.
  """

  catalog: Catalog
  user_ids: tuple[str, ...]
  users: np.ndarray
  items: np.ndarray
  times: np.ndarray
  grades: np.ndarray
  impressions: Impressions | None = None

  def offsets(self) -> np.ndarray:
    """Returns int64 [U + 1]: user u owns rows offsets[u]:offsets[u + 1]."""
    return np.searchsorted(self.users, np.arange(len(self.user_ids) + 1))

  def positions(self) -> np.ndarray:
    """Returns int64 [n]: each row's place in its user's history, from 0."""
    return np.arange(len(self.users)) - self.offsets()[self.users]

  def has_times(self) -> bool:
    """Returns False where each time is just the row's place in its history.

    Such a file tells an order, and often one in which ties stand by item
    code; what came first inside a history then proves nothing.
    """
    return not np.array_equal(self.times, self.positions())

  def histories(self) -> list[np.ndarray]:
    """Returns each user's items in time order, int32 arrays [U]."""
    return np.split(self.items, self.offsets()[1:-1])


def make_log(
  catalog: Catalog,
  user_ids: tuple[str, ...],
  users: np.ndarray,
  items: np.ndarray,
  times: np.ndarray,
  grades: np.ndarray,
  seed: int,
  impressions: Impressions | None = None,
) -> Log:
  """Sorts rows into a Log; the seed alone orders ties, never file order.

  Rows are first put into an order that depends on their content only, so that
  shuffling a file does not change the result.

  Args:
    catalog: the items.
    user_ids: [U].
    users: int [n].
    items: int [n].
    times: int [n].
    grades: int [n].
    seed: of the order inside ties.
    impressions: passed on.

  Returns:
    The sorted Log.
  """
  canonical = np.lexsort((grades, items, times, users))
  draw = np.random.default_rng([seed, 1]).random(len(users))
  tie = np.empty(len(users))
  tie[canonical] = draw
  order = np.lexsort((tie, times, users))
  return Log(
    catalog,
    tuple(user_ids),
    users[order].astype(np.int32),
    items[order].astype(np.int32),
    times[order].astype(np.int64),
    grades[order].astype(np.int8),
    impressions,
  )


def core(users: np.ndarray, items: np.ndarray, least: int) -> np.ndarray:
  """Returns the mask of rows in the `least`-core.

  Users and items with fewer than `least` rows go, again and again, until none
  is left.

  Args:
    users: int [n].
    items: int [n].
    least: rows that each kept user and item has.

  Returns:
    bool [n].
  """
  keep = np.ones(len(users), bool)
  while True:
    by_user = np.bincount(users[keep], minlength=users.max(initial=0) + 1)
    by_item = np.bincount(items[keep], minlength=items.max(initial=0) + 1)
    inside = keep & (by_user[users] >= least) & (by_item[items] >= least)
    if inside.sum() == keep.sum():
      return keep
    keep = inside
