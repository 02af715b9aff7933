"""Study: the loss of dropping the reasoning, and how much training recovers.

Compares the policy that reasons, the same policy without its reasoning, the
policy trained to answer at once, and the read-outs, which decode nothing: on
all test slates, and on the hard ones, where reasoning changes the first pick of
most seeds.
"""

import pathlib
from typing import Any

import numpy as np

from gr2_jax.pipeline import reporting
from gr2_jax.studies import study

TABLE = 'internalize.md'
BASE = 'with reasoning'
DROPPED = 'reasoning dropped'
METRICS = ('r@1', 'n@5')
# Kind of slates -> metric -> its name in the table.
SHOWN = {
  'all': {'r@1': 'R@1', 'n@5': 'N@5'},
  'hard': {'r@1': 'hard R@1', 'n@5': 'hard N@5'},
}
COLUMNS = (
  'answers',
  'tokens',
  *study.columns(SHOWN['all']),
  *study.columns(SHOWN['hard']),
)


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains the policies and compares their answers to test slates.

  Args:
    config: every section that `internalize` and its inputs read;
      study_internalize; seeds.
    inputs: none; the study makes its own runs.
    workdir: of this study; the runs go beside it.

  Returns:
    `rows`: for each kind of answers the `tokens` decoded, and for `all` and
    `hard` slates `r@1` and `n@5`, means over seeds and slates, with the loss
    against the answers with reasoning and its 95 % interval (`r@1_lost`,
    `n@5_lost`). `hard`: the share of hard slates.
  """
  del inputs
  stage, start = config.study_internalize, config.internalize.start
  rows = (
    study.Row(config, start, thinking=True),
    study.Row(config, start),
    study.Row(config, 'internalize'),
  )
  for row in rows:
    study.train(row, workdir)
  reasoned, dropped, direct = (
    study.rank(
      row,
      workdir,
      slates=stage.test_slates,
      batch_size=config.internalize.eval_batch_size,
    )
    for row in rows
  )
  slates = direct[0].slates
  answers = {
    BASE: [(t.generated, t.length) for t in reasoned],
    DROPPED: [(t.generated, t.length) for t in dropped],
    'internalized': [(t.generated, t.length) for t in direct],
    'read-out': [(t.readout, 0 * t.length) for t in direct],
    'read-out, before': [(t.readout, 0 * t.length) for t in dropped],
  }
  metrics = {
    name: [direct[0].metrics(ranking) for ranking, _ in by_seed]
    for name, by_seed in answers.items()
  }
  changed = [
    a.generated[:, 0] != b.generated[:, 0]
    for a, b in zip(reasoned, dropped, strict=True)
  ]
  hard = np.mean(changed, axis=0) > 0.5

  def compare(chosen: np.ndarray) -> dict[str, dict[str, Any]]:
    """Compares on the chosen slates; empty rows where there are none."""
    scores = {
      name: {
        metric: study.stack(by_seed, metric)[:, chosen]
        for metric in (METRICS if chosen.any() else ())
      }
      for name, by_seed in metrics.items()
    }
    return study.compare(scores, BASE, slates.user[chosen], stage.resamples)

  on_all, on_hard = compare(np.full(len(slates), True)), compare(hard)
  lines = [
    {
      'answers': name,
      'tokens': float(np.mean([length.mean() for _, length in by_seed])),
      'all': on_all[name],
      'hard': on_hard[name],
    }
    for name, by_seed in answers.items()
  ]
  results = {'rows': lines, 'hard': float(hard.mean())}
  results |= study.size(slates, config.seeds)
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  return results


def summary(results: dict[str, Any]) -> str:
  """The study as a table and a line of counts."""
  lines = []
  for row in results['rows']:
    line = {'answers': row['answers'], 'tokens': f'{row["tokens"]:.1f}'}
    for kind, shown in SHOWN.items():
      if row[kind]:
        line |= study.cells(row[kind], shown, row['answers'] == BASE)
    lines.append(line)
  return (
    f'{reporting.table(lines, COLUMNS)}\n\n{study.size_in_words(results)}; '
    f'reasoning changed the first pick of {results["hard"]:.1%}'
  )
