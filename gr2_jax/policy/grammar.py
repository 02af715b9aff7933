"""What a completion may be: a grammar is a mask on the next token.

`Ranking` is the answer of a re-ranker, `[reasoning </think>] slot * count
<eos>`; `compressor.grammar.Extraction` is a context in fewer tokens. A grammar
is static; what it depends on besides is arrays:

  facts     of every prompt: a slate's count, or what may be extracted
  progress  of every rollout: where it stands before its next token

The same `allowed` serves the decode loop and the scoring of finished
completions, so a constrained sampler and its learner agree token for token. A
grammar of few tokens has a menu of them for every prompt: logits are made for
these alone.

Axes: P prompts, G group, T completion time, K candidates, V vocabulary,
S prompt tokens, N tokens to choose from: V, or those of a menu.
"""

import dataclasses
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp

from gr2_jax.ops import parsing


@flax.struct.dataclass
class RankingProgress:
  """Where in a ranking each rollout stands."""

  answering: jax.Array  # bool [...], past the reasoning
  emitted: jax.Array  # bool [..., K], candidates already listed
  done: jax.Array  # bool [...], <eos> was emitted


@dataclasses.dataclass(frozen=True)
class Ranking:
  """The token ids that an answer is made of; facts: int32 [P], the counts."""

  slot_base: int  # id of slot token 0; the others follow
  num_slots: int  # slot tokens in the vocabulary
  num_candidates: int  # K, the longest slate
  think_end: int
  eos: int
  pad: int

  def menu(self, facts: jax.Array) -> None:
    """None: any token of the vocabulary may come."""
    del facts

  def start(
    self, facts: jax.Array | None, shape: tuple[int, ...], thinking: bool
  ) -> RankingProgress:
    """Progress before the first token."""
    del facts
    return RankingProgress(
      answering=jnp.full(shape, not thinking),
      emitted=jnp.zeros((*shape, self.num_candidates), bool),
      done=jnp.zeros(shape, bool),
    )

  def advance(
    self, facts: jax.Array | None, progress: RankingProgress, token: jax.Array
  ) -> RankingProgress:
    """Progress after `token` [...]; slots named in reasoning do not count."""
    del facts
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
    facts: jax.Array,
    progress: RankingProgress,
    remaining: jax.Array,
    size: int,
  ) -> jax.Array:
    """The permutation mask: which tokens keep the completion on its way.

    While reasoning everything but <eos> and padding is allowed, until just
    enough room is left to close it and to list every candidate; in the answer
    each candidate once, then <eos>.

    Args:
      facts: int32 [P], candidates in the slate.
      progress: [P, ...].
      remaining: int32 [P, ...], tokens left in the budget, this one included.
      size: V.

    Returns:
      bool [P, ..., V], at least one True everywhere.
    """
    ids = jnp.arange(size)
    K, base = self.num_candidates, self.slot_base
    count = spread(facts, remaining.shape)
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
  """A mask on the next token; static, so it may be an argument of a jit."""

  eos: int
  pad: int

  def menu(self, facts: Any) -> jax.Array | None:
    """Token ids int32 [P, N] that may come; None: the whole vocabulary."""

  def start(self, facts: Any, shape: tuple[int, ...], thinking: bool) -> Any:
    """Progress [P, ...] before the first token."""

  def advance(self, facts: Any, progress: Any, token: jax.Array) -> Any:
    """Progress after `token` [P, ...]."""

  def allowed(
    self, facts: Any, progress: Any, remaining: jax.Array, size: int
  ) -> jax.Array:
    """Tokens that may come next: bool [P, ..., N], one True at least."""


def replay(
  grammar: Grammar, facts: Any, tokens: jax.Array, thinking: bool
) -> Any:
  """Progress before every token of finished completions [P, ..., T]."""

  def step(progress, token):
    return grammar.advance(facts, progress, token), progress

  first = grammar.start(facts, tokens.shape[:-1], thinking)
  _, progress = jax.lax.scan(step, first, jnp.moveaxis(tokens, -1, 0))
  axis = tokens.ndim - 1
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), progress)


def spread(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[P, *rest] -> `shape`, (P, .., *rest), the same for all in between."""
  middle = (1,) * (len(shape) - x.ndim)
  return jnp.broadcast_to(x.reshape(x.shape[0], *middle, *x.shape[1:]), shape)
