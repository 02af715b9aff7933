"""Compressed contexts: what they may be, and what they earn (GR2, Eq. 10-11).

A compressor rewrites the context of a slate, the source, into fewer tokens: of
the history some, then of every candidate's line some, between the same anchors
(`<candidates>` and the slots in order) and an `<eos>`. Segment 0 is the
history, segment 1 + k the line of candidate k, which its slot ends. Nothing is
estimated: an extract is verified id by id against its source, so that a copy,
a cut, an invention, a label or an answer in the compressor's hand earns 0.

What no verdict sees is a choice among honest tokens: a segment may repeat or
reorder its own, and a line may be longer than another by `spread`.

The worked examples share one slate of two candidates, grades 0 and 2, lower
case for the tokens of text:

  source       <bos> <history> a b a c <candidates> x u s0 y u v s1 go
  compression  a c <candidates> x s0 y v s1 <eos>

Axis letters: P prompts, G compressions of each, S source tokens, T compression
tokens, K candidates.
"""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import masking, rewards

VALID = 0
CUT_OFF = 1
MALFORMED = 2
OVER_BUDGET = 3
UNGROUNDED = 4
UNEVEN = 5
MARKED = 6
VERDICTS = (
  'valid',
  'cut_off',
  'malformed',
  'over_budget',
  'ungrounded',
  'uneven',
  'marked',
)


@dataclasses.dataclass(frozen=True)
class Symbols:
  """The token ids that give a context its form; static under jit.

  All but the marks are anchors. An anchor is of no segment, wherever it stands.
  """

  history: int  # opens the history of a source; a compression has none
  candidates: int  # opens the candidates
  slot_base: int  # candidate k is slot_base + k
  num_slots: int  # at least K
  eos: int  # ends a compression
  marks: tuple[int, ...] = ()  # ids that say that something was left out


class Judged(NamedTuple):
  """What a frozen ranker makes of compressions.

  Attributes:
    solvable: bool [P, G], whether it still finds a positive.
    ranking: float32 [P, G] in [0, 1], NDCG of its order.
    total: float32 [P, G] in [0, 1].
  """

  solvable: jax.Array
  ranking: jax.Array
  total: jax.Array


def source_segments(
  source: chex.Array, length: chex.Array, symbols: Symbols
) -> jax.Array:
  """The segment of each token of sources.

  The history must stand before the candidates.

  Example: -1 -1 0 0 0 0 -1 1 1 -1 2 2 2 -1 -1.

  Args:
    source: int [P, S]; ids beyond the length are not read.
    length: int [P].
    symbols: token ids.

  Returns:
    int32 [P, S]; -1 at anchors, before the history, behind the last slot and
    beyond the length.
  """
  chex.assert_shape(length, jnp.shape(source)[:-1])
  source = jnp.asarray(source)
  inside = masking.length_mask(length, source.shape[-1])
  start = masking.first(inside & (source == symbols.history))
  opened = masking.index_like(source.shape) > start[..., None]
  return _segments(source, inside & opened, symbols)


def segments(
  tokens: chex.Array, length: chex.Array, symbols: Symbols
) -> jax.Array:
  """The segment of each token of compressions, which begin in the history.

  Example: 0 0 -1 1 -1 2 2 -1 -1.

  Args:
    tokens: int [P, G, T]; ids beyond the length are not read.
    length: int [P, G].
    symbols: token ids.

  Returns:
    int32 [P, G, T]; -1 at anchors, behind the last slot, from the first `eos`
    on and beyond the length.
  """
  tokens = jnp.asarray(tokens)
  stop, _ = _stop(tokens, length, symbols)
  inside = masking.length_mask(stop, tokens.shape[-1])
  return _segments(tokens, inside, symbols)


