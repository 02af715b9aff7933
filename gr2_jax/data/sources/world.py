"""A generated catalog and traffic whose best order is known.

Items belong to clusters, and each cluster is the complement of another. Users
like a few clusters and the years around one, and want the complements of their
last items. The chance of a click on item i is

  p1 = sigmoid(relevance), relevance = taste + complement + era + level,
  p2 = sigmoid(relevance - 1): the chance that a click is of grade 2,

and the utility is the expected gain p1 * (1 - p2) + 3 * p1 * p2, the mean of
2^grade - 1. The incoming ranker's score is part of it, plus the item's fame and
noise. Fame also decides which items are offered and engaged with, so that
popularity is a misleading signal. In training a click at rank r is recorded
only with chance r^-position_bias; validation and test clicks have no such bias,
as in a randomized bucket.

Axes: I items, U users, n impressions, K candidates.
"""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from gr2_jax.data import log as log_lib
from gr2_jax.data import splits

DAY = 86_400
START = 1_609_459_200  # 2021-01-01, in seconds.
DEPARTMENTS = ('Home', 'Garden', 'Sport', 'Music')
SYLLABLES = ('ba', 'do', 'fe', 'gi', 'ku', 'la', 'mo', 'ne', 'pi', 'ru')
YEARS = 20  # Items are of the years 2001..2020, those that appear later 2021.
RECENT = 3  # Last items whose complements are wanted.
LEVEL = -2.5  # Relevance of an item without taste, complement or era.


def load(config: ConfigDict) -> log_lib.Log:
  """Generates a log with impressions, a function of `config.split_seed`.

  Args:
    config: section `data`; reads `world`, `candidates` and the split.
  """
  size = config.world
  rng = np.random.default_rng([config.split_seed, 3])
  cluster, year, fame, birth = _items(size, rng)
  catalog = _catalog(cluster, year, rng)
  complement = np.roll(rng.permutation(size.clusters), 1)
  taste = _tastes(size, rng)
  era = rng.integers(2001, 2021, size=size.n_users)
  present = rng.random(size.n_users) < 0.7
  first_day = np.where(present, 0, rng.integers(size.days, size=size.n_users))

  users = np.arange(size.n_users)
  lasting = (
    LEVEL
    + 3.5 * taste[:, cluster]
    - 0.4 * np.minimum(np.abs(era[:, None] - year) / 5, 2)
  )
  seen = np.zeros((size.n_users, size.n_items), bool)
  recent = np.full((size.n_users, RECENT), -1)
  rows, shown = [], []

  def relevance() -> np.ndarray:
    wanted = np.zeros((size.n_users, size.clusters + 1))
    kinds = np.where(recent < 0, size.clusters, complement[cluster[recent]])
    wanted[users[:, None], kinds] = 1.0
    return lasting + 2.0 * wanted[:, cluster]

  def choose(logits: np.ndarray, n: int, day: np.ndarray) -> np.ndarray:
    alive = (birth <= day[:, None]) & ~seen
    drawn = np.where(alive, logits + rng.gumbel(size=logits.shape), -np.inf)
    return np.argsort(-drawn, axis=1)[:, :n]

  def engage(
    who: np.ndarray, items: np.ndarray, times: np.ndarray, grades: np.ndarray
  ) -> None:
    rows.append(np.stack([who, items, times, grades]))
    seen[who, items] = True
    recent[who] = np.concatenate([recent[who, 1:], items[:, None]], axis=1)

  # Before the first slate.
  clock = START + first_day * DAY
  for _ in range(size.organic):
    likes = relevance()
    item = choose(likes + 0.5 * fame, 1, first_day)[:, 0]
    clock = clock + 60
    engage(users, item, clock, 1 + _coin(rng, likes[users, item] - 1.0))

  # One slate a day.
  visitor = np.tile(users, size.visits)
  part = splits.impression_parts(visitor, size.n_users, config)
  part = part.reshape(size.visits, size.n_users)
  rank = np.arange(config.candidates)
  for visit in range(size.visits):
    day = first_day + visit
    likes = relevance()
    offered = choose(0.4 * likes + fame, config.candidates, day)
    truth = np.take_along_axis(likes, offered, axis=1)
    score = 0.4 * truth + 0.8 * fame[offered]
    score += size.noise * rng.normal(size=score.shape)
    order = np.argsort(-score, axis=1)
    offered, truth, score = (
      np.take_along_axis(x, order, axis=1) for x in (offered, truth, score)
    )
    click = _coin(rng, truth)
    noticed = rng.random(click.shape) < (rank + 1.0) ** -size.position_bias
    click = click * np.where(part[visit, :, None] == 0, noticed, True)
    grade = click * (1 + _coin(rng, truth - 1.0))
    p1, p2 = _sigmoid(truth), _sigmoid(truth - 1.0)
    clock = START + day * DAY + DAY // 2
    shown.append((users, clock, offered, score, grade, p1 * (1 + 2 * p2)))
    for place in range(config.candidates):
      who = np.flatnonzero(click[:, place])
      engage(
        who, offered[who, place], clock[who] + 60 + place, grade[who, place]
      )

  user, item, time, grade = np.concatenate(rows, axis=1)
  parts = [np.concatenate(column) for column in zip(*shown, strict=True)]
  impressions = log_lib.Impressions(
    users=parts[0].astype(np.int32),
    times=parts[1].astype(np.int64),
    candidates=parts[2].astype(np.int32),
    scores=parts[3].astype(np.float32),
    grades=parts[4].astype(np.int8),
    utility=parts[5].astype(np.float32),
  )
  user_ids = tuple(f'user-{u}' for u in users)
  return log_lib.make_log(
    catalog, user_ids, user, item, time, grade, config.split_seed, impressions
  )


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1.0 / (1.0 + np.exp(-x))


