"""Rollouts of the compressor: sampled, verified, judged and rewarded.

The prompt is a full context and the ratio to compress it to. The compressor
writes a new context, by the grammar `Extraction` or unconstrained. The new
context is verified id by id, judged, and rewarded (Eq. 10-11):

  r = (a r_comp + (1 - a) r_judge) l

With a ranker as the judge, everything from the prompt to the advantage is one
compiled function.

Axes: P prompts, G compressions of each, S prompt tokens, T compression tokens,
K candidates.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.compressor import grammar as grammar_lib
from gr2_jax.compressor import judge
from gr2_jax.compressor.options import CompressorOptions
from gr2_jax.ops import advantages, compression, losses, masking
from gr2_jax.policy import policy, sampling
from gr2_jax.prompts import prompt, vocabulary
from gr2_jax.train import policy_gradient

_CONTEXTS = 512  # training contexts whose tokens are averaged

Rows = dict[str, jax.Array]


def grammar(prompter: prompt.Prompter, slack: int) -> grammar_lib.Extraction:
  """The grammar of the compressions of a data set's prompts.

  Raises:
    ValueError: the prompts do not begin with the history.
  """
  words = prompter.vocabulary
  if prompter.layout != ('history', 'candidates'):
    raise ValueError(
      f'prompt.layout={prompter.layout}: the compressor needs the history '
      "first: ('history', 'candidates')"
    )
  return grammar_lib.Extraction(
    history=words.control['<history>'],
    candidates=words.control['<candidates>'],
    slot_base=words.slot_base,
    num_slots=words.layout.num_slots,
    num_candidates=prompter.num_candidates,
    eos=words.eos,
    pad=words.pad,
    slack=slack,
  )


def budgets(
  prompter: prompt.Prompter, slates: Any, ratios: Collection[float]
) -> dict[float, int]:
  """Converts ratios to tokens of a compression, <eos> included.

  A ratio is a share of the average context of the training `slates`, so that
  slates cost the same, however long a user's history is.
  """
  indices = np.linspace(0, len(slates) - 1, _CONTEXTS).astype(int)
  orders = (np.arange(int(slates[i]['count'])) for i in indices)
  mean = np.mean(
    [
      context_tokens(prompter, prompter.prompt(slates[i], order)['prompt'])
      for i, order in zip(indices, orders, strict=True)
    ]
  )
  return {ratio: int(ratio * mean) for ratio in ratios}


def sampler(
  grammar: grammar_lib.Extraction,
  budgets: Mapping[float, int],
  *,
  group: int = 1,
  temperature: float = 0.0,
  constrained: bool = True,
) -> sampling.SamplingOptions:
  """A sampler with room for the largest budget, and for every anchor."""
  minimum = grammar.min_tokens(grammar.num_candidates)
  return sampling.SamplingOptions(
    group=group,
    max_tokens=max(minimum, *budgets.values()),
    temperature=temperature,
    constrained=constrained,
  )


def symbols(words: vocabulary.Vocabulary) -> compression.Symbols:
  """The token ids that the verification of compressions reads."""
  return compression.Symbols(
    history=words.control['<history>'],
    candidates=words.control['<candidates>'],
    slot_base=words.slot_base,
    num_slots=words.layout.num_slots,
    eos=words.eos,
    marks=words.ellipses,
  )


def context_tokens(prompter: prompt.Prompter, ids: np.ndarray) -> int:
  """Tokens of a prompt's two blocks, as `prompter.prompt` returns it."""
  return len(ids) - len(prompter.opening) - len(prompter.closing)


