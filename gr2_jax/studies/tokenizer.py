"""Study: how techniques change semantic IDs, and how the IDs change ranking.

Trains a tokenizer for the plain recipe, each technique alone, all pairs, all
but one and all together, with every seed. Writes tables, with the techniques'
mean effects beside the published ones, and a figure. Each run is a `tokenizer`
artifact beside the study, so a killed study continues.

Axes: S seeds, n slates.
"""

import itertools
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gr2_jax.ops import statistics
from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.studies import study

TABLE = 'ablation.md'
FIGURE = 'ablation.png'
PLAIN = 'plain'

# Mean effect on uniqueness, in points, reported in arXiv 2602.07774.
PUBLISHED = {
  'ema': 66.2,
  'random': 28.7,
  'diversity': 0.6,
  'reset': -4.0,
  'contrastive': -13.2,
}
BEFORE_LAST = 'uniqueness_before_last_level'
MEASURES = ('uniqueness', BEFORE_LAST, 'reconstruction_r2')


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains the grid, ranks with some recipes' IDs, writes tables and figure.

  Args:
    config: every section that `tokenizer`, `sft` and their inputs read;
      study_tokenizer; seeds.
    inputs: none; the study makes its own runs.
    workdir: of this study; the runs go beside it.

  Returns:
    `rows`: for each recipe, means and deviations over the seeds; `effects`: of
    each technique on uniqueness, in points; `ranking`: test N@5 of policies
    that read the IDs, and the gain over the first recipe's, with a 95 %
    interval over seeds and users.
  """
  del inputs
  study.figure(1, 1)  # Fails before the runs, not after.
  stage = config.study_tokenizer
  recipes = make_recipes(stage)
  missing = [name for name in stage.ranked if name not in recipes]
  if missing:
    raise ValueError(
      f'study_tokenizer.ranked: {missing[0]!r} is no recipe; known: '
      f'{", ".join(recipes)}'
    )
  rows = {}
  for name, recipe in recipes.items():
    runs = [
      artifacts.run_stage(
        _with(config, recipe, seed), 'tokenizer', workdir.parent
      )
      for seed in config.seeds
    ]
    rows[name] = _row([artifacts.read_results(path) for path in runs])
  results = {
    'rows': rows,
    'effects': effects(rows, stage.techniques),
    'ranking': _rank(config, recipes, workdir),
    'seeds': len(config.seeds),
  }
  _draw(rows, workdir / FIGURE)
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  return results


def make_recipes(stage: ConfigDict) -> dict[str, dict[str, Any]]:
  """Name of each recipe -> the fields of `tokenizer` that it sets."""
  techniques = tuple(stage.techniques)
  plain, changes = stage.plain.to_dict(), stage.changes.to_dict()

  def combine(names: Iterable[str]) -> dict[str, Any]:
    fields = dict(plain)
    for name in names:
      fields |= changes[name]
    return fields

  combinations = [
    (),
    *((name,) for name in techniques),
    *itertools.combinations(techniques, 2),
    *(tuple(t for t in techniques if t != name) for name in techniques),
    techniques,
  ]
  recipes = {'+'.join(names) or PLAIN: combine(names) for names in combinations}
  for name, fields in stage.others.to_dict().items():
    recipes[name] = plain | fields
  # A ranked name `a+b+c` that is not in the grid is added.
  for name in stage.ranked:
    if name not in recipes and set(name.split('+')) <= set(changes):
      recipes[name] = combine(name.split('+'))
  return recipes


def _with(config: ConfigDict, recipe: dict[str, Any], seed: int) -> ConfigDict:
  """The config of one recipe and seed."""
  fields = {f'tokenizer.{name}': value for name, value in recipe.items()}
  return study.changed(
    config, fields | {'tokenizer.seed': seed, 'seeds': (seed,)}
  )


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
  """One recipe's means and deviations over its seeds."""
  row = {}
  for name in MEASURES:
    values = [run[name] for run in runs]
    row[name] = float(np.mean(values))
    row[f'{name}_deviation'] = float(np.std(values))
  row['usage'] = np.mean([run['usage'] for run in runs], axis=0).tolist()
  row['largest_prefix'] = float(np.mean([r['largest_prefix'][0] for r in runs]))
  return row


