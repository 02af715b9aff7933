import dataclasses
import functools

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from gr2_jax.models import transformer

from .. import tiny

pytestmark = pytest.mark.slow

BASE, SIZE = 30, 3  # The family; 5..17 are a history's, 18..29 a rest's.
MODEL = dataclasses.replace(tiny.MODEL, memory_base=BASE, num_memory=SIZE)
GROUP, TIME = 2, 4

encode = jax.jit(transformer.encode_prompt, static_argnums=0)
remember = jax.jit(transformer.encode_memory, static_argnums=(0, 4))
complete = jax.jit(transformer.completion_hidden, static_argnums=0)
find_readable = jax.jit(
  lambda ids, length: transformer.readable_keys(
    transformer.find_memory(ids, length, BASE, SIZE)
  )
)


def readable_by_hand(ids, length):
  """Which keys each query reads, and which are read afterwards, one by one."""
  T = len(ids)
  ours = [t < length and BASE <= ids[t] < BASE + SIZE for t in range(T)]
  after = [any(ours[:t]) and not ours[t] for t in range(T)]
  reads, kept = np.zeros((T, T), bool), np.zeros(T, bool)
  for s in range(T):
    lost = not after[s] and not ours[s]
    kept[s] = not (any(ours) and lost)
    for t in range(s, T):
      reads[t, s] = not (after[t] and lost)
  return reads, kept


@hypothesis.given(
  hypothesis.extra.numpy.arrays(
    np.int32, (4, 6), elements=st.integers(BASE - 2, BASE + SIZE + 1)
  ),
  hypothesis.extra.numpy.arrays(np.int32, 4, elements=st.integers(1, 6)),
)
def test_what_is_readable_equals_a_loop(ids, length):
  ids[0] = BASE - 1  # A row without memory tokens.
  reads, kept = find_readable(ids, length)
  for row in range(4):
    wanted = readable_by_hand(ids[row], length[row])
    np.testing.assert_array_equal(reads[row], wanted[0])
    np.testing.assert_array_equal(kept[row], wanted[1])


def pieces(num_memory, seed=0):
  """Histories that end in memory tokens, rests, and completions."""
  rng = np.random.default_rng(seed)
  length, rest_length = np.int32([7, 3, 5, 4]), np.int32([1, 5, 3, 2])
  length += num_memory
  ids = rng.integers(5, 18, (4, length.max())).astype(np.int32)
  for row, end in zip(ids, length, strict=True):
    row[end - num_memory : end] = BASE + np.arange(num_memory)
    row[end:] = tiny.GRAMMAR.pad
  rest = rng.integers(18, 30, (4, 5)).astype(np.int32)
  rest[np.arange(5) >= rest_length[:, None]] = tiny.GRAMMAR.pad
  completion = rng.integers(18, 30, (4, GROUP, TIME)).astype(np.int32)
  return (ids, length), (rest, rest_length), completion


def joined(first, second):
  """Right-padded rows end to end."""
  (a, n), (b, m) = first, second
  out = np.zeros((len(a), a.shape[1] + b.shape[1]), np.int32)
  for row in range(len(a)):
    out[row, : n[row] + m[row]] = [*a[row, : n[row]], *b[row, : m[row]]]
  return out, n + m


def in_two_pieces(params, first, rest, completion, num_memory, stop=False):
  kept = transformer.encode_memory(MODEL, params, *first, num_memory)
  if stop:
    kept = kept.replace(kv=jax.lax.stop_gradient(kept.kv))
  hidden, prefix = transformer.encode_prompt(MODEL, params, *rest, kept)
  return hidden, transformer.completion_hidden(
    MODEL, params, hidden, prefix, completion
  )


def at_once(model, params, prompt, start, size, completion):
  """Hidden states of the `size` tokens from `start` on, and of completions."""
  hidden, prefix = transformer.encode_prompt(model, params, *prompt)
  at = jnp.minimum(start[:, None] + jnp.arange(size), hidden.shape[1] - 1)
  return jnp.take_along_axis(hidden, at[..., None], 1), (
    transformer.completion_hidden(model, params, hidden, prefix, completion)
  )


