"""The compressor: a policy that rewrites a slate's context, and its judge.

Asked for a share of its tokens, it writes the context anew (`Extraction`, or,
unconstrained, whatever it likes). What it wrote is verified id by id, read by a
frozen ranker in place of the whole, and paid (Eq. 10-11):

  r = (a r_comp + (1 - a) r_judge) l

All of it is one compiled function, from the prompt to the advantage, unless a
judge in words is asked in the ranker's place (`compressor_judge`). A context
that cannot be compressed, or of which nothing valid was written, stays whole.

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
from gr2_jax.ops import advantages, compression, losses, masking
from gr2_jax.policy import policy, sampling
from gr2_jax.prompts import prompt, vocabulary
from gr2_jax.train import policy_gradient

_COUNTED = 512  # training contexts of which an average one's tokens are known


def grammar(prompter: prompt.Prompter, slack: int) -> grammar_lib.Extraction:
  """The grammar of the compressions of a data set's prompts.

  Args:
    prompter: of the data set.
    slack: tokens by which a candidate's line may be longer than the first, and
      the first shorter than its share.

  Raises:
    ValueError: the prompts do not begin with the history.
  """
  words = prompter.vocabulary
  if prompter.layout != ('history', 'candidates'):
    raise ValueError(
      f'prompt.layout={prompter.layout}: the compressor reads the history '
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
  prompter: prompt.Prompter, slates: Any, keeps: Collection[float]
) -> dict[float, int]:
  """How many tokens a share of the context is.

  The share is of an average context of the training slates, so that a slate
  costs its readers the same whether its user is known for long or not.

  Args:
    prompter: of the data set.
    slates: random access to the training slates.
    keeps: shares.

  Returns:
    Share -> tokens of a compression at most, <eos> included.
  """
  few = np.linspace(0, len(slates) - 1, _COUNTED).astype(int)
  orders = (np.arange(int(slates[i]['count'])) for i in few)
  mean = np.mean(
    [
      context_tokens(prompter, prompter.prompt(slates[i], order)['prompt'])
      for i, order in zip(few, orders, strict=True)
    ]
  )
  return {keep: int(keep * mean) for keep in keeps}


def sampler(
  grammar: grammar_lib.Extraction,
  budgets: Mapping[float, int],
  *,
  group: int = 1,
  temperature: float = 0.0,
  constrained: bool = True,
) -> sampling.SamplingOptions:
  """A sampler with room for the largest budget, and for every slate's marks."""
  least = grammar.least(grammar.num_candidates)
  return sampling.SamplingOptions(
    group=group,
    max_tokens=max(least, *budgets.values()),
    temperature=temperature,
    constrained=constrained,
  )


def symbols(words: vocabulary.Vocabulary) -> compression.Symbols:
  """The token ids that compressions are verified by."""
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


def requests(
  prompter: prompt.Prompter,
  budgets: Mapping[float, int],
  order: str,
  remote: bool = False,
) -> Callable[..., dict[str, np.ndarray]]:
  """Rendering for the compressor: whole contexts, and how much is to be left.

  Args:
    prompter: of the data set.
    budgets: share of the tokens -> how many; one is drawn for each prompt.
    order: in which candidates are shown, of `prompt.ORDERS`.
    remote: whether a judge in words is to read of the slates.

  Returns:
    `(slate, rng) -> dict`, the fields of `examples.generation_rows`, and
    `budget` and `whole`, tokens of a compression at most and of the context. A
    copy is over any budget.
  """
  keeps = tuple(budgets)

  def render(slate, rng):
    shown = prompt.presentation(int(slate['count']), order, rng)
    row = prompter.prompt(slate, shown, rng)
    keep = keeps[int(rng.integers(len(keeps)))]
    whole = context_tokens(prompter, row['prompt'])
    ids = [*row['prompt'], *prompter.ask('<compress>', ratio=keep)]
    return row | {
      'prompt': prompt.pad(ids, prompter.prompt_tokens + 1, 'prompt'),
      'prompt_length': np.int32(len(ids)),
      'budget': np.int32(min(budgets[keep], whole - 1)),
      'whole': np.int32(whole),
      **(judge.told(slate) if remote else {}),
    }

  return render


