"""A judge of reasoning without a model: four axes read from the token ids.

A span of reasoning cites semantic IDs (SIDs: L code tokens of levels 0..L-1 in
a row) and names candidates by their slot tokens. Citations are checked against
the prompt, and the conclusion against the answer. The axes are those of GR2:
history grounding, consistency, flow, identifier correctness. Each lies in
[0, 1] and is verified, not estimated. They measure form and agreement, not
whether the argument is a good one.

The worked examples share one slate. Items are written A, B, .. for their SIDs:

  prompt      <history> A B <candidates> C c0 D c1 E c2
  completion  likes comedy as B so comedy fits c1 c0 </think> c1 c2 c0 <eos>

Axis letters: P prompts, G group, T time of the completion, Tp of the prompt,
K candidates, S slot tokens, L levels, C codebook size.
"""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import Array, masking, parsing

_NO_CODE = -2  # The level of a token that is no code; its successor is none.


@dataclasses.dataclass(frozen=True)
class Symbols:
  """The token ids that the judge reads; static under jit.

  Example: with `sid_base` 100, `levels` 2 and `codebook_size` 4, the SID of
  the codes (3, 1) is the tokens 103 105.
  """

  history: int  # opens the block of the user's history in a prompt
  candidates: int  # opens the block of the candidates
  sid_base: int  # code c of level l is sid_base + l * codebook_size + c
  levels: int  # L
  codebook_size: int  # C
  slot_base: int  # candidate j is slot_base + j
  num_slots: int  # S
  think_end: int
  eos: int


class Quality(NamedTuple):
  """The four axes and their mean, each float32 [P, G] in [0, 1]."""

  grounding: jax.Array
  consistency: jax.Array
  flow: jax.Array
  identifiers: jax.Array
  total: jax.Array


def judge(
  tokens: Array,
  length: Array,
  prompt: Array,
  prompt_length: Array,
  count: Array,
  ranking: Array,
  verdict: Array,
  symbols: Symbols,
) -> Quality:
  """Grades how far the reasoning of completions can be verified.

  The span runs from the first token to the first `think_end`, which must stand
  before any `eos`. Without a span, or with an empty one, every axis is 0: a
  policy that does not reason earns a constant, which cancels in the advantage.

  * grounding: SIDs cited in the span that the prompt's history contains, over
    the SIDs cited. 0 where none is cited.
  * consistency: the conclusion is the last run of slot tokens in the span. Half
    of the axis is whether its first slot is the answer's first pick, half is
    the share of its m different slots that are in the answer's top m. 0 without
    a conclusion or a valid answer.
  * flow: the share of slot tokens that stand after the first SID cited, so that
    evidence comes before candidates, times the share of the span's bigrams that
    are new at their place, so that no step is repeated.
  * identifiers: the share of correct attempts to name something. An attempt is
    a slot token, correct where the slate has that candidate; or a chain of
    codes of rising level, correct where it has all levels from 0 to L-1 and the
    SID is one of the history or of the candidates. 0 without an attempt.

  Example: grounding 1 (B is in the history); consistency 0.75 (c1 is the first
  pick, and of c1 c0 only c1 is in the top two, c1 c2); flow 1; identifiers 1;
  total 0.9375.

  `tokens` int [P, G, T] are completions, `prompt` is int [P, Tp]; ids beyond
  their lengths, `eos` included, are not read. `ranking` [P, G, K], in slots,
  and `verdict` [P, G] come from `parsing.parse_answer`. The two blocks may
  stand in either order in the prompt; each ends where the other or the end of
  the prompt begins.
  """
  chex.assert_rank([tokens, prompt, ranking], [3, 2, 3])
  chex.assert_equal_shape([length, verdict])
  chex.assert_equal_shape_prefix([tokens, length, ranking], 2)
  chex.assert_shape([prompt_length, count], jnp.shape(prompt)[:1])
  tokens, prompt = jnp.asarray(tokens), jnp.asarray(prompt)
  count = jnp.broadcast_to(jnp.asarray(count)[:, None], length.shape)
  inside = masking.length_mask(length, tokens.shape[-1])
  end = masking.first(inside & (tokens == symbols.think_end))
  stop = masking.first(inside & (tokens == symbols.eos))
  span = masking.length_mask(jnp.where(end < stop, end, 0), tokens.shape[-1])

  history, candidates = _blocks(prompt, prompt_length, symbols)
  cited = _complete_sids(tokens, span, symbols)
  shown = _complete_sids(prompt, history | candidates, symbols)
  is_cited = cited.place < tokens.shape[-1]
  is_shown = shown.place < prompt.shape[-1]
  in_history = is_shown & _taken(history, shown.place)
  grounded = is_cited & _among(cited, shown, in_history)
  exists = is_cited & _among(cited, shown, is_shown)

  slot = tokens - symbols.slot_base
  named = span & (slot >= 0) & (slot < symbols.num_slots)
  grounding = masking.divide(_number(grounded), _number(is_cited))
  agrees = _agreement(_last_run(named), slot, ranking, count, symbols.num_slots)
  consistency = jnp.where(verdict == parsing.VALID, agrees, 0.0)
  after = masking.index_like(tokens.shape) > cited.place[..., :1]
  in_turn = masking.divide(_number(named & after), _number(named))
  flow = in_turn * _fresh_bigrams(tokens, span)
  right = _number(exists) + _number(named & (slot < count[..., None]))
  attempts = _number(_chain_starts(tokens, span, symbols)) + _number(named)
  identifiers = masking.divide(right, attempts)
  total = (grounding + consistency + flow + identifiers) / 4
  return Quality(grounding, consistency, flow, identifiers, total)


def _number(hits: jax.Array) -> jax.Array:
  """The number of hits: int32 [...]."""
  return jnp.sum(hits, axis=-1)


