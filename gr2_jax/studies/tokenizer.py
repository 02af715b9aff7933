"""Study: what each technique does to semantic IDs, and what IDs do to ranking.

Trains a tokenizer for the plain recipe, each technique alone, all pairs, all
together and all but one, over the seeds, and writes one table, the techniques'
mean effects beside the published ones, and one figure. Each run is a
`tokenizer` artifact beside this one, so a study that was killed goes on.

Axes: S seeds, n slates.
"""

import itertools
import pathlib
from collections.abc import Iterable
from typing import Any

import ml_collections
import numpy as np

from gr2_jax.ops import statistics
from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.studies import study

TABLE = 'ablation.md'
FIGURE = 'ablation.png'
PLAIN = 'plain'

# Mean effect on uniqueness, in points, that arXiv 2602.07774 reports.
PUBLISHED = {
  'ema': 66.2,
  'random': 28.7,
  'diversity': 0.6,
  'reset': -4.0,
  'contrastive': -13.2,
}
MEASURES = (
  'uniqueness',
  'uniqueness_before_last_level',
  'reconstruction_r2',
)


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Runs the grid, ranks with its extremes, writes table and figure.

  Args:
    config: every section that `tokenizer`, `sft` and what they need read;
      study_tokenizer; seeds.
    inputs: none: the runs are made here.
    workdir: of this stage; its parent gets the runs.

  Returns:
    `rows`: for each recipe, means and deviations over the seeds; `effects`: of
    each technique on uniqueness, in points; `ranking`: test N@5 of policies
    that read the IDs, and their gain over the first recipe's, with a 95 %
    interval over seeds and users.
  """
  del inputs
  from matplotlib import figure  # noqa: F401  Fails before the runs, not after.

  stage = config.study_tokenizer
  recipes = make_recipes(stage)
  missing = [name for name in stage.ranked if name not in recipes]
  if missing:
    raise ValueError(
      f'study_tokenizer.ranked: {missing[0]!r} is no recipe; known: '
      f'{", ".join(recipes)}'
    )
  rows = {}
  for name, changes in recipes.items():
    runs = [
      artifacts.read_results(
        artifacts.run_stage(
          _with(config, changes, seed), 'tokenizer', workdir.parent
        )
      )
      for seed in config.seeds
    ]
    rows[name] = _row(runs)
  results = {
    'rows': rows,
    'effects': effects(rows, stage.techniques),
    'ranking': _rank(config, recipes, workdir),
    'seeds': len(config.seeds),
  }
  _draw(results, workdir / FIGURE)
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  return results


def make_recipes(stage) -> dict[str, dict[str, Any]]:
  """Name of each recipe -> the fields of `tokenizer` that it sets."""
  techniques = tuple(stage.techniques)
  chosen: list[tuple[str, ...]] = [()]
  chosen += [(name,) for name in techniques]
  chosen += itertools.combinations(techniques, 2)
  chosen += [tuple(t for t in techniques if t != name) for name in techniques]
  chosen += [techniques]
  plain = stage.plain.to_dict()
  changes = stage.changes.to_dict()
  recipes = {}
  for names in chosen:
    fields = dict(plain)
    for name in names:
      fields |= changes[name]
    recipes['+'.join(names) or PLAIN] = fields
  for name, fields in stage.others.to_dict().items():
    recipes[name] = plain | fields
  # A recipe that ranks need not be one of those above: `a+b+c` makes it.
  for name in [n for n in stage.ranked if n not in recipes]:
    if set(name.split('+')) <= set(changes):
      recipes[name] = dict(plain)
      for part in name.split('+'):
        recipes[name] |= changes[part]
  return recipes


def _with(
  config: ml_collections.ConfigDict, changes: dict[str, Any], seed: int
) -> ml_collections.ConfigDict:
  """The config of one run."""
  own = config.copy_and_resolve_references()
  own.tokenizer.update(changes)
  own.tokenizer.seed = seed
  return own


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
  """One recipe, over its seeds."""
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
  """What adding a technique does to uniqueness, in points.

  Args:
    rows: of `run`.
    techniques: their names.

  Returns:
    For each technique: `alone`, on the plain recipe; `mean` and `before_last`,
    the means over all pairs of rows that differ in it alone, of the whole
    tuple and of all but its last level; `pairs`, how many there are.
  """
  techniques = tuple(techniques)
  known = {
    frozenset(() if name == PLAIN else name.split('+')): row
    for name, row in rows.items()
    if name == PLAIN or set(name.split('+')) <= set(techniques)
  }
  found = {}
  for technique in techniques:
    pairs = [
      (row, known[names - {technique}])
      for names, row in known.items()
      if technique in names and names - {technique} in known
    ]

    def rise(measure: str, pairs=pairs) -> list[float]:
      return [100 * (a[measure] - b[measure]) for a, b in pairs]

    alone = known[frozenset({technique})], known[frozenset()]
    found[technique] = {
      'alone': rise('uniqueness', [alone])[0],
      'mean': float(np.mean(rise('uniqueness'))),
      'before_last': float(np.mean(rise('uniqueness_before_last_level'))),
      'pairs': len(pairs),
    }
  return found


def _rank(
  config: ml_collections.ConfigDict,
  recipes: dict[str, dict[str, Any]],
  workdir: pathlib.Path,
) -> dict[str, dict[str, Any]]:
  """Trains policies on some recipes' IDs, seed by seed, and compares them."""
  stage = config.study_tokenizer
  found, first = {}, None
  for name in stage.ranked:
    watches, users = [], None
    for seed in config.seeds:
      own = _with(config, recipes[name], seed)
      artifacts.run_stage(own, 'sft', workdir.parent, seed)
      tested = study.rank_test(
        own,
        'sft',
        seed,
        workdir,
        slates=stage.test_slates,
        thinking=config.sft.thinking,
        batch_size=config.sft.eval_batch_size,
      )
      users = tested.slates.user
      watches.append(tested.watch(tested.generated))
    scores = np.stack([w['n@5'] for w in watches])
    first = scores if first is None else first
    gain = statistics.two_level_bootstrap(
      scores, first, users, resamples=stage.resamples
    )
    found[name] = {
      'n@5': float(scores.mean()),
      'r@1': float(np.mean([w['r@1'] for w in watches])),
      'incoming_n@5': float(tested.incoming['n@5'].mean()),
      'gain': gain.estimate,
      'gain_ci': [gain.low, gain.high],
    }
  return found


