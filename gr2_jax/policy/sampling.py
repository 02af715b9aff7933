"""Rollouts: prefill once per slate, then one decode loop for its whole group.

A grammar (`policy.grammar`) limits the completion; the prompt's last token
selects reasoning or a direct answer.

Axes: P prompts, G group, T completion time, K candidates, V vocabulary.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from gr2_jax.models import transformer
from gr2_jax.ops import parsing
from gr2_jax.policy import grammar as grammar_lib


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """How to decode; every field is static, so each value is one trace."""

  group: int  # rollouts of one slate
  max_tokens: int  # completion length, reasoning and answer together
  temperature: float = 1.0  # 0 = greedy
  thinking: bool = False  # the completion begins with a reasoning span
  constrained: bool = False  # the grammar's mask: every answer is valid


@struct.dataclass
class Rollouts:
  """Sampled completions; training scores these very ids."""

  tokens: jax.Array  # int32 [P, G, T], pad after the length
  length: jax.Array  # int32 [P, G], tokens with <eos>, at most T
  logp: jax.Array  # float32 [P, G, T], under the sampler; 0 after the length
  entropy: jax.Array  # float32 [P, G, T], of each token's distribution, nats


def logits_of(hidden: jax.Array, rows: jax.Array) -> jax.Array:
  """Logits of hidden states [P, ..., D], in their dtype.

  `rows` of the embedding are [V, D], shared by all prompts, or [P, N, D]; the
  logits are [P, ..., V] or [P, ..., N].
  """
  rows = rows.astype(hidden.dtype)
  if rows.ndim == 2:
    return hidden @ rows.T
  return jnp.einsum('p...d,pnd->p...n', hidden, rows)


def distribution(
  logits: jax.Array, temperature: float, allowed: jax.Array | None
) -> jax.Array:
  """Log-probabilities float32 [..., V], both for sampling and for scoring.

  A temperature of 0 (greedy) leaves the logits as they are. `allowed` is a
  bool [..., V]; a forbidden token gets a very negative log-probability.
  """
  logits = logits.astype(jnp.float32) / (temperature or 1.0)
  if allowed is not None:
    logits = jnp.where(allowed, logits, jnp.finfo(jnp.float32).min)
  return jax.nn.log_softmax(logits)


def entropy(logps: jax.Array) -> jax.Array:
  """Entropy in nats of log-probabilities [..., V]; forbidden tokens add 0."""
  return -jnp.sum(jnp.exp(logps) * jnp.maximum(logps, -1e9), axis=-1)


@struct.dataclass
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
  constraint_inputs: Any,
  key: jax.Array,
  grammar: grammar_lib.Grammar,
  options: SamplingOptions,
  encoded: tuple[jax.Array, transformer.Prefix] | None = None,
) -> Rollouts:
  """Samples a group of completions for every prompt.

  Each prompt is encoded once and never repeated over the group; the loop stops
  when every rollout has ended. Pure: jit with `model`, `grammar` and `options`
  static.

  Args:
    model: the decoder's shape.
    params: unboxed parameters.
    prompt_PxTp: int32 ids, right-padded.
    prompt_length_P: int32.
    constraint_inputs: of the grammar; for a ranking int32 [P], candidates in
      each slate.
    key: PRNG key.
    grammar: the mask on the next token.
    options: group, budget, temperature, masks.
    encoded: of `transformer.encode_prompt`, where the prompts are encoded.

  Returns:
    Rollouts [P, G, T].
  """
  P, G, T = prompt_PxTp.shape[0], options.group, options.max_tokens
  hidden, prefix = encoded or transformer.encode_prompt(
    model, params, prompt_PxTp, prompt_length_P
  )
  last = jnp.take_along_axis(hidden, prefix.last[:, None, None], axis=1)
  embedding = transformer.output_embedding(params)
  shape = (model.num_layers, P, G, T, model.num_kv_heads, model.head_dim)
  empty = jnp.zeros(shape, model.dtype)
  candidates = (
    grammar.candidate_tokens(constraint_inputs) if options.constrained else None
  )
  rows = embedding if candidates is None else embedding[candidates]
  zeros = jnp.zeros((P, G, T), jnp.float32)

  def draw(
    t: jax.Array, hidden_PxGxD: jax.Array, progress: Any, rollouts: Rollouts
  ) -> tuple[jax.Array, Any, Rollouts]:
    """Token t, the progress after it, and the rollouts with it."""
    logits = logits_of(hidden_PxGxD, rows)
    allowed = None
    if options.constrained:
      allowed = grammar.allowed(
        constraint_inputs,
        progress,
        jnp.broadcast_to(T - t, (P, G)),
        logits.shape[-1],
      )
    logps = distribution(logits, options.temperature, allowed)
    if options.temperature:
      choice = jax.random.categorical(jax.random.fold_in(key, t), logps)
    else:
      choice = jnp.argmax(logps, -1)
    logp = jnp.take_along_axis(logps, choice[..., None], -1)[..., 0]
    token = choice
    if candidates is not None:
      token = jnp.take_along_axis(candidates, choice, axis=1)
    done = progress.done
    token = jnp.where(done, grammar.pad, token.astype(jnp.int32))

    rollouts = Rollouts(
      tokens=rollouts.tokens.at[:, :, t].set(token),
      length=rollouts.length + (~done).astype(jnp.int32),
      logp=rollouts.logp.at[:, :, t].set(jnp.where(done, 0.0, logp)),
      entropy=rollouts.entropy.at[:, :, t].set(
        jnp.where(done, 0.0, entropy(logps))
      ),
    )
    return token, grammar.advance(constraint_inputs, progress, token), rollouts

  def body(s: _Loop) -> _Loop:
    """Reads token t - 1 and draws token t; the last token is never read."""
    read = s.t - 1
    mask = jnp.broadcast_to(jnp.arange(T) <= read, (P, G, 1, T))
    position = jnp.broadcast_to(prefix.length[:, None, None] + read, (P, G, 1))
    hidden, cache = transformer.Transformer(model).apply(
      {'params': params},
      s.token[..., None],
      position,
      mask,
      prefix,
      s.cache,
      read,
    )
    cache = cast(transformer.KeyValues, cache)
    token, progress, rollouts = draw(
      s.t, hidden[:, :, 0], s.progress, s.rollouts
    )
    return _Loop(s.t + 1, token, cache, progress, rollouts)

  first = jnp.broadcast_to(last, (P, G, last.shape[-1]))
  token, progress, rollouts = draw(
    jnp.int32(0),
    first,
    grammar.start(constraint_inputs, (P, G), options.thinking),
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
  options: SamplingOptions,
  tokens: jax.Array,
  length: jax.Array,
  count: jax.Array,
  incoming: jax.Array,
) -> parsing.Answer:
  """`parsing.parse_answer` of ids [..., T], by a grammar's token ids."""
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
    thinking=options.thinking,
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

  An `eos` of -1 ends no completion. Pure: jit with `model`, `max_tokens`, `eos`
  and `pad` static. Returns Rollouts [P, 1, T].
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