def generation_rows(
  prompter: prompt.Prompter,
  budgets: Mapping[float, int],
  order: str,
  in_words: bool = False,
) -> Callable[..., dict[str, np.ndarray]]:
  """Renders full contexts as prompts of the compressor.

  Args:
    prompter: of full contexts.
    budgets: tokens of each ratio; a prompt draws one of them.
    order: of the candidates, see `prompt.ORDERS`.
    in_words: adds the fields that `judge.HttpJudge` reads.

  Returns:
    `(slate, rng) -> row`: the fields of `examples.generation_rows`, `budget`,
    the most tokens of a compression, and `whole`, the tokens of the context.
    The budget is below `whole`, so that a copy exceeds it.
  """
  ratios = tuple(budgets)

  def render(slate, rng):
    shown = prompt.presentation(int(slate['count']), order, rng)
    row = prompter.prompt(slate, shown, rng)
    ratio = ratios[int(rng.integers(len(ratios)))]
    whole = context_tokens(prompter, row['prompt'])
    ids = [*row['prompt'], *prompter.ask('<compress>', ratio=ratio)]
    return row | {
      'prompt': prompt.pad(ids, prompter.prompt_tokens + 1, 'prompt'),
      'prompt_length': np.int32(len(ids)),
      'budget': np.int32(min(budgets[ratio], whole - 1)),
      'whole': np.int32(whole),
      **(judge.slate_fields(slate) if in_words else {}),
    }

  return render


def constraint_inputs(
  grammar: grammar_lib.Extraction, rows: Rows
) -> grammar_lib.Source:
  """The grammar's inputs for rows of `generation_rows`."""
  return grammar.source(
    rows['prompt'], rows['prompt_length'], rows['count'], rows['budget']
  )


