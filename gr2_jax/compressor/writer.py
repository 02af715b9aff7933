"""Contexts written by a trained compressor, slate after slate, to be kept.

Greedy, and judged on the way where someone judges. A context that cannot be
compressed, or of which nothing valid was written, stays whole, and the record
says why.

Axes: n slates, K candidates, T compression tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gr2_jax.compressor import judge
from gr2_jax.compressor import rollouts as rollouts_lib
from gr2_jax.distributed import processes, sharding
from gr2_jax.ops import compression
from gr2_jax.pipeline import reporting
from gr2_jax.policy import policy
from gr2_jax.prompts import compressed, examples


@dataclasses.dataclass(frozen=True)
class Written:
  """Greedy compressions of some slates, on the host.

  Attributes:
    tokens: int32 [n, T].
    length: int32 [n], with <eos>.
    presented: int32 [n, K], incoming rank of each slot.
    count: int32 [n].
    judged: of `Judgement`, each [n].
  """

  tokens: np.ndarray
  length: np.ndarray
  presented: np.ndarray
  count: np.ndarray
  judged: judge.Judgement


def make_write(
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  ranker: Any,
  config,
  stage,
  budgets: Mapping[float, int],
  remote: judge.Remote | None = None,
) -> Callable[..., Iterator[Written]]:
  """How slates are compressed greedily, a batch after another.

  Args:
    spec: the policy's.
    mesh: where the parameters lie.
    ranker: parameters of the ranker that judges; None where nobody does.
    config: section prompt.
    stage: section `compress`.
    budgets: of `rollouts.budgets`, of the one share that is asked for.
    remote: who judges in the ranker's place, if any.

  Returns:
    `(params, slates, seed, desc) -> iterator of Written`; the presentation is a
    function of (seed, index), and an empty `desc` shows no progress.
  """
  render = rollouts_lib.requests(
    spec.prompter, budgets, config.prompt.order, remote is not None
  )
  grammar = rollouts_lib.grammar(spec.prompter, stage.slack)
  greedy = rollouts_lib.sampler(grammar, budgets, constrained=stage.constrained)

  def tell(rows, drawn: judge.Drawn, judged: judge.Judgement):
    del rows
    rollouts = drawn.rollouts
    return {
      'tokens': rollouts.tokens,
      'length': rollouts.length,
      **judged._asdict(),
    }

  answer = rollouts_lib.make_judged(
    spec, grammar, greedy, stage, ranker, remote, tell
  )

  def write(params, slates, seed: int, desc: str = '') -> Iterator[Written]:
    key = jax.random.key(0)  # The greedy draw nothing.
    with (
      reporting.progress(
        len(slates), desc or 'compress', unit='slate', quiet=not desc
      ) as bar,
      sharding.activate(mesh),
    ):
      for n, batch in examples.in_order(
        slates, render, stage.eval_batch_size, seed
      ):
        rows = sharding.shard_batch(batch, mesh)
        found = processes.gather_to_host(answer(params, rows, key))
        found = {name: x[:n, 0] for name, x in found.items()}
        bar.update(n)
        yield Written(
          tokens=found.pop('tokens'),
          length=found.pop('length'),
          presented=batch['incoming'][:n],
          count=batch['count'][:n],
          judged=judge.Judgement(**found),
        )

  return write


def store(
  spec: policy.PolicySpec, slates: Any, parts: Iterable[Written]
) -> Iterator[dict[str, np.ndarray]]:
  """Records of `compressions` of what was written, in order.

  Args:
    spec: the ranker's, whose prompts have the whole context.
    slates: those that were compressed.
    parts: of `make_write`.
  """
  too_short = compressed.FAULTS.index('too_short')
  at = 0
  for part in parts:
    for row, count in enumerate(part.count.tolist()):
      whole = spec.prompter.context.reduce(
        spec.prompter.lines(slates[at + row]), None
      )
      fault, length = int(part.judged.verdict[row]), int(part.length[row])
      written = whole
      if fault == compression.VALID:
        written = compressed.split_up(
          part.tokens[row, :length],
          spec.prompter,
          part.presented[row, :count],
        )
      elif fault == compression.OVER_BUDGET and length == count + 2:
        fault = too_short  # Nothing but the marks, and these did not fit.
      yield compressed.record(written, whole, fault)
    at += len(part.count)