def constraint_inputs(
  grammar: grammar_lib.Extraction, rows: dict[str, jax.Array]
) -> grammar_lib.Source:
  """What may be kept of prompts of `requests`."""
  return grammar.source(
    rows['prompt'], rows['prompt_length'], rows['count'], rows['budget']
  )


def imitation_loss(
  spec: policy.PolicySpec,
  grammar: grammar_lib.Extraction,
  config: sampling.SamplingOptions,
  stage,
):
  """Cross entropy of given compressions, under the sampler's own mask.

  Of several of a slate only the one counts that the ranker finds most like
  what it is held to, see `judge.make_likeness`.

  Args:
    spec: the policy's.
    grammar: of `grammar`.
    config: of `sampler`, of temperature 1.
    stage: section `compress`.

  Returns:
    `(params, ranker, rows) -> (loss, metrics)`; rows have `tokens` int32
    [P, G, T] and `length` int32 [P, G] beside the fields of `requests`.
  """
  target, likeness = judge.make_likeness(spec, symbols(spec.vocabulary), stage)

  def loss_fn(params, ranker, rows):
    tokens, length = rows['tokens'], rows['length']
    source = constraint_inputs(grammar, rows)
    like = likeness(ranker, target(ranker, rows), rows['count'], tokens, length)
    best = jnp.argmax(like, axis=1)[:, None]
    batch = policy_gradient.PolicyBatch(
      prompt=rows['prompt'],
      prompt_length=rows['prompt_length'],
      constraint_inputs=source,
      tokens=jnp.take_along_axis(tokens, best[..., None], axis=1),
      length=jnp.take_along_axis(length, best, axis=1),
      logp=None,
      advantage=None,
      use=None,
    )
    scores = policy_gradient.score(spec.model, params, batch, grammar, config)
    written = masking.length_mask(batch.length, tokens.shape[-1])
    loss = losses.token_cross_entropy(scores.logp, written).mean()
    return loss, {
      'entropy': masking.masked_mean(scores.entropy, written),
      'likeness_drawn': like.mean(),
      'likeness_best': like.max(axis=1).mean(),
    }

  return loss_fn


def make_draw(
  spec: policy.PolicySpec,
  grammar: grammar_lib.Extraction,
  config: sampling.SamplingOptions,
  stage,
) -> Callable[..., judge.Drawn]:
  """How compressions are sampled and verified.

  Args:
    spec: the policy's.
    grammar: of `grammar`.
    config: how to roll out.
    stage: slack, ellipsis_cost.

  Returns:
    `(params, rows, key) -> Drawn`; pure.
  """
  verify = make_verify(spec, stage)

  def draw(params, rows, key) -> judge.Drawn:
    source = constraint_inputs(grammar, rows)
    rollouts = sampling.sample(
      spec.model,
      params,
      rows['prompt'],
      rows['prompt_length'],
      source,
      key,
      grammar,
      config,
    )
    return verify(rows, source, rollouts)

  return draw


def make_verify(spec: policy.PolicySpec, stage) -> Callable[..., judge.Drawn]:
  """What can be said of compressions without a judge.

  Args:
    spec: the policy's.
    stage: slack, ellipsis_cost.

  Returns:
    `(rows, constraint_inputs, rollouts) -> Drawn`; pure.
  """
  marks = symbols(spec.vocabulary)

  def verify(rows, source, rollouts) -> judge.Drawn:
    tokens, length = rollouts.tokens, rollouts.length
    shown = rows['prompt'], rows['prompt_length']
    return judge.Drawn(
      source=source,
      rollouts=rollouts,
      verdict=compression.verify(
        tokens, length, *shown, rows['count'], rows['budget'], marks,
        2 * stage.slack,
      ),
      saved=compression.compression_reward(length, rows['whole']),
      preservation=compression.preservation(
        shown[0],
        compression.source_segments(*shown, marks) == 0,
        tokens,
        compression.segments(tokens, length, marks) == 0,
      ),
      ellipsis=compression.ellipsis_factor(
        tokens, length, marks, stage.ellipsis_cost
      ),
    )  # fmt: skip

  return verify