def verify(
  tokens: chex.Array,
  length: chex.Array,
  source: chex.Array,
  source_length: chex.Array,
  count: chex.Array,
  budget: chex.Array,
  symbols: Symbols,
  spread: chex.Numeric,
) -> jax.Array:
  """Whether compressions are extracts of their sources.

  Of several faults the first of this list is the verdict:

  1. CUT_OFF: no `eos` within the length;
  2. MALFORMED: the anchors before it are not `candidates` and the slots of the
     slate, each once and in order (an answer written as slots into the history
     is one way to get there), or something stands between the last slot and
     `eos`, or behind it;
  3. OVER_BUDGET: more tokens, `eos` included, than the budget;
  4. UNGROUNDED: a token that the same segment of the source does not have: a
     label, an invention, the evidence of another candidate. Marks say nothing
     about a candidate and are left to the last verdict;
  5. UNEVEN: the longest line and the shortest differ by more than `spread`
     tokens. Who describes only one candidate writes the answer;
  6. MARKED: one of the marks.

  Example: VALID with a budget of 9 and a spread of 1. A budget of 8:
  OVER_BUDGET. A spread of 0: UNEVEN, the lines are x and y v. With y for x:
  UNGROUNDED, the line of s0 has no y. Without s1: MALFORMED.

  Args:
    tokens: int [P, G, T], compressions; ids beyond the length are not read.
    length: int [P, G], `eos` included.
    source: int [P, S]; ids beyond the length are not read.
    source_length: int [P].
    count: int [P], real candidates.
    budget: int [P], the most tokens of a compression.
    symbols: token ids.
    spread: int scalar, tokens by which two lines may differ.

  Returns:
    int32 [P, G], indices into `VERDICTS`.
  """
  chex.assert_rank([tokens, source, spread], [3, 2, 0])
  chex.assert_equal_shape_prefix([tokens, length], 2)
  chex.assert_equal_shape_prefix([tokens, source], 1)
  chex.assert_shape([source_length, count, budget], jnp.shape(source)[:1])
  tokens, source = jnp.asarray(tokens), jnp.asarray(source)
  length = jnp.asarray(length)
  count, budget = jnp.asarray(count)[:, None], jnp.asarray(budget)[:, None]
  stop, cut_off = _stop(tokens, length, symbols)
  inside = masking.length_mask(stop, tokens.shape[-1])
  time = masking.index_like(tokens.shape)

  anchor = inside & _is_anchor(tokens, symbols)
  order = jnp.cumsum(anchor, axis=-1) - 1
  slot = symbols.slot_base + order - 1
  wanted = jnp.where(order == 0, symbols.candidates, slot)
  place = jnp.where(anchor, time, -1)
  malformed = (
    jnp.any(anchor & (tokens != wanted), axis=-1)
    | (jnp.sum(anchor, axis=-1) != count + 1)
    | (jnp.max(place, axis=-1) != stop - 1)
    | (stop != length - 1)
  )

  segment = segments(tokens, length, symbols)
  mark = inside & _is_mark(tokens, symbols)
  shown = source_segments(source, source_length, symbols)
  # A byte per [P, G, T, S] at most: 13 MB for 64 compressions of 1,000 tokens.
  same = tokens[..., None] == source[:, None, None, :]
  same &= segment[..., None] == shown[:, None, None, :]
  ungrounded = (segment >= 0) & ~mark & ~jnp.any(same, axis=-1)

  # Of anchors in order, every slot ends a line that begins behind another.
  before = jax.lax.cummax(place, axis=place.ndim - 1)
  before = jnp.pad(before, [(0, 0), (0, 0), (1, 0)], constant_values=-1)
  line = time - before[..., :-1] - 1
  ends = anchor & (order > 0)
  longest = jnp.max(jnp.where(ends, line, 0), axis=-1)
  shortest = jnp.min(jnp.where(ends, line, tokens.shape[-1]), axis=-1)

  faults = (
    cut_off,
    malformed,
    length > budget,
    jnp.any(ungrounded, axis=-1),
    longest - shortest > spread,
    jnp.any(mark, axis=-1),
  )
  codes = [jnp.full(length.shape, i + 1, jnp.int32) for i in range(len(faults))]
  return jnp.select(faults, codes, jnp.full(length.shape, VALID, jnp.int32))


def compression_reward(
  length: chex.Array, source_length: chex.Array
) -> jax.Array:
  """The share of tokens saved: r_comp = max(0, 1 - length / source length).

  Example: 9 tokens of 15: 0.4.

  Args:
    length: int [P, G], `eos` included.
    source_length: int [P].

  Returns:
    float32 [P, G] in [0, 1]; 0 where the source is empty.
  """
  chex.assert_equal_shape_prefix([length, source_length], 1)
  length = jnp.asarray(length)
  source_length = jnp.asarray(source_length)[:, None]
  saved = jnp.maximum(source_length - length, 0).astype(jnp.float32)
  return masking.divide(saved, jnp.broadcast_to(source_length, saved.shape))


