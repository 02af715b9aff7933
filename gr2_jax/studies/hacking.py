"""Study: when does a policy copy the incoming order, and what prevents it.

Trains every combination of reward, gate and order of presentation from policies
that were taught to copy, and writes one table and one figure.

Axes: S seeds, n slates, K candidates.
"""

import itertools
import pathlib
from typing import Any

import ml_collections
import numpy as np

from gr2_jax.ops import statistics
from gr2_jax.pipeline import reporting
from gr2_jax.studies import study

TABLE = 'hacking.md'
FIGURE = 'hacking.png'

# Rows of the figure: title -> the metric in the log.
CURVES = {
  'reward': 'reward',
  'held-out N@5': 'validation/n@5',
  'copy rate': 'validation/copied',
  'Kendall tau to incoming': 'validation/kendall_tau',
  'order sensitivity': 'validation/order_sensitivity',
}
COLUMNS = (
  'order',
  'reward',
  'gate',
  'N@5 gain',
  'copied',
  'top 3 kept',
  'tau',
  'order sens.',
  'first pick 0',
  'reward rise',
)


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains the grid, measures its policies on test slates, draws.

  Args:
    config: every section that `rl` and its inputs read; study_hacking; seeds.
    inputs: none; the study makes its own runs.
    workdir: of this study; the runs go beside it.

  Returns:
    `start`: for each order, the policies that training starts from; `cells`:
    for each combination, the policies that it ends with. Metrics are means over
    seeds and slates; `n@5_gain` is over the incoming order, with a 95 %
    interval.
  """
  del inputs
  study.figure(1, 1)  # Fails before the runs, not after.
  stage = config.study_hacking
  rows, starts = {}, {}
  for order, reward, gate in itertools.product(
    stage.orders, stage.rewards, stage.gates
  ):
    fields = {'prompt.order': order, 'rl.reward': reward, 'rl.gate': gate}
    changed, thinking = study.changed(config, fields), config.rl.thinking
    rows[order, reward, gate] = study.Row(changed, 'rl', thinking)
    starts.setdefault(order, study.Row(changed, 'sft', thinking))
  logs = {
    key: [
      reporting.read_metrics(path / 'metrics.jsonl')
      for path in study.train(row, workdir)
    ]
    for key, row in rows.items()
  }
  cells = [
    dict(zip(('order', 'reward', 'gate'), key, strict=True))
    | _measure(row, stage, workdir)
    | {'reward_rise': _rise(logs[key])}
    for key, row in rows.items()
  ]
  results = {
    'start': {
      order: _measure(row, stage, workdir) for order, row in starts.items()
    },
    'cells': cells,
    'seeds': len(config.seeds),
  }
  _draw(logs, cells, workdir / FIGURE)
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  return results


def _measure(
  row: study.Row, stage: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict[str, Any]:
  """Metrics of a row's policies; `stage` is the section `study_hacking`."""
  tests = study.rank(
    row,
    workdir,
    slates=stage.test_slates,
    batch_size=row.config.rl.eval_batch_size,
    extras=('order_sensitivity',),
  )
  slates = tests[0].slates
  metrics = [t.metrics(t.generated) for t in tests]
  gain = statistics.two_level_bootstrap(
    study.stack(metrics, 'n@5'),
    tests[0].incoming['n@5'],
    slates.user,
    resamples=stage.resamples,
  )
  first = study.stack(metrics, 'first_pick').astype(int)
  histogram = np.bincount(first.ravel(), minlength=slates.grades.shape[1])
  means = {
    name: float(study.stack(metrics, name).mean())
    for name in ('n@5', 'r@1', 'copied', 'top3_unchanged', 'kendall_tau')
  }
  return means | {
    'n@5_gain': gain.estimate,
    'n@5_gain_ci': [gain.low, gain.high],
    'first_pick': (histogram / histogram.sum()).tolist(),
    'order_sensitivity': float(np.mean([t.order_sensitivity for t in tests])),
  }


