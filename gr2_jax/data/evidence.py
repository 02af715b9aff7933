"""Evidence: what an honest system may know of a candidate, in numbers.

History is what the user did before the slate, its last 30 items; everything
else is fitted on rows that hold neither the slate's user (in training) nor
anything after the validation cut. `even`, `long` (.97), `short` (.8) and
`recent` (last 5) are weights over the history that sum to one.

  incoming_score   score of the incoming ranker
  incoming_rank    0 for the first
  co_long          decayed symmetric co-engagement, mean by long
  co_short         the same by short
  co_last          the same with the last item alone
  co_max           largest over the history
  co_hits          history items that are neighbours
  joint_mean       co-occurrence in a user at any distance, mean by even;
                   a user counts 1 / length
  joint_max        largest over the history
  directed         decayed weight of the candidate after the item, by short,
                   over the root of both counts
  direction        log((after + .5) / (before + .5)), by short
  latent           cosine-like product of mean history and candidate in the
                   32 strongest singular directions
  latent_recent    the same by recent
  genre            category match with the history
  genre_recent     the same by recent
  leaf             share of the history with the same last category
  transition       log lift of the candidate's categories after those of the
                   last three items, mean; pairs at most 3 places apart
  transition_max   largest over the last three
  text_mean        TF-IDF cosine of titles (words, word pairs), by long
  text_max         largest over the history
  popularity       log(1 + rows of the item)
  trend            log share of its earlier rows that fall in the last
                   quarter of the time up to the slate
  quality          mean grade, shrunk by 5 rows
  popularity_gap   distance to the history's mean log popularity
  stage_gap        mean log place in other histories, less log of this place
  year             year - 2000, 0 where unknown
  year_gap         log(1 + distance to the history's mean year)
  year_gap_recent  the same by recent
  age              years since then at the time of the slate

A candidate that the catalog lacks, `Facts.beside`, has no interactions: the
columns in MET are those of its neighbours in the incoming order.

Where a file tells an order but no times (`Log.has_times`), the columns in
ORDERED are zero: order inside a day may follow item codes.

Axes: n slates, K candidates, R history items read, E columns, I items,
C categories.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

from gr2_jax.data import item_text as content_lib
from gr2_jax.data import log as log_lib
from gr2_jax.data import preranker

EVIDENCE = (
  'incoming_score',
  'incoming_rank',
  'co_long',
  'co_short',
  'co_last',
  'co_max',
  'co_hits',
  'joint_mean',
  'joint_max',
  'directed',
  'direction',
  'latent',
  'latent_recent',
  'genre',
  'genre_recent',
  'leaf',
  'transition',
  'transition_max',
  'text_mean',
  'text_max',
  'popularity',
  'trend',
  'quality',
  'popularity_gap',
  'stage_gap',
  'year',
  'year_gap',
  'year_gap_recent',
  'age',
)

# Columns that read who came first.
ORDERED = (
  'directed',
  'direction',
  'transition',
  'transition_max',
  'trend',
  'stage_gap',
  'age',
)

# Columns that read who met the candidate.
MET = (
  'co_long',
  'co_short',
  'co_last',
  'co_max',
  'co_hits',
  'joint_mean',
  'joint_max',
  'directed',
  'direction',
  'latent',
  'latent_recent',
  'popularity',
  'trend',
  'quality',
  'popularity_gap',
  'stage_gap',
)

REACH = 30  # History items read.
RECENT = 5
NEXT = 3  # Places within which one category leads to another.
ROWS = 2048
LATENT = 32


@dataclasses.dataclass(frozen=True)
class Facts:
  """Everything `compute` looks up, fitted on the rows of one Statistics.

  Arrays of I + 1 rows have a last one for items without any interaction; those
  that the catalog lacks, with indices from I on, are such.

  Attributes:
    statistics: the pre-ranker's.
    content: what the items' text says.
    joint: float32 [I, I], co-occurrence at any distance.
    counts: float32 [I + 1], rows per item.
    transition: float32 [C, C], log lift.
    latent: float32 [I + 1, 32].
    quality: float32 [I + 1].
    stage: float32 [I + 1], mean log(1 + place).
    item_times: int64, sorted item * span + time of each row.
    times: int64, sorted times of the rows.
    span: larger than any time difference.
  """

  statistics: preranker.Statistics
  content: content_lib.Content
  joint: sparse.csr_array
  counts: np.ndarray
  transition: np.ndarray
  latent: np.ndarray
  quality: np.ndarray
  stage: np.ndarray
  item_times: np.ndarray
  times: np.ndarray
  span: int

  def beside(self, items: log_lib.Catalog) -> Facts:
    """The same for items [M] beside the catalog's: I, I + 1, .. are theirs."""
    return dataclasses.replace(self, content=self.content.beside(items))


