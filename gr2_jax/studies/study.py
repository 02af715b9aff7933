"""What studies share: policies tried on test slates, compared and tabulated.

Axes: S seeds, n slates, K candidates.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Hashable, Mapping
from typing import Any, TypeVar

import ml_collections
import numpy as np

from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import statistics
from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.policy import answers, policy
from gr2_jax.policy import ranking as ranking_lib

Name = TypeVar('Name', bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Tested:
  """What a policy did with test slates.

  Attributes:
    slates: the slates.
    generated: int32 [n, K] the answers, in incoming ranks.
    readout: int32 [n, K] the order of the slots' scores.
    length: int32 [n] tokens that were written.
    order_sensitivity: float32 [n] how much an answer changes with a shuffled
      presentation; None where it was not asked for.
    claims: name -> float64 [n], what `claims.judge` finds in the reasoning;
      empty where it was not asked for.
  """

  slates: slates_lib.Slates
  generated: np.ndarray
  readout: np.ndarray
  length: np.ndarray
  order_sensitivity: np.ndarray | None
  claims: dict[str, np.ndarray]

  @functools.cached_property
  def incoming(self) -> dict[str, np.ndarray]:
    """`ranking.watch` of the incoming order."""
    shape = self.slates.grades.shape
    return self.watch(np.broadcast_to(np.arange(shape[1]), shape))

  def watch(self, ranking: np.ndarray) -> dict[str, np.ndarray]:
    """`ranking.watch` of a ranking of the slates, int32 [n, K]."""
    return ranking_lib.watch(ranking, self.slates.grades, self.slates.count)


def rank_test(
  config: ml_collections.ConfigDict,
  stage: str,
  seed: int,
  workdir: pathlib.Path,
  *,
  slates: int,
  thinking: bool,
  batch_size: int,
  watches: Collection[str] = (),
) -> Tested:
  """Ranks a fixed draw of test slates with a finished policy.

  Args:
    config: of the policy's run.
    stage: that leaves a policy, finished beside the workdir.
    seed: of the run.
    workdir: of the study; keeps the answers, so they are made once.
    slates: how many, at most.
    thinking: whether the policy reasons first.
    batch_size: slates at a time.
    watches: as `answers.ranked` has them; the same at every call of a study.

  Returns:
    The answers.
  """
  plan = artifacts.plan(config, stage, seed)
  root = workdir.parent
  inputs = {k: a.directory(root) for k, a in plan.inputs.items()}
  source = plan.directory(root)
  records = slates_lib.source(inputs['slates'], 'test')
  rng = np.random.default_rng(0)
  chosen = np.sort(rng.permutation(len(records))[:slates])

  def load() -> tuple[policy.Setup, Any, ranking_lib.Chosen]:
    setup = policy.load(config, inputs, *policy.form_of(source))
    params = setup.load_params(source)
    return setup, params, ranking_lib.Chosen(records, chosen)

  found = answers.ranked(
    workdir / f'{source.name}{"" if thinking else "-direct"}.npz',
    load,
    thinking=thinking,
    order=config.prompt.order,
    batch_size=batch_size,
    seed=1,
    watches=watches,
  )
  return Tested(
    slates=records.slates().take(chosen),
    generated=found['generated'],
    readout=found['readout'],
    length=found['length'],
    order_sensitivity=found.get('order_sensitivity'),
    claims={
      name.removeprefix(answers.CLAIMS): values
      for name, values in found.items()
      if name.startswith(answers.CLAIMS)
    },
  )


def rank_tests(
  config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path, **how
) -> list[Tested]:
  """`rank_test` of each of the config's seeds; `how` are its keywords."""
  return [
    rank_test(config, stage, seed, workdir, **how) for seed in config.seeds
  ]


def compare(
  scores: Mapping[Name, Mapping[str, np.ndarray]],
  base: Name,
  users: np.ndarray,
  resamples: int,
) -> dict[Name, dict[str, Any]]:
  """Every policy beside one of them, measure by measure.

  Args:
    scores: policy -> measure -> float [S, n].
    base: the policy that the others are compared with.
    users: [n], of the slates.
    resamples: of the intervals, over seeds and users.

  Returns:
    Policy -> of each measure its mean over seeds and slates, and under
    `<measure>_lost` what is lost to the base, with a 95 % interval.
  """
  rows: dict[Name, dict[str, Any]] = {name: {} for name in scores}
  for name, own in scores.items():
    for measure, values in own.items():
      rows[name][measure] = float(values.mean())
      rows[name][f'{measure}_lost'] = statistics.two_level_bootstrap(
        scores[base][measure], values, users, resamples=resamples
      )._asdict()
  return rows


def size(slates: slates_lib.Slates, seeds: Collection[int]) -> dict[str, int]:
  """On how much a study stands, for its results."""
  return {
    'n_slates': len(slates),
    'n_users': len(np.unique(slates.user)),
    'seeds': len(seeds),
  }


def size_in_words(results: Mapping[str, Any]) -> str:
  """What `size` put into results, for people."""
  return (
    f'{results["n_slates"]} slates of {results["n_users"]} users, '
    f'{results["seeds"]} seed(s)'
  )


def columns(shown: Mapping[str, str]) -> list[str]:
  """The columns of `cells`: of every measure what it is, and what is lost."""
  return [name + end for name in shown.values() for end in ('', ' lost')]


def cells(
  row: Mapping[str, Any], shown: Mapping[str, str], base: bool
) -> dict[str, Any]:
  """A row of `compare` as cells of a table.

  Args:
    row: of `compare`.
    shown: measure -> what the table calls it.
    base: whether the row is the one that the others are compared with.
  """
  line = {}
  for measure, name in shown.items():
    lost = row[f'{measure}_lost']
    line[name] = row[measure]
    line[f'{name} lost'] = '-' if base else reporting.interval(**lost)
  return line
