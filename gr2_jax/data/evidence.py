"""Evidence: what an honest system may know of a candidate, as numbers.

`COLUMNS` lists them all: an entry there is a new column of every data set that
is built from then on, and of slates over HTTP. Baselines read all columns;
prompts show those that `prompt.evidence` names.

The history is the user's last 30 items before the slate. Everything else is
fitted on rows that hold neither the slate's user (in training) nor anything
after the validation cut.

Axes: n slates, K candidates, R history items read, E columns, I items,
C categories, D latent width.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

from gr2_jax.data import item_text as content_lib
from gr2_jax.data import log as log_lib
from gr2_jax.data import preranker

REACH = 30  # History items read.
RECENT = 5  # History items that the weights `recent` cover.
NEXT = 3  # Places within which one category leads to another.
LATENT = 32  # Singular directions.
PRIOR = 5  # Rows of the mean item that smooth an item's own mean.
ROWS = 2048  # Slates computed at once: bounds the dense [ROWS, R, K] blocks.


class Reads(enum.Flag):
  """What a column reads beside the history."""

  SLATE = enum.auto()  # The incoming order.
  CATALOG = enum.auto()  # The candidate's title, categories and year.
  # Who engaged with the candidate. A candidate outside the catalog has the mean
  # of its neighbors in the incoming order.
  INTERACTIONS = enum.auto()
  # When things happened. The column is zero where the log gives only an order
  # (`Log.has_times`), since order within a day may follow item codes.
  TIMES = enum.auto()


@dataclasses.dataclass(frozen=True)
class Column:
  """A number about each candidate of a slate."""

  name: str  # In configs, in `meta.json` and in the token `<name=bin>`.
  reads: Reads
  compute: Callable[[_Block], np.ndarray]  # Returns [n, K].
  meaning: str


SLATE, CATALOG, INTERACTIONS, TIMES = Reads

# `even`, `long` (decay .97 per step back), `short` (.8) and `recent` (the last
# 5 items) are weights over the history that sum to one.
# fmt: off
COLUMNS = (
  Column('incoming_score', SLATE, lambda s: s.scores,
         'score of the incoming ranker'),
  Column('incoming_rank', SLATE, lambda s: np.arange(s.scores.shape[1]),
         'place in the incoming order, 0 for the first'),
  Column('co_long', INTERACTIONS, lambda s: s.mean(s.long, s.co),
         'decayed symmetric co-engagement with the history, mean by `long`'),
  Column('co_short', INTERACTIONS, lambda s: s.mean(s.short, s.co),
         'decayed co-engagement, mean by `short`'),
  Column('co_last', INTERACTIONS, lambda s: s.co[:, 0],
         'decayed co-engagement with the last item'),
  Column('co_max', INTERACTIONS, lambda s: s.co.max(1),
         'largest decayed co-engagement with any history item'),
  Column('co_hits', INTERACTIONS, lambda s: (s.co > 0).sum(1),
         "number of history items that are the candidate's neighbors"),
  Column('joint_mean', INTERACTIONS, lambda s: s.mean(s.even, s.joint),
         'mean co-occurrence with the history at any distance in a user, who '
         'counts 1 / length'),
  Column('joint_max', INTERACTIONS, lambda s: s.joint.max(1),
         'largest co-occurrence with any history item'),
  Column('directed', INTERACTIONS | TIMES, lambda s: s.directed(),
         'decayed weight of the candidate after the item, by `short`, over the '
         'root of both counts'),
  Column('direction', INTERACTIONS | TIMES, lambda s: s.direction(),
         'log((after + .5) / (before + .5)), by `short`'),
  Column('latent', INTERACTIONS, lambda s: s.match(s.even, s.latent),
         'match of mean history and candidate in the strongest singular '
         'directions'),
  Column('latent_recent', INTERACTIONS, lambda s: s.match(s.recent, s.latent),
         'match of the last five items and candidate in these directions'),
  Column('genre', CATALOG, lambda s: s.match(s.even, s.genres),
         'category match with the history'),
  Column('genre_recent', CATALOG, lambda s: s.match(s.recent, s.genres),
         'category match with the last five items'),
  Column('leaf', CATALOG, lambda s: s.leaf(),
         'share of the history with the same last category'),
  Column('transition', CATALOG | TIMES, lambda s: s.lift.mean(axis=1),
         "log lift of the candidate's categories after those of the last three "
         'items, at most 3 places apart, mean'),
  Column('transition_max', CATALOG | TIMES, lambda s: s.lift.max(axis=1),
         'largest log lift over the last three items'),
  Column('text_mean', CATALOG, lambda s: s.mean(s.long, s.text),
         'TF-IDF cosine of titles (words, word pairs), mean by `long`'),
  Column('text_max', CATALOG, lambda s: s.text.max(1),
         'largest title cosine with any history item'),
  Column('popularity', INTERACTIONS, lambda s: s.popularity[s.offered_row],
         'log(1 + rows of the item)'),
  Column('trend', INTERACTIONS | TIMES, lambda s: s.trend(),
         "log share of the candidate's earlier rows that fall in the last "
         'quarter of the time up to the slate'),
  Column('quality', INTERACTIONS, lambda s: s.facts.quality[s.offered_row],
         'mean grade, shrunk by 5 rows'),
  Column('popularity_gap', INTERACTIONS, lambda s: s.popularity_gap(),
         "distance to the history's mean log popularity"),
  Column('stage_gap', INTERACTIONS | TIMES, lambda s: s.stage_gap(),
         'mean log place in other histories, less the log of this place'),
  Column('year', CATALOG, lambda s: np.where(s.year > 0, s.year - 2000, 0),
         'year - 2000, 0 where unknown'),
  Column('year_gap', CATALOG, lambda s: s.year_gap(s.even),
         "log(1 + distance to the history's mean year)"),
  Column('year_gap_recent', CATALOG, lambda s: s.year_gap(s.recent),
         "log(1 + distance to the last five items' mean year)"),
  Column('age', CATALOG | TIMES, lambda s: s.age(),
         "years from the item's year to the slate"),
)
# fmt: on
NAMES = tuple(column.name for column in COLUMNS)


def places(reads: Reads) -> list[int]:
  """Places in COLUMNS of the columns that read this."""
  return [i for i, column in enumerate(COLUMNS) if reads in column.reads]


@dataclasses.dataclass(frozen=True)
class Facts:
  """Everything that columns look up, fitted on the rows of one Statistics.

  Arrays of I + 1 rows have a last one for items without any interaction; items
  outside the catalog (index I or more) use that last row too.
  """

  statistics: preranker.Statistics
  content: content_lib.Content
  joint: sparse.csr_array  # float32 [I, I], co-occurrence at any distance
  counts: np.ndarray  # float32 [I + 1], rows per item
  transition: np.ndarray  # float32 [C, C], log lift
  latent: np.ndarray  # float32 [I + 1, D], unit rows
  quality: np.ndarray  # float32 [I + 1], mean grade
  stage: np.ndarray  # float32 [I + 1], mean log(1 + place)
  item_times: np.ndarray  # int64, sorted item * span + time - start of each row
  start: int  # time of the first row
  span: int  # larger than any time difference
  has_times: bool  # whether the log gives times, not only an order

  def beside(self, items: log_lib.Catalog) -> Facts:
    """Adds items [M] outside the catalog, with indices I, I + 1, .."""
    return dataclasses.replace(self, content=self.content.beside(items))


def fit(
  log: log_lib.Log,
  statistics: preranker.Statistics,
  content: content_lib.Content,
) -> Facts:
  """Fits the facts on exactly the rows that `statistics` is made of."""
  rows = statistics.rows
  users, items, times = log.users[rows], log.items[rows], log.times[rows]
  n_items, n_users = len(log.catalog), len(log.user_ids)

  lengths = np.bincount(users, minlength=n_users)
  engaged = sparse.csr_array(
    (
      (1.0 / np.sqrt(np.maximum(lengths, 1)))[users].astype(np.float32),
      (users, items),
    ),
    shape=(n_users, n_items),
  )
  scale = sparse.diags_array(1 / np.sqrt(np.maximum(statistics.counts, 1.0)))
  joint = scale @ (engaged.T @ engaged) @ scale
  joint = sparse.csr_array(joint).astype(np.float32)
  joint.sort_indices()

  flow = sparse.csr_array((n_items, n_items), dtype=np.float32)
  for lag in range(1, NEXT + 1):
    pair = users[lag:] == users[:-lag]
    ends = items[:-lag][pair], items[lag:][pair]
    flow = flow + sparse.csr_array(
      (np.ones(len(ends[0]), np.float32), ends), shape=flow.shape
    )
  genres = content.rows.genres
  joint_genre = genres.T @ (flow @ genres) + 1.0
  expected = np.outer(joint_genre.sum(1), joint_genre.sum(0))
  transition = np.log(joint_genre * joint_genre.sum() / expected)

  counts = np.append(statistics.counts, np.float32(0))

  def smoothed(values: np.ndarray, empty: float) -> np.ndarray:
    """Mean of the values by item, shrunk to the mean of all: [I + 1]."""
    mean = values.mean() if len(rows) else empty
    total = np.bincount(items, values, minlength=n_items + 1)
    return ((total + PRIOR * mean) / (counts + PRIOR)).astype(np.float32)

  start, end = (times.min(), times.max()) if len(times) else (0, 0)
  span = int(end - start) + 2
  order = np.lexsort((times, items))
  item_times = items[order].astype(np.int64) * span + (times[order] - start)
  return Facts(
    statistics=statistics,
    content=content,
    joint=joint,
    counts=counts,
    transition=transition.astype(np.float32),
    latent=_latent(sparse.csr_array(engaged @ scale)),
    quality=smoothed(log.grades[rows], 1.0),
    stage=smoothed(np.log1p(log.positions()[rows]), 0.0),
    item_times=item_times,
    start=int(start),
    span=span,
    has_times=log.has_times(),
  )


def _latent(engaged_UxI: sparse.csr_array) -> np.ndarray:
  """Unit vectors of the items in the strongest directions: [I + 1, D]."""
  size = min(engaged_UxI.shape)
  first = np.random.default_rng(0).normal(size=size)
  _, value, vector = linalg.svds(
    engaged_UxI.astype(np.float64), k=min(LATENT, size - 1), v0=first
  )
  latent = (vector.T * np.sqrt(np.maximum(value, 0))).astype(np.float32)
  latent /= np.maximum(np.linalg.norm(latent, axis=1, keepdims=True), 1e-6)
  return np.pad(latent, ((0, 1), (0, 0)))


def compute(
  log: log_lib.Log,
  facts: Facts,
  users: np.ndarray,
  positions: np.ndarray,
  times: np.ndarray,
  candidates: np.ndarray,
  scores: np.ndarray,
) -> np.ndarray:
  """Returns float32 [n, K, E]; a padding candidate's row is all zero."""
  age = np.arange(REACH)
  end = log.offsets()[users] + positions
  index = np.maximum(end[:, None] - 1 - age, 0)
  history = np.where(age < positions[:, None], log.items[index], -1)
  return compute_from_histories(
    facts, history, positions, times, candidates, scores
  )


