"""One RL step compared with google-tunix's GRPO step: same model and tokens.

python -m gr2_jax.bench.rl_step

A step samples a group of completions for every prompt, computes their
log-probabilities under a frozen reference, rewards and advantages, and makes
one AdamW update on the clipped surrogate with a KL term. Both sides start from
the same float32 parameters and draw every token of the budget, because no end
of sequence can be drawn. Their steps alternate in one process. The first two
compile and do not count; column `first` has the seconds of the very first.
"""

import functools
import statistics
from collections.abc import Mapping

import jax
import numpy as np
from absl import app, flags, logging

from gr2_jax import bench
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
  """Runs the sides in turn, each on the same prompts, without id 0.

  Args:
    steps: side -> step.
    size: of a step.
    count: counted steps of each side, after `WARM_UP` others.
    vocab_size: of the prompts.

  Returns:
    Side -> median seconds of every phase and of their `total`, and the seconds
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
  size: own_step.Size, results: Mapping[str, Mapping[str, float]]
) -> str:
  """The table of one size: a row for each side."""
  rows = [{str(size): side, **seconds} for side, seconds in results.items()]
  return reporting.table(rows, (str(size), *own_step.PHASES, 'total', 'first'))


def ratio_line(
  size: own_step.Size, results: Mapping[str, Mapping[str, float]]
) -> str:
  """`ratio 192+48: 3.1`: tunix's median step over ours."""
  ratio = results['tunix']['total'] / results['gr2_jax']['total']
  return f'ratio {size}: {ratio:.1f}'


def measure(size: own_step.Size, count: int) -> dict[str, dict[str, float]]:
  """Checks that both sides have the same model, and times them.

  Raises:
    RuntimeError: the two decoders differ in a log-probability.
  """
  params = sharding.unbox(transformer.init_params(MODEL, jax.random.key(0)))
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
    f'{size}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters '
    f'(gr2_jax), {their_count:,} (tunix); '
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
  """Prints a table for each size, then the ratios."""
  del argv
  logging.set_verbosity(logging.ERROR)
  ratios = []
  for size in [own_step.Size.parse(x) for x in _SIZES.value]:
    results = measure(size, _STEPS.value)
    print(
      f'{report(size, results)}\n'
      f'seconds, medians of {_STEPS.value} steps; {bench.machine()}'
    )
    ratios.append(ratio_line(size, results))
  print('\n'.join(ratios))


if __name__ == '__main__':
  app.run(main)
