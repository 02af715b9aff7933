"""What a compression may be: a part of its prompt's tokens, in their order.

`Extraction` is a `policy.grammar.Grammar`: the same mask serves the sampler and
the learner.

Axes: P prompts, S prompt tokens, N tokens to choose from.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from gr2_jax.ops import masking
from gr2_jax.policy import grammar


@flax.struct.dataclass
class Source:
  """What may be extracted of every prompt."""

  tokens: jax.Array  # int32 [P, S], the prompts
  before: jax.Array  # int32 [P, S], where each stood last; -1: nowhere
  begin: jax.Array  # int32 [P], where the history begins
  mark: jax.Array  # int32 [P, S + 1], the first mark from each place on
  marks_left: jax.Array  # int32 [P, S + 1], marks from each place on
  count: jax.Array  # int32 [P], candidates
  shortest: jax.Array  # int32 [P], tokens of the shortest line
  budget: jax.Array  # int32 [P], tokens of a compression, <eos> included


@flax.struct.dataclass
class ExtractionProgress:
  """Where in its prompt each compression stands."""

  place: jax.Array  # int32 [...], first of the tokens that are still left
  used: jax.Array  # int32 [...], tokens written
  line: jax.Array  # int32 [...], of them in this candidate's line
  first: jax.Array  # int32 [...], in the first candidate's; -1 before its end
  done: jax.Array  # bool [...], <eos> was emitted


@dataclasses.dataclass(frozen=True)
class Extraction:
  """A prompt's context in fewer tokens; constraint_inputs: `Source`.

  A compression keeps some tokens of the history, then `<candidates>`, then of
  every candidate's line some tokens and its slot, then <eos>: what it keeps
  stands in the order of the prompt, and the marks, `<candidates>` and every
  slot, are always kept. It holds its budget, where the marks alone do, and uses
  it: what the history leaves is shared out among the lines, of which the first
  is at most `slack` tokens short of its share, or as long as the shortest line
  can be. No line is shorter than the first, where it can be as long, nor more
  than `slack` tokens longer: how much is said of a candidate does not tell how
  good it is.
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
    """Finds what can be kept of prompts whose history comes first."""
    S = prompt_PxS.shape[1]
    real = masking.length_mask(length_P, S)
    slot = prompt_PxS - self.slot_base
    is_slot = real & (slot >= 0) & (slot < count_P[:, None])
    is_mark = is_slot | (real & (prompt_PxS == self.candidates))
    place = jnp.where(is_mark, jnp.arange(S), S)
    before = jax.lax.cummax(jnp.where(is_mark, jnp.arange(S), -1), axis=1)
    before = jnp.pad(before, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]
    line = jnp.where(is_slot, jnp.arange(S) - before - 1, S)
    mark = jax.lax.cummin(place, axis=1, reverse=True)
    left = jnp.cumsum(is_mark[:, ::-1], axis=1)[:, ::-1]
    opened = jnp.argmax(prompt_PxS == self.history, axis=1)
    end = [(0, 0), (0, 1)]
    same = prompt_PxS[:, :, None] == prompt_PxS[:, None, :]
    same &= jnp.arange(S)[:, None] > jnp.arange(S)
    return Source(
      tokens=prompt_PxS,
      before=jnp.max(jnp.where(same, jnp.arange(S), -1), axis=-1),
      begin=(opened + 1).astype(jnp.int32),
      mark=jnp.pad(mark, end, constant_values=S).astype(jnp.int32),
      marks_left=jnp.pad(left, end).astype(jnp.int32),
      count=count_P,
      shortest=line.min(1).astype(jnp.int32),
      budget=budget_P,
    )

  def candidate_tokens(self, constraint_inputs: Source) -> jax.Array:
    """int32 [P, S + 1], the prompts' tokens and <eos>."""
    return jnp.pad(
      constraint_inputs.tokens, [(0, 0), (0, 1)], constant_values=self.eos
    )

  def least(self, count: Any) -> Any:
    """Tokens of a compression that keeps nothing but the marks and <eos>."""
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
    S = constraint_inputs.tokens.shape[1]
    place = jnp.arange(S)
    tokens = grammar.spread(constraint_inputs.tokens, (*token.shape, S))
    here = (tokens == token[..., None]) & (place >= progress.place[..., None])
    found = jnp.min(jnp.where(here, place, S), axis=-1)
    slot = token - self.slot_base
    closes = (slot >= 0) & (slot < self.num_slots)
    opened = token == self.candidates
    in_line = _taken(
      constraint_inputs.marks_left, progress.place
    ) <= grammar.spread(constraint_inputs.count, token.shape)
    ends_first = closes & (progress.first < 0)
    return ExtractionProgress(
      place=jnp.minimum(found + 1, S).astype(jnp.int32),
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
    """Which tokens can be kept next.

    Args:
      constraint_inputs: of the prompts.
      progress: [P, ...].
      remaining: int32 [P, ...], tokens left in the sampler's budget, this one
        included.
      size: N = S + 1, of the candidate tokens.

    Returns:
      bool [P, ..., N], at least one True everywhere; of a token that the menu
      has several times the first place that is left.
    """
    S, shape = size - 1, remaining.shape
    at, line, first = progress.place, progress.line, progress.first
    mark = _taken(constraint_inputs.mark, at)
    marks = _taken(constraint_inputs.marks_left, at)
    budget = grammar.spread(constraint_inputs.budget, shape) - progress.used
    # Tokens beside the marks and <eos> that there is room for.
    spare = jnp.minimum(remaining, budget) - marks - 1
    in_line = marks <= grammar.spread(constraint_inputs.count, shape)
    share = (spare + line) // jnp.maximum(marks, 1)
    shortest = jnp.minimum(
      share, grammar.spread(constraint_inputs.shortest, shape)
    )
    opens = first < 0
    wanted = jnp.where(opens, shortest, first)
    most = jnp.minimum(share, wanted + self.slack)
    full = (spare <= 0) | (in_line & (line >= most))
    # Tokens that this line is short of, and that it must not skip.
    least = wanted - jnp.where(opens, self.slack, 0)
    short = jnp.minimum(least, share) - line
    short = jnp.where(in_line & ~full, jnp.clip(short, 0, mark - at), 0)
    place = jnp.arange(S)
    end = mark - jnp.maximum(short - 1, 0)
    window = (place >= at[..., None]) & (place < end[..., None])
    window = (window & ~full[..., None]) | (
      (place == mark[..., None]) & (short == 0)[..., None]
    )
    window &= (
      grammar.spread(constraint_inputs.before, window.shape) < at[..., None]
    )
    ends = (marks == 0)[..., None]
    return jnp.concatenate([window & ~ends, ends], axis=-1)


def _taken(x_PxS: jax.Array, place: jax.Array) -> jax.Array:
  """x[p, place[p, ..]]: int32 [P, ...]."""
  flat = place.reshape(place.shape[0], -1)
  return jnp.take_along_axis(x_PxS, flat, axis=1).reshape(place.shape)