def imitation_loss(
  spec: policy.PolicySpec,
  options: sampling.SamplingOptions,
  compressor: CompressorOptions,
  params: Any,
  ranker: Any,
  rows: Rows,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross entropy of given compressions, under the sampler's mask; and metrics.

  Rows have `tokens` int32 [P, G, T] and `length` int32 [P, G] besides the
  fields of `generation_rows`. Of the compressions of a slate, only the one with
  the highest `judge.likeness` counts.
  """
  rules = grammar(spec.prompter, compressor.slack)
  tokens, length = rows['tokens'], rows['length']
  target = judge.likeness_target(spec, compressor.judge_by, ranker, rows)
  like = judge.likeness(spec, ranker, target, rows['count'], tokens, length)
  best = jnp.argmax(like, axis=1)[:, None]
  batch = policy_gradient.PolicyBatch(
    prompt=rows['prompt'],
    prompt_length=rows['prompt_length'],
    constraint_inputs=constraint_inputs(rules, rows),
    tokens=jnp.take_along_axis(tokens, best[..., None], axis=1),
    length=jnp.take_along_axis(length, best, axis=1),
    logp=None,
    advantage=None,
    use=None,
  )
  scores = policy_gradient.score(spec.model, params, batch, rules, options)
  written = masking.length_mask(batch.length, tokens.shape[-1])
  return losses.token_cross_entropy(scores.logp, written).mean(), {
    'entropy': masking.masked_mean(scores.entropy, written),
    'likeness_drawn': like.mean(),
    'likeness_best': like.max(axis=1).mean(),
  }


def sample(
  spec: policy.PolicySpec,
  options: sampling.SamplingOptions,
  compressor: CompressorOptions,
  params: Any,
  rows: Rows,
  key: jax.Array,
) -> judge.Verified:
  """Samples compressions of rows of `generation_rows`, and verifies them."""
  rules = grammar(spec.prompter, compressor.slack)
  source = constraint_inputs(rules, rows)
  prompts = rows['prompt'], rows['prompt_length']
  rollouts = sampling.sample(
    spec.model, params, *prompts, source, key, rules, options
  )
  return verify(spec, compressor, rows, source, rollouts)


def verify(
  spec: policy.PolicySpec,
  compressor: CompressorOptions,
  rows: Rows,
  source: grammar_lib.Source,
  rollouts: sampling.Rollouts,
) -> judge.Verified:
  """Verifies compressions, and computes their rewards but the judge's."""
  ids = symbols(spec.vocabulary)
  tokens, length = rollouts.tokens, rollouts.length
  context = rows['prompt'], rows['prompt_length']
  return judge.Verified(
    source=source,
    rollouts=rollouts,
    verdict=compression.verify(
      tokens, length, *context, rows['count'], rows['budget'], ids,
      2 * compressor.slack,
    ),
    saved=compression.compression_reward(length, rows['whole']),
    preservation=compression.preservation(
      context[0],
      compression.source_segments(*context, ids) == 0,
      tokens,
      compression.segments(tokens, length, ids) == 0,
    ),
    ellipsis=compression.ellipsis_factor(
      tokens, length, ids, compressor.ellipsis_cost
    ),
  )  # fmt: skip


def make_judged_rollouts(
  spec: policy.PolicySpec,
  options: sampling.SamplingOptions,
  compressor: CompressorOptions,
  ranker: Any,
  http_judge: judge.HttpJudge | None,
  finish: Callable[[Rows, judge.Verified, judge.Judgment], Any],
) -> Callable[..., Any]:
  """Compiles sampling, verification, judgment, and what follows from it.

  Args:
    spec: of the policy.
    options: of sampling.
    compressor: its options.
    ranker: parameters of the ranker that judges; None if nothing is judged.
    http_judge: judges instead of the ranker, on the host, between two compiled
      functions.
    finish: computes the result; pure.

  Returns:
    `(params, rows, key) -> result`.
  """
  draw = functools.partial(sample, spec, options, compressor)

  def conclude(rows, verified, judged: compression.Judged):
    weight = compressor.compression_weight
    return finish(rows, verified, judge.judgment(verified, judged, weight))

  if http_judge is None:

    @jax.jit
    def judged_by_ranker(ranker, params, rows, key):
      verified = draw(params, rows, key)
      judged = judge.judge_by_ranker(
        spec, compressor, ranker, rows, verified.rollouts, verified.preservation
      )
      return conclude(rows, verified, judged)

    return functools.partial(judged_by_ranker, ranker)

  @jax.jit
  def begin(params, rows, key):
    """Compressions, and which could earn a reward, with the best marks."""
    verified = draw(params, rows, key)
    best = jnp.ones_like(verified.saved)
    highest = compression.reward(
      verified.verdict, best, best, verified.ellipsis, 0.0
    )
    return verified, highest > 0

  end = jax.jit(conclude)

  def judged_by_http(params, rows, key):
    verified, eligible = begin(params, rows, key)
    return end(rows, verified, http_judge(rows, verified.rollouts, eligible))

  return judged_by_http


def make_rollout_step(
  spec: policy.PolicySpec,
  options: sampling.SamplingOptions,
  compressor: CompressorOptions,
  ranker: Any,
  http_judge: judge.HttpJudge | None = None,
) -> Callable[..., tuple[policy_gradient.PolicyBatch, dict[str, jax.Array]]]:
  """Compiles `(params, rows, key) -> (PolicyBatch, metrics)`.

  Arguments as of `make_judged_rollouts`.
  """

  def finish(rows: Rows, verified: judge.Verified, judged: judge.Judgment):
    rollouts = verified.rollouts
    flat = advantages.zero_variance(judged.reward)
    batch = policy_gradient.PolicyBatch(
      prompt=rows['prompt'],
      prompt_length=rows['prompt_length'],
      constraint_inputs=verified.source,
      tokens=rollouts.tokens,
      length=rollouts.length,
      logp=rollouts.logp,
      advantage=advantages.group_advantage(
        judged.reward, kind=compressor.advantage
      ),
      use=~flat,
    )
    written = masking.length_mask(rollouts.length, options.max_tokens)
    metrics = judge.metrics(judged) | {
      'flat_groups': flat.mean(),
      'length': rollouts.length.mean(),
      'sampler_entropy': masking.masked_mean(rollouts.entropy, written),
    }
    return batch, metrics

  return make_judged_rollouts(
    spec, options, compressor, ranker, http_judge, finish
  )
