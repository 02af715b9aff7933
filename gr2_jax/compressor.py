"""The compressor: a policy that rewrites a slate's context, and its judge.

Asked for a share of its tokens, it writes the context anew (`Extraction`, or,
unconstrained, whatever it likes). What it wrote is verified id by id, read by a
frozen ranker in place of the whole, and paid (Eq. 10-11):

  r = (a r_comp + (1 - a) r_judge) l

All of it is one compiled function, from the prompt to the advantage. A context
that cannot be compressed, or of which nothing valid was written, stays whole.

Axes: P prompts, G compressions of each, S prompt tokens, T compression tokens,
K candidates.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax import (
  cluster,
  grammars,
  policy,
  policy_gradient,
  reporting,
  sampling,
  sharding,
)
from gr2_jax.data import batches, compressions, prompts, vocabulary
from gr2_jax.models import transformer
from gr2_jax.ops import advantages, compression, masking


class Judgement(NamedTuple):
  """What compressions are worth; arrays [P, G]."""

  verdict: jax.Array  # int32, of `compression.VERDICTS`
  kept: jax.Array  # float32, share of the context's tokens
  preservation: jax.Array  # float32, share of the history's evidence
  solvable: jax.Array  # bool, the ranker still finds a positive
  ranking: jax.Array  # float32, NDCG of the ranker's read-out
  judge: jax.Array  # float32, r_judge, of preservation and ranking
  reward: jax.Array  # float32, Eq. 10


def of(setup: policy.Setup, slack: int) -> policy.Setup:
  """The same tokens and shapes, to write compressions with.

  Args:
    setup: a ranker's.
    slack: tokens by which a candidate's line may differ from the first.

  Raises:
    ValueError: the prompts do not begin with the history.
  """
  prompter, words = setup.prompter, setup.vocabulary
  if prompter.layout != ('history', 'candidates'):
    raise ValueError(
      f'prompt.layout={prompter.layout}: the compressor reads the history '
      "first: ('history', 'candidates')"
    )
  grammar = grammars.Extraction(
    history=words.control['<history>'],
    candidates=words.control['<candidates>'],
    slot_base=words.slot_base,
    num_slots=words.layout.num_slots,
    num_candidates=prompter.num_candidates,
    eos=words.eos,
    pad=words.pad,
    slack=slack,
  )
  return dataclasses.replace(setup, grammar=grammar)


def sampler(
  setup: policy.Setup,
  keep: float,
  *,
  group: int = 1,
  temperature: float = 0.0,
  constrained: bool = True,
) -> sampling.SamplingConfig:
  """A sampler with room for that share of the longest context."""
  p = setup.prompter
  return sampling.SamplingConfig(
    group=group,
    max_tokens=max(int(keep * p.prompt_tokens), p.num_candidates + 2),
    temperature=temperature,
    constrained=constrained,
  )


def symbols(words: vocabulary.Vocabulary) -> compression.Symbols:
  """The token ids that compressions are verified by."""
  spelt = (words.pieces.spelling(token) for token in range(len(words)))
  return compression.Symbols(
    history=words.control['<history>'],
    candidates=words.control['<candidates>'],
    slot_base=words.slot_base,
    num_slots=words.layout.num_slots,
    eos=words.eos,
    marks=tuple(
      token
      for token, text in enumerate(spelt)
      if text and text.strip() in ('..', '...', '\u2026')
    ),
  )


def context_tokens(prompter: prompts.Prompter, ids: np.ndarray) -> int:
  """Tokens of a prompt's two blocks, as `prompter.prompt` returns it."""
  return len(ids) - len(prompter.opening) - len(prompter.closing)


