"""Study: when does a policy copy the incoming order, and what stops it.

Trains {reward} x {gate} x {order of presentation} from policies that were
taught to copy, over the seeds, and writes one table and one figure. Each run is
an `rl` artifact beside this one: a study that was killed goes on, and runs that
it shares with others are not made twice.

Axes: S seeds, n slates, K candidates.
"""

import itertools
import pathlib
from typing import Any

import ml_collections
import numpy as np

from gr2_jax.ops import statistics
from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.studies import study

TABLE = 'hacking.md'
FIGURE = 'hacking.png'

# Rows of the figure: what is drawn over the steps, and its name in the log.
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
  """Runs the grid, measures its policies on test slates, draws.

  Args:
    config: every section that `rl` and what it needs read; study_hacking;
      seeds.
    inputs: none: the runs are made here.
    workdir: of this stage; its parent gets the runs.

  Returns:
    `start`: for each order, the policies that training starts from; `cells`:
    for each combination, what became of them. The watches are means over seeds
    and slates, `n@5_gain` is over the incoming order, with a 95 % interval.
  """
  del inputs
  from matplotlib import figure  # noqa: F401  Fails before the runs, not after.

  stage = config.study_hacking
  cells, starts, logs = [], {}, {}
  for order, reward, gate in itertools.product(
    stage.orders, stage.rewards, stage.gates
  ):
    own = config.copy_and_resolve_references()
    own.prompt.order, own.rl.reward, own.rl.gate = order, reward, gate
    runs = [
      artifacts.run_stage(own, 'rl', workdir.parent, seed)
      for seed in config.seeds
    ]
    name = {'order': order, 'reward': reward, 'gate': gate}
    logs[order, reward, gate] = [
      reporting.read_metrics(path / 'metrics.jsonl') for path in runs
    ]
    if order not in starts:
      starts[order] = _measure(own, 'sft', workdir)
    cells.append(
      name
      | _measure(own, 'rl', workdir)
      | {'reward_rise': _rise(logs[order, reward, gate])}
    )
  results = {'start': starts, 'cells': cells, 'seeds': len(config.seeds)}
  _draw(logs, cells, workdir / FIGURE)
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  return results


def _measure(
  config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path
) -> dict[str, Any]:
  """What became of the policies of a stage, one for each seed."""
  own = config.study_hacking
  tests = study.rank_tests(
    config,
    stage,
    workdir,
    slates=own.test_slates,
    thinking=config.rl.thinking,
    batch_size=config.rl.eval_batch_size,
    watches=('order_sensitivity',),
  )
  slates = tests[0].slates
  watches = [t.watch(t.generated) for t in tests]
  gain = statistics.two_level_bootstrap(
    np.stack([w['n@5'] for w in watches]),
    tests[0].incoming['n@5'],
    slates.user,
    resamples=own.resamples,
  )
  first = np.stack([w['first_pick'] for w in watches]).astype(int)
  histogram = np.bincount(first.ravel(), minlength=slates.grades.shape[1])
  means = {
    name: float(np.mean([w[name] for w in watches]))
    for name in ('n@5', 'r@1', 'copied', 'top3_unchanged', 'kendall_tau')
  }
  return means | {
    'n@5_gain': gain.estimate,
    'n@5_gain_ci': [gain.low, gain.high],
    'first_pick': (histogram / histogram.sum()).tolist(),
    'order_sensitivity': float(np.mean([t.order_sensitivity for t in tests])),
  }


def _rise(logs: list[list[dict]]) -> float:
  """Training reward of the last fifth of the steps over that of the first."""
  rises = []
  for rows in logs:
    rewards = [row['reward'] for row in rows if 'reward' in row]
    part = max(1, len(rewards) // 5)
    rises.append(np.mean(rewards[-part:]) - np.mean(rewards[:part]))
  return float(np.mean(rises))


def summary(results: dict[str, Any]) -> str:
  """The study as a table, for people; the start of each order comes first."""
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
  """Curves over training: a column an order, a colour a gate, a dash a reward.

  The last row shows which incoming position the first pick came from.
  """
  from matplotlib import figure

  orders = list(dict.fromkeys(order for order, _, _ in logs))
  rewards = list(dict.fromkeys(reward for _, reward, _ in logs))
  gates = list(dict.fromkeys(gate for _, _, gate in logs))
  high = len(CURVES) + 1
  sheet = figure.Figure((4 * len(orders), 2.1 * high), layout='constrained')
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
  """Steps [t] and values [S, t]; a metric of every step is averaged in 20s."""
  values = [
    {row['step']: row[field] for row in rows if row.get(field) is not None}
    for rows in runs
  ]
  steps = np.array(sorted(set.intersection(*map(set, values))))
  found = np.array([[run[s] for s in steps] for run in values])
  size = max(1, len(steps) // 20)
  whole = len(steps) // size * size
  return (
    steps[:whole].reshape(-1, size).mean(1),
    found[:, :whole].reshape(len(runs), -1, size).mean(2),
  )