def preservation(
  source: chex.Array,
  evidence: chex.Array,
  tokens: chex.Array,
  written: chex.Array,
) -> jax.Array:
  """Share of the evidence of a source that a compression still has.

  Places of evidence whose token is written at all, over places of evidence: a
  token that the evidence has often counts as often, and need be written once.

  Example: the history a b a c is the evidence, a c is written: 3 / 4.

  Args:
    source: int [P, S].
    evidence: bool [P, S], what is to be kept, such as `source_segments == 0`.
    tokens: int [P, G, T].
    written: bool [P, G, T], where it counts, such as `segments == 0`.

  Returns:
    float32 [P, G] in [0, 1]; 1 where there is no evidence.
  """
  chex.assert_rank([source, tokens], [2, 3])
  chex.assert_equal_shape([source, evidence])
  chex.assert_equal_shape([tokens, written])
  chex.assert_equal_shape_prefix([source, tokens], 1)
  source, tokens = jnp.asarray(source), jnp.asarray(tokens)
  evidence, written = jnp.asarray(evidence), jnp.asarray(written)
  same = source[:, None, :, None] == tokens[:, :, None, :]
  kept = jnp.any(same & written[:, :, None, :], axis=-1) & evidence[:, None, :]
  kept = jnp.sum(kept, axis=-1)
  total = jnp.broadcast_to(jnp.sum(evidence, axis=-1)[:, None], kept.shape)
  return jnp.where(total == 0, 1.0, masking.divide(kept, total))


def judge(
  scores: chex.Array,
  grades: chex.Array,
  count: chex.Array,
  preservation: chex.Array,
  k: int = 5,
  top: int = 3,
) -> Judged:
  """What is left of a slate, by the scores of a ranker that read compressions.

  With q = NDCG@k of the candidates by score (gains 2^g - 1), p = preservation:

    r_judge = 0.2 p + 0.8 q  if a positive is among the `top` best scores
              0.8 p + 0.2 q  otherwise

  Example: scores 0.2 0.9 put the positive first: solvable, q = 1, and with p =
  0.75 a total of 0.95. Scores 0.9 0.2 with `top` 1: not solvable, q = 0.6309,
  total 0.7262.

  Args:
    scores: float [P, G, K]; of equal ones the first candidate is first.
    grades: int [P, K].
    count: int [P], real candidates; the others are not read.
    preservation: float32 [P, G].
    k: cut-off of the NDCG.
    top: ranks in which a positive must be.

  Returns:
    Judged of [P, G].

  Raises:
    ValueError: if k < 1.
  """
  chex.assert_rank([scores, grades], [3, 2])
  chex.assert_equal_shape_prefix([scores, preservation], 2)
  shape = jnp.shape(scores)
  chex.assert_shape(grades, (shape[0], shape[2]))
  chex.assert_shape(count, shape[:1])
  grades = jnp.broadcast_to(jnp.asarray(grades)[:, None, :], shape)
  count = jnp.broadcast_to(jnp.asarray(count)[:, None], shape[:-1])
  padding = ~masking.length_mask(count, shape[-1])
  order = jnp.lexsort((-jnp.asarray(scores), padding), axis=-1)
  slate = (order, grades, count)
  quality = rewards.ndcg(*slate, k)
  found = rewards.positives_by_rank(*slate)[..., :top]
  solvable = jnp.any(found > 0, axis=-1)
  weight = jnp.where(solvable, 0.8, 0.2)
  total = (1.0 - weight) * preservation + weight * quality
  return Judged(solvable, quality, total.astype(jnp.float32))


def order_grades(scores: chex.Array, count: chex.Array) -> jax.Array:
  """Grades by an order in place of labels: 2 to the first, 1 to the next two.

  With them `judge` says how much of the order that a ranker has of the whole
  context is still its order of the compressed one. No label is read.

  Example: scores 0.2 0.9 0.1 0.5: 1 2 0 1.

  Args:
    scores: float [P, K]; of equal ones the first candidate is first.
    count: int [P], real candidates; the others get 0.

  Returns:
    int32 [P, K].
  """
  chex.assert_shape(count, jnp.shape(scores)[:1])
  scores = jnp.asarray(scores)
  real = masking.length_mask(jnp.asarray(count), scores.shape[-1])
  order = jnp.lexsort((-scores, ~real), axis=-1)
  rank = jnp.argsort(order, axis=-1)
  grades = jnp.where(rank == 0, 2, jnp.where(rank < 3, 1, 0))
  return jnp.where(real, grades, 0).astype(jnp.int32)