def compute_from_histories(
  facts: Facts,
  history: np.ndarray,
  positions: np.ndarray,
  times: np.ndarray,
  candidates: np.ndarray,
  scores: np.ndarray,
) -> np.ndarray:
  """As `compute`, for histories that the log need not hold.

  Args:
    facts: of `fit`, with the items `beside` it that the slates name.
    history: int [n, R], the last R = REACH items, LATEST first, -1 pads.
    positions: int [n], length of each whole history.
    times: int [n], of the slates.
    candidates: int [n, K], -1 pads.
    scores: float32 [n, K] of the incoming ranker.

  Returns:
    float32 [n, K, E]; finite also where a history is empty.
  """
  arrays = history, positions, times, candidates, scores
  evidence = np.zeros((*candidates.shape, len(COLUMNS)), np.float32)
  for low in range(0, len(history), ROWS):
    part = slice(low, low + ROWS)
    block = _Block(facts, *(array[part] for array in arrays))
    for place, column in enumerate(COLUMNS):
      evidence[part, :, place] = column.compute(block)
  _interpolate(evidence, candidates, len(facts.content))
  if not facts.has_times:
    evidence[..., places(TIMES)] = 0.0
  evidence[candidates < 0] = 0.0
  return evidence


def _interpolate(
  evidence: np.ndarray, candidates: np.ndarray, size: int
) -> None:
  """Fills in, in place, the interactions of candidates with indices from I on.

  Nobody engaged with such an item because it is new; zeros would mean that
  users passed it over. So its columns of INTERACTIONS are the mean of the two
  nearest candidates, in the incoming order, that the catalog has. A slate
  without any keeps zeros.
  """
  columns = places(INTERACTIONS)
  known = (candidates >= 0) & (candidates < size)
  for row, place in np.argwhere(candidates >= size):
    near = np.flatnonzero(known[row])
    near = near[np.argsort(np.abs(near - place), kind='stable')[:2]]
    if len(near):
      values = evidence[row][np.ix_(near, columns)]
      evidence[row, place, columns] = values.mean(axis=0)


