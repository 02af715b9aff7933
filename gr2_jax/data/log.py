"""The form that every source delivers: a catalog, interactions, impressions.

Axes: I items, U users, n rows, K candidates.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np


class DataError(ValueError):
  """Bad input; the message names file, line, field, finding and cure."""


def parse_json(text: bytes | str, where: str) -> Any:
  """Parses JSON from outside; a DataError names `where` it stands."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise DataError(
      f'{where}: not valid JSON ({error}): the file may be cut off here; write '
      'it again'
    ) from error


@dataclasses.dataclass(frozen=True)
class Catalog:
  """The items."""

  item_ids: tuple[str, ...]  # [I], of the source; they never reach a model
  titles: tuple[str, ...]  # [I], may be empty
  categories: tuple[tuple[str, ...], ...]  # [I], genres, or a path from wide
  years: np.ndarray  # int32 [I], 0 where unknown

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
  """Slates that an upstream ranker showed."""

  users: np.ndarray  # int32 [n]
  times: np.ndarray  # int64 [n]
  candidates: np.ndarray  # int32 [n, K] catalog indices, -1 pads at the end
  scores: np.ndarray  # float32 [n, K] of the upstream ranker
  grades: np.ndarray  # int8 [n, K] in 0..2
  utility: np.ndarray | None = None  # float32 [n, K], the true expected gain


@dataclasses.dataclass(frozen=True)
class Log:
  """Interactions, sorted by user, then time, then a seeded random number."""

  catalog: Catalog
  user_ids: tuple[str, ...]  # [U], of the source
  users: np.ndarray  # int32 [n]
  items: np.ndarray  # int32 [n] catalog indices
  times: np.ndarray  # int64 [n], in seconds, or any unit that orders
  grades: np.ndarray  # int8 [n], 1 or 2
  impressions: Impressions | None = None  # None: the pre-ranker makes slates

  def offsets(self) -> np.ndarray:
    """Returns int64 [U + 1]: user u owns rows offsets[u]:offsets[u + 1]."""
    return np.searchsorted(self.users, np.arange(len(self.user_ids) + 1))

  def positions(self) -> np.ndarray:
    """Returns int64 [n]: each row's place in its user's history, from 0."""
    return np.arange(len(self.users)) - self.offsets()[self.users]

  def has_times(self) -> bool:
    """Returns False where each time is just the row's place in its history.

    Such a file gives an order, often with ties sorted by item code, so that the
    order within a history proves nothing.
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
  """Sorts rows into a Log; the seed orders ties, whatever the file's order."""
  # An order that depends on the rows' content alone comes first.
  canonical = np.lexsort((grades, items, times, users))
  tie = np.empty(len(users))
  tie[canonical] = np.random.default_rng([seed, 1]).random(len(users))
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
  """Returns the mask of rows in the `least`-core, bool [n].

  Users and items with fewer than `least` rows are dropped repeatedly until none
  is left.
  """
  keep = np.ones(len(users), bool)
  while True:
    by_user = np.bincount(users[keep], minlength=users.max(initial=0) + 1)
    by_item = np.bincount(items[keep], minlength=items.max(initial=0) + 1)
    inside = keep & (by_user[users] >= least) & (by_item[items] >= least)
    if inside.sum() == keep.sum():
      return keep
    keep = inside
