"""Rollouts: prefill once per slate, then one decode loop for its whole group.

A completion is `[reasoning </think>] slot * count <eos>`: the prompt's last
token says whether it reasons. The grammar is static; its state per rollout is
two small arrays, from which `allowed_tokens` makes the permutation mask. The
same function serves the decode loop and the scoring of finished completions,
so a constrained sampler and its learner agree token for token.

Axes: P prompts, G group, T completion time, K candidates, V vocabulary,
S slot tokens.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from gr2_jax.models import transformer
from gr2_jax.ops import parsing


@dataclasses.dataclass(frozen=True)
class Grammar:
  """The token ids that an answer is made of."""

  slot_base: int  # id of slot token 0; the others follow
  num_slots: int  # slot tokens in the vocabulary
  num_candidates: int  # K, the longest slate
  think_end: int
  eos: int
  pad: int


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How to decode; every field is static, so each value is one trace."""

  group: int  # rollouts of one slate
  max_tokens: int  # completion length, reasoning and answer together
  temperature: float = 1.0  # 0 = greedy
  thinking: bool = False  # the completion opens with a reasoning span
  constrained: bool = False  # permutation mask: every answer is valid


@flax.struct.dataclass
class Progress:
  """Where in the grammar each rollout stands, before its next token."""

  answering: jax.Array  # bool [...], past the reasoning
  emitted: jax.Array  # bool [..., K], candidates already listed
  done: jax.Array  # bool [...], <eos> was emitted


@flax.struct.dataclass
class Rollouts:
  """Sampled completions: these ids are what is scored and trained on."""

  tokens: jax.Array  # int32 [P, G, T], pad after the length
  length: jax.Array  # int32 [P, G], tokens with <eos>, at most T
  logp: jax.Array  # float32 [P, G, T], under the sampler; 0 after the length
  entropy: jax.Array  # float32 [P, G, T], of each token's distribution, nats


def start(grammar: Grammar, shape: tuple[int, ...], thinking: bool) -> Progress:
  """Progress before the first token."""
  return Progress(
    answering=jnp.full(shape, not thinking),
    emitted=jnp.zeros((*shape, grammar.num_candidates), bool),
    done=jnp.zeros(shape, bool),
  )


def advance(grammar: Grammar, progress: Progress, token: jax.Array) -> Progress:
  """Progress after `token` [...]; slots named while reasoning do not count."""
  slot = jax.nn.one_hot(
    token - grammar.slot_base, grammar.num_candidates, dtype=bool
  )
  return Progress(
    answering=progress.answering | (token == grammar.think_end),
    emitted=progress.emitted | (slot & progress.answering[..., None]),
    done=progress.done | (token == grammar.eos),
  )


def replay(grammar: Grammar, tokens: jax.Array, thinking: bool) -> Progress:
  """Progress before every token of finished completions [..., T]."""

  def step(progress, token):
    return advance(grammar, progress, token), progress

  first = start(grammar, tokens.shape[:-1], thinking)
  _, progress = jax.lax.scan(step, first, jnp.moveaxis(tokens, -1, 0))
  axis = tokens.ndim - 1
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), progress)


def allowed_tokens(
  grammar: Grammar,
  progress: Progress,
  count: jax.Array,
  remaining: jax.Array,
  vocab_size: int,
) -> jax.Array:
  """The permutation mask: which tokens keep the completion on its way.

  While reasoning everything but <eos> and padding is allowed, until just
  enough room is left to close it and to list every candidate; in the answer
  each candidate once, then <eos>.

  Args:
    grammar: token ids.
    progress: [...].
    count: int32 [...], candidates in the slate.
    remaining: int32 [...], tokens left in the budget, this one included.
    vocab_size: V.

  Returns:
    bool [..., V], at least one True everywhere.
  """
  ids = jnp.arange(vocab_size)
  K, base = grammar.num_candidates, grammar.slot_base
  allowed = parsing.answer_mask(progress.emitted, count)
  answer = jnp.zeros((*allowed.shape[:-1], vocab_size), bool)
  answer = answer.at[..., base : base + K].set(allowed[..., :K])
  answer = answer.at[..., grammar.eos].set(allowed[..., K])
  must_close = remaining <= count + 2
  close = ids == grammar.think_end
  text = (ids != grammar.eos) & (ids != grammar.pad)
  reasoning = jnp.where(must_close[..., None], close, text)
  return jnp.where(progress.answering[..., None], answer, reasoning)