def _rise(logs: list[list[dict]]) -> float:
  """Training reward of the last fifth of the steps minus that of the first."""
  rises = []
  for rows in logs:
    rewards = [row['reward'] for row in rows if 'reward' in row]
    part = max(1, len(rewards) // 5)
    rises.append(np.mean(rewards[-part:]) - np.mean(rewards[:part]))
  return float(np.mean(rises))


def summary(results: dict[str, Any]) -> str:
  """The study as a table; the start of each order comes first."""
  rows = []
  for order, start in results['start'].items():
    rows.append(_row({'order': order, 'reward': '(start)', 'gate': ''} | start))
    rows += [_row(c) for c in results['cells'] if c['order'] == order]
  return reporting.table(rows, COLUMNS)


def _row(cell: dict[str, Any]) -> dict[str, Any]:
  """One line of the table."""
  gain = reporting.interval(cell['n@5_gain'], *cell['n@5_gain_ci'])
  return {
    'order': cell['order'],
    'reward': cell['reward'],
    'gate': cell['gate'],
    'N@5 gain': gain,
    'copied': cell['copied'],
    'top 3 kept': cell['top3_unchanged'],
    'tau': cell['kendall_tau'],
    'order sens.': cell['order_sensitivity'],
    'first pick 0': cell['first_pick'][0],
    'reward rise': cell.get('reward_rise'),
  }


def _draw(
  logs: dict[tuple[str, str, str], list[list[dict]]],
  cells: list[dict[str, Any]],
  path: pathlib.Path,
) -> None:
  """Draws training curves: a column an order, a color a gate, a dash a reward.

  The last row of panels shows the incoming position of the first pick.
  """
  orders = list(dict.fromkeys(order for order, _, _ in logs))
  rewards = list(dict.fromkeys(reward for _, reward, _ in logs))
  gates = list(dict.fromkeys(gate for _, _, gate in logs))
  high = len(CURVES) + 1
  sheet = study.figure(4 * len(orders), 2.1 * high)
  axes = sheet.subplots(high, len(orders), squeeze=False, sharey='row')

  def style(reward: str, gate: str) -> dict[str, Any]:
    return {
      'color': f'C{gates.index(gate)}',
      'linestyle': ('-', '--', ':', '-.')[rewards.index(reward) % 4],
      'label': f'{reward}, {gate}',
    }

  for (order, reward, gate), runs in logs.items():
    column = axes[:, orders.index(order)]
    for axis, (title, field) in zip(column, CURVES.items(), strict=False):
      steps, values = _curve(runs, field)
      axis.plot(steps, values.mean(0), **style(reward, gate))
      axis.fill_between(
        steps,
        values.min(0),
        values.max(0),
        color=f'C{gates.index(gate)}',
        alpha=0.12,
        linewidth=0,
      )
      axis.set_ylabel(title)
  for cell in cells:
    axis = axes[-1, orders.index(cell['order'])]
    axis.plot(cell['first_pick'], **style(cell['reward'], cell['gate']))
    axis.set_xlabel('incoming position')
    axis.set_ylabel('first pick')
  for order, axis in zip(orders, axes[0], strict=True):
    axis.set_title(f'candidates: {order}')
  for axis in axes[-2]:
    axis.set_xlabel('step')
  axes[0, 0].legend(fontsize='x-small')
  sheet.savefig(path, dpi=110)


def _curve(runs: list[list[dict]], field: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps [t] and values [S, t], in at most about 20 averaged points."""
  values = [
    {row['step']: row[field] for row in rows if row.get(field) is not None}
    for rows in runs
  ]
  steps = np.array(sorted(set.intersection(*map(set, values))))
  curves = np.array([[run[s] for s in steps] for run in values])
  size = max(1, len(steps) // 20)
  whole = len(steps) // size * size
  return (
    steps[:whole].reshape(-1, size).mean(1),
    curves[:, :whole].reshape(len(runs), -1, size).mean(2),
  )