def fit(
  log: log_lib.Log,
  statistics: preranker.Statistics,
  content: content_lib.Content,
) -> Facts:
  """Fits the facts on exactly the rows that `statistics` saw."""
  rows = statistics.rows
  users, items = log.users[rows], log.items[rows]
  n_items, n_users = len(log.catalog), len(log.user_ids)
  counts = statistics.counts

  lengths = np.bincount(users, minlength=n_users)
  engaged = sparse.csr_array(
    (
      (1.0 / np.sqrt(np.maximum(lengths, 1)))[users].astype(np.float32),
      (users, items),
    ),
    shape=(n_users, n_items),
  )
  scale = sparse.diags_array(1 / np.sqrt(np.maximum(counts, 1.0)))
  joint = scale @ (engaged.T @ engaged) @ scale
  joint = sparse.csr_array(joint).astype(np.float32)
  joint.sort_indices()

  rank = min(LATENT, min(n_users, n_items) - 1)
  start = np.random.default_rng(0).normal(size=min(n_users, n_items))
  _, value, vector = linalg.svds(
    sparse.csr_array(engaged @ scale).astype(np.float64), k=rank, v0=start
  )
  latent = (vector.T * np.sqrt(np.maximum(value, 0))).astype(np.float32)
  latent /= np.maximum(np.linalg.norm(latent, axis=1, keepdims=True), 1e-6)

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

  counts = np.append(counts, np.float32(0))
  latent = np.pad(latent, ((0, 1), (0, 0)))
  grades = np.bincount(items, log.grades[rows], minlength=n_items + 1)
  mean = log.grades[rows].mean() if len(rows) else 1.0
  quality = (grades + 5 * mean) / (counts + 5)
  places = np.log1p(log.positions()[rows])
  overall = places.mean() if len(rows) else 0.0
  stage = np.bincount(items, places, minlength=n_items + 1)
  stage = (stage + 5 * overall) / (counts + 5)
  order = np.lexsort((log.times[rows], items))
  times = np.sort(log.times[rows])
  base = times[0] if len(times) else 0
  span = int(times[-1] - base) + 2 if len(times) else 2
  item_times = items[order].astype(np.int64) * span
  item_times += log.times[rows][order] - base
  return Facts(
    statistics,
    content,
    joint,
    counts,
    transition.astype(np.float32),
    latent,
    quality.astype(np.float32),
    stage.astype(np.float32),
    item_times,
    times,
    span,
  )


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
  return of_histories(log, facts, history, positions, times, candidates, scores)


def of_histories(
  log: log_lib.Log,
  facts: Facts,
  history: np.ndarray,
  positions: np.ndarray,
  times: np.ndarray,
  candidates: np.ndarray,
  scores: np.ndarray,
) -> np.ndarray:
  """As `compute`, for histories that the log need not hold.

  Args:
    log: what the facts were fitted on.
    facts: of `fit`.
    history: int [n, R], the last R = REACH items, LATEST first, -1 pads; from I
      on of `Facts.beside`, and so the candidates.
    positions: int [n], length of each whole history.
    times: int [n], of the slates.
    candidates: int [n, K], -1 pads.
    scores: float32 [n, K] of the incoming ranker.

  Returns:
    float32 [n, K, E]; finite also where a history is empty.
  """
  out = np.zeros((*candidates.shape, len(EVIDENCE)), np.float32)
  for low in range(0, len(history), ROWS):
    part = slice(low, low + ROWS)
    out[part] = _block(
      log,
      facts,
      history[part],
      positions[part],
      times[part],
      candidates[part],
      scores[part],
    )
  _interpolate(out, candidates, len(facts.content))
  if not log.has_times():
    out[..., [EVIDENCE.index(name) for name in ORDERED]] = 0.0
  out[candidates < 0] = 0.0
  return out


def _interpolate(out: np.ndarray, candidates: np.ndarray, size: int) -> None:
  """Gives candidates beside the catalog the interactions of their neighbours.

  That nobody met an item says that it is new, where zeros would say that those
  who met others left it. So its columns of MET are the mean of the two nearest
  in the incoming order that the catalog has. A slate without any keeps zeros.

  Args:
    out: float32 [n, K, E], changed in place.
    candidates: int [n, K], -1 pads.
    size: I.
  """
  columns = [EVIDENCE.index(name) for name in MET]
  met = (candidates >= 0) & (candidates < size)
  for row, place in np.argwhere(candidates >= size):
    known = np.flatnonzero(met[row])
    near = known[np.argsort(np.abs(known - place), kind='stable')[:2]]
    if len(near):
      out[row, place, columns] = out[row][np.ix_(near, columns)].mean(axis=0)