@pytest.mark.parametrize('num_memory', [1, SIZE])
def test_a_cached_memory_equals_one_pass_over_the_prompt(num_memory):
  params = tiny.params(MODEL)
  first, rest, completion = pieces(num_memory)
  found = jax.jit(in_two_pieces, static_argnums=4)(
    params, first, rest, completion, num_memory
  )
  wanted = jax.jit(at_once, static_argnums=(0, 4))(
    MODEL, params, joined(first, rest), first[1], 5, completion
  )
  real = np.arange(5) < rest[1][:, None]
  np.testing.assert_allclose(found[0][real], wanted[0][real], atol=1e-5)
  np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)


def test_a_memory_is_its_tokens_and_where_the_prompt_goes_on():
  first, rest, _ = pieces(2)
  kept = remember(MODEL, tiny.params(), *first, 2)
  _, whole = encode(MODEL, tiny.params(), *first)
  assert kept.kv.k.shape == (2, 4, 2, 2, 4)  # [L, P, K, M, H]
  assert kept.mask.all()
  np.testing.assert_array_equal(kept.length, first[1])
  for row, end in enumerate(first[1]):
    for found, wanted in ((kept.kv.k, whole.kv.k), (kept.kv.v, whole.kv.v)):
      np.testing.assert_array_equal(
        found[:, row], wanted[:, row, :, end - 2 : end]
      )
  hidden, prefix = encode(MODEL, tiny.params(), *rest, kept)
  assert hidden.shape == (4, 5, 16)
  np.testing.assert_array_equal(prefix.length, first[1] + rest[1])
  np.testing.assert_array_equal(prefix.last, rest[1] - 1)
  np.testing.assert_array_equal(prefix.mask.sum(1), 2 + rest[1])


@functools.partial(jax.jit, static_argnums=0)
def masked_hidden(model, params, ids, mask):
  """The decoder on whole sequences, each with a mask of its own."""
  time = jnp.broadcast_to(jnp.arange(ids.shape[1]), (len(ids), 1, ids.shape[1]))
  hidden, _ = transformer.Transformer(model).apply(
    {'params': params}, ids[:, None], time, mask[:, None]
  )
  return hidden[:, 0]


def test_prompts_and_completions_read_what_the_loop_says():
  params = tiny.params(MODEL)
  prompt, length = joined(*pieces(2)[:2])
  completion = pieces(2)[2]
  length[1] = 5  # Ends in its memory tokens.
  prompt[2, length[2] - 1] = BASE  # And memory tokens in two places.
  prompt[3, prompt[3] >= BASE] = 5  # None.
  ids, first = tiny.whole_sequences(prompt, length, completion)
  mask = np.stack([readable_by_hand(row, len(row))[0] for row in ids])
  wanted = masked_hidden(tiny.MODEL, params, ids, mask)
  hidden, prefix = encode(MODEL, params, prompt, length)
  for row in range(4):
    np.testing.assert_allclose(
      hidden[row, : length[row]],
      wanted[row * GROUP, : length[row]],
      atol=1e-5,
    )
  at = (first - 1)[:, None] + np.arange(TIME)
  found = complete(MODEL, params, hidden, prefix, completion)
  np.testing.assert_allclose(
    found.reshape(4 * GROUP, TIME, -1),
    np.take_along_axis(np.asarray(wanted), at[..., None], 1),
    atol=1e-5,
  )
  plain, _ = encode(tiny.MODEL, params, prompt, length)
  gap = np.abs(hidden - plain).max(-1)
  assert gap[0, length[0] - 1] > 1e-2  # Behind; the others are as they were.
  assert gap[1, : length[1]].max() < 1e-5
  assert gap[3].max() < 1e-5


