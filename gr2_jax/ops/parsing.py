"""From completion ids to a ranking, and the mask that keeps answers valid.

An answer is `slot * count, <eos>`, after `reasoning..., <think_end>` where the
policy thinks. It is read from the sampled ids themselves: there is no decoding
to text and back.

Axis letters: T time, K candidates.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import masking

VALID = 0
WRONG_FORMAT = 1
OUT_OF_SET = 2
REPETITION = 3
MISSING = 4
VERDICTS = ('valid', 'wrong_format', 'out_of_set', 'repetition', 'missing')


class Answer(NamedTuple):
  """A parsed answer.

  Attributes:
    ranking: int32 [..., K]; the incoming order where the answer is invalid.
    verdict: int32 [...], an index into `VERDICTS`.
  """

  ranking: jax.Array
  verdict: jax.Array


def incoming_ranking(incoming: chex.Array, count: chex.Array) -> jax.Array:
  """The ranking that repeats the incoming order.

  Args:
    incoming: int [..., K], incoming rank of each presented candidate; what
      stands at padding is not read.
    count: int [...].

  Returns:
    int32 [..., K].
  """
  incoming = jnp.asarray(incoming, jnp.int32)
  size = incoming.shape[-1]
  real = masking.length_mask(count, size)
  key = jnp.where(real, incoming, size + masking.index_like(incoming.shape))
  return jnp.argsort(key, axis=-1).astype(jnp.int32)


def parse_answer(
  completion_ids: chex.Array,
  lengths: chex.Array,
  count: chex.Array,
  incoming: chex.Array,
  *,
  num_candidates: int,
  slot_base: int,
  num_slots: int,
  eos: int,
  think_end: int,
  thinking: bool,
) -> Answer:
  """Reads rankings from completions.

  The answer runs from the token after the first `think_end` (from the first
  token when not thinking) to the first `eos`. Of several faults the first of
  this list is the verdict:

  1. WRONG_FORMAT: no `eos` within the length, tokens after it, no `think_end`
     before it (when thinking), or a token in the answer that is no slot;
  2. OUT_OF_SET: a slot that holds no candidate of this slate;
  3. REPETITION: a candidate twice;
  4. MISSING: a candidate not at all. (More than `count` slots are always one
     of the faults above.)

  Slot tokens inside the reasoning are not read.

  Args:
    completion_ids: int [..., T]; ids at or beyond the length are not read.
    lengths: int [...], tokens sampled, `eos` included.
    count: int [...], real candidates.
    incoming: int [..., K], the order an invalid answer falls back to.
    num_candidates: K.
    slot_base: id of the first slot token; candidate j is `slot_base + j`.
    num_slots: how many slot tokens the vocabulary has, at least K.
    eos: id that ends a completion.
    think_end: id that ends the reasoning.
    thinking: whether completions reason before they answer.

  Returns:
    Answer(ranking int32 [..., K], verdict int32 [...]).

  Raises:
    ValueError: if the vocabulary has fewer slots than there are candidates.
  """
  if num_slots < num_candidates:
    raise ValueError(
      f'num_slots={num_slots} slot tokens cannot name '
      f'num_candidates={num_candidates} candidates: enlarge the vocabulary'
    )
  ids = jnp.asarray(completion_ids, jnp.int32)
  lengths = jnp.asarray(lengths, jnp.int32)
  count = jnp.asarray(count, jnp.int32)
  chex.assert_equal_shape_prefix([ids, incoming], ids.ndim - 1)
  chex.assert_shape([lengths, count], ids.shape[:-1])
  chex.assert_axis_dimension(incoming, -1, num_candidates)
  size = ids.shape[-1]
  time = masking.index_like(ids.shape)
  inside = masking.length_mask(lengths, size)

  def first(hits):
    return jnp.min(jnp.where(hits, time, size), axis=-1)

  stop = first(inside & (ids == eos))
  broken = (stop == size) | (stop != lengths - 1)
  start = jnp.zeros_like(stop)
  if thinking:
    end = first(inside & (ids == think_end))
    broken |= end >= stop
    start = end + 1

  answer = inside & (time >= start[..., None]) & (time < stop[..., None])
  slot = ids - slot_base
  is_slot = (slot >= 0) & (slot < num_slots)
  broken |= jnp.any(answer & ~is_slot, axis=-1)
  outside = jnp.any(answer & is_slot & (slot >= count[..., None]), axis=-1)

  shape = ids.shape + (num_candidates,)
  candidate = masking.index_like(shape)
  named = answer[..., None] & (slot[..., None] == candidate)
  times_named = jnp.sum(named, axis=-2)
  real = masking.length_mask(count, num_candidates)
  repeated = jnp.any(real & (times_named > 1), axis=-1)
  missing = jnp.any(real & (times_named == 0), axis=-1)

  verdict = jnp.select(
    [broken, outside, repeated, missing],
    [
      jnp.full_like(stop, fault)
      for fault in (WRONG_FORMAT, OUT_OF_SET, REPETITION, MISSING)
    ],
    jnp.full_like(stop, VALID),
  )
  place = jnp.min(jnp.where(named, time[..., None], size), axis=-2)
  order = masking.index_like(place.shape)
  answered = jnp.argsort(jnp.where(real, place, size + order), axis=-1)
  ranking = jnp.where(
    (verdict == VALID)[..., None],
    answered.astype(jnp.int32),
    incoming_ranking(incoming, count),
  )
  return Answer(ranking, verdict)


def start_answer(batch_shape: tuple[int, ...], num_candidates: int):
  """`emitted` before the first slot: bool [*batch_shape, K], all False."""
  return jnp.zeros(tuple(batch_shape) + (num_candidates,), bool)


def answer_mask(emitted: chex.Array, count: chex.Array) -> jax.Array:
  """What the next token of an answer may be: the permutation mask.

  Args:
    emitted: bool [..., K], candidates already named.
    count: int [...], real candidates.

  Returns:
    bool [..., K + 1]: each candidate, once; then `eos`, allowed only when
    every real candidate was named. At least one entry is always True.
  """
  real = masking.length_mask(count, emitted.shape[-1])
  left = real & ~emitted
  done = ~jnp.any(left, axis=-1, keepdims=True)
  return jnp.concatenate([left, done], axis=-1)


def step_answer(emitted: chex.Array, choice: chex.Array) -> jax.Array:
  """`emitted` after one more token.

  Args:
    emitted: bool [..., K].
    choice: int [...], index into the mask: a candidate, or K for `eos`.

  Returns:
    bool [..., K].
  """
  index = masking.index_like(emitted.shape)
  return emitted | (index == jnp.asarray(choice)[..., None])
