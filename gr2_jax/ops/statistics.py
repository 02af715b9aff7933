"""Intervals and tests for paired comparisons of rankers, in numpy.

Slates of one user are not independent, and neither are slates scored by one
trained seed: both are resampled whole. Axis letters: S seeds, U users (the
clusters); n slates, R resamples. Arguments shared by all functions:

* `first`, `second` [n] or [S, n]: a metric of two rankers on the same slates;
* `clusters` [n]: the user of each slate, any labels;
* `resamples` R, `level` the coverage of the interval, `seed` of the resampling.

All raise ValueError on shapes that do not fit, non-finite values, no slates, a
level outside (0, 1) or fewer than one resample.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

_SHAPES = {
  1: '[slates]: use two_level_bootstrap for several seeds',
  2: '[seeds, slates]: use paired_bootstrap for a single seed',
}
_CHUNK = 1 << 22  # Draws held at once: 32 MB of indices.


class Interval(NamedTuple):
  """An estimated mean difference, first minus second, and its interval."""

  estimate: float
  low: float
  high: float


class McNemar(NamedTuple):
  """An exact McNemar test: slates that only one ranker hit, two-sided p."""

  only_first: int
  only_second: int
  p_value: float


class TwoLevelEquivalence(NamedTuple):
  """Two one-sided bootstrap tests."""

  estimate: float  # The mean difference, first minus second.
  low: float  # Ends of the interval.
  high: float
  p: float  # Of the worse side.
  equivalent: bool  # The interval lies inside (-margin, margin).
  not_worse: bool  # It lies above -margin.


class Equivalence(NamedTuple):
  """Two one-sided tests; equivalent within the margin where p is small."""

  estimate: float
  p_value: float  # Of the worse side.


def paired_bootstrap(
  first: np.ndarray,
  second: np.ndarray,
  clusters: np.ndarray,
  *,
  resamples: int = 2000,
  level: float = 0.95,
  seed: int = 0,
) -> Interval:
  """Percentile interval of mean(first - second), clusters resampled.

  Each resample draws as many users as there are, with replacement, takes all
  their slates, and averages over slates. Both metrics are [n].
  """
  difference = _difference(first, second, clusters, 1)
  return _bootstrap(difference[None], clusters, resamples, level, seed)[0]


def two_level_bootstrap(
  first: np.ndarray,
  second: np.ndarray,
  clusters: np.ndarray,
  *,
  resamples: int = 2000,
  level: float = 0.95,
  seed: int = 0,
) -> Interval:
  """As `paired_bootstrap`, with training seeds resampled as well.

  Seeds and users are crossed: a resample draws seeds and users independently,
  and every drawn seed is averaged over the same drawn users. `first` is [S, n];
  `second` too, or [n] for a ranker without seeds (the incoming order). With one
  seed, only users vary.
  """
  difference = _difference(first, second, clusters, 2)
  return _bootstrap(difference, clusters, resamples, level, seed)[0]


def two_level_equivalence(
  first: np.ndarray,
  second: np.ndarray,
  clusters: np.ndarray,
  *,
  margin: float,
  resamples: int = 2000,
  level: float = 0.9,
  seed: int = 0,
) -> TwoLevelEquivalence:
  """Whether |mean(first - second)| is below a margin, over seeds and users.

  Two one-sided tests on the resamples of `two_level_bootstrap`, whose interval
  it returns and whose shapes it takes. A side's p-value is (1 + hits) / (1 +
  R), where hits are resamples on or beyond that side's margin. Each side is
  tested at (1 - level) / 2. The margin must be > 0.
  """
  if not margin > 0:
    raise ValueError(f'margin is {margin}; it must be > 0')
  difference = _difference(first, second, clusters, 2)
  interval, replicas = _bootstrap(difference, clusters, resamples, level, seed)
  hits = max(np.sum(replicas <= -margin), np.sum(replicas >= margin))
  not_worse = interval.low > -margin
  return TwoLevelEquivalence(
    *interval,
    p=float((1 + hits) / (1 + resamples)),
    equivalent=not_worse and interval.high < margin,
    not_worse=not_worse,
  )


def share_of_gain(
  student: np.ndarray,
  teacher: np.ndarray,
  base: np.ndarray,
  clusters: np.ndarray,
  *,
  resamples: int = 2000,
  level: float = 0.95,
  seed: int = 0,
) -> Interval:
  """The share of a teacher's gain that its students keep.

  (mean(student) - mean(base)) / (mean(teacher) - mean(base)); users are
  resampled for all three at once, and seeds of the student. The ratio is
  meaningless where the teacher gains nothing.

  `student` is [S, n]; `teacher` and `base`, the ranker that both improve on
  (the incoming order), are [n].
  """
  gained = _difference(student, base, clusters, 2)
  whole = _difference(teacher, base, clusters, 1)
  rng = np.random.default_rng(seed)
  both = np.concatenate([gained, whole[None]])
  means = _resampled(both, clusters, resamples, rng)
  shares = _over_seeds(means[:, :-1], rng) / means[:, -1]
  estimate = float(gained.mean() / whole.mean())
  return _percentiles(estimate, shares, level)


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
  """Exact McNemar test of two paired hit-or-miss metrics [n], such as r@1.

  Under the null each discordant slate is a fair coin. Slates are taken as
  independent. The p-value is 1 where no slate is discordant. Raises ValueError
  on shapes that differ or values other than 0 and 1.
  """
  first, second = np.asarray(first), np.asarray(second)
  if first.shape != second.shape:
    raise ValueError(f'shapes differ: {first.shape} and {second.shape}')
  for name, values in (('first', first), ('second', second)):
    if not np.isin(values, (0, 1)).all():
      raise ValueError(f'{name} has values other than 0 and 1')
  only_first = int(np.sum((first == 1) & (second == 0)))
  only_second = int(np.sum((first == 0) & (second == 1)))
  total = only_first + only_second
  p_value = 1.0
  if total:
    p_value = float(stats.binomtest(only_first, total, 0.5).pvalue)
  return McNemar(only_first, only_second, p_value)


def equivalence(
  first: np.ndarray, second: np.ndarray, clusters: np.ndarray, *, margin: float
) -> Equivalence:
  """Whether |mean(first - second)| is below a margin > 0, by TOST.

  Two one-sided t-tests. The error is clustered by user, with U - 1 degrees of
  freedom (so at least two users); with one slate a user it is the ordinary
  one-sample t-test. Both metrics are [n].
  """
  difference = _difference(first, second, clusters, 1)
  if margin <= 0:
    raise ValueError(f'margin is {margin}; it must be > 0')
  estimate = float(difference.mean())
  sums, counts = _by_cluster((difference - estimate)[None], clusters)
  users = len(counts)
  if users < 2:
    raise ValueError('one cluster alone has no spread: at least two are needed')
  variance = np.sum(np.square(sums[0])) * users / (users - 1)
  error = float(np.sqrt(variance) / len(difference))
  if error == 0:
    return Equivalence(estimate, 0.0 if abs(estimate) < margin else 1.0)
  above = stats.t.sf((estimate + margin) / error, users - 1)
  below = stats.t.cdf((estimate - margin) / error, users - 1)
  return Equivalence(estimate, float(max(above, below)))


def _difference(
  first: np.ndarray, second: np.ndarray, clusters: np.ndarray, axes: int
) -> np.ndarray:
  """Differences in float64 with that many axes; checks shapes and values."""
  first = np.asarray(first, np.float64)
  second = np.asarray(second, np.float64)
  clusters = np.asarray(clusters)
  if first.ndim not in (1, 2) or first.shape[-1:] != clusters.shape:
    raise ValueError(
      f'first has shape {first.shape} and clusters {clusters.shape}: the last '
      'axis of the first must be the slates that the clusters label'
    )
  if second.shape not in (first.shape, first.shape[-1:]):
    raise ValueError(
      f'second has shape {second.shape}; it must be that of first, '
      f'{first.shape}, or {first.shape[-1:]}'
    )
  if first.ndim != axes:
    raise ValueError(f'first has shape {first.shape}, not {_SHAPES[axes]}')
  if first.size == 0:
    raise ValueError(f'first has shape {first.shape}: nothing to compare')
  for name, values in (('first', first), ('second', second)):
    if not np.isfinite(values).all():
      raise ValueError(f'{name} has {np.sum(~np.isfinite(values))} non-finite')
  return first - second


def _by_cluster(
  values: np.ndarray, clusters: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Sums [S, U] and sizes [U] of values [S, n] by cluster."""
  labels, inverse = np.unique(clusters, return_inverse=True)
  sums = np.stack([np.bincount(inverse, row, len(labels)) for row in values])
  return sums, np.bincount(inverse, minlength=len(labels)).astype(np.float64)