class _Block:
  """Some slates, and what columns look up for them.

  Pads read item 0; the weights over the history are 0 there. Items without any
  interaction share the last of I + 1 rows.
  """

  def __init__(
    self,
    facts: Facts,
    history: np.ndarray,
    positions: np.ndarray,
    times: np.ndarray,
    candidates: np.ndarray,
    scores: np.ndarray,
  ):
    self.facts, self.positions = facts, positions
    self.times, self.scores = times, scores
    self.real = history >= 0
    self.even, self.short = self._weights(1.0), self._weights(0.8)
    self.long, self.recent = self._weights(0.97), self._weights(1.0, RECENT)

    # Of the history [n, R, ..] and of the candidates [n, K, ..].
    both = np.maximum(history, 0), np.maximum(candidates, 0)
    self.read, self.offered = both
    self.genres = tuple(map(facts.content.genres, both))
    self.leaves = tuple(map(facts.content.leaf, both))
    self.read_year, self.year = map(facts.content.years, both)
    size = len(facts.counts) - 1
    self.read_row, self.offered_row = (np.minimum(x, size) for x in both)
    self.latent = facts.latent[self.read_row], facts.latent[self.offered_row]
    self.popularity = np.log1p(facts.counts)

    # Of each pair [n, R, K].
    pair = [np.where(x < size, x, -1) for x in (history, candidates)]
    directed = facts.statistics.directed
    self.co = content_lib.lookup(facts.statistics.similarity, *pair)
    self.joint = content_lib.lookup(facts.joint, *pair)
    self.after = content_lib.lookup(directed, *pair)
    # Transposing the matrix instead takes far longer.
    self.before = content_lib.lookup(directed, *pair[::-1]).swapaxes(1, 2)
    self.text = facts.content.cosine(history, candidates)
    last = self.genres[0][:, :NEXT] @ facts.transition
    lift = np.einsum('nrc,nkc->nrk', last, self.genres[1])
    self.lift = lift * self.real[:, :NEXT, None]  # Of the last items alone.

  def _weights(self, decay: float, last: int | None = None) -> np.ndarray:
    age = np.arange(self.real.shape[1])
    w = np.where(self.real, decay**age, 0.0)
    if last is not None:
      w = w * (age < last)
    return (w / np.maximum(w.sum(1, keepdims=True), 1e-6)).astype(np.float32)

  def mean(self, weights: np.ndarray, values_nxRxK: np.ndarray) -> np.ndarray:
    """Mean over the history: [n, K]."""
    return np.einsum('nr,nrk->nk', weights, values_nxRxK)

  def match(
    self, weights: np.ndarray, vectors: tuple[np.ndarray, np.ndarray]
  ) -> np.ndarray:
    """Product of the mean history, of [n, R, D], and candidates [n, K, D]."""
    taste = np.einsum('nr,nrd->nd', weights, vectors[0])
    return np.einsum('nd,nkd->nk', taste, vectors[1])

  def directed(self) -> np.ndarray:
    root = np.sqrt(np.maximum(self.facts.counts, 1))
    scale = 1 / (
      root[self.read_row][:, :, None] * root[self.offered_row][:, None, :]
    )
    return self.mean(self.short, self.after * scale)

  def direction(self) -> np.ndarray:
    ratio = np.log((self.after + 0.5) / (self.before + 0.5))
    return self.mean(self.short, ratio)

  def leaf(self) -> np.ndarray:
    read, offered = self.leaves
    return self.mean(self.even, read[:, :, None] == offered[:, None, :])

  def popularity_gap(self) -> np.ndarray:
    habit = np.einsum('nr,nr->n', self.even, self.popularity[self.read_row])
    return np.abs(self.popularity[self.offered_row] - habit[:, None])

  def trend(self) -> np.ndarray:
    facts = self.facts
    now = np.clip(self.times - facts.start, 0, facts.span - 1)[:, None]
    key = self.offered.astype(np.int64) * facts.span
    until = np.searchsorted(facts.item_times, key + now)
    begin = np.searchsorted(facts.item_times, key)
    recent = np.searchsorted(facts.item_times, key + now * 3 // 4)
    return np.log((until - recent + 1) / (until - begin + 2))

  def stage_gap(self) -> np.ndarray:
    place = np.log1p(self.positions)[:, None]
    return self.facts.stage[self.offered_row] - place

  def year_gap(self, weights: np.ndarray) -> np.ndarray:
    weights = weights * (self.read_year > 0)
    total = weights.sum(1)
    center = (weights * self.read_year).sum(1) / np.maximum(total, 1e-6)
    gap = np.abs(self.year - center[:, None])
    valid = (self.year > 0) & (total > 0)[:, None]
    return np.where(valid, np.log1p(gap), 0.0)

  def age(self) -> np.ndarray:
    today = 1970 + self.times[:, None] / (365.25 * 86400)
    return np.where(self.year > 0, today - self.year, 0)
