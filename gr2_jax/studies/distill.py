"""Study: what a small student keeps of a large teacher, and by which way.

For each data set a teacher is trained once, and its students, over the seeds,
by every row of the config: SFT on the teacher's traces, on-policy distillation,
RL alone, RL after either. One table, one figure. Each run is an artifact beside
this one: a study that was killed goes on.

Axes: S seeds, n slates, K candidates.
"""

import itertools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

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
  """Runs the rows on every data set, measures them on test slates, draws.

  Args:
    config: every section that these stages and what they need read;
      study_distill; seeds.
    inputs: none: the runs are made here.
    workdir: of this stage; its parent gets the runs.

  Returns:
    `data`, for each data set: `parameters` of teacher and student; `rows`: the
    incoming order's and the teacher's numbers, and for each row means over
    seeds and slates, `n@5_gain` over the incoming order and `n@5_kept`, its
    share of the teacher's, each with a 95 % interval, and `claims`, the
    verified quality of its reasoning; `pairs`: differences of N@5 between rows;
    `traces`: by kind, what the teacher's traces came to.
  """
  del inputs
  from matplotlib import figure  # noqa: F401  Fails before the runs, not after.

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


def _study(
  config: ml_collections.ConfigDict, dataset: str, workdir: pathlib.Path
) -> dict[str, Any]:
  """All rows on one data set."""
  stage, root = config.study_distill, workdir.parent
  own = config.copy_and_resolve_references()
  own.data.source = dataset
  own.prompt.evidence = stage.evidence[dataset]
  own.seeds = config.seeds[:1]
  teaching = _with(own, stage.teacher)
  teaching.sft.steps = stage.steps[dataset].teacher
  own.seeds = config.seeds
  teacher = artifacts.run_stage(teaching, 'sft', root)

  learning = _with(own, stage.student)
  learning.traces.policy = learning.opd.policy = str(teacher)
  learning.opd.view = stage.views[dataset]
  learning.opd.steps = stage.steps[dataset].opd
  plans = {}
  for name, target, kind, start in stage.rows:
    plans[name] = plan = learning.copy_and_resolve_references()
    plan.traces.kind = kind or plan.traces.kind
    if start:
      plan[target].start = start
    for seed in config.seeds:
      artifacts.run_stage(plan, target, root, seed)

  # On the test slates, only now.
  tested = {TEACHER: _rank(teaching, 'sft', workdir)}
  for name, target, _, _ in stage.rows:
    tested[name] = _rank(plans[name], target, workdir)
  first = tested[TEACHER][0]
  watched = {
    name: [t.watch(t.generated) for t in tests]
    for name, tests in tested.items()
  }
  spoken = first.watch(first.readout)
  watched = {TEACHER: watched[TEACHER], READOUT: [spoken]} | watched
  best = READOUT if stage.views[dataset] == 'readout' else TEACHER
  scores = {
    name: np.stack([w['n@5'] for w in watches])
    for name, watches in watched.items()
  }
  base, users = first.incoming['n@5'], first.slates.user
  rows = [
    {'row': 'incoming'} | {m: float(first.incoming[m].mean()) for m in METRICS}
  ]
  for name, watches in watched.items():
    means = {m: float(np.mean([w[m] for w in watches])) for m in METRICS}
    measured = {
      'n@5_gain': statistics.two_level_bootstrap(
        scores[name], base, users, resamples=stage.resamples
      )._asdict(),
      'n@5_kept': statistics.share_of_gain(
        scores[name],
        scores[best][0],
        base,
        users,
        resamples=stage.resamples,
      )._asdict(),
      'n@5_seeds': scores[name].mean(1).tolist(),
      'claims': claims.summary(_marks(tested.get(name, []))),
    }
    rows.append({'row': name} | means | measured)
  return {
    'parameters': {
      'teacher': _size(teaching, root),
      'student': _size(learning, root),
    },
    'rows': rows,
    'pairs': [
      {'pair': f'{b} - {a}'}
      | statistics.two_level_bootstrap(
        scores[b], scores[a], users, resamples=stage.resamples
      )._asdict()
      for a, b in itertools.combinations(plans, 2)
    ],
    'traces': {
      kind: artifacts.read_results(
        artifacts.plan(plans[name], 'traces').directory(root)
      )
      for name, _, kind, _ in stage.rows
      if kind
    },
    'n_slates': len(users),
    'n_users': len(np.unique(users)),
  }


