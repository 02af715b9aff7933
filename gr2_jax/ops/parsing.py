"""From completion ids to a ranking, and the mask that keeps answers valid.

An answer is `slot * count, <eos>`, after `reasoning..., <think_end>` where the
policy thinks. It is read from the sampled ids themselves, without decoding to
text and back.

Axis letters: T time, K candidates.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import Array, masking

VALID, WRONG_FORMAT, OUT_OF_SET, REPETITION, MISSING = range(5)
VERDICTS = ('valid', 'wrong_format', 'out_of_set', 'repetition', 'missing')


class Answer(NamedTuple):
  """A parsed answer."""

  ranking: jax.Array  # int32 [..., K]; the incoming order where it is invalid
  verdict: jax.Array  # int32 [...], an index into `VERDICTS`


def incoming_ranking(incoming: Array, count: Array) -> jax.Array:
  """The ranking that repeats the incoming order: int32 [..., K]."""
  incoming = jnp.asarray(incoming, jnp.int32)
  size = incoming.shape[-1]
  real = masking.length_mask(count, size)
  key = jnp.where(real, incoming, size + masking.index_like(incoming.shape))
  return jnp.argsort(key, axis=-1).astype(jnp.int32)


def parse_answer(
  completion_ids: Array,
  lengths: Array,
  count: Array,
  incoming: Array,
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
  token when not thinking) to the first `eos`. The verdict is the first fault of
  this list:

  1. WRONG_FORMAT: no `eos` within the length, tokens after it, no `think_end`
     before it (when thinking), or a token in the answer that is no slot;
  2. OUT_OF_SET: a slot that holds no candidate of this slate;
  3. REPETITION: a candidate occurs twice;
  4. MISSING: a candidate does not occur. (More than `count` slots are always
     one of the faults above.)

  Slot tokens inside the reasoning are not read.

  Ids [..., T] at or beyond `lengths` [...], the tokens sampled including `eos`,
  are not read. Candidate j of K is the token `slot_base + j`; the vocabulary
  has `num_slots` such tokens, at least K (otherwise ValueError). `thinking`
  completions reason before they answer. An invalid answer falls back to the
  order `incoming`.
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

  stop = masking.first(inside & (ids == eos))
  broken = (stop == size) | (stop != lengths - 1)
  start = jnp.zeros_like(stop)
  if thinking:
    end = masking.first(inside & (ids == think_end))
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

  verdict = masking.first_fault(broken, outside, repeated, missing)
  place = jnp.min(jnp.where(named, time[..., None], size), axis=-2)
  order = masking.index_like(place.shape)
  answered = jnp.argsort(jnp.where(real, place, size + order), axis=-1)
  ranking = jnp.where(
    (verdict == VALID)[..., None],
    answered.astype(jnp.int32),
    incoming_ranking(incoming, count),
  )
  return Answer(ranking, verdict)


def start_answer(
  batch_shape: tuple[int, ...], num_candidates: int
) -> jax.Array:
  """`emitted` before the first slot: bool [*batch_shape, K], all False."""
  return jnp.zeros(tuple(batch_shape) + (num_candidates,), bool)


def answer_mask(emitted: Array, count: Array) -> jax.Array:
  """The permutation mask: the tokens that an answer may continue with.

  `emitted` bool [..., K] marks the candidates already named. Returns bool
  [..., K + 1]: each candidate once; then `eos`, allowed only when every real
  candidate was named. At least one entry is always True.
  """
  real = masking.length_mask(count, emitted.shape[-1])
  left = real & ~emitted
  done = ~jnp.any(left, axis=-1, keepdims=True)
  return jnp.concatenate([left, done], axis=-1)


def step_answer(emitted: Array, choice: Array) -> jax.Array:
  """`emitted` [..., K] after a `choice` [...]: a candidate, or K for `eos`."""
  index = masking.index_like(emitted.shape)
  chosen = index == jnp.asarray(choice)[..., None]
  return jnp.logical_or(emitted, chosen)
