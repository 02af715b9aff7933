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

from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.studies import study

TABLE = 'internalize.md'
BASE = 'with reasoning'
DROPPED = 'reasoning dropped'
METRICS = ('r@1', 'n@5')
# Kind of slates -> metric -> what the table calls it.
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

  def ask(source: str, thinking: bool) -> list[study.Tested]:
    return study.rank_tests(
      config,
      source,
      workdir,
      slates=stage.test_slates,
      thinking=thinking,
      batch_size=config.internalize.eval_batch_size,
    )

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
    name: [direct[0].watch(ranking) for ranking, _ in tests]
    for name, tests in answers.items()
  }
  changed = [
    a.generated[:, 0] != b.generated[:, 0]
    for a, b in zip(reasoned, dropped, strict=True)
  ]
  hard = np.mean(changed, axis=0) > 0.5

  def compared(chosen: np.ndarray) -> dict[str, dict[str, Any]]:
    """Of some of the slates; nothing where there is none."""
    few = {
      name: {
        metric: np.stack([w[metric][chosen] for w in watches])
        for metric in (METRICS if chosen.any() else ())
      }
      for name, watches in scores.items()
    }
    return study.compare(few, BASE, slates.user[chosen], stage.resamples)

  everywhere, where_hard = compared(np.full(len(slates), True)), compared(hard)
  rows = [
    {
      'answers': name,
      'tokens': float(np.mean([length.mean() for _, length in tests])),
      'all': everywhere[name],
      'hard': where_hard[name],
    }
    for name, tests in answers.items()
  ]
  results = {
    'rows': rows,
    'hard': float(hard.mean()),
  } | study.size(slates, config.seeds)
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  return results


def summary(results: dict[str, Any]) -> str:
  """The study as a table and a line, for people."""
  lines = []
  for row in results['rows']:
    line = {'answers': row['answers'], 'tokens': f'{row["tokens"]:.1f}'}
    for kind, shown in SHOWN.items():
      if row[kind]:
        line |= study.cells(row[kind], shown, row['answers'] == BASE)
    lines.append(line)
  counted = (
    f'{study.size_in_words(results)}; reasoning changed the first pick of '
    f'{results["hard"]:.1%}'
  )
  return f'{reporting.table(lines, COLUMNS)}\n\n{counted}'
