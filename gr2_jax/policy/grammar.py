"""Grammars: masks on the next token of a completion.

`Ranking` is the answer of a re-ranker, `[reasoning </think>] slot * count
<eos>`; `compressor.grammar.Extraction` is a context in fewer tokens. A grammar
is static. Two things vary, and are arrays:

  constraint_inputs  of each prompt: a slate's count, or what may be extracted
  progress           of each rollout, before its next token

The decode loop and the scoring of finished completions share `allowed`, so a
constrained sampler and its learner agree token for token. A grammar of few
tokens lists them as `candidate_tokens`: logits are computed for these alone.

Axes: P prompts, G group, T completion time, K candidates, V vocabulary,
S prompt tokens, N tokens to choose from: V, or the candidate tokens.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from gr2_jax.ops import parsing


@struct.dataclass
class RankingProgress:
  """Progress of each rollout in its ranking."""

  answering: jax.Array  # bool [...], past the reasoning
  emitted: jax.Array  # bool [..., K], candidates already listed
  done: jax.Array  # bool [...], <eos> was emitted


@dataclasses.dataclass(frozen=True)
class Ranking:
  """The token ids of an answer; constraint_inputs: int32 [P], the counts."""

  slot_base: int  # id of slot token 0; the others follow
  num_slots: int  # slot tokens in the vocabulary
  num_candidates: int  # K, the longest slate
  think_end: int
  eos: int
  pad: int

  def candidate_tokens(self, constraint_inputs: Any) -> None:
    """None: the whole vocabulary."""
    del constraint_inputs

  def start(
    self, constraint_inputs: Any, shape: tuple[int, ...], thinking: bool
  ) -> RankingProgress:
    """Progress before the first token."""
    del constraint_inputs
    return RankingProgress(
      answering=jnp.full(shape, not thinking),
      emitted=jnp.zeros((*shape, self.num_candidates), bool),
      done=jnp.zeros(shape, bool),
    )

  def advance(
    self, constraint_inputs: Any, progress: RankingProgress, token: jax.Array
  ) -> RankingProgress:
    """Progress after `token` [...]; slots named in reasoning do not count."""
    del constraint_inputs
    slot = jax.nn.one_hot(
      token - self.slot_base, self.num_candidates, dtype=bool
    )
    return RankingProgress(
      answering=progress.answering | (token == self.think_end),
      emitted=progress.emitted | (slot & progress.answering[..., None]),
      done=progress.done | (token == self.eos),
    )

  def allowed(
    self,
    constraint_inputs: jax.Array,
    progress: RankingProgress,
    remaining: jax.Array,
    size: int,
  ) -> jax.Array:
    """The permutation mask.

    Reasoning may use every token but <eos> and padding, until there is just
    room left to close it and to list every candidate. The answer lists each
    candidate once, then <eos>.

    Args:
      constraint_inputs: int32 [P], candidates in the slate.
      progress: [P, ...].
      remaining: int32 [P, ...], tokens left in the budget, this one included.
      size: V.

    Returns:
      bool [P, ..., V], at least one True everywhere.
    """
    ids = jnp.arange(size)
    K, base = self.num_candidates, self.slot_base
    count = spread(constraint_inputs, remaining.shape)
    allowed = parsing.answer_mask(progress.emitted, count)
    answer = jnp.zeros((*allowed.shape[:-1], size), bool)
    answer = answer.at[..., base : base + K].set(allowed[..., :K])
    answer = answer.at[..., self.eos].set(allowed[..., K])
    must_close = remaining <= count + 2
    close = ids == self.think_end
    text = (ids != self.eos) & (ids != self.pad)
    reasoning = jnp.where(must_close[..., None], close, text)
    return jnp.where(progress.answering[..., None], answer, reasoning)


class Grammar(Protocol):
  """A mask on the next token; hashable, so it may be static in a jit."""

  @property
  def slot_base(self) -> int:
    """Id of slot token 0; the others follow."""
    ...

  @property
  def num_candidates(self) -> int:
    """K, the longest slate."""
    ...

  @property
  def pad(self) -> int:
    """Id that follows <eos>."""
    ...

  def candidate_tokens(self, constraint_inputs: Any) -> jax.Array | None:
    """Token ids int32 [P, N] that may come; None: the whole vocabulary."""
    ...

  def start(
    self, constraint_inputs: Any, shape: tuple[int, ...], thinking: bool
  ) -> Any:
    """Progress [P, ...] before the first token."""
    ...

  def advance(
    self, constraint_inputs: Any, progress: Any, token: jax.Array
  ) -> Any:
    """Progress after `token` [P, ...]."""
    ...

  def allowed(
    self,
    constraint_inputs: Any,
    progress: Any,
    remaining: jax.Array,
    size: int,
  ) -> jax.Array:
    """Tokens that may come next: bool [P, ..., N], at least one True."""
    ...


def replay(
  grammar: Grammar, constraint_inputs: Any, tokens: jax.Array, thinking: bool
) -> Any:
  """Progress before every token of finished completions [P, ..., T]."""

  def step(progress: Any, token: jax.Array) -> tuple[Any, Any]:
    return grammar.advance(constraint_inputs, progress, token), progress

  first = grammar.start(constraint_inputs, tokens.shape[:-1], thinking)
  _, progress = jax.lax.scan(step, first, jnp.moveaxis(tokens, -1, 0))
  axis = tokens.ndim - 1
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), progress)


def spread(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Broadcasts [P, *rest] to `shape`, (P, .., *rest), over the axes between."""
  middle = (1,) * (len(shape) - x.ndim)
  return jnp.broadcast_to(x.reshape(x.shape[0], *middle, *x.shape[1:]), shape)
