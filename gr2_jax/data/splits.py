"""Who trains, who validates, who tests: by user, or by time within a user.

Axes: U users, n impressions.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import numpy as np
from ml_collections import ConfigDict

from gr2_jax.data import log as log_lib

SPLITS = ('train', 'validation', 'test')

Struct = TypeVar('Struct')


@dataclasses.dataclass(frozen=True)
class SlatePositions:
  """Where slates stand in the log; one row for each slate."""

  split: np.ndarray  # int [n], index in SPLITS
  user: np.ndarray  # int [n]
  position: np.ndarray  # int [n], rows of the user that came before
  limit: np.ndarray  # int [n], positives are rows position..limit - 1
  time: np.ndarray  # int64 [n]
  shown: np.ndarray  # int [n], row of the impressions, -1 if there are none


def assign(n: int, shares: tuple[float, ...], seed: int) -> np.ndarray:
  """Deals n users out at random, in the given shares (of their sum).

  Returns:
    int32 [n], the part of each user.
  """
  edges = np.cumsum(shares)[:-1] / np.sum(shares) * n
  place = np.random.default_rng([seed, 2]).permutation(n)
  return np.searchsorted(np.round(edges), place, side='right').astype(np.int32)


def by_user(config: ConfigDict) -> bool:
  """Returns whether users, not times, are split.

  Raises:
    ValueError: `config.split` is neither 'auto' nor 'user' nor 'time'.
  """
  if config.split not in ('auto', 'user', 'time'):
    raise ValueError(
      f"data.split is {config.split!r}; it must be 'auto', 'user' or 'time'"
    )
  if config.split == 'auto':
    return config.source != 'files'
  return config.split == 'user'


def user_parts(n_users: int, config: ConfigDict) -> np.ndarray:
  """Returns int32 [U]: the index in SPLITS, 0 for all where time splits."""
  if by_user(config):
    return assign(n_users, config.split_shares, config.split_seed)
  return np.zeros(n_users, np.int32)


def folds(n_users: int, config: ConfigDict) -> np.ndarray:
  """Returns int32 [U]: the fold that leaves each user's rows out."""
  return assign(n_users, (1.0,) * config.folds, config.split_seed + 7919)


def time_cuts(length: int) -> tuple[int, int]:
  """Returns where validation and test begin in a sequence of this length.

  The last 20 %, at most 20, are test, the 10 % before them validation; at
  least one each, so that short sequences are leave-one-out.
  """
  test = min(20, max(1, int(0.2 * length)))
  validation = max(1, int(0.1 * length))
  return max(0, length - test - validation), max(0, length - test)


def impression_parts(
  users: np.ndarray, n_users: int, config: ConfigDict
) -> np.ndarray:
  """Returns int32 [n]: the split of each impression.

  Args:
    users: int [n]; each user's impressions stand in time order.
    n_users: U.
    config: section `data`.
  """
  parts = user_parts(n_users, config)[users]
  if by_user(config):
    return parts
  order = np.argsort(users, kind='stable')
  size = np.bincount(users, minlength=n_users)
  place = np.arange(len(users)) - (np.cumsum(size) - size)[users[order]]
  cuts = np.array([time_cuts(n) for n in size])[users[order]]
  parts[order] = (place[:, None] >= cuts).sum(axis=1)
  return parts


def known_rows(log: log_lib.Log, config: ConfigDict) -> np.ndarray:
  """Returns bool [rows of the log]: those that statistics may be fitted on.

  By user: the rows of train users. By time: each user's rows before that
  user's validation part.
  """
  n_users = len(log.user_ids)
  if by_user(config):
    return user_parts(n_users, config)[log.users] == 0
  shown = log.impressions
  if shown is None:
    cuts = np.array([time_cuts(n)[0] for n in np.diff(log.offsets())])
    return log.positions() < cuts[log.users]
  later = impression_parts(shown.users, n_users, config) > 0
  cuts = np.full(n_users, np.iinfo(np.int64).max)
  np.minimum.at(cuts, shown.users[later], shown.times[later])
  return log.times < cuts[log.users]


def slate_positions(log: log_lib.Log, config: ConfigDict) -> SlatePositions:
  """Places slates: at the impressions, or else along each history.

  Where a user has more than the config's maximum, they are evenly spaced.

  Raises:
    DataError: no history is long enough for a slate.
  """
  return _of_impressions(log, config) if log.impressions else _plan(log, config)


def _plan(log: log_lib.Log, config: ConfigDict) -> SlatePositions:
  lengths = np.diff(log.offsets())
  part = user_parts(len(lengths), config)
  least = config.min_history if by_user(config) else config.min_history_time
  pieces = []
  for user, length in enumerate(lengths):
    if by_user(config):
      borders = [(part[user], 0, length)]
    else:
      low, high = time_cuts(length)
      borders = [(0, 0, low), (1, low, high), (2, high, length)]
    for split, begin, end in borders:
      places = _spaced(np.arange(max(begin, least), end), config, split)
      limit = np.minimum(places + config.horizon, end)
      same = np.ones_like(places)
      pieces.append(np.stack([same * split, same * user, places, limit]))
  split, user, place, limit = np.concatenate(pieces, axis=1).astype(np.int64)
  if not len(user):
    raise log_lib.DataError(
      f'no user has more than {least} interactions (the longest history has '
      f'{lengths.max(initial=0)}): lower data.min_history, '
      'data.min_history_time or data.min_core, or bring longer histories'
    )
  time = log.times[log.offsets()[user] + place]
  return SlatePositions(split, user, place, limit, time, np.full_like(user, -1))


def _of_impressions(log: log_lib.Log, config: ConfigDict) -> SlatePositions:
  shown = log.impressions
  split = impression_parts(shown.users, len(log.user_ids), config)
  rows = [np.zeros(0, np.int64)]
  for part in range(len(SPLITS)):
    inside = np.flatnonzero(split == part)
    inside = inside[np.argsort(shown.users[inside], kind='stable')]
    borders = np.flatnonzero(np.diff(shown.users[inside])) + 1
    for one_user in np.split(inside, borders):
      rows.append(_spaced(one_user, config, part))
  rows = np.concatenate(rows)
  user, time = shown.users[rows].astype(np.int64), shown.times[rows]
  offsets = log.offsets()
  position = np.array(
    [
      np.searchsorted(log.times[offsets[u] : offsets[u + 1]], t)
      for u, t in zip(user, time, strict=True)
    ],
    np.int64,
  )
  return SlatePositions(split[rows], user, position, position, time, rows)


def _spaced(places: np.ndarray, config: ConfigDict, split: int) -> np.ndarray:
  """Thins out places to the config's maximum, evenly spaced."""
  most = config.max_slates_eval if split else config.max_slates_train
  n = len(places)
  return places[np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))]


def take(struct: Struct, index: np.ndarray) -> Struct:
  """Returns the struct of arrays with rows `index`."""
  return type(struct)(**{k: x[index] for k, x in vars(struct).items()})
