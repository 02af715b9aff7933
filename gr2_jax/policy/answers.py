"""A policy's answers to test slates, made once for `evaluate` and studies.

Axes: n slates, K candidates.
"""

import pathlib
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from gr2_jax.data import files
from gr2_jax.ops import metrics
from gr2_jax.policy import claims, ranking
from gr2_jax.policy import policy as policy_lib

CLAIMS = 'claims/'  # prefix of the marks of the reasoning


def ranked(
  path: pathlib.Path,
  load: Callable[[], tuple[policy_lib.Policy, Any]],
  *,
  thinking: bool,
  order: str,
  batch_size: int,
  seed: int,
  extras: Collection[str] = (),
  also: Callable[[policy_lib.Policy, Any], dict[str, np.ndarray]] | None = None,
  desc: str = '',
) -> dict[str, np.ndarray]:
  """Ranks slates with a policy, or reads the answers of an earlier call.

  Args:
    path: file of the answers; where it exists, nothing is loaded.
    load: `() -> (policy, random access to slates)`.
    thinking: whether the policy reasons first.
    order: how candidates are presented, one of `prompt.ORDERS`.
    batch_size: slates at a time.
    seed: of the presentation.
    extras: any of `order_sensitivity` and `free_verdict`, which rank all slates
      once more, and `claims`.
    also: `(policy, slates) -> more arrays to store`.
    desc: label of the progress bar; empty for none.

  Returns:
    `generated`, `readout`, `verdict` and `length` of `ranking.Ranked`. With the
    extras: `order_sensitivity` float32 [n], how much an answer changes with a
    shuffled presentation; `free_verdict` int32 [n], without the permutation
    mask; the marks of `claims.judge`, float64 [n] each, under CLAIMS + name.
  """
  if not path.exists():
    policy, slates = load()

    def answer(order: str, seed: int, constrained: bool) -> ranking.Ranked:
      return ranking.rank(
        policy,
        slates,
        thinking=thinking,
        order=order,
        batch_size=batch_size,
        seed=seed,
        constrained=constrained,
        desc=desc,
      )

    answers = answer(order, seed, True)
    fields = {
      name: getattr(answers, name)
      for name in ('generated', 'readout', 'verdict', 'length')
    }
    if 'order_sensitivity' in extras:
      again = answer('shuffled', seed + 1, True)
      fields['order_sensitivity'] = metrics.order_sensitivity(
        answers.generated, again.generated, answers.count
      )
    if 'free_verdict' in extras:
      fields['free_verdict'] = answer(order, seed, False).verdict
    if 'claims' in extras:
      catalog = policy.spec.catalog
      assert catalog is not None  # Every policy of a data set has one.
      marks = claims.judge(
        policy.spec.prompter,
        catalog,
        slates,
        tokens=answers.tokens,
        length=answers.length,
        presented=answers.presented,
        generated=answers.generated,
        verdict=answers.verdict,
      )
      fields |= {CLAIMS + name: values for name, values in marks.items()}
    if also:
      fields |= also(policy, slates)
    with files.atomic_write(path, 'wb') as file:
      np.savez(file, **fields)
  with np.load(path) as file:
    return dict(file)