def distribution(
  logits: jax.Array, temperature: float, allowed: jax.Array | None
) -> jax.Array:
  """Log-probabilities that are sampled from, and scored with.

  Args:
    logits: [..., V].
    temperature: 0 (greedy) leaves the logits as they are.
    allowed: bool [..., V], or None for all.

  Returns:
    float32 [..., V]; a forbidden token has a very negative one.
  """
  logits = logits.astype(jnp.float32) / (temperature or 1.0)
  if allowed is not None:
    logits = jnp.where(allowed, logits, jnp.finfo(jnp.float32).min)
  return jax.nn.log_softmax(logits)


def entropy(logps: jax.Array) -> jax.Array:
  """Entropy in nats of log-probabilities [..., V]; forbidden tokens add 0."""
  return -jnp.sum(jnp.exp(logps) * jnp.maximum(logps, -1e9), axis=-1)


@flax.struct.dataclass
class _Loop:
  t: jax.Array  # the next token
  token: jax.Array  # int32 [P, G], token t - 1
  cache: transformer.KeyValues  # of the tokens before that one
  progress: Progress
  rollouts: Rollouts


def sample(
  model: transformer.TransformerConfig,
  params: Any,
  prompt_PxTp: jax.Array,
  prompt_length_P: jax.Array,
  count_P: jax.Array,
  key: jax.Array,
  grammar: Grammar,
  config: SamplingConfig,
  encoded: tuple[jax.Array, transformer.Prefix] | None = None,
) -> Rollouts:
  """Samples a group of completions for every prompt.

  The prompt is encoded once and never repeated over the group; the loop stops
  when every rollout has ended. Pure: jit with `model`, `grammar` and `config`
  static.

  Args:
    model: the decoder's shape.
    params: unboxed parameters.
    prompt_PxTp: int32 ids, right-padded.
    prompt_length_P: int32.
    count_P: int32, candidates in each slate.
    key: PRNG key.
    grammar: token ids of the answer.
    config: group, budget, temperature, masks.
    encoded: the prompts, of `transformer.encode_prompt`, where they are known.

  Returns:
    Rollouts [P, G, T].
  """
  P, G, T = prompt_PxTp.shape[0], config.group, config.max_tokens
  hidden, prefix = encoded or transformer.encode_prompt(
    model, params, prompt_PxTp, prompt_length_P
  )
  last = jnp.take_along_axis(
    hidden, (prompt_length_P - 1)[:, None, None], axis=1
  )
  embedding = transformer.output_embedding(params)
  count = jnp.broadcast_to(count_P[:, None], (P, G))
  shape = (model.num_layers, P, G, T, model.num_kv_heads, model.head_dim)
  empty = jnp.zeros(shape, model.dtype)
  zeros = jnp.zeros((P, G, T), jnp.float32)

  def draw(t, hidden_PxGxD, progress, rollouts):
    """Token t, what it changes, and the rollouts with it."""
    logits = hidden_PxGxD @ embedding.T.astype(hidden_PxGxD.dtype)
    allowed = None
    if config.constrained:
      allowed = allowed_tokens(
        grammar,
        progress,
        count,
        jnp.broadcast_to(T - t, (P, G)),
        model.vocab_size,
      )
    logps = distribution(logits, config.temperature, allowed)
    if config.temperature:
      token = jax.random.categorical(jax.random.fold_in(key, t), logps)
    else:
      token = jnp.argmax(logps, -1)
    done = progress.done
    token = jnp.where(done, grammar.pad, token.astype(jnp.int32))
    logp = jnp.take_along_axis(logps, token[..., None], -1)[..., 0]

    def keep(x):
      return jnp.where(done, 0.0, x)

    rollouts = Rollouts(
      tokens=rollouts.tokens.at[:, :, t].set(token),
      length=rollouts.length + (~done).astype(jnp.int32),
      logp=rollouts.logp.at[:, :, t].set(keep(logp)),
      entropy=rollouts.entropy.at[:, :, t].set(keep(entropy(logps))),
    )
    return token, advance(grammar, progress, token), rollouts

  def body(s: _Loop) -> _Loop:
    """Reads token t - 1, draws token t: the last one is never read."""
    read = s.t - 1
    own = jnp.broadcast_to(jnp.arange(T) <= read, (P, G, 1, T))
    position = jnp.broadcast_to(
      prompt_length_P[:, None, None] + read, (P, G, 1)
    )
    hidden, cache = transformer.Transformer(model).apply(
      {'params': params},
      s.token[..., None],
      position,
      own,
      prefix,
      s.cache,
      read,
    )
    token, progress, rollouts = draw(
      s.t, hidden[:, :, 0], s.progress, s.rollouts
    )
    return _Loop(s.t + 1, token, cache, progress, rollouts)

  first = jnp.broadcast_to(last, (P, G, last.shape[-1]))
  token, progress, rollouts = draw(
    jnp.int32(0),
    first,
    start(grammar, (P, G), config.thinking),
    Rollouts(
      tokens=jnp.full((P, G, T), grammar.pad, jnp.int32),
      length=jnp.zeros((P, G), jnp.int32),
      logp=zeros,
      entropy=zeros,
    ),
  )
  cache = transformer.KeyValues(k=empty, v=empty)
  loop = jax.lax.while_loop(
    lambda s: (s.t < T) & ~s.progress.done.all(),
    body,
    _Loop(jnp.int32(1), token, cache, progress, rollouts),
  )
  return loop.rollouts


