"""Study: how much of a large teacher's gain a small student keeps, by method.

For each data set a teacher is trained once, and its students by every row of
the config: SFT on the teacher's traces, on-policy distillation, RL alone, RL
after either. One table, one figure.

Axes: S seeds, n slates, K candidates.
"""

import itertools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from gr2_jax.distributed import sharding
from gr2_jax.ops import statistics
from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.policy import claims, policy
from gr2_jax.studies import study

TABLE = 'distill.md'
FIGURE = 'distill.png'
TEACHER, READOUT = 'teacher', 'teacher, read-out'
METRICS = ('r@1', 'n@5', 'copied', 'top3_unchanged', 'kendall_tau')
CLAIMS = ('total', 'citations', 'categories', 'conclusion', 'claimed')
COLUMNS = (
  'data',
  'row',
  'R@1',
  'N@5',
  'N@5 gain',
  "of the teacher's",
  'copied',
  'reasoning',
  'citations',
  'categories',
  'conclusion',
)


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains the rows on every data set, measures them on test slates, draws.

  Args:
    config: every section that these stages and their inputs read;
      study_distill; seeds.
    inputs: none; the study makes its own runs.
    workdir: of this study; the runs go beside it.

  Returns:
    `data`, for each data set: `parameters` of teacher and student; `rows`: the
    metrics of the incoming order and of the teacher, and for each row means
    over seeds and slates, `n@5_gain` over the incoming order and `n@5_kept`,
    its share of the teacher's, each with a 95 % interval, and `claims`, the
    verified quality of its reasoning; `pairs`: differences of N@5 between rows;
    `traces`: by kind, the results of the stage `traces`.
  """
  del inputs
  study.figure(1, 1)  # Fails before the runs, not after.
  results = {
    'data': [
      {'data': dataset} | _study(config, dataset, workdir)
      for dataset in config.study_distill.datasets
    ],
    'seeds': len(config.seeds),
  }
  _draw(results, workdir / FIGURE)
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  return results


def _rows(
  config: ml_collections.ConfigDict, dataset: str, workdir: pathlib.Path
) -> dict[str, study.Row]:
  """Trains the teacher and plans its students."""
  stage = config.study_distill
  base = study.changed(
    config,
    {'data.source': dataset, 'prompt.evidence': stage.evidence[dataset]},
  )
  teaching = base.copy_and_resolve_references()
  teaching.update(stage.teacher.to_dict())
  teaching.sft.steps = stage.steps[dataset].teacher
  teaching.seeds = config.seeds[:1]
  teacher = study.Row(teaching, 'sft', teaching.sft.thinking)
  (teacher_run,) = study.train(teacher, workdir)
  learning = base.copy_and_resolve_references()
  learning.update(stage.student.to_dict())
  learning.traces.policy = learning.opd.policy = str(teacher_run)
  learning.opd.view = stage.views[dataset]
  learning.opd.steps = stage.steps[dataset].opd
  rows = {TEACHER: teacher}
  for name, target, kind, start in stage.rows:
    fields = {'traces.kind': kind} if kind else {}
    fields |= {f'{target}.start': start} if start else {}
    changed = study.changed(learning, fields)
    rows[name] = study.Row(changed, target, changed[target].thinking)
  return rows


def _study(
  config: ml_collections.ConfigDict, dataset: str, workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains and measures all rows on one data set."""
  stage = config.study_distill
  rows = _rows(config, dataset, workdir)
  for row in rows.values():
    study.train(row, workdir)
  tested = {
    name: study.rank(
      row,
      workdir,
      slates=stage.test_slates,
      batch_size=row.config[row.stage].eval_batch_size,
      extras=('claims',) if row.thinking else (),
    )
    for name, row in rows.items()
  }
  first = tested[TEACHER][0]
  metrics = {
    name: [t.metrics(t.generated) for t in tests]
    for name, tests in tested.items()
  }
  readout = {READOUT: [first.metrics(first.readout)]}
  metrics = {TEACHER: metrics[TEACHER]} | readout | metrics
  best = READOUT if stage.views[dataset] == 'readout' else TEACHER
  scores = {
    name: study.stack(by_seed, 'n@5') for name, by_seed in metrics.items()
  }
  incoming, users = first.incoming['n@5'], first.slates.user

  def measure(name: str) -> dict[str, Any]:
    means = {m: float(study.stack(metrics[name], m).mean()) for m in METRICS}
    gain = statistics.two_level_bootstrap(
      scores[name], incoming, users, resamples=stage.resamples
    )
    kept = statistics.share_of_gain(
      scores[name], scores[best][0], incoming, users, resamples=stage.resamples
    )
    return means | {
      'n@5_gain': gain._asdict(),
      'n@5_kept': kept._asdict(),
      'n@5_seeds': scores[name].mean(1).tolist(),
      'claims': claims.summary(_marks(tested.get(name, []))),
    }

  students = [name for name in rows if name != TEACHER]
  size = study.size(first.slates, config.seeds)
  return {
    'parameters': {
      'teacher': _parameters(rows[TEACHER].config, workdir.parent),
      'student': _parameters(rows[students[0]].config, workdir.parent),
    },
    'rows': [
      {'row': 'incoming'}
      | {m: float(first.incoming[m].mean()) for m in METRICS}
    ]
    + [{'row': name} | measure(name) for name in metrics],
    'pairs': [
      {'pair': f'{b} - {a}'}
      | statistics.two_level_bootstrap(
        scores[b], scores[a], users, resamples=stage.resamples
      )._asdict()
      for a, b in itertools.combinations(students, 2)
    ],
    'traces': {
      kind: artifacts.read_results(
        artifacts.plan(rows[name].config, 'traces').directory(workdir.parent)
      )
      for name, _, kind, _ in stage.rows
      if kind
    },
    'n_slates': size['n_slates'],
    'n_users': size['n_users'],
  }