def requests(
  prompter: prompts.Prompter, keeps: tuple[float, ...], order: str
) -> Callable[..., dict[str, np.ndarray]]:
  """Rendering for the compressor: whole contexts, and how much is to be left.

  Args:
    prompter: of the data set.
    keeps: shares of the tokens, one drawn for each prompt.
    order: in which candidates are shown, of `prompts.ORDERS`.

  Returns:
    `(slate, rng) -> dict`, the fields of `batches.requests` and `budget` and
    `whole`, tokens of a compression at most and of the context.
  """

  def render(slate, rng):
    shown = prompts.presentation(int(slate['count']), order, rng)
    row = prompter.prompt(slate, shown, rng)
    keep = float(keeps[int(rng.integers(len(keeps)))])
    whole = context_tokens(prompter, row['prompt'])
    ids = [*row['prompt'], *prompter.ask('<compress>', keep=keep)]
    return row | {
      'prompt': prompts.pad(ids, prompter.prompt_tokens + 1, 'prompt'),
      'prompt_length': np.int32(len(ids)),
      'budget': np.int32(keep * whole),
      'whole': np.int32(whole),
    }

  return render


def facts(
  grammar: grammars.Extraction, rows: dict[str, jax.Array]
) -> grammars.Source:
  """What may be kept of prompts of `requests`."""
  return grammar.source(
    rows['prompt'], rows['prompt_length'], rows['count'], rows['budget']
  )


def make_judge(setup: policy.Setup, stage) -> Callable[..., Judgement]:
  """How compressions are judged, by a ranker that reads them.

  Args:
    setup: of `of`.
    stage: slack, judge_k, judge_top, ellipsis_cost, compression_weight.

  Returns:
    `(ranker's parameters, rows, rollouts) -> Judgement`; pure.
  """
  marks = symbols(setup.vocabulary)
  before = jnp.array([*setup.prompter.opening, marks.history], jnp.int32)

  def read(params, rows, rollouts: sampling.Rollouts) -> jax.Array:
    """The ranker's scores [P, G, K]."""
    P, G, T = rollouts.tokens.shape
    K = setup.prompter.num_candidates
    tokens = rollouts.tokens.reshape(P * G, T)
    opening = jnp.broadcast_to(before, (P * G, len(before)))
    prompt = jnp.concatenate([opening, tokens], axis=1)
    slot = marks.slot_base + jnp.arange(K)
    places = jnp.argmax(tokens[:, None] == slot[:, None], axis=-1)
    hidden, _ = transformer.encode_prompt(
      setup.model,
      params,
      prompt,
      rollouts.length.reshape(-1) + len(before),
    )
    scores = transformer.slot_scores(params, hidden, places + len(before))
    return scores.reshape(P, G, K)

  def judge(params, rows, rollouts: sampling.Rollouts) -> Judgement:
    tokens, length = rollouts.tokens, rollouts.length
    source = rows['prompt'], rows['prompt_length']
    verdict = compression.verify(
      tokens, length, *source, rows['count'], rows['budget'], marks,
      2 * stage.slack,
    )  # fmt: skip
    preserved = compression.preservation(
      source[0],
      compression.source_segments(*source, marks) == 0,
      tokens,
      compression.segments(tokens, length, marks) == 0,
    )
    judged = compression.judge(
      read(params, rows, rollouts),
      rows['grades'],
      rows['count'],
      preserved,
      k=stage.judge_k,
      top=stage.judge_top,
    )
    saved = compression.compression_reward(length, rows['whole'])
    reward = compression.reward(
      verdict,
      saved,
      judged.total,
      compression.ellipsis_factor(tokens, length, marks, stage.ellipsis_cost),
      stage.compression_weight,
    )
    return Judgement(
      verdict=verdict,
      kept=1 - saved,
      preservation=preserved,
      solvable=judged.solvable,
      ranking=judged.ranking,
      judge=judged.total,
      reward=reward,
    )

  return judge


