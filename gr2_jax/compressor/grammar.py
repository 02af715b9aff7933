"""The grammar of compressions: some of a prompt's tokens, in their order.

`Extraction` is a `policy.grammar.Grammar`: the sampler and the learner share
its mask. Anchors are the tokens that every compression keeps: `<candidates>`
and the slots.

Axes: P prompts, S prompt tokens, N tokens to choose from.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gr2_jax.ops import masking
from gr2_jax.policy import grammar


@struct.dataclass
class Source:
  """The prompts, and the places in them that the mask looks up.

  Arrays of [P, S + 1] have an entry for the place behind the prompt.
  """

  tokens: jax.Array  # int32 [P, S], the prompts
  before: jax.Array  # int32 [P, S], last earlier place of the token; -1: none
  begin: jax.Array  # int32 [P], first place of the history
  anchor: jax.Array  # int32 [P, S + 1], first anchor at or after each place
  anchors_left: jax.Array  # int32 [P, S + 1], anchors at or after each place
  count: jax.Array  # int32 [P], candidates
  shortest: jax.Array  # int32 [P], tokens of the shortest candidate line
  budget: jax.Array  # int32 [P], most tokens of a compression, <eos> included


@struct.dataclass
class ExtractionProgress:
  """The state of each compression before its next token."""

  place: jax.Array  # int32 [...], first place of the prompt that is still left
  used: jax.Array  # int32 [...], tokens written
  line: jax.Array  # int32 [...], tokens written of the current line
  first: jax.Array  # int32 [...], tokens of the first line; -1 before its end
  done: jax.Array  # bool [...], <eos> was emitted


@dataclasses.dataclass(frozen=True)
class Extraction:
  """Compressions of a context; constraint_inputs: `Source`.

  A compression consists of tokens of the history, `<candidates>`, tokens of
  each candidate's line followed by its slot, and <eos>. Tokens stay in the
  order of the prompt, and every anchor is kept.

  A compression uses its budget and does not exceed it, unless the anchors alone
  do. The lines share equally the tokens that the history leaves. The first line
  is at most `slack` tokens shorter than its share, or than the shortest line of
  the prompt. Every other line is at least as long as the first, if the prompt
  has that many tokens, and at most `slack` longer. So the length of a line does
  not reveal how good its candidate is.
  """

  history: int
  candidates: int
  slot_base: int
  num_slots: int
  num_candidates: int
  eos: int
  pad: int
  slack: int = 1

  def source(
    self,
    prompt_PxS: jax.Array,
    length_P: jax.Array,
    count_P: jax.Array,
    budget_P: jax.Array,
  ) -> Source:
    """Analyzes prompts in which the history comes before the candidates."""
    S = prompt_PxS.shape[1]
    real = masking.length_mask(length_P, S)
    slot = prompt_PxS - self.slot_base
    is_slot = real & (slot >= 0) & (slot < count_P[:, None])
    is_anchor = is_slot | (real & (prompt_PxS == self.candidates))
    place = jnp.where(is_anchor, jnp.arange(S), S)
    before = jax.lax.cummax(jnp.where(is_anchor, jnp.arange(S), -1), axis=1)
    before = jnp.pad(before, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]
    line = jnp.where(is_slot, jnp.arange(S) - before - 1, S)
    anchor = jax.lax.cummin(place, axis=1, reverse=True)
    left = jnp.cumsum(is_anchor[:, ::-1], axis=1)[:, ::-1]
    opened = jnp.argmax(prompt_PxS == self.history, axis=1)
    end = [(0, 0), (0, 1)]
    same = prompt_PxS[:, :, None] == prompt_PxS[:, None, :]
    same &= jnp.arange(S)[:, None] > jnp.arange(S)
    return Source(
      tokens=prompt_PxS,
      before=jnp.max(jnp.where(same, jnp.arange(S), -1), axis=-1),
      begin=(opened + 1).astype(jnp.int32),
      anchor=jnp.pad(anchor, end, constant_values=S).astype(jnp.int32),
      anchors_left=jnp.pad(left, end).astype(jnp.int32),
      count=count_P,
      shortest=line.min(1).astype(jnp.int32),
      budget=budget_P,
    )

  def candidate_tokens(self, constraint_inputs: Source) -> jax.Array:
    """int32 [P, S + 1], the prompts' tokens and <eos>."""
    return jnp.pad(
      constraint_inputs.tokens, [(0, 0), (0, 1)], constant_values=self.eos
    )

  def min_tokens(self, count: Any) -> Any:
    """Tokens of a compression of anchors and <eos> alone."""
    return count + 2

  def start(
    self, constraint_inputs: Source, shape: tuple[int, ...], thinking: bool
  ) -> ExtractionProgress:
    """Progress before the first token."""
    del thinking
    zeros = jnp.zeros(shape, jnp.int32)
    return ExtractionProgress(
      place=grammar.spread(constraint_inputs.begin, shape),
      used=zeros,
      line=zeros,
      first=zeros - 1,
      done=jnp.zeros(shape, bool),
    )

  def advance(
    self,
    constraint_inputs: Source,
    progress: ExtractionProgress,
    token: jax.Array,
  ) -> ExtractionProgress:
    """Progress after `token` [P, ...]."""
    source, S = constraint_inputs, constraint_inputs.tokens.shape[1]
    place = jnp.arange(S)
    tokens = grammar.spread(source.tokens, (*token.shape, S))
    here = (tokens == token[..., None]) & (place >= progress.place[..., None])
    match = jnp.min(jnp.where(here, place, S), axis=-1)
    slot = token - self.slot_base
    closes = (slot >= 0) & (slot < self.num_slots)
    opened = token == self.candidates
    anchors = _at(source.anchors_left, progress.place)
    in_line = anchors <= grammar.spread(source.count, token.shape)
    ends_first = closes & (progress.first < 0)
    return ExtractionProgress(
      place=jnp.minimum(match + 1, S).astype(jnp.int32),
      used=progress.used + 1,
      line=jnp.where(closes | opened | ~in_line, 0, progress.line + 1),
      first=jnp.where(ends_first, progress.line, progress.first),
      done=progress.done | (token == self.eos),
    )

  def allowed(
    self,
    constraint_inputs: Source,
    progress: ExtractionProgress,
    remaining: jax.Array,
    size: int,
  ) -> jax.Array:
    """The mask on the prompt's places, then <eos>: bool [P, ..., N = S + 1].

    At least one is True. Of a repeated token's remaining places, only the first
    can be. `remaining`, int32 [P, ...], counts the tokens left to the sampler,
    this one included.
    """
    source, S, shape = constraint_inputs, size - 1, remaining.shape
    at, line, first = progress.place, progress.line, progress.first
    anchor = _at(source.anchor, at)
    anchors = _at(source.anchors_left, at)
    budget = grammar.spread(source.budget, shape) - progress.used
    # Tokens that still fit, besides the anchors and <eos>.
    spare = jnp.minimum(remaining, budget) - anchors - 1
    in_line = anchors <= grammar.spread(source.count, shape)
    share = (spare + line) // jnp.maximum(anchors, 1)
    shortest = jnp.minimum(share, grammar.spread(source.shortest, shape))
    is_first = first < 0
    target = jnp.where(is_first, shortest, first)
    longest = jnp.minimum(share, target + self.slack)
    full = (spare <= 0) | (in_line & (line >= longest))
    # Tokens that this line still needs, so it must leave as many unskipped.
    minimum = target - jnp.where(is_first, self.slack, 0)
    short = jnp.minimum(minimum, share) - line
    short = jnp.where(in_line & ~full, jnp.clip(short, 0, anchor - at), 0)
    place = jnp.arange(S)
    end = anchor - jnp.maximum(short - 1, 0)
    window = (place >= at[..., None]) & (place < end[..., None])
    window = (window & ~full[..., None]) | (
      (place == anchor[..., None]) & (short == 0)[..., None]
    )
    window &= grammar.spread(source.before, window.shape) < at[..., None]
    ends = (anchors == 0)[..., None]
    return jnp.concatenate([window & ~ends, ends], axis=-1)


def _at(x_PxS: jax.Array, place: jax.Array) -> jax.Array:
  """x[p, place[p, ...]]: [P, ...]."""
  flat = place.reshape(place.shape[0], -1)
  return jnp.take_along_axis(x_PxS, flat, axis=1).reshape(place.shape)