def test_prompts_without_memory_tokens_are_as_without_the_family():
  params = tiny.params()
  prompt, length = tiny.prompts(6)
  prompt[(prompt >= BASE) & (prompt < BASE + SIZE)] = 5
  prompt[np.arange(7) >= length[:, None]] = BASE  # In the padding: nothing.
  tiny.assert_trees_close(
    encode(MODEL, params, prompt, length)[1],
    encode(tiny.MODEL, params, prompt, length)[1],
    1e-5,
  )
  real = np.arange(7) < length[:, None]
  np.testing.assert_allclose(
    encode(MODEL, params, prompt, length)[0][real],
    encode(tiny.MODEL, params, prompt, length)[0][real],
    atol=1e-5,
  )


@pytest.mark.parametrize('layers', [1, 2])
def test_a_history_passes_through_the_memory_alone(layers):
  """One layer's memory holds nothing yet: its keys come from embeddings."""
  model = dataclasses.replace(MODEL, num_layers=layers)
  params = tiny.params(model)
  first, rest, completion = pieces(2)
  other = first[0].copy()
  other[:, 0] = 17
  assert (other != first[0]).any(axis=1).all()
  run = jax.jit(at_once, static_argnums=(0, 4))
  a, b = (
    run(model, params, joined((ids, first[1]), rest), first[1], 1, completion)
    for ids in (first[0], other)
  )
  for x, y in zip(a, b, strict=True):
    gap = np.abs(x - y).max((-1, -2))
    assert (gap == 0).all() if layers == 1 else (gap > 1e-3).all()


def test_gradients_reach_a_history_through_the_memory_alone():
  params = tiny.params(MODEL)
  first, rest, completion = pieces(2)
  weight = np.random.default_rng(2).normal(size=(4, 5, 16)) / 30
  weight *= (np.arange(5) < rest[1][:, None])[..., None]
  later = np.random.default_rng(3).normal(size=(4, GROUP, TIME, 16)) / 30

  def gradient(hidden_fn):
    def loss(params):
      hidden, following = hidden_fn(params)
      return jnp.sum(hidden * weight) + jnp.sum(following * later)

    return jax.jit(jax.grad(loss))(params)

  prompt = joined(first, rest)
  wanted = gradient(
    lambda p: at_once(MODEL, p, prompt, first[1], 5, completion)
  )
  found = gradient(lambda p: in_two_pieces(p, first, rest, completion, 2))
  tiny.assert_trees_close(found, wanted, 1e-5)
  stopped = gradient(
    lambda p: in_two_pieces(p, first, rest, completion, 2, stop=True)
  )
  history = np.unique(first[0][(first[0] >= 5) & (first[0] < BASE)])
  assert (np.abs(wanted['embedding'][history]).max(-1) > 1e-4).all()
  assert not np.any(stopped['embedding'][history])
  assert not np.any(stopped['embedding'][BASE : BASE + 2])
  assert np.abs(stopped['embedding'][rest[0][:, 0]]).max() > 1e-3


def test_other_lengths_are_not_traced_again():
  traces = []

  @jax.jit
  def run(params, first, rest, completion):
    traces.append(1)
    return in_two_pieces(params, first, rest, completion, 2)[1]

  params = tiny.params(MODEL)
  first, rest, completion = pieces(2)
  a = run(params, first, rest, completion)
  b = run(params, first, (rest[0], rest[1] % 3 + 1), completion)
  c = run(params, (first[0][::-1], first[1][::-1]), rest, completion)
  assert len(traces) == 1
  assert np.abs(a - b).max() > 1e-3
  assert np.abs(a - c).max() > 1e-3


@pytest.mark.parametrize(('base', 'size'), [(-1, 3), (5, -2), (38, 3), (41, 0)])
def test_a_family_outside_of_the_vocabulary_is_named(base, size):
  with pytest.raises(ValueError, match=f'num_memory={size} name ids outside'):
    dataclasses.replace(tiny.MODEL, memory_base=base, num_memory=size)


@pytest.mark.parametrize('num_memory', [0, SIZE + 1])
def test_a_memory_of_tokens_that_there_are_not_is_named(num_memory):
  first, _, _ = pieces(1)
  with pytest.raises(ValueError, match=f'num_memory={num_memory} .*raise that'):
    transformer.encode_memory(MODEL, tiny.params(), *first, num_memory)
