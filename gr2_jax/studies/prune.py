"""Study: what a policy loses with its layers, and what distillation wins back.

The whole policy, and at every depth the one that is left as it was cut and once
it is distilled; their rankings, and the order of the scores at their slots, for
which nothing is decoded. On test slates.
"""

import pathlib
from typing import Any

import numpy as np

from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.studies import study

TABLE = 'prune.md'
WHOLE = 'whole'
SHOWN = {'n@5': 'N@5', 'r@1': 'R@1', 'one pass n@5': 'one pass N@5'}
MEASURES = tuple(SHOWN)
COLUMNS = ('policy', 'layers', *study.columns(SHOWN), 'kept')


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains what is not trained, and compares the answers on test slates.

  Args:
    config: every section that `prune` and what it needs read; study_prune;
      seeds.
    inputs: none: the runs are made here.
    workdir: of this stage; its parent gets the runs.

  Returns:
    `rows`: of each policy its `layers`; of each of MEASURES the mean over
    seeds and slates, and what is lost to the whole policy, with a 95 %
    interval (`n@5_lost` ..); `kept`, the layers that stayed, a list a seed.
  """
  del inputs
  stage, start = config.study_prune, config.prune.start
  total = config.model.num_layers
  policies = {(WHOLE, total): (config, start)}
  for layers in stage.layers:
    for name, steps in (('cut', 0), ('distilled', config.prune.steps)):
      own = config.copy_and_resolve_references()
      own.prune.layers, own.prune.steps = layers, steps
      policies[name, layers] = own, 'prune'
  runs = {
    key: [
      artifacts.run_stage(own, source, workdir.parent, seed)
      for seed in config.seeds
    ]
    for key, (own, source) in policies.items()
  }
  # On the test slates, only now.
  tested = {
    key: study.rank_tests(
      own,
      source,
      workdir,
      slates=stage.test_slates,
      thinking=False,
      batch_size=config.prune.eval_batch_size,
    )
    for key, (own, source) in policies.items()
  }
  whole = WHOLE, total
  slates = tested[whole][0].slates
  compared = study.compare(
    {key: _scores(found) for key, found in tested.items()},
    whole,
    slates.user,
    stage.resamples,
  )
  rows = []
  for key, found in compared.items():
    row = {'policy': key[0], 'layers': key[1]} | found
    if key != whole:
      row['kept'] = [artifacts.read_results(run)['kept'] for run in runs[key]]
    rows.append(row)
  results = {'rows': rows} | study.size(slates, config.seeds)
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  return results


def _scores(tested: list[study.Tested]) -> dict[str, np.ndarray]:
  """Of each of MEASURES float32 [S, n]: S seeds, n slates."""
  found = []
  for answers in tested:
    own = answers.watch(answers.generated)
    one_pass = answers.watch(answers.readout)
    found.append((own['n@5'], own['r@1'], one_pass['n@5']))
  return dict(zip(MEASURES, np.stack(found, axis=1), strict=True))


def summary(results: dict[str, Any]) -> str:
  """The study as a table and a line, for people."""
  lines = []
  for row in results['rows']:
    line = {
      'policy': row['policy'],
      'layers': row['layers'],
      'kept': '; '.join(
        ' '.join(map(str, layers)) for layers in row.get('kept', ())
      ),
    }
    lines.append(line | study.cells(row, SHOWN, row['policy'] == WHOLE))
  table = reporting.table(lines, COLUMNS)
  return f'{table}\n\n{study.size_in_words(results)}'
