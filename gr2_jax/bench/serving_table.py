"""The tables of `bench.serve`: what a mode bears, and what it gives.

Axes: n slates, K candidates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gr2_jax.pipeline import reporting
from gr2_jax.policy import ranking as ranking_lib

LOAD = (
  'mode', 'clients', 'p50', 'p95', 'p99', 'slates/s', 'errors', 'late', 'batch',
  'prefills', 'MB before', 'MB',
)  # fmt: skip

Orders = Sequence[Sequence[int] | None]  # of n slates, None for a late answer


def load(rows: Sequence[Mapping[str, Any]]) -> str:
  """The load table: a row a mode and number of clients."""
  return reporting.table(_rounded(rows), LOAD)


def gains(
  rows: Sequence[Mapping[str, Any]], quality: Mapping[str, float]
) -> str:
  """The ROI table: a row a mode, beside `reason`.

  Args:
    rows: of `serving_load.measure`.
    quality: mode -> mean N@5; may have more than was measured, or nothing.

  Returns:
    The table, with the columns:

      N@5         as given
      lost        N@5 of `reason` less this one
      decoded     tokens written, a slate
      / tokens    how many times fewer they are than those of `reason`
      x slates/s  how many times as many, for each number of clients
      / p50       how many times shorter, likewise

    What has no meaning is `-`, as ratios to nothing decoded.
  """
  found = {(row['mode'], row['clients']): row for row in rows}
  modes = list(dict.fromkeys([*quality, *(row['mode'] for row in rows)]))
  clients = list(dict.fromkeys(row['clients'] for row in rows))
  decoded = {
    mode: float(np.mean([r['decoded'] for r in rows if r['mode'] == mode]))
    for mode in modes
    if any(row['mode'] == mode for row in rows)
  }

  def ratio(a: float | None, b: float | None) -> str | None:
    return f'{a / b:.2f}' if a and b else None

  table = []
  for mode in modes:
    line = {
      'mode': mode,
      'N@5': quality.get(mode),
      'lost': quality.get('reason', np.nan) - quality.get(mode, np.nan),
      'decoded': f'{decoded[mode]:.1f}' if mode in decoded else None,
      '/ tokens': ratio(decoded.get('reason'), decoded.get(mode)),
    }
    for n in clients:
      own, reason = found.get((mode, n), {}), found.get(('reason', n), {})
      line |= {
        f'x slates/s, {n}': ratio(own.get('slates/s'), reason.get('slates/s')),
        f'/ p50, {n}': ratio(reason.get('p50'), own.get('p50')),
      }
    table.append(line)
  columns = ['mode', 'N@5', 'lost', 'decoded', '/ tokens']
  for name in ('x slates/s', '/ p50'):
    columns += [f'{name}, {n}' for n in clients]
  return reporting.table(table, columns)


def agreement(ours: Orders, theirs: Orders) -> str:
  """How many orders are equal, of those that neither gave too late."""
  pairs = [pair for pair in zip(ours, theirs, strict=True) if None not in pair]
  equal = sum(a == b for a, b in pairs)
  return f'{equal} of {len(pairs)} orders are equal'


def ndcg(orders: Orders, grades_nxK: np.ndarray, count_n: np.ndarray) -> float:
  """Mean N@5 of orders in incoming ranks; NaN where an answer was late."""
  if None in orders:
    return float('nan')
  ranking = np.tile(
    np.arange(grades_nxK.shape[1], dtype=np.int32), (len(orders), 1)
  )
  for row, order in enumerate(orders):
    ranking[row, : len(order)] = order
  return float(
    ranking_lib.slate_metrics(ranking, grades_nxK, count_n)['n@5'].mean()
  )


def _rounded(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Milliseconds and rates to what can be told apart."""
  return [
    {k: f'{v:.2f}' if isinstance(v, float) else v for k, v in row.items()}
    for row in rows
  ]