def _coin(rng: np.random.Generator, logits: np.ndarray) -> np.ndarray:
  return (rng.random(logits.shape) < _sigmoid(logits)).astype(np.int64)


def _items(
  size: ConfigDict, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
  """Draws cluster, year, fame and day of birth of each item [I]."""
  cluster = rng.integers(size.clusters, size=size.n_items)
  fame = rng.normal(size=size.n_items)
  later = rng.integers(1, max(2, size.days // 2), size=size.n_items)
  birth = np.where(rng.random(size.n_items) < 0.8, 0, later)
  year = np.where(
    birth > 0, 2021, 2021 - rng.integers(1, YEARS + 1, size.n_items)
  )
  return cluster, year, fame, birth


def _tastes(size: ConfigDict, rng: np.random.Generator) -> np.ndarray:
  """Returns float [U, clusters]: 1 for the three clusters that a user likes."""
  order = np.argsort(rng.random((size.n_users, size.clusters)), axis=1)
  taste = np.zeros((size.n_users, size.clusters))
  np.put_along_axis(taste, order[:, :3], 1.0, axis=1)
  return taste


def _catalog(
  cluster: np.ndarray, year: np.ndarray, rng: np.random.Generator
) -> log_lib.Catalog:
  """Titles are two words of the cluster and one of the item."""
  nouns = [_word(rng, 3) for _ in range(3 * (cluster.max(initial=0) + 1))]
  titles, categories = [], []
  for kind in cluster:
    first, second = rng.choice(3, size=2, replace=False)
    words = nouns[3 * kind + first], nouns[3 * kind + second], _word(rng, 2)
    titles.append(' '.join(words))
    department = DEPARTMENTS[kind % len(DEPARTMENTS)]
    categories.append((department, nouns[3 * kind].capitalize()))
  return log_lib.Catalog(
    tuple(f'item-{i}' for i in range(len(cluster))),
    tuple(titles),
    tuple(categories),
    year.astype(np.int32),
  )


def _word(rng: np.random.Generator, syllables: int) -> str:
  return ''.join(rng.choice(SYLLABLES, size=syllables))