def effects(
  rows: dict[str, dict[str, Any]], techniques: Iterable[str]
) -> dict[str, dict[str, float]]:
  """Effect of adding each technique on uniqueness, in points.

  Returns:
    For each technique: `alone`, on the plain recipe; `mean` and `before_last`,
    the means over all pairs of rows that differ in it alone, for the whole
    tuple and for all but its last level; `pairs`, their number.
  """
  techniques = tuple(techniques)
  known = {
    frozenset(() if name == PLAIN else name.split('+')): row
    for name, row in rows.items()
    if name == PLAIN or set(name.split('+')) <= set(techniques)
  }

  def rise(pairs: list[tuple[dict, dict]], measure: str) -> float:
    differences = [100 * (a[measure] - b[measure]) for a, b in pairs]
    return float(np.mean(differences))

  effect = {}
  for technique in techniques:
    pairs = [
      (row, known[names - {technique}])
      for names, row in known.items()
      if technique in names and names - {technique} in known
    ]
    alone = known[frozenset({technique})], known[frozenset()]
    effect[technique] = {
      'alone': rise([alone], 'uniqueness'),
      'mean': rise(pairs, 'uniqueness'),
      'before_last': rise(pairs, BEFORE_LAST),
      'pairs': len(pairs),
    }
  return effect


def _rank(
  config: ConfigDict, recipes: dict[str, dict[str, Any]], workdir: pathlib.Path
) -> dict[str, dict[str, Any]]:
  """Trains policies on the ranked recipes' IDs and compares their rankings."""
  stage = config.study_tokenizer
  rows, base = {}, None
  for name in stage.ranked:
    tests = []
    for seed in config.seeds:
      row = study.Row(
        _with(config, recipes[name], seed), 'sft', config.sft.thinking
      )
      study.train(row, workdir)
      tests += study.rank(
        row,
        workdir,
        slates=stage.test_slates,
        batch_size=config.sft.eval_batch_size,
      )
    metrics = [test.metrics(test.generated) for test in tests]
    scores = study.stack(metrics, 'n@5')
    base = scores if base is None else base
    gain = statistics.two_level_bootstrap(
      scores, base, tests[0].slates.user, resamples=stage.resamples
    )
    rows[name] = {
      'n@5': float(scores.mean()),
      'r@1': float(study.stack(metrics, 'r@1').mean()),
      'incoming_n@5': float(tests[0].incoming['n@5'].mean()),
      'gain': gain.estimate,
      'gain_ci': [gain.low, gain.high],
    }
  return rows


def summary(results: dict[str, Any]) -> str:
  """The study as three tables."""

  def spread(row: dict[str, Any], name: str) -> str:
    return f'{100 * row[name]:.1f} ± {100 * row[f"{name}_deviation"]:.1f}'

  grid = [
    {
      'recipe': name,
      'unique %': spread(row, 'uniqueness'),
      'before the last level %': spread(row, BEFORE_LAST),
      'R2': row['reconstruction_r2'],
      'codes used, by level': ' '.join(f'{u:.2f}' for u in row['usage']),
      'largest first prefix': f'{row["largest_prefix"]:.0f}',
    }
    for name, row in results['rows'].items()
  ]
  effect = [
    {
      'technique': name,
      'alone': f'{row["alone"]:+.1f}',
      'mean effect': f'{row["mean"]:+.1f}',
      'pairs': row['pairs'],
      'published': f'{PUBLISHED[name]:+.1f}' if name in PUBLISHED else '',
      'before the last level': f'{row["before_last"]:+.1f}',
    }
    for name, row in results['effects'].items()
  ]
  ranking = [
    {
      'IDs': name,
      'N@5': row['n@5'],
      'R@1': row['r@1'],
      'incoming N@5': row['incoming_n@5'],
      'N@5 gain over the first': reporting.interval(
        row['gain'], *row['gain_ci']
      ),
    }
    for name, row in results['ranking'].items()
  ]
  return '\n\n'.join(
    reporting.table(rows, tuple(rows[0]))
    for rows in (grid, effect, ranking)
    if rows
  )


def _draw(rows: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
  """Draws each recipe's uniqueness, whole and before the last level."""
  sheet = study.figure(7, 1 + 0.24 * len(rows))
  axis = sheet.subplots()
  place = np.arange(len(rows))[::-1]
  for offset, name in ((0.2, 'uniqueness'), (-0.2, BEFORE_LAST)):
    axis.barh(
      place + offset,
      [100 * row[name] for row in rows.values()],
      0.38,
      xerr=[100 * row[f'{name}_deviation'] for row in rows.values()],
      label=name.replace('_', ' '),
    )
  axis.set_yticks(place, list(rows), fontsize='small')
  axis.set_xlabel('% of items; lines: deviation over seeds')
  axis.set_xlim(0, 102)
  axis.legend(fontsize='small', loc='lower left')
  sheet.savefig(path, dpi=110)