def _bootstrap(
  difference: np.ndarray,
  clusters: np.ndarray,
  resamples: int,
  level: float,
  seed: int,
) -> tuple[Interval, np.ndarray]:
  """Interval of the mean of differences [S, n], and its replicas [R]."""
  if not 0 < level < 1:
    raise ValueError(f'level is {level}; it must lie between 0 and 1')
  if resamples < 1:
    raise ValueError(f'resamples is {resamples}; it must be at least 1')
  rng = np.random.default_rng(seed)
  means = _resampled(difference, clusters, resamples, rng)
  replicas = _over_seeds(means, rng)
  return _percentiles(float(difference.mean()), replicas, level), replicas


def _resampled(
  values: np.ndarray,
  clusters: np.ndarray,
  resamples: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Means [R, S] of values [S, n] over users drawn with replacement."""
  sums, counts = _by_cluster(values, clusters)
  seeds, users = sums.shape
  # Drawing U users with replacement gives each a multinomial weight.
  columns = np.concatenate([sums, counts[None]]).T
  means = np.empty((resamples, seeds))
  step = max(1, _CHUNK // users)
  for start in range(0, resamples, step):
    rows = min(step, resamples - start)
    drawn = rng.integers(users, size=(rows, users))
    drawn += np.arange(rows)[:, None] * users
    weights = np.bincount(drawn.ravel(), minlength=rows * users)
    totals = weights.reshape(rows, users).astype(np.float64) @ columns
    means[start : start + rows] = totals[:, :-1] / totals[:, -1:]
  return means


def _over_seeds(means: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Means [R] of means [R, S] over seeds drawn with replacement."""
  drawn = rng.integers(means.shape[1], size=means.shape)
  return np.take_along_axis(means, drawn, axis=1).mean(axis=1)


def _percentiles(
  estimate: float, replicas: np.ndarray, level: float
) -> Interval:
  """The interval of an estimate with replicas [R]."""
  tail = 50.0 * (1.0 - level)
  low, high = np.percentile(replicas, [tail, 100.0 - tail])
  return Interval(estimate, float(low), float(high))
