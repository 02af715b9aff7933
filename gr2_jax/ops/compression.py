"""Verification and rewards of compressed contexts (GR2, Eq. 10-11).

A compressor rewrites the context of a slate, the source, into fewer tokens. It
keeps a part of the history and a part of every candidate's line, between the
same anchors (`<candidates>` and the slots in order), and ends with `<eos>`.
Segment 0 is the history; segment 1 + k is the line of candidate k, which its
slot ends. Nothing is estimated: an extract is verified id by id against its
source, so that a copied, cut or invented token, a label, or an answer hidden
in the compression earns 0.

The checks leave some freedom: a segment may repeat or reorder its own tokens,
and one line may be `spread` tokens longer than another.

The worked examples share one slate of two candidates with grades 0 and 2;
lower-case letters are tokens of text:

  source       <bos> <history> a b a c <candidates> x u s0 y u v s1 go
  compression  a c <candidates> x s0 y v s1 <eos>

Axis letters: P prompts, G compressions of each, S source tokens, T compression
tokens, K candidates. Shared arguments:

* `source` int [P, S] and `tokens` int [P, G, T], the compressions; their
  `length` [P] and [P, G] counts `eos`, and ids beyond it are not read;
* `count` int [P], real candidates.
"""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import Array, masking, rewards

VALID, CUT_OFF, MALFORMED, OVER_BUDGET, UNGROUNDED, UNEVEN, MARKED = range(7)
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

  All but the marks are anchors. An anchor belongs to no segment.
  """

  history: int  # opens the history of a source; a compression has none
  candidates: int  # opens the candidates
  slot_base: int  # candidate k is slot_base + k
  num_slots: int  # at least K
  eos: int  # ends a compression
  marks: tuple[int, ...] = ()  # ids that say that something was left out


class Judged(NamedTuple):
  """A frozen ranker's verdict on compressions, each [P, G]."""

  solvable: jax.Array  # bool, whether a positive is among its top candidates
  ranking: jax.Array  # float32 in [0, 1], NDCG of its order
  total: jax.Array  # float32 in [0, 1]


def source_segments(
  source: Array, length: Array, symbols: Symbols
) -> jax.Array:
  """The segment of each token of sources; the history stands before candidates.

  Example: -1 -1 0 0 0 0 -1 1 1 -1 2 2 2 -1 -1.

  Returns int32 [P, S]; -1 at anchors, before the history, behind the last slot
  and beyond the length.
  """
  chex.assert_shape(length, jnp.shape(source)[:-1])
  source = jnp.asarray(source)
  inside = masking.length_mask(length, source.shape[-1])
  start = masking.first(inside & (source == symbols.history))
  opened = masking.index_like(source.shape) > start[..., None]
  return _segments(source, inside & opened, symbols)


def segments(tokens: Array, length: Array, symbols: Symbols) -> jax.Array:
  """The segment of each token of compressions, which begin in the history.

  Example: 0 0 -1 1 -1 2 2 -1 -1.

  Returns int32 [P, G, T]; -1 at anchors, behind the last slot, from the first
  `eos` on and beyond the length.
  """
  tokens = jnp.asarray(tokens)
  stop, _ = _stop(tokens, length, symbols)
  inside = masking.length_mask(stop, tokens.shape[-1])
  return _segments(tokens, inside, symbols)