def _block(log, facts, history, positions, times, candidates, scores):
  n, k = candidates.shape
  real = history >= 0
  safe = np.maximum(history, 0)
  item = np.maximum(candidates, 0)
  # Whom nobody has met share the last row.
  size, content = len(facts.counts) - 1, facts.content
  safe_met, item_met = np.minimum(safe, size), np.minimum(item, size)
  pair = (
    np.where(history < size, history, -1),
    np.where(candidates < size, candidates, -1),
  )
  age = np.arange(history.shape[1])

  def weights(decay, last=None):
    w = np.where(real, decay**age, 0.0)
    if last is not None:
      w = w * (age < last)
    return (w / np.maximum(w.sum(1, keepdims=True), 1e-6)).astype(np.float32)

  even, short = weights(1.0), weights(0.8)
  long, recent = weights(0.97), weights(1.0, RECENT)
  columns = {}
  columns['incoming_score'] = scores
  columns['incoming_rank'] = np.broadcast_to(
    np.arange(k, dtype=np.float32), (n, k)
  )
  co = content_lib.lookup(facts.statistics.similarity, *pair)
  columns['co_long'] = np.einsum('nr,nrk->nk', long, co)
  columns['co_short'] = np.einsum('nr,nrk->nk', short, co)
  columns['co_last'] = co[:, 0]
  columns['co_max'] = co.max(1)
  columns['co_hits'] = (co > 0).sum(1)
  joint = content_lib.lookup(facts.joint, *pair)
  columns['joint_mean'] = np.einsum('nr,nrk->nk', even, joint)
  columns['joint_max'] = joint.max(1)
  root = np.sqrt(np.maximum(facts.counts, 1))
  scale = 1 / (root[safe_met][:, :, None] * root[item_met][:, None, :])
  after = content_lib.lookup(facts.statistics.directed, *pair)
  before = content_lib.lookup(facts.statistics.directed, *pair[::-1])
  before = before.swapaxes(1, 2)  # Turning the whole matrix takes far longer.
  columns['directed'] = np.einsum('nr,nrk->nk', short, after * scale)
  columns['direction'] = np.einsum(
    'nr,nrk->nk', short, np.log((after + 0.5) / (before + 0.5))
  )
  taste = np.einsum('nr,nrd->nd', even, facts.latent[safe_met])
  columns['latent'] = np.einsum('nd,nkd->nk', taste, facts.latent[item_met])
  taste = np.einsum('nr,nrd->nd', recent, facts.latent[safe_met])
  columns['latent_recent'] = np.einsum(
    'nd,nkd->nk', taste, facts.latent[item_met]
  )
  read, offered = content.genres(safe), content.genres(item)
  genre = np.einsum('nr,nrc->nc', even, read)
  columns['genre'] = np.einsum('nc,nkc->nk', genre, offered)
  genre = np.einsum('nr,nrc->nc', recent, read)
  columns['genre_recent'] = np.einsum('nc,nkc->nk', genre, offered)
  same = content.leaf(safe)[:, :, None] == content.leaf(item)[:, None, :]
  columns['leaf'] = np.einsum('nr,nrk->nk', even, same)
  last = read[:, :NEXT] @ facts.transition
  lift = np.einsum('nrc,nkc->nrk', last, offered)
  lift = lift * real[:, :NEXT, None]
  columns['transition'] = lift.mean(axis=1)
  columns['transition_max'] = lift.max(axis=1)
  text = content.cosine(history, candidates)
  columns['text_mean'] = np.einsum('nr,nrk->nk', long, text)
  columns['text_max'] = text.max(1)
  popularity = np.log1p(facts.counts)
  columns['popularity'] = popularity[item_met]
  base = facts.times[0] if len(facts.times) else 0
  now = np.clip(times - base, 0, facts.span - 1)[:, None]
  key = item.astype(np.int64) * facts.span
  until = np.searchsorted(facts.item_times, key + now)
  begin = np.searchsorted(facts.item_times, key)
  half = np.searchsorted(facts.item_times, key + now * 3 // 4)
  columns['trend'] = np.log((until - half + 1) / (until - begin + 2))
  columns['quality'] = facts.quality[item_met]
  habit = np.einsum('nr,nr->n', even, popularity[safe_met])
  columns['popularity_gap'] = np.abs(popularity[item_met] - habit[:, None])
  columns['stage_gap'] = facts.stage[item_met] - np.log1p(positions)[:, None]
  then, year = content.years(safe), content.years(item)
  known = then > 0

  def year_gap(w):
    w = w * known
    centre = (w * then).sum(1) / np.maximum(w.sum(1), 1e-6)
    gap = np.abs(year - centre[:, None])
    valid = (year > 0) & (w.sum(1) > 0)[:, None]
    return np.where(valid, np.log1p(gap), 0.0)

  columns['year'] = np.where(year > 0, year - 2000, 0)
  columns['year_gap'] = year_gap(even)
  columns['year_gap_recent'] = year_gap(recent)
  today = 1970 + times[:, None] / (365.25 * 86400)
  columns['age'] = np.where(year > 0, today - year, 0)
  return np.stack([columns[name] for name in EVIDENCE], axis=-1)
