"""What studies share: the policies of their runs, tried on test slates.

Axes: n slates, K candidates.
"""

import dataclasses
import functools
import pathlib

import ml_collections
import numpy as np

from gr2_jax import artifacts, policy, ranker
from gr2_jax.data import claims
from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import metrics

_CLAIMS = 'claims/'


@dataclasses.dataclass(frozen=True)
class Tested:
  """What a policy did with test slates.

  Attributes:
    slates: the slates.
    generated: int32 [n, K] the answers, in incoming ranks.
    readout: int32 [n, K] the order of the slots' scores.
    sensitivity: float32 [n] how much an answer changes with a shuffled
      presentation.
    length: int32 [n] tokens that were written.
    claims: name -> float64 [n], what `claims.judge` finds in the reasoning;
      empty where there is none.
  """

  slates: slates_lib.Slates
  generated: np.ndarray
  readout: np.ndarray
  sensitivity: np.ndarray
  length: np.ndarray
  claims: dict[str, np.ndarray]

  @functools.cached_property
  def incoming(self) -> dict[str, np.ndarray]:
    """`ranker.watch` of the incoming order."""
    shape = self.slates.grades.shape
    order = np.broadcast_to(np.arange(shape[1]), shape)
    return ranker.watch(order, self.slates.grades, self.slates.count)


def rank_test(
  config: ml_collections.ConfigDict,
  stage: str,
  seed: int,
  workdir: pathlib.Path,
  *,
  slates: int,
  thinking: bool,
  batch_size: int,
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
  kept = workdir / f'{source.name}{"" if thinking else "-direct"}.npz'
  if not kept.exists():
    setup = policy.load(config, inputs, *policy.form_of(source))
    answer = functools.partial(
      ranker.rank,
      setup,
      setup.load_params(source),
      ranker.Chosen(records, chosen),
      thinking=thinking,
      batch_size=batch_size,
    )
    ranked = answer(order=config.prompt.order, seed=1)
    found = {}
    if thinking:
      found = claims.judge(
        setup.prompter,
        setup.catalog,
        ranker.Chosen(records, chosen),
        **{
          name: getattr(ranked, name)
          for name in ('tokens', 'length', 'presented', 'generated', 'verdict')
        },
      )
    again = answer(order='shuffled', seed=2)
    temporary = kept.with_suffix('.tmp.npz')
    np.savez(
      temporary,
      generated=ranked.generated,
      readout=ranked.readout,
      length=ranked.length,
      sensitivity=metrics.order_sensitivity(
        ranked.generated, again.generated, ranked.count
      ),
      **{_CLAIMS + name: values for name, values in found.items()},
    )
    temporary.replace(kept)
  with np.load(kept) as found:
    arrays = dict(found)
  judged = {k: arrays.pop(k) for k in tuple(arrays) if k.startswith(_CLAIMS)}
  return Tested(
    slates=records.slates().take(chosen),
    claims={k.removeprefix(_CLAIMS): v for k, v in judged.items()},
    **arrays,
  )