def verify(
  tokens: Array,
  length: Array,
  source: Array,
  source_length: Array,
  count: Array,
  budget: Array,
  symbols: Symbols,
  spread: Array | float,
) -> jax.Array:
  """Verifies that compressions are extracts of their sources.

  The verdict is the first fault of this list:

  1. CUT_OFF: no `eos` within the length;
  2. MALFORMED: the anchors before it are not `candidates` and the slots of the
     slate, each once and in order (for instance, an answer written as slots
     into the history), or a token stands between the last slot and `eos`, or
     after;
  3. OVER_BUDGET: more tokens, `eos` included, than the budget;
  4. UNGROUNDED: a token that the same segment of the source does not contain: a
     label, an invention, the evidence of another candidate. Marks carry no
     information about a candidate and are left to the last verdict;
  5. UNEVEN: the longest and the shortest line differ by more than `spread`
     tokens. A compressor that describes only one candidate gives the answer
     away;
  6. MARKED: it contains one of the marks.

  Example: VALID with a budget of 9 and a spread of 1. A budget of 8:
  OVER_BUDGET. A spread of 0: UNEVEN, the lines are x and y v. With y for x:
  UNGROUNDED, the line of s0 has no y. Without s1: MALFORMED.

  `budget` int [P] is the largest length of a compression, `spread` an int
  scalar in tokens. Returns int32 [P, G], indices into `VERDICTS`.
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
  expected = jnp.where(order == 0, symbols.candidates, slot)
  place = jnp.where(anchor, time, -1)
  malformed = (
    jnp.any(anchor & (tokens != expected), axis=-1)
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

  return masking.first_fault(
    cut_off,
    malformed,
    length > budget,
    jnp.any(ungrounded, axis=-1),
    longest - shortest > spread,
    jnp.any(mark, axis=-1),
  )


def compression_reward(length: Array, source_length: Array) -> jax.Array:
  """The share of tokens saved: r_comp = max(0, 1 - length / source length).

  Example: 9 tokens of 15: 0.4.

  Returns float32 [P, G] in [0, 1]; 0 where the source is empty.
  """
  chex.assert_equal_shape_prefix([length, source_length], 1)
  length = jnp.asarray(length)
  source_length = jnp.asarray(source_length)[:, None]
  saved = jnp.maximum(source_length - length, 0).astype(jnp.float32)
  return masking.divide(saved, jnp.broadcast_to(source_length, saved.shape))


def preservation(
  source: Array, evidence: Array, tokens: Array, written: Array
) -> jax.Array:
  """Share of a source's evidence that a compression still contains.

  It counts the places of evidence whose token is written at all: a token that
  occurs several times in the evidence counts as often, and needs to be written
  only once.

  Example: the history a b a c is the evidence, a c is written: 3 / 4.

  `evidence` bool [P, S] marks the places to keep, such as `source_segments ==
  0`; `written` bool [P, G, T] the places that count, such as `segments == 0`.
  Returns float32 [P, G] in [0, 1]; 1 where there is no evidence.
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
  scores: Array,
  grades: Array,
  count: Array,
  preservation: Array,
  k: int = 5,
  top: int = 3,
) -> Judged:
  """Quality of compressions, from the scores of a ranker that reads them.

  With q = NDCG@k of the candidates by score (gains 2^g - 1), p = preservation:

    r_judge = 0.2 p + 0.8 q  if a positive is among the `top` best scores
              0.8 p + 0.2 q  otherwise

  Example: scores 0.2 0.9 put the positive first: solvable, q = 1, and with p =
  0.75 a total of 0.95. Scores 0.9 0.2 with `top` 1: not solvable, q = 0.6309,
  total 0.7262.

  `scores` are float [P, G, K]; ties keep the order of the candidates. Grades
  are int [P, K], preservation float32 [P, G]. Raises ValueError if k < 1.
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
  positives = rewards.positives_by_rank(*slate)[..., :top]
  solvable = jnp.any(positives > 0, axis=-1)
  weight = jnp.where(solvable, 0.8, 0.2)
  total = (1.0 - weight) * preservation + weight * quality
  return Judged(solvable, quality, total.astype(jnp.float32))


def order_grades(scores: Array, count: Array) -> jax.Array:
  """Grades from an order, not labels: 2 for the first, 1 for the next two.

  With these grades, `judge` measures how much of a ranker's order on the full
  context survives compression, without reading a label.

  Example: scores 0.2 0.9 0.1 0.5: 1 2 0 1.

  `scores` are float [P, K]; ties keep the order of the candidates. Returns
  int32 [P, K], 0 at padding.
  """
  chex.assert_shape(count, jnp.shape(scores)[:1])
  scores = jnp.asarray(scores)
  real = masking.length_mask(jnp.asarray(count), scores.shape[-1])
  order = jnp.lexsort((-scores, ~real), axis=-1)
  rank = jnp.argsort(order, axis=-1)
  grades = jnp.where(rank == 0, 2, jnp.where(rank < 3, 1, 0))
  return jnp.where(real, grades, 0).astype(jnp.int32)


def ellipsis_factor(
  tokens: Array, length: Array, symbols: Symbols, cost: Array | float = 1.0
) -> jax.Array:
  """The factor by which truncation marks reduce a reward.

  l = max(0, 1 - cost * marks); 0 where there is no `eos`, since such a
  compression was truncated itself. With a cost below 1, a mark in a single line
  is a hint that has a price.

  Example: 1. With a mark in it: 0, or 0.75 at a cost of 0.25.

  `cost` is a float scalar for each mark before `eos`. Returns float32 [P, G] in
  [0, 1].
  """
  tokens = jnp.asarray(tokens)
  stop, cut_off = _stop(tokens, length, symbols)
  inside = masking.length_mask(stop, tokens.shape[-1])
  marks = jnp.sum(inside & _is_mark(tokens, symbols), axis=-1)
  left = jnp.maximum(0.0, 1.0 - cost * marks.astype(jnp.float32))
  return jnp.where(cut_off, 0.0, left)


def reward(
  verdict: Array,
  r_comp: Array,
  r_judge: Array,
  ellipsis: Array,
  weight: Array | float,
) -> jax.Array:
  """The reward of compressions: r = (a r_comp + (1 - a) r_judge) l.

  It is 0 for every verdict but VALID and MARKED; the factor l handles marks.

  Example: a = 0.5, r_comp 0.4, r_judge 0.95, l 1: 0.675.

  The four come from `verify`, `compression_reward`, `judge` (its total) and
  `ellipsis_factor`; `weight` is a. Returns float32 [P, G] in [0, 1].
  """
  chex.assert_equal_shape([verdict, r_comp, r_judge, ellipsis])
  verdict = jnp.asarray(verdict)
  earned = (weight * r_comp + (1.0 - weight) * r_judge) * ellipsis
  extract = (verdict == VALID) | (verdict == MARKED)
  return jnp.where(extract, earned, 0.0).astype(jnp.float32)


def _stop(
  tokens: Array, length: Array, symbols: Symbols
) -> tuple[jax.Array, jax.Array]:
  """The place of the first `eos`, or the length; and whether there is none."""
  chex.assert_shape(length, tokens.shape[:-1])
  inside = masking.length_mask(length, tokens.shape[-1])
  end = masking.first(inside & (tokens == symbols.eos))
  cut_off = end == tokens.shape[-1]
  return jnp.where(cut_off, jnp.asarray(length, jnp.int32), end), cut_off


def _is_slot(ids: jax.Array, symbols: Symbols) -> jax.Array:
  slot = ids - symbols.slot_base
  return (slot >= 0) & (slot < symbols.num_slots)


def _is_anchor(ids: jax.Array, symbols: Symbols) -> jax.Array:
  others = (ids == symbols.history) | (ids == symbols.candidates)
  return others | (ids == symbols.eos) | _is_slot(ids, symbols)


def _is_mark(ids: jax.Array, symbols: Symbols) -> jax.Array:
  hit = jnp.zeros(ids.shape, bool)
  for mark in symbols.marks:
    hit |= ids == mark
  return hit


def _segments(ids: jax.Array, inside: jax.Array, symbols: Symbols) -> jax.Array:
  """Segments of the ids inside, the first of which is in the history."""
  time = masking.index_like(ids.shape)
  start = masking.first(inside & (ids == symbols.candidates))
  lines = time > start[..., None]
  slot = inside & lines & _is_slot(ids, symbols)
  last = jnp.max(jnp.where(slot, time, -1), axis=-1)[..., None]
  keep = inside & ~_is_anchor(ids, symbols) & (~lines | (time < last))
  segment = jnp.where(lines, 1 + jnp.cumsum(slot, axis=-1), 0)
  return jnp.where(keep, segment, -1).astype(jnp.int32)
