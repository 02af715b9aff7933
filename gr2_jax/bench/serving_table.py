"""The tables of `bench.serve`: load, and gains over the mode `reason`.

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
  """The load table: a row for each mode and number of clients."""
  rounded = [
    {k: f'{v:.2f}' if isinstance(v, float) else v for k, v in row.items()}
    for row in rows
  ]
  return reporting.table(rounded, LOAD)


def gains(
  rows: Sequence[Mapping[str, Any]], quality: Mapping[str, float]
) -> str:
  """Compares each mode with `reason`.

  The columns of the table:

    N@5         of `quality`
    lost        N@5 of `reason` minus N@5 of this mode
    decoded     tokens decoded, a slate
    / tokens    tokens of `reason` over tokens of this mode
    x slates/s  rate of this mode over that of `reason`, by number of clients
    / p50       p50 of `reason` over that of this mode, by number of clients

  A ratio without a meaning is `-`.

  Args:
    rows: of `serving_load.measure`.
    quality: mode -> mean N@5; may hold other modes than `rows`.
  """
  by_key = {(row['mode'], row['clients']): row for row in rows}
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
      row, reason = by_key.get((mode, n), {}), by_key.get(('reason', n), {})
      line |= {
        f'x slates/s, {n}': ratio(row.get('slates/s'), reason.get('slates/s')),
        f'/ p50, {n}': ratio(reason.get('p50'), row.get('p50')),
      }
    table.append(line)
  columns = ['mode', 'N@5', 'lost', 'decoded', '/ tokens']
  for name in ('x slates/s', '/ p50'):
    columns += [f'{name}, {n}' for n in clients]
  return reporting.table(table, columns)


def agreement(ours: Orders, theirs: Orders) -> str:
  """Counts equal orders, where neither answer was late."""
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
