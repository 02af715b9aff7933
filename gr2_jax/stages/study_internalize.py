"""Study: what a policy loses with its reasoning, and what training wins back.

The policy that reasons, the same one asked for its answer at once, the one that
was trained to answer at once, and the order of the scores at its slot tokens,
for which nothing is decoded. On all test slates, and on the hard ones, where
reasoning changed the first pick of most seeds.

Axes: S seeds, n slates, K candidates.
"""

import pathlib
from typing import Any

import numpy as np

from gr2_jax import artifacts, ranker, reporting
from gr2_jax.ops import statistics
from gr2_jax.stages import studies

TABLE = 'internalize.md'
BASE = 'with reasoning'
DROPPED = 'reasoning dropped'
METRICS = ('r@1', 'n@5')
COLUMNS = (
  'answers',
  'tokens',
  'R@1',
  'R@1 lost',
  'N@5',
  'N@5 lost',
  'hard R@1',
  'hard R@1 lost',
  'hard N@5',
  'hard N@5 lost',
)


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains what is not trained, and compares the answers on test slates.

  Args:
    config: every section that `internalize` and what it needs read;
      study_internalize; seeds.
    inputs: none: the runs are made here.
    workdir: of this stage; its parent gets the runs.

  Returns:
    `rows`: of each kind of answers `tokens` decoded, and for `all` and `hard`
    slates `r@1` and `n@5`, means over seeds and slates, and what is lost to the
    answers with reasoning, with a 95 % interval (`r@1_lost`, `n@5_lost`).
    `hard`: the share of slates that are.
  """
  del inputs
  stage, start = config.study_internalize, config.internalize.start
  for seed in config.seeds:
    artifacts.run_stage(config, 'internalize', workdir.parent, seed)

  def ask(source: str, thinking: bool) -> list[studies.Tested]:
    return [
      studies.rank_test(
        config,
        source,
        seed,
        workdir,
        slates=stage.test_slates,
        thinking=thinking,
        batch_size=config.internalize.eval_batch_size,
      )
      for seed in config.seeds
    ]

  # On the test slates, only now.
  reasoned, dropped = ask(start, True), ask(start, False)
  direct = ask('internalize', False)
  slates = direct[0].slates
  answers = {
    BASE: [(t.generated, t.length) for t in reasoned],
    DROPPED: [(t.generated, t.length) for t in dropped],
    'internalised': [(t.generated, t.length) for t in direct],
    'one pass': [(t.readout, 0 * t.length) for t in direct],
    'one pass, before': [(t.readout, 0 * t.length) for t in dropped],
  }
  scores = {
    name: [ranker.watch(r, slates.grades, slates.count) for r, _ in tests]
    for name, tests in answers.items()
  }
  changed = [
    a.generated[:, 0] != b.generated[:, 0]
    for a, b in zip(reasoned, dropped, strict=True)
  ]
  hard = np.mean(changed, axis=0) > 0.5
  rows = []
  for name, tests in answers.items():
    row = {
      'answers': name,
      'tokens': float(np.mean([length.mean() for _, length in tests])),
    }
    for kind, chosen in (('all', np.full(len(slates), True)), ('hard', hard)):
      row[kind] = {}
      for metric in METRICS if chosen.any() else ():
        own, base = (
          np.stack([w[metric][chosen] for w in scores[n]]) for n in (name, BASE)
        )
        row[kind][metric] = float(own.mean())
        row[kind][f'{metric}_lost'] = statistics.two_level_bootstrap(
          base, own, slates.user[chosen], resamples=stage.resamples
        )._asdict()
    rows.append(row)
  results = {
    'rows': rows,
    'hard': float(hard.mean()),
    'n_slates': len(slates),
    'n_users': len(np.unique(slates.user)),
    'seeds': len(config.seeds),
  }
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  return results


def summary(results: dict[str, Any]) -> str:
  """The study as a table and a line, for people."""
  lines = []
  for row in results['rows']:
    line = {'answers': row['answers'], 'tokens': f'{row["tokens"]:.1f}'}
    for kind, prefix in (('all', ''), ('hard', 'hard ')):
      for metric in METRICS if row[kind] else ():
        lost = row[kind][f'{metric}_lost']
        shown = f'{prefix}{metric.upper()}'
        line[shown] = row[kind][metric]
        line[f'{shown} lost'] = (
          reporting.interval(**lost) if row['answers'] != BASE else '-'
        )
    lines.append(line)
  counted = (
    f'{results["n_slates"]} slates of {results["n_users"]} users, '
    f'{results["seeds"]} seed(s); reasoning changed the first pick of '
    f'{results["hard"]:.1%}'
  )
  return f'{reporting.table(lines, COLUMNS)}\n\n{counted}'
