"""Writes and stores the contexts of all slates with a trained compressor.

Decoding is greedy. A context stays full if it cannot be compressed or if its
compression is invalid; its record holds the reason.

Axes: n slates, K candidates, T compression tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gr2_jax.compressor import judge
from gr2_jax.compressor import rollouts as rollouts_lib
from gr2_jax.compressor.options import CompressorOptions
from gr2_jax.distributed import processes, sharding
from gr2_jax.ops import compression
from gr2_jax.pipeline import reporting
from gr2_jax.policy import policy
from gr2_jax.prompts import compressed, examples


@dataclasses.dataclass(frozen=True)
class Written:
  """Greedy compressions of some slates, on the host."""

  tokens: np.ndarray  # int32 [n, T]
  length: np.ndarray  # int32 [n], with <eos>
  presented: np.ndarray  # int32 [n, K], incoming rank of each slot
  count: np.ndarray  # int32 [n], candidates
  judged: judge.Judgment  # [n]


def make_write(
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  ranker: Any,
  order: str,
  compressor: CompressorOptions,
  budgets: Mapping[float, int],
  http_judge: judge.HttpJudge | None = None,
) -> Callable[..., Iterator[Written]]:
  """Compiles the compressor's greedy decoding.

  `budgets` has the tokens of the one ratio to write, `order` is one of
  `prompt.ORDERS`, and the rest is as in `rollouts.make_judged_rollouts`.

  Returns:
    `(params, slates, seed, desc) -> iterator of Written`. The presentation is a
    function of (seed, index); without `desc` there is no progress bar.
  """
  render = rollouts_lib.generation_rows(
    spec.prompter, budgets, order, http_judge is not None
  )
  grammar = rollouts_lib.grammar(spec.prompter, compressor.slack)
  greedy = rollouts_lib.sampler(
    grammar, budgets, constrained=compressor.constrained
  )

  def fields(rows, verified: judge.Verified, judged: judge.Judgment):
    del rows
    rollouts = verified.rollouts
    return rollouts.tokens, rollouts.length, judged

  decode = rollouts_lib.make_judged_rollouts(
    spec, greedy, compressor, ranker, http_judge, fields
  )

  def write(params, slates, seed: int, desc: str = '') -> Iterator[Written]:
    key = jax.random.key(0)  # Greedy decoding draws nothing.
    with (
      reporting.progress(
        len(slates), desc or 'compress', unit='slate', quiet=not desc
      ) as bar,
      sharding.activate(mesh),
    ):
      for n, batch in examples.in_order(
        slates, render, compressor.eval_batch_size, seed
      ):
        rows = sharding.shard_batch(batch, mesh)
        host = processes.gather_to_host(decode(params, rows, key))
        tokens, length, judged = jax.tree.map(lambda x, n=n: x[:n, 0], host)
        bar.update(n)
        yield Written(
          tokens, length, batch['incoming'][:n], batch['count'][:n], judged
        )

  return write


def store(
  spec: policy.PolicySpec, slates: Any, parts: Iterable[Written]
) -> Iterator[dict[str, np.ndarray]]:
  """Converts compressions of `slates` to records of `prompts.compressed`.

  `spec` is the ranker's, whose prompts have the full context; `parts` are in
  the order of the slates.
  """
  too_short = compressed.FAULTS.index('too_short')
  start = 0
  for part in parts:
    for row, count in enumerate(part.count.tolist()):
      whole = spec.prompter.context.reduce(
        spec.prompter.lines(slates[start + row]), None
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
        fault = too_short  # The anchors alone exceed the budget.
      yield compressed.record(written, whole, fault)
    start += len(part.count)