def ellipsis_factor(
  tokens: chex.Array,
  length: chex.Array,
  symbols: Symbols,
  cost: chex.Numeric = 1.0,
) -> jax.Array:
  """What truncation leaves of a reward: l = max(0, 1 - cost * marks).

  0 where there is no `eos`: such a compression was truncated itself. With a
  cost below 1, a mark that stands in one line alone is a hint that is paid for.

  Example: 1. With a mark in it: 0, or 0.75 at a cost of 0.25.

  Args:
    tokens: int [P, G, T]; ids beyond the length are not read.
    length: int [P, G], `eos` included.
    symbols: token ids.
    cost: float scalar, of each mark before `eos`.

  Returns:
    float32 [P, G] in [0, 1].
  """
  tokens = jnp.asarray(tokens)
  stop, cut_off = _stop(tokens, length, symbols)
  inside = masking.length_mask(stop, tokens.shape[-1])
  marks = jnp.sum(inside & _is_mark(tokens, symbols), axis=-1)
  left = jnp.maximum(0.0, 1.0 - cost * marks.astype(jnp.float32))
  return jnp.where(cut_off, 0.0, left)


def reward(
  verdict: chex.Array,
  r_comp: chex.Array,
  r_judge: chex.Array,
  ellipsis: chex.Array,
  weight: chex.Numeric,
) -> jax.Array:
  """The reward of compressions: r = (a r_comp + (1 - a) r_judge) l.

  0 for every verdict but VALID and MARKED, of which the factor l takes care.

  Example: a = 0.5, r_comp 0.4, r_judge 0.95, l 1: 0.675.

  Args:
    verdict: int [P, G], from `verify`.
    r_comp: float32 [P, G], from `compression_reward`.
    r_judge: float32 [P, G], the total of `judge`.
    ellipsis: float32 [P, G], from `ellipsis_factor`.
    weight: float scalar a in [0, 1].

  Returns:
    float32 [P, G] in [0, 1].
  """
  chex.assert_equal_shape([verdict, r_comp, r_judge, ellipsis])
  verdict = jnp.asarray(verdict)
  earned = (weight * r_comp + (1.0 - weight) * r_judge) * ellipsis
  extract = (verdict == VALID) | (verdict == MARKED)
  return jnp.where(extract, earned, 0.0).astype(jnp.float32)


def _stop(tokens, length, symbols):
  """Where the first `eos` stands or else the end; and whether it is the end."""
  chex.assert_shape(length, tokens.shape[:-1])
  inside = masking.length_mask(length, tokens.shape[-1])
  end = masking.first(inside & (tokens == symbols.eos))
  cut_off = end == tokens.shape[-1]
  return jnp.where(cut_off, jnp.asarray(length, jnp.int32), end), cut_off


def _is_slot(ids, symbols):
  slot = ids - symbols.slot_base
  return (slot >= 0) & (slot < symbols.num_slots)


def _is_anchor(ids, symbols):
  others = (ids == symbols.history) | (ids == symbols.candidates)
  return others | (ids == symbols.eos) | _is_slot(ids, symbols)


def _is_mark(ids, symbols):
  hit = jnp.zeros(ids.shape, bool)
  for mark in symbols.marks:
    hit |= ids == mark
  return hit


def _segments(ids, inside, symbols):
  """Segments of the ids inside, the first of which is in the history."""
  time = masking.index_like(ids.shape)
  start = masking.first(inside & (ids == symbols.candidates))
  lines = time > start[..., None]
  slot = inside & lines & _is_slot(ids, symbols)
  last = jnp.max(jnp.where(slot, time, -1), axis=-1)[..., None]
  keep = inside & ~_is_anchor(ids, symbols) & (~lines | (time < last))
  segment = jnp.where(lines, 1 + jnp.cumsum(slot, axis=-1), 0)
  return jnp.where(keep, segment, -1).astype(jnp.int32)