def parse(
  grammar: Grammar,
  config: SamplingConfig,
  tokens: jax.Array,
  length: jax.Array,
  count: jax.Array,
  incoming: jax.Array,
) -> parsing.Answer:
  """Reads answers from sampled ids, as this grammar writes them.

  Args:
    grammar: token ids.
    config: whether completions reason first.
    tokens: int32 [..., T].
    length: int32 [...], with <eos>.
    count: int32 [...].
    incoming: int32 [..., K].

  Returns:
    Rankings [..., K] and verdicts [...], see `parsing.parse_answer`.
  """
  return parsing.parse_answer(
    tokens,
    length,
    count,
    incoming,
    num_candidates=grammar.num_candidates,
    slot_base=grammar.slot_base,
    num_slots=grammar.num_slots,
    eos=grammar.eos,
    think_end=grammar.think_end,
    thinking=config.thinking,
  )


def generate(
  model: transformer.TransformerConfig,
  params: Any,
  prompt_PxTp: jax.Array,
  prompt_length_P: jax.Array,
  max_tokens: int,
  eos: int,
  pad: int,
) -> Rollouts:
  """Continues prompts greedily, as free text: `sample` without a grammar.

  Pure: jit with `model`, `max_tokens`, `eos` and `pad` static.

  Args:
    model: the decoder's shape.
    params: unboxed parameters.
    prompt_PxTp: int32 ids, right-padded.
    prompt_length_P: int32.
    max_tokens: T, the budget of each completion.
    eos: id that ends a completion; -1 for none.
    pad: id that follows it.

  Returns:
    Rollouts [P, 1, T].
  """
  return sample(
    model,
    params,
    prompt_PxTp,
    prompt_length_P,
    jnp.zeros_like(prompt_length_P),
    jax.random.key(0),
    Grammar(
      slot_base=0,
      num_slots=0,
      num_candidates=0,
      think_end=-1,
      eos=eos,
      pad=pad,
    ),
    SamplingConfig(group=1, max_tokens=max_tokens, temperature=0.0),
  )
