"""A policy's answers to test slates, made once: for `evaluate` and studies.

Axes: n slates, K candidates.
"""

import pathlib
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from gr2_jax.ops import metrics
from gr2_jax.policy import claims, policy, ranking

CLAIMS = 'claims/'  # Before the names of what is found in the reasoning.


def ranked(
  path: pathlib.Path,
  load: Callable[[], tuple[policy.Setup, Any, Any]],
  *,
  thinking: bool,
  order: str,
  batch_size: int,
  seed: int,
  watches: Collection[str] = (),
  desc: str = '',
) -> dict[str, np.ndarray]:
  """Ranks slates with a policy, or finds what it answered before.

  Args:
    path: the file that keeps the answers; where it is, nothing is loaded.
    load: `() -> (setup, parameters, random access to slates)`.
    thinking: whether the policy reasons first.
    order: in which candidates are shown, of `prompts.ORDERS`.
    batch_size: slates at a time.
    seed: of the presentation.
    watches: what is asked for beside the answers, some of `order_sensitivity`
      and `free_verdict`, which cost another pass each, and `claims`.
    desc: of a progress bar; empty for none.

  Returns:
    generated, readout, verdict and length, as `ranking.Ranked` has them. Where
    they are asked for: `order_sensitivity` float32 [n], how much an answer
    changes with a shuffled presentation; `free_verdict` int32 [n], without the
    permutation mask; what `claims.judge` finds in the reasoning, float64 [n]
    under CLAIMS + name.
  """
  if not path.exists():
    setup, params, slates = load()

    def answer(order: str, seed: int, constrained: bool) -> ranking.Ranked:
      return ranking.rank(
        setup,
        params,
        slates,
        thinking=thinking,
        order=order,
        batch_size=batch_size,
        seed=seed,
        constrained=constrained,
        desc=desc,
      )

    own = answer(order, seed, True)
    found = {
      name: getattr(own, name)
      for name in ('generated', 'readout', 'verdict', 'length')
    }
    if 'order_sensitivity' in watches:
      again = answer('shuffled', seed + 1, True)
      found['order_sensitivity'] = metrics.order_sensitivity(
        own.generated, again.generated, own.count
      )
    if 'free_verdict' in watches:
      found['free_verdict'] = answer(order, seed, False).verdict
    if 'claims' in watches:
      judged = claims.judge(
        setup.prompter,
        setup.catalog,
        slates,
        tokens=own.tokens,
        length=own.length,
        presented=own.presented,
        generated=own.generated,
        verdict=own.verdict,
      )
      found |= {CLAIMS + name: values for name, values in judged.items()}
    temporary = path.with_suffix('.tmp.npz')
    np.savez(temporary, **found)
    temporary.replace(path)
  with np.load(path) as kept:
    return dict(kept)