def _taken(values: jax.Array, place: jax.Array) -> jax.Array:
  """values[place]; a place beyond the end reads the last value."""
  at = jnp.minimum(place, values.shape[-1] - 1)
  return jnp.take_along_axis(values, at, axis=-1)


def _shift(
  values: jax.Array, places: int, fill: jax.Array | float
) -> jax.Array:
  """values[t + places] at t (places may be < 0), `fill` beyond the ends."""
  size = values.shape[-1]
  edge = [(0, 0)] * (values.ndim - 1)
  side = (0, places) if places > 0 else (-places, 0)
  wide = jnp.pad(values, [*edge, side], constant_values=fill)
  return wide[..., places:] if places > 0 else wide[..., :size]


def _blocks(
  prompt: jax.Array, length: Array, symbols: Symbols
) -> tuple[jax.Array, jax.Array]:
  """The places of history and of candidates: bool [P, Tp], twice."""
  inside = masking.length_mask(length, prompt.shape[-1])
  time = masking.index_like(prompt.shape)
  history = masking.first(inside & (prompt == symbols.history))[..., None]
  candidates = masking.first(inside & (prompt == symbols.candidates))[..., None]

  def block(start: jax.Array, other: jax.Array) -> jax.Array:
    return inside & (time > start) & ((other < start) | (time < other))

  return block(history, candidates), block(candidates, history)


def _levels(
  ids: jax.Array, mask: jax.Array, symbols: Symbols
) -> tuple[jax.Array, jax.Array]:
  """Level of each code token, `_NO_CODE` elsewhere; and its code."""
  code = ids - symbols.sid_base
  size = symbols.codebook_size
  is_code = mask & (code >= 0) & (code < symbols.levels * size)
  return jnp.where(is_code, code // size, _NO_CODE), code % size


class _Sids(NamedTuple):
  """The complete SIDs of a row, first to last; at most N = T // L fit in it."""

  place: jax.Array  # int32 [..., N], where they begin; T where there is none
  words: tuple[jax.Array, ...]  # int32 [..., N], together the codes


def _complete_sids(ids: jax.Array, mask: jax.Array, symbols: Symbols) -> _Sids:
  """Finds complete SIDs.

  An int32 word holds as many levels as fit, so that C^L may exceed its range;
  two SIDs are equal exactly where their words are.
  """
  L, C, T = symbols.levels, symbols.codebook_size, ids.shape[-1]
  level, code = _levels(ids, mask, symbols)
  in_word = max(n for n in range(1, L + 1) if n == 1 or C**n <= 2**31)
  complete, words = jnp.ones(ids.shape, bool), []
  for step in range(L):
    complete &= _shift(level, step, _NO_CODE) == step
    digit = _shift(code, step, 0)
    if step % in_word:
      words[-1] = words[-1] * C + digit
    else:
      words.append(digit)
  place = jnp.where(complete, masking.index_like(ids.shape), T)
  place = jnp.sort(place, axis=-1)[..., : max(1, T // L)]
  return _Sids(place, tuple(_taken(word, place) for word in words))


def _chain_starts(
  ids: jax.Array, mask: jax.Array, symbols: Symbols
) -> jax.Array:
  """Codes that do not continue the level before them: bool [..., T]."""
  level, _ = _levels(ids, mask, symbols)
  return (level >= 0) & (_shift(level, -1, _NO_CODE) + 1 != level)


def _among(cited: _Sids, shown: _Sids, mask: jax.Array) -> jax.Array:
  """Whether each SID cited is one of those shown under the mask [P, N]."""
  same = mask[:, None, None, :]
  for word, other in zip(cited.words, shown.words, strict=True):
    same = same & (word[..., None] == other[:, None, None, :])
  return jnp.any(same, axis=-1)


def _last_run(hits: jax.Array) -> jax.Array:
  """The last unbroken run of hits: bool [..., T]."""
  time = masking.index_like(hits.shape)
  last = jnp.max(jnp.where(hits, time, -1), axis=-1)[..., None]
  gaps = jnp.where(~hits & (time < last), time, -1)
  return hits & (time > jnp.max(gaps, axis=-1)[..., None])


def _agreement(
  conclusion: jax.Array,
  slot: jax.Array,
  ranking: Array,
  count: jax.Array,
  num_slots: int,
) -> jax.Array:
  """Mean of: same first pick; overlap of the conclusion with as large a top."""
  start = masking.first(conclusion)
  first = _taken(slot, start[..., None])[..., 0]
  picked = (start < slot.shape[-1]) & (first == ranking[..., 0])
  shape = (*slot.shape, num_slots)
  hit = conclusion[..., None] & (slot[..., None] == masking.index_like(shape))
  concluded = jnp.any(hit, axis=-2)
  size = _number(concluded)
  top = masking.length_mask(jnp.minimum(size, count), ranking.shape[-1])
  shape = (*ranking.shape, num_slots)
  hit = top[..., None] & (ranking[..., None] == masking.index_like(shape))
  shared = _number(concluded & jnp.any(hit, axis=-2))
  overlap = masking.divide(shared, size)
  return 0.5 * (picked.astype(jnp.float32) + overlap)


def _fresh_bigrams(ids: jax.Array, span: jax.Array) -> jax.Array:
  """Different bigrams over bigrams of the span: float32 [...]."""
  pair = span & _shift(span, 1, False)
  first = jnp.where(pair, ids, -1)
  second = jnp.where(pair, _shift(ids, 1, -1), -1)
  first, second = jax.lax.sort((first, second), dimension=-1, num_keys=2)
  fresh = (first != _shift(first, -1, -1)) | (second != _shift(second, -1, -1))
  return masking.divide(_number(fresh & (first >= 0)), _number(pair))