def _marks(tests: list[study.Tested]) -> dict[str, np.ndarray]:
  """Marks of the reasoning of all seeds; empty where there is none."""
  if not tests or not tests[0].claims:
    return {}
  return {c: np.concatenate([t.claims[c] for t in tests]) for c in CLAIMS}


def _parameters(config: ml_collections.ConfigDict, root: pathlib.Path) -> int:
  """How many parameters a policy has."""
  needs = artifacts.plan(config, 'midtrain').inputs
  spec = policy.load(config, {k: a.directory(root) for k, a in needs.items()})
  return sum(
    x.size
    for x in jax.tree.leaves(
      spec.abstract_params(sharding.make_mesh(**config.mesh))
    )
  )


def summary(results: dict[str, Any]) -> str:
  """The study as tables and a line a data set."""
  rows, pairs, lines = [], [], []
  for data in results['data']:
    name = data['data']
    rows += [{'data': name} | _row(row) for row in data['rows']]
    pairs += [
      {
        'data': name,
        'difference of N@5': pair['pair'],
        '': reporting.interval(pair['estimate'], pair['low'], pair['high']),
      }
      for pair in data['pairs']
    ]
    big, small = (data['parameters'][k] for k in ('teacher', 'student'))
    lines.append(
      f'{name}: {data["n_slates"]} slates of {data["n_users"]} users, '
      f'{results["seeds"]} seed(s); teacher {big:,} parameters, student '
      f'{small:,}, {big / small:.1f} times fewer; traces kept: '
      + ', '.join(
        f'{kind} {t["traces"]} of {t["traces"] + t["rejected"]}'
        for kind, t in data['traces'].items()
      )
    )
  shown = reporting.table(pairs, ('data', 'difference of N@5', ''))
  return '\n\n'.join([reporting.table(rows, COLUMNS), *lines, shown])


def _row(row: dict[str, Any]) -> dict[str, Any]:
  """One line of the table."""
  line = {name: row[name.lower()] for name in ('row', 'R@1', 'N@5', 'copied')}
  if 'n@5_gain' not in row:  # The incoming order.
    return line
  line |= {
    'N@5 gain': reporting.interval(**row['n@5_gain']),
    "of the teacher's": reporting.interval(**row['n@5_kept'], form='.2f'),
    'reasoning': row['claims'].get('total'),
  }
  return line | {c: row['claims'].get(c) for c in CLAIMS[1:4]}


def _draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """Draws a row of panels a data set: gains, and the quality of reasoning."""
  high = len(results['data'])
  sheet = study.figure(10, 0.6 + 2.6 * high)
  axes = sheet.subplots(high, 2, squeeze=False, width_ratios=(2, 1))
  for data, (gains, marks) in zip(results['data'], axes, strict=True):
    rows = [row for row in data['rows'] if 'n@5_gain' in row]
    place = -np.arange(len(rows))
    for at, row in zip(place, rows, strict=True):
      gain = row['n@5_gain']
      color = 'C1' if row['row'] in (TEACHER, READOUT) else 'C0'
      gains.plot([gain['low'], gain['high']], [at, at], color=color)
      gains.plot(gain['estimate'], at, 'o', color=color)
    gains.axvline(0, color='grey', linewidth=0.8)
    gains.set_yticks(place, [row['row'] for row in rows])
    gains.set_title(f'{data["data"]}: N@5 gain over the incoming order')
    quality = [row['claims'].get('total') or 0.0 for row in rows]
    marks.barh(place, quality, color='C2')
    marks.set_xlim(0, 1)
    marks.set_yticks(place, [])
    marks.set_title('reasoning that can be verified')
  sheet.savefig(path, dpi=110)