def make_judged(
  spec: policy.PolicySpec,
  grammar: grammar_lib.Extraction,
  config: sampling.SamplingOptions,
  stage,
  ranker: Any,
  remote: judge.Remote | None,
  use: Callable[..., Any],
) -> Callable[..., Any]:
  """Compiles sampling, judging, and what is to become of it.

  With a ranker as the judge this is one compiled function; with another, two,
  and the host between them.

  Args:
    spec: the policy's.
    grammar: of `grammar`.
    config: how to roll out.
    stage: section `compress`.
    ranker: parameters of the ranker; None where nobody judges.
    remote: who judges in its place, if any.
    use: `(rows, Drawn, Judgement) -> result`; pure.

  Returns:
    `(params, rows, key) -> result`.
  """
  draw = make_draw(spec, grammar, config, stage)

  def finish(rows, drawn: judge.Drawn, judged: compression.Judged):
    return use(rows, drawn, judge.pay(drawn, judged, stage.compression_weight))

  if remote is None:
    read = judge.nobody
    if ranker is not None:
      read = judge.make_ranker(spec, symbols(spec.vocabulary), stage)

    @jax.jit
    def whole(ranker, params, rows, key):
      drawn = draw(params, rows, key)
      judged = read(ranker, rows, drawn.rollouts, drawn.preservation)
      return finish(rows, drawn, judged)

    return functools.partial(whole, ranker)

  @jax.jit
  def begin(params, rows, key):
    """Compressions, and which of them the best marks would earn anything."""
    drawn = draw(params, rows, key)
    best = jnp.ones_like(drawn.saved)
    most = compression.reward(drawn.verdict, best, best, drawn.ellipsis, 0.0)
    return drawn, most > 0

  end = jax.jit(finish)

  def in_turn(params, rows, key):
    drawn, paid = begin(params, rows, key)
    return end(rows, drawn, remote(rows, drawn.rollouts, paid))

  return in_turn


def make_rollout_step(
  spec: policy.PolicySpec,
  grammar: grammar_lib.Extraction,
  config: sampling.SamplingOptions,
  stage,
  ranker: Any,
  remote: judge.Remote | None = None,
) -> Callable[..., tuple[policy_gradient.PolicyBatch, dict[str, jax.Array]]]:
  """Compiles rollouts and what they teach.

  Args:
    spec: the policy's.
    grammar: of `grammar`.
    config: how to roll out.
    stage: section `compress`.
    ranker: parameters of the ranker that judges.
    remote: who judges in its place, if any.

  Returns:
    `(params, rows, key) -> (PolicyBatch, watches)`.
  """

  def learn(rows, drawn: judge.Drawn, judged: judge.Judgement):
    rollouts = drawn.rollouts
    flat = advantages.zero_variance(judged.reward)
    batch = policy_gradient.PolicyBatch(
      prompt=rows['prompt'],
      prompt_length=rows['prompt_length'],
      constraint_inputs=drawn.source,
      tokens=rollouts.tokens,
      length=rollouts.length,
      logp=rollouts.logp,
      advantage=advantages.group_advantage(judged.reward, kind=stage.advantage),
      use=~flat,
    )
    written = masking.length_mask(rollouts.length, config.max_tokens)
    watches = judge.watch(judged) | {
      'flat_groups': flat.mean(),
      'length': rollouts.length.mean(),
      'sampler_entropy': masking.masked_mean(rollouts.entropy, written),
    }
    return batch, watches

  return make_judged(spec, grammar, config, stage, ranker, remote, learn)