def summary(results: dict[str, Any]) -> str:
  """The study as three tables, for people."""

  def spread(row: dict[str, Any], name: str) -> str:
    return f'{100 * row[name]:.1f} ± {100 * row[f"{name}_deviation"]:.1f}'

  grid = [
    {
      'recipe': name,
      'unique %': spread(row, 'uniqueness'),
      'before the last level %': spread(row, 'uniqueness_before_last_level'),
      'R2': row['reconstruction_r2'],
      'codes used, by level': ' '.join(f'{u:.2f}' for u in row['usage']),
      'largest first prefix': f'{row["largest_prefix"]:.0f}',
    }
    for name, row in results['rows'].items()
  ]
  effect = [
    {
      'technique': name,
      'alone': f'{found["alone"]:+.1f}',
      'mean effect': f'{found["mean"]:+.1f}',
      'pairs': found['pairs'],
      'published': f'{PUBLISHED[name]:+.1f}' if name in PUBLISHED else '',
      'before the last level': f'{found["before_last"]:+.1f}',
    }
    for name, found in results['effects'].items()
  ]
  ranking = [
    {
      'IDs': name,
      'N@5': row['n@5'],
      'R@1': row['r@1'],
      'incoming N@5': row['incoming_n@5'],
      'N@5 gain over the first': (
        f'{row["gain"]:+.4f} [{row["gain_ci"][0]:+.4f}, '
        f'{row["gain_ci"][1]:+.4f}]'
      ),
    }
    for name, row in results['ranking'].items()
  ]
  return '\n\n'.join(
    reporting.table(rows, tuple(rows[0]))
    for rows in (grid, effect, ranking)
    if rows
  )


def _draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """A bar a recipe: unique tuples, and unique before the last level."""
  from matplotlib import figure

  rows = results['rows']
  sheet = figure.Figure((7, 1 + 0.24 * len(rows)), layout='constrained')
  axis = sheet.subplots()
  place = np.arange(len(rows))[::-1]
  for offset, name, colour in (
    (0.2, 'uniqueness', 'C0'),
    (-0.2, 'uniqueness_before_last_level', 'C1'),
  ):
    axis.barh(
      place + offset,
      [100 * row[name] for row in rows.values()],
      0.38,
      xerr=[100 * row[f'{name}_deviation'] for row in rows.values()],
      color=colour,
      label=name.replace('_', ' '),
    )
  axis.set_yticks(place, list(rows), fontsize='small')
  axis.set_xlabel('% of items; lines: deviation over seeds')
  axis.set_xlim(0, 102)
  axis.legend(fontsize='small', loc='lower left')
  sheet.savefig(path, dpi=110)