def make_act(setup: policy.Setup, config: sampling.SamplingConfig, stage):
  """Compiles `(params, rows, key) -> (PolicyBatch, watches)` of a judge.

  Args:
    setup: of `of`.
    config: how to roll out.
    stage: section `compress`.

  Returns:
    `(ranker's parameters, params, rows, key) -> (PolicyBatch, watches)`.
  """
  judge = make_judge(setup, stage)

  @jax.jit
  def act(ranker: Any, params: Any, rows: dict[str, jax.Array], key: jax.Array):
    source = facts(setup.grammar, rows)
    rollouts = sampling.sample(
      setup.model,
      params,
      rows['prompt'],
      rows['prompt_length'],
      source,
      key,
      setup.grammar,
      config,
    )
    judged = judge(ranker, rows, rollouts)
    flat = advantages.zero_variance(judged.reward)
    batch = policy_gradient.PolicyBatch(
      prompt=rows['prompt'],
      prompt_length=rows['prompt_length'],
      facts=source,
      tokens=rollouts.tokens,
      length=rollouts.length,
      logp=rollouts.logp,
      advantage=advantages.group_advantage(judged.reward, kind=stage.advantage),
      use=~flat,
    )
    written = masking.length_mask(rollouts.length, config.max_tokens)
    watches = watch(judged) | {
      'flat_groups': flat.mean(),
      'length': rollouts.length.mean(),
      'sampler_entropy': masking.masked_mean(rollouts.entropy, written),
    }
    return batch, watches

  return act


def watch(judged: Judgement) -> dict[str, jax.Array]:
  """Means of a judgement, and the share of each verdict."""
  means = {
    name: getattr(judged, name).mean()
    for name in Judgement._fields
    if name != 'verdict'
  }
  return means | {
    f'verdict/{name}': (judged.verdict == code).mean()
    for code, name in enumerate(compression.VERDICTS)
  }


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
  judged: Judgement


def make_write(
  setup: policy.Setup, ranker: Any, config, stage, keep: float
) -> Callable[..., Iterator[Written]]:
  """How slates are compressed greedily, a batch after another.

  Args:
    setup: of `of`.
    ranker: parameters of the judge.
    config: section prompt.
    stage: section `compress`.
    keep: share of the tokens.

  Returns:
    `(params, slates, seed, desc) -> iterator of Written`; the presentation is a
    function of (seed, index), and an empty `desc` shows no progress.
  """
  render = requests(setup.prompter, (keep,), config.prompt.order)
  greedy = sampler(setup, keep, constrained=stage.constrained)
  judge = make_judge(setup, stage)

  @jax.jit
  def answer(params, ranker, rows):
    rollouts = sampling.sample(
      setup.model,
      params,
      rows['prompt'],
      rows['prompt_length'],
      facts(setup.grammar, rows),
      jax.random.key(0),
      setup.grammar,
      greedy,
    )
    judged = judge(ranker, rows, rollouts)
    return {
      'tokens': rollouts.tokens,
      'length': rollouts.length,
      **judged._asdict(),
    }

  def write(params, slates, seed: int, desc: str = '') -> Iterator[Written]:
    with (
      reporting.progress(
        len(slates), desc or 'compress', unit='slate', quiet=not desc
      ) as bar,
      sharding.activate(setup.mesh),
    ):
      for n, batch in batches.in_order(
        slates, render, stage.eval_batch_size, seed
      ):
        rows = sharding.shard_batch(batch, setup.mesh)
        found = cluster.fetch(answer(params, ranker, rows))
        found = {name: x[:n, 0] for name, x in found.items()}
        bar.update(n)
        yield Written(
          tokens=found.pop('tokens'),
          length=found.pop('length'),
          presented=batch['incoming'][:n],
          count=batch['count'][:n],
          judged=Judgement(**found),
        )

  return write


def store(
  setup: policy.Setup, slates: Any, parts: Iterable[Written]
) -> Iterator[dict[str, np.ndarray]]:
  """Records of `compressions` of what was written, in order.

  Args:
    setup: the ranker's, whose prompts have the whole context.
    slates: those that were compressed.
    parts: of `make_write`.
  """
  too_short = compressions.FAULTS.index('too_short')
  at = 0
  for part in parts:
    for row, count in enumerate(part.count.tolist()):
      whole = setup.prompter.context.reduce(
        setup.prompter.lines(slates[at + row]), None
      )
      fault, length = int(part.judged.verdict[row]), int(part.length[row])
      written = whole
      if fault == compression.VALID:
        written = compressions.split_up(
          part.tokens[row, :length],
          setup.prompter,
          part.presented[row, :count],
        )
      elif fault == compression.OVER_BUDGET and length == count + 2:
        fault = too_short  # Nothing but the marks, and these did not fit.
      yield compressions.record(written, whole, fault)
    at += len(part.count)
