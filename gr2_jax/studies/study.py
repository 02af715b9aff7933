"""The comparison that all studies share: train, rank test slates, compare.

A study is a set of rows. A row is a policy: the config that differs from the
study's, and the stage that trains it. All rows are trained, with every seed,
before the test slates are read. Each run is an artifact beside the study, so a
study that was killed continues, and studies share their runs.

Axes: S seeds, n slates, K candidates.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections
import numpy as np

from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.ops import statistics
from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.policy import answers, policy
from gr2_jax.policy import ranking as ranking_lib

Name = TypeVar('Name', bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Row:
  """A policy of a study: `stage` trains it with `config`."""

  config: ml_collections.ConfigDict
  stage: str
  thinking: bool = False  # whether it reasons before it ranks


@dataclasses.dataclass(frozen=True)
class Tested:
  """A policy's answers to the test slates.

  Attributes:
    slates: the slates.
    generated: int32 [n, K], the written orders, in incoming ranks.
    readout: int32 [n, K], the orders of the read-out.
    length: int32 [n], decoded tokens.
    order_sensitivity: float32 [n], how much an answer changes with a shuffled
      presentation; None unless it is one of the extras.
    claims: name -> float64 [n], the marks of `claims.judge`; empty unless they
      are one of the extras.
  """

  slates: slates_lib.Slates
  generated: np.ndarray
  readout: np.ndarray
  length: np.ndarray
  order_sensitivity: np.ndarray | None
  claims: dict[str, np.ndarray]

  @functools.cached_property
  def incoming(self) -> dict[str, np.ndarray]:
    """Metrics [n] of the incoming order."""
    shape = self.slates.grades.shape
    return self.metrics(np.broadcast_to(np.arange(shape[1]), shape))

  def metrics(self, ranking: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics [n] of a ranking of the slates, int32 [n, K]."""
    return ranking_lib.slate_metrics(
      ranking, self.slates.grades, self.slates.count
    )


def changed(
  config: ml_collections.ConfigDict, fields: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """Copies a config and changes some of its fields, named `section.field`."""
  copy = config.copy_and_resolve_references()
  copy.update_from_flattened_dict(dict(fields))
  return copy


def train(row: Row, workdir: pathlib.Path) -> list[pathlib.Path]:
  """Trains a row's policy with every seed; returns the artifacts."""
  return [
    artifacts.run_stage(row.config, row.stage, workdir.parent, seed)
    for seed in row.config.seeds
  ]


def draw(
  slates: pathlib.Path, most: int
) -> tuple[slates_lib.SlateSource, np.ndarray]:
  """The test slates of an artifact, and the `most` of them a study reads."""
  source = slates_lib.SlateSource(slates, 'test')
  rng = np.random.default_rng(0)
  return source, np.sort(rng.permutation(len(source))[:most])


def rank(
  row: Row,
  workdir: pathlib.Path,
  *,
  slates: int,
  batch_size: int,
  extras: Collection[str] = (),
) -> list[Tested]:
  """Ranks a fixed draw of test slates with a row's policy of every seed.

  Args:
    row: whose policies are trained.
    workdir: of the study; stores the answers, which are made once.
    slates: how many, at most.
    batch_size: slates at a time.
    extras: of `answers.ranked`; the same at every call of a study.
  """
  return [
    _rank_seed(row, seed, workdir, slates, batch_size, extras)
    for seed in row.config.seeds
  ]


def _rank_seed(
  row: Row,
  seed: int,
  workdir: pathlib.Path,
  most: int,
  batch_size: int,
  extras: Collection[str],
) -> Tested:
  config = row.config
  plan = artifacts.plan(config, row.stage, seed)
  inputs = {k: a.directory(workdir.parent) for k, a in plan.inputs.items()}
  run = plan.directory(workdir.parent)
  source, chosen = draw(inputs['slates'], most)

  def load() -> tuple[policy.Policy, ranking_lib.Chosen]:
    spec = policy.load(config, inputs, *policy.form_of(run))
    mesh = sharding.make_mesh(**config.mesh)
    ranker = policy.Policy(spec, spec.load_params(run, mesh), mesh)
    return ranker, ranking_lib.Chosen(source, chosen)

  fields = answers.ranked(
    workdir / f'{run.name}{"" if row.thinking else "-direct"}.npz',
    load,
    thinking=row.thinking,
    order=config.prompt.order,
    batch_size=batch_size,
    seed=1,
    extras=extras,
  )
  return Tested(
    slates=source.slates().take(chosen),
    generated=fields['generated'],
    readout=fields['readout'],
    length=fields['length'],
    order_sensitivity=fields.get('order_sensitivity'),
    claims={
      name.removeprefix(answers.CLAIMS): values
      for name, values in fields.items()
      if name.startswith(answers.CLAIMS)
    },
  )


def stack(
  by_seed: Sequence[Mapping[str, np.ndarray]], metric: str
) -> np.ndarray:
  """One metric of every seed and slate: [S, n]."""
  return np.stack([metrics[metric] for metrics in by_seed])


def compare(
  scores: Mapping[Name, Mapping[str, np.ndarray]],
  base: Name,
  users: np.ndarray,
  resamples: int,
) -> dict[Name, dict[str, Any]]:
  """Compares every row with one of them, measure by measure.

  Args:
    scores: row -> measure -> float [S, n].
    base: the row that the others are compared with.
    users: [n], of the slates.
    resamples: of the intervals, over seeds and users.

  Returns:
    Row -> for each measure the mean over seeds and slates, and under
    `<measure>_lost` the loss against the base with a 95 % interval.
  """
  rows: dict[Name, dict[str, Any]] = {name: {} for name in scores}
  for name, measures in scores.items():
    for measure, values in measures.items():
      rows[name][measure] = float(values.mean())
      rows[name][f'{measure}_lost'] = statistics.two_level_bootstrap(
        scores[base][measure], values, users, resamples=resamples
      )._asdict()
  return rows


def size(slates: slates_lib.Slates, seeds: Collection[int]) -> dict[str, int]:
  """Counts of slates, users and seeds, for the results."""
  return {
    'n_slates': len(slates),
    'n_users': len(np.unique(slates.user)),
    'seeds': len(seeds),
  }


def size_in_words(results: Mapping[str, Any]) -> str:
  """The counts of `size` as text."""
  return (
    f'{results["n_slates"]} slates of {results["n_users"]} users, '
    f'{results["seeds"]} seed(s)'
  )


def columns(shown: Mapping[str, str]) -> list[str]:
  """The columns of `cells`: for each measure its mean and its loss."""
  return [name + end for name in shown.values() for end in ('', ' lost')]


def cells(
  row: Mapping[str, Any], shown: Mapping[str, str], base: bool
) -> dict[str, Any]:
  """Formats a row of `compare` for a table.

  Args:
    row: of `compare`.
    shown: measure -> its name in the table.
    base: whether the others are compared with this row.
  """
  line = {}
  for measure, name in shown.items():
    line[name] = row[measure]
    line[f'{name} lost'] = (
      '-' if base else reporting.interval(**row[f'{measure}_lost'])
    )
  return line


def figure(width: float, height: float) -> Any:
  """A new matplotlib figure.

  Raises:
    ImportError: the extra `report` is not installed. Studies that draw make a
      figure before their runs, so that this does not happen after them.
  """
  from matplotlib import figure as figure_lib

  return figure_lib.Figure((width, height), layout='constrained')
