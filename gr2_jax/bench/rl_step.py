"""One RL step beside google-tunix's GRPO step: same model, same tokens.

python -m gr2_jax.bench.rl_step

A step is the rollout of a group of completions for every prompt, their
log-probabilities under a frozen reference, rewards and advantages, and one
AdamW update on the clipped surrogate with a KL term. Both sides start from the
same float32 parameters of the same decoder, read prompts of full length, and
draw every token of the budget: no end of sequence can be drawn. Their steps
alternate in one process. The first two of each compile and are not counted;
column `first` has the seconds of the very first.

Axes: P prompts, G group, T time.
"""

import functools
import os
import statistics
from collections.abc import Mapping

import jax
import numpy as np
from absl import app, flags, logging

from gr2_jax.bench import own_step, tunix_step
from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.pipeline import reporting

_SIZES = flags.DEFINE_list(
  'sizes', ['192+48', '1024+64'], 'Prompt tokens + completion tokens.'
)
_STEPS = flags.DEFINE_integer('steps', 10, 'Counted steps of each side.', 1)

WARM_UP = 2  # Steps that compile; tunix compiles its update twice.
MODEL = transformer.TransformerConfig(
  vocab_size=2048,
  d_model=128,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  d_ff=384,
  rope_base=1e6,  # The only one that tunix's Qwen3 has.
)


def interleave(
  steps: Mapping[str, own_step.Step],
  size: own_step.Size,
  count: int,
  vocab_size: int,
) -> dict[str, dict[str, float]]:
  """Runs the sides in turn, each on the same prompts.

  Args:
    steps: side -> step.
    size: of a step.
    count: counted steps of each side, after `WARM_UP` others.
    vocab_size: prompts are drawn from these ids, without 0.

  Returns:
    side -> median seconds of every phase and of their `total`, and the seconds
    of the `first` step, compilation included.
  """
  totals = {side: [] for side in steps}
  rng = np.random.default_rng(0)
  shape = (size.prompts, size.prompt)
  for index in range(WARM_UP + count):
    prompts = rng.integers(1, vocab_size, shape, np.int32)
    for side, step in steps.items():
      seconds = step(index, prompts)
      totals[side].append(seconds | {'total': sum(seconds.values())})
  return {
    side: {
      phase: statistics.median(row[phase] for row in rows[WARM_UP:])
      for phase in (*own_step.PHASES, 'total')
    }
    | {'first': rows[0]['total']}
    for side, rows in totals.items()
  }


def report(
  size: own_step.Size, found: Mapping[str, Mapping[str, float]]
) -> str:
  """The table of one size: a row a side."""
  rows = [{str(size): side, **seconds} for side, seconds in found.items()]
  return reporting.table(rows, (str(size), *own_step.PHASES, 'total', 'first'))


def ratio_line(
  size: own_step.Size, found: Mapping[str, Mapping[str, float]]
) -> str:
  """`ratio 192+48: 3.1`: tunix's median step over ours."""
  ratio = found['tunix']['total'] / found['gr2_jax']['total']
  return f'ratio {size}: {ratio:.1f}'


def measure(size: own_step.Size, count: int) -> dict[str, dict[str, float]]:
  """Times both sides at one size, once they are known to be the same model.

  Args:
    size: of a step.
    count: counted steps of each side.

  Returns:
    What `interleave` returns.

  Raises:
    RuntimeError: the two decoders differ in a log-probability.
  """
  params = sharding.unbox(transformer.init_params(MODEL, jax.random.key(0)))
  our_count = sum(x.size for x in jax.tree.leaves(params))
  our_step, our_logp = own_step.make_step(MODEL, size, params)
  their_step, their_logp, their_count = tunix_step.make_step(
    MODEL, size, params
  )
  draw = functools.partial(
    np.random.default_rng(1).integers, 1, MODEL.vocab_size, dtype=np.int32
  )
  prompts = draw(size=(size.prompts, size.prompt))
  tokens = draw(size=(size.prompts, size.group, size.completion))
  gap = np.abs(our_logp(prompts, tokens) - their_logp(prompts, tokens)).max()
  print(
    f'{size}: {our_count:,} parameters (gr2_jax), {their_count:,} (tunix); '
    f'log-probabilities differ by at most {gap:.0e}'
  )
  if not gap < 1e-3:
    raise RuntimeError(
      f'the two decoders differ by {gap:.1g} in a log-probability: the ratio '
      'would compare two different models'
    )
  steps = {'gr2_jax': our_step, 'tunix': their_step}
  return interleave(steps, size, count, MODEL.vocab_size)


def main(argv: list[str]) -> None:
  """Entry point of `app.run`: a table a size, then the ratios."""
  del argv
  logging.set_verbosity(logging.ERROR)
  sizes = [own_step.Size.parse(x) for x in _SIZES.value]
  ratios = []
  for size in sizes:
    found = measure(size, _STEPS.value)
    load = ', '.join(f'{x:.1f}' for x in os.getloadavg())
    print(
      f'{report(size, found)}\n'
      f'seconds, medians of {_STEPS.value} steps; {os.cpu_count()} cores, load '
      f'{load} (1, 5, 15 minutes)'
    )
    ratios.append(ratio_line(size, found))
  print('\n'.join(ratios))


if __name__ == '__main__':
  app.run(main)
