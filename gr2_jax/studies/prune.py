"""Study: the loss of removing layers, and how much distillation recovers.

Compares the full policy with the pruned policy of every depth, before and after
distillation, by the written order and by the read-out, on test slates.
"""

import pathlib
from typing import Any

import numpy as np

from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.studies import study

TABLE = 'prune.md'
WHOLE = 'whole'
SHOWN = {'n@5': 'N@5', 'r@1': 'R@1', 'read-out n@5': 'read-out N@5'}
MEASURES = tuple(SHOWN)
COLUMNS = ('policy', 'layers', *study.columns(SHOWN), 'kept')


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains the policies and compares their answers to test slates.

  Args:
    config: every section that `prune` and its inputs read; study_prune; seeds.
    inputs: none; the study makes its own runs.
    workdir: of this study; the runs go beside it.

  Returns:
    `rows`: for each policy its `layers`; for each of MEASURES the mean over
    seeds and slates, and the loss against the full policy with a 95 % interval
    (`n@5_lost` ..); `kept`, the layers that remain, one list a seed.
  """
  del inputs
  stage = config.study_prune
  whole = WHOLE, config.model.num_layers
  rows = {whole: study.Row(config, config.prune.start)}
  for layers in stage.layers:
    for name, steps in (('cut', 0), ('distilled', config.prune.steps)):
      fields = {'prune.layers': layers, 'prune.steps': steps}
      rows[name, layers] = study.Row(study.changed(config, fields), 'prune')
  runs = {key: study.train(row, workdir) for key, row in rows.items()}
  tested = {
    key: study.rank(
      row,
      workdir,
      slates=stage.test_slates,
      batch_size=config.prune.eval_batch_size,
    )
    for key, row in rows.items()
  }
  slates = tested[whole][0].slates
  compared = study.compare(
    {key: _scores(answers) for key, answers in tested.items()},
    whole,
    slates.user,
    stage.resamples,
  )
  lines = []
  for key, measures in compared.items():
    line = {'policy': key[0], 'layers': key[1]} | measures
    if key != whole:
      line['kept'] = [artifacts.read_results(run)['kept'] for run in runs[key]]
    lines.append(line)
  results = {'rows': lines} | study.size(slates, config.seeds)
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  return results


def _scores(tested: list[study.Tested]) -> dict[str, np.ndarray]:
  """Measure -> float32 [S, n]."""
  written = [t.metrics(t.generated) for t in tested]
  readout = [t.metrics(t.readout) for t in tested]
  return {
    'n@5': study.stack(written, 'n@5'),
    'r@1': study.stack(written, 'r@1'),
    'read-out n@5': study.stack(readout, 'n@5'),
  }


def summary(results: dict[str, Any]) -> str:
  """The study as a table and a line of counts."""
  lines = []
  for row in results['rows']:
    kept = '; '.join(
      ' '.join(map(str, layers)) for layers in row.get('kept', ())
    )
    line = {'policy': row['policy'], 'layers': row['layers'], 'kept': kept}
    lines.append(line | study.cells(row, SHOWN, row['policy'] == WHOLE))
  table = reporting.table(lines, COLUMNS)
  return f'{table}\n\n{study.size_in_words(results)}'
