"""Rollouts: prefill once per slate, then one decode loop for its whole group.

What a completion may be is a grammar's matter (`grammars`). The prompt's last
token says what is asked for.

Axes: P prompts, G group, T completion time, K candidates, V vocabulary.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from gr2_jax.models import transformer
from gr2_jax.ops import parsing
from gr2_jax.policy import grammar as grammar_lib


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """How to decode; every field is static, so each value is one trace."""

  group: int  # rollouts of one slate
  max_tokens: int  # completion length, reasoning and answer together
  temperature: float = 1.0  # 0 = greedy
  thinking: bool = False  # the completion opens with a reasoning span
  constrained: bool = False  # the grammar's mask: every answer is valid


@flax.struct.dataclass
class Rollouts:
  """Sampled completions: these ids are what is scored and trained on."""

  tokens: jax.Array  # int32 [P, G, T], pad after the length
  length: jax.Array  # int32 [P, G], tokens with <eos>, at most T
  logp: jax.Array  # float32 [P, G, T], under the sampler; 0 after the length
  entropy: jax.Array  # float32 [P, G, T], of each token's distribution, nats


def logits_of(hidden: jax.Array, rows: jax.Array) -> jax.Array:
  """Logits of hidden states [P, ..., D].

  Args:
    hidden: the states.
    rows: [V, D], the same for all, or [P, N, D], each prompt's own.

  Returns:
    [P, ..., V] or [P, ..., N], in the dtype of the states.
  """
  rows = rows.astype(hidden.dtype)
  if rows.ndim == 2:
    return hidden @ rows.T
  return jnp.einsum('p...d,pnd->p...n', hidden, rows)


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
  progress: Any  # of the grammar
  rollouts: Rollouts


def sample(
  model: transformer.TransformerConfig,
  params: Any,
  prompt_PxTp: jax.Array,
  prompt_length_P: jax.Array,
  facts: Any,
  key: jax.Array,
  grammar: grammar_lib.Grammar,
  config: SamplingOptions,
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
    facts: of the prompts, as the grammar has them: int32 [P], candidates in
      each slate.
    key: PRNG key.
    grammar: what a completion may be.
    config: group, budget, temperature, masks.
    encoded: the prompts, of `transformer.encode_prompt`, where they are known.

  Returns:
    Rollouts [P, G, T].
  """
  P, G, T = prompt_PxTp.shape[0], config.group, config.max_tokens
  hidden, prefix = encoded or transformer.encode_prompt(
    model, params, prompt_PxTp, prompt_length_P
  )
  last = jnp.take_along_axis(hidden, prefix.last[:, None, None], axis=1)
  embedding = transformer.output_embedding(params)
  shape = (model.num_layers, P, G, T, model.num_kv_heads, model.head_dim)
  empty = jnp.zeros(shape, model.dtype)
  menu = grammar.menu(facts) if config.constrained else None
  rows = embedding if menu is None else embedding[menu]
  zeros = jnp.zeros((P, G, T), jnp.float32)

  def draw(t, hidden_PxGxD, progress, rollouts):
    """Token t, what it changes, and the rollouts with it."""
    logits = logits_of(hidden_PxGxD, rows)
    allowed = None
    if config.constrained:
      allowed = grammar.allowed(
        facts, progress, jnp.broadcast_to(T - t, (P, G)), logits.shape[-1]
      )
    logps = distribution(logits, config.temperature, allowed)
    if config.temperature:
      choice = jax.random.categorical(jax.random.fold_in(key, t), logps)
    else:
      choice = jnp.argmax(logps, -1)
    logp = jnp.take_along_axis(logps, choice[..., None], -1)[..., 0]
    token = choice
    if menu is not None:
      token = jnp.take_along_axis(menu, choice, axis=1)
    done = progress.done
    token = jnp.where(done, grammar.pad, token.astype(jnp.int32))

    def keep(x):
      return jnp.where(done, 0.0, x)

    rollouts = Rollouts(
      tokens=rollouts.tokens.at[:, :, t].set(token),
      length=rollouts.length + (~done).astype(jnp.int32),
      logp=rollouts.logp.at[:, :, t].set(keep(logp)),
      entropy=rollouts.entropy.at[:, :, t].set(keep(entropy(logps))),
    )
    return token, grammar.advance(facts, progress, token), rollouts

  def body(s: _Loop) -> _Loop:
    """Reads token t - 1, draws token t: the last one is never read."""
    read = s.t - 1
    own = jnp.broadcast_to(jnp.arange(T) <= read, (P, G, 1, T))
    position = jnp.broadcast_to(prefix.length[:, None, None] + read, (P, G, 1))
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
    grammar.start(facts, (P, G), config.thinking),
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
  grammar: grammar_lib.Ranking,
  config: SamplingOptions,
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
    grammar_lib.Ranking(
      slot_base=0,
      num_slots=0,
      num_candidates=0,
      think_end=-1,
      eos=eos,
      pad=pad,
    ),
    SamplingOptions(group=1, max_tokens=max_tokens, temperature=0.0),
  )