def _marks(tests: list[study.Tested]) -> dict[str, np.ndarray]:
  """What the reasoning of all seeds was found to be; empty without any."""
  if not tests or not tests[0].claims:
    return {}
  return {c: np.concatenate([t.claims[c] for t in tests]) for c in CLAIMS}


def _with(
  config: ml_collections.ConfigDict, sections: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """The config with some sections' fields changed."""
  own = config.copy_and_resolve_references()
  own.update(sections.to_dict())
  return own


def _rank(
  config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path
) -> list[study.Tested]:
  """The answers of a row, one for each seed."""
  thinking = config[stage].thinking
  return study.rank_tests(
    config,
    stage,
    workdir,
    slates=config.study_distill.test_slates,
    thinking=thinking,
    batch_size=config[stage].eval_batch_size,
    watches=('claims',) if thinking else (),
  )


def _size(config: ml_collections.ConfigDict, root: pathlib.Path) -> int:
  """Parameters of a policy."""
  needs = artifacts.plan(config, 'midtrain').inputs
  setup = policy.load(config, {k: a.directory(root) for k, a in needs.items()})
  return sum(x.size for x in jax.tree.leaves(setup.abstract_params()))


def summary(results: dict[str, Any]) -> str:
  """The study as tables, for people."""
  rows, pairs, lines = [], [], []
  for found in results['data']:
    dataset = found['data']
    rows += [{'data': dataset} | _row(row) for row in found['rows']]
    pairs += [
      {'data': dataset, 'difference of N@5': pair['pair'], '': _interval(pair)}
      for pair in found['pairs']
    ]
    big, small = (found['parameters'][k] for k in ('teacher', 'student'))
    lines.append(
      f'{dataset}: {found["n_slates"]} slates of {found["n_users"]} users, '
      f'{results["seeds"]} seed(s); teacher {big:,} parameters, student '
      f'{small:,}, {big / small:.1f} times fewer; traces kept: '
      + ', '.join(
        f'{kind} {t["traces"]} of {t["traces"] + t["rejected"]}'
        for kind, t in found['traces'].items()
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
    'N@5 gain': _interval(row['n@5_gain']),
    "of the teacher's": _interval(row['n@5_kept'], '.2f'),
    'reasoning': row['claims'].get('total'),
  }
  return line | {c: row['claims'].get(c) for c in CLAIMS[1:4]}


def _interval(found: dict[str, float], form: str = '+.4f') -> str:
  """An estimate and its interval, as text."""
  low, high = found['low'], found['high']
  return f'{found["estimate"]:{form}} [{low:{form}}, {high:{form}}]'


def _draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """A row of panels a data set: what each way gains, and how it reasons."""
  from matplotlib import figure

  high = len(results['data'])
  sheet = figure.Figure((10, 0.6 + 2.6 * high), layout='constrained')
  axes = sheet.subplots(high, 2, squeeze=False, width_ratios=(2, 1))
  for found, (gains, marks) in zip(results['data'], axes, strict=True):
    rows = [row for row in found['rows'] if 'n@5_gain' in row]
    place = -np.arange(len(rows))
    for at, row in zip(place, rows, strict=True):
      gain = row['n@5_gain']
      colour = 'C1' if row['row'] in (TEACHER, READOUT) else 'C0'
      gains.plot([gain['low'], gain['high']], [at, at], color=colour)
      gains.plot(gain['estimate'], at, 'o', color=colour)
    gains.axvline(0, color='grey', linewidth=0.8)
    gains.set_yticks(place, [row['row'] for row in rows])
    gains.set_title(f'{found["data"]}: N@5 gain over the incoming order')
    quality = [row['claims'].get('total') or 0.0 for row in rows]
    marks.barh(place, quality, color='C2')
    marks.set_xlim(0, 1)
    marks.set_yticks(place, [])
    marks.set_title('reasoning that can be verified')
  sheet.savefig(path, dpi=110)
