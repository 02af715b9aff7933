import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.ops import parsing

from . import oracles

K, T, SLOTS, BASE, EOS, END, WORD = 5, 14, 7, 10, 1, 2, 3
VOCABULARY = (EOS, END, WORD, *range(BASE, BASE + SLOTS), BASE + SLOTS, 0)


@functools.cache
def parser(thinking, jitted=True):
  parse = functools.partial(
    parsing.parse_answer,
    num_candidates=K,
    slot_base=BASE,
    num_slots=SLOTS,
    eos=EOS,
    think_end=END,
    thinking=thinking,
  )
  return jax.jit(parse) if jitted else parse


def oracle(ids, length, count, incoming, thinking):
  return oracles.parse(
    ids, length, count, incoming, BASE, SLOTS, EOS, END, thinking
  )


def assert_as_oracle(ids, lengths, count, incoming, thinking, jitted=True):
  answer = parser(thinking, jitted)(ids, lengths, count, incoming)
  expected = [
    oracle(*row, thinking)
    for row in zip(ids, lengths, count, incoming, strict=True)
  ]
  names = [parsing.VERDICTS[v] for v in np.asarray(answer.verdict)]
  assert names == [name for _, name in expected]
  np.testing.assert_array_equal(answer.ranking, [r for r, _ in expected])
  return names


def one(tokens, count=3, thinking=False, incoming=(2, 0, 1, 9, 9)):
  """Verdict name and ranking of a single completion without batch axes."""
  ids = np.full(T, BASE, np.int32)  # Padding looks like a slot.
  ids[: len(tokens)] = tokens
  answer = parser(thinking)(
    ids, np.int32(len(tokens)), np.int32(count), np.array(incoming, np.int32)
  )
  return parsing.VERDICTS[int(answer.verdict)], list(answer.ranking)


A, B, C, D = range(BASE, BASE + 4)
FALLBACK = [1, 2, 0, 3, 4]


@pytest.mark.parametrize(
  ('tokens', 'thinking', 'verdict'),
  [
    ([C, A, B, EOS], False, 'valid'),
    ([WORD, A, END, C, A, B, EOS], True, 'valid'),
    ([END, C, A, B, EOS], True, 'valid'),
    ([C, A, B], False, 'wrong_format'),
    ([C, WORD, A, B, EOS], False, 'wrong_format'),
    ([C, A, B, EOS, C], False, 'wrong_format'),
    ([C, A, B, EOS], True, 'wrong_format'),
    ([EOS, END, C, A, B, EOS], True, 'wrong_format'),
    ([C, A, B, EOS, END, EOS], True, 'wrong_format'),
    ([WORD, END, C, A, END, B, EOS], True, 'wrong_format'),
    ([C, A, BASE + SLOTS, EOS], False, 'wrong_format'),
    ([], False, 'wrong_format'),
    ([C, A, D, EOS], False, 'out_of_set'),
    ([C, A, A, EOS], False, 'repetition'),
    ([C, A, B, C, EOS], False, 'repetition'),
    ([C, A, EOS], False, 'missing'),
    ([EOS], False, 'missing'),
    # Several faults: the first of the order decides.
    ([WORD, D, A, A, EOS], False, 'wrong_format'),
    ([D, A, A, EOS], False, 'out_of_set'),
    ([A, A, EOS], False, 'repetition'),
  ],
)
def test_verdicts(tokens, thinking, verdict):
  name, ranking = one(tokens, thinking=thinking)
  assert name == verdict
  assert ranking == ([2, 0, 1, 3, 4] if verdict == 'valid' else FALLBACK)


def test_too_few_slot_tokens_is_an_error():
  with pytest.raises(ValueError, match='num_slots=4'):
    parsing.parse_answer(
      np.zeros((1, T), np.int32),
      np.ones(1, np.int32),
      np.ones(1, np.int32),
      np.zeros((1, K), np.int32),
      num_candidates=K,
      slot_base=BASE,
      num_slots=4,
      eos=EOS,
      think_end=END,
      thinking=False,
    )


def random_completions(seed, batch, thinking):
  """Answers with a few random edits, so that every verdict is common."""
  rng = np.random.default_rng(seed)
  _, _, count, incoming = oracles.random_slates(seed, batch, K)
  ids = rng.choice(VOCABULARY, (batch, T)).astype(np.int32)
  lengths = np.empty(batch, np.int32)
  for b, n in enumerate(count):
    tokens = [*(BASE + rng.permutation(n)), EOS]
    if thinking:
      reasoning = rng.choice([WORD, A, D, 0], rng.integers(4))
      tokens = [*reasoning, END, *tokens]
    for _ in range(rng.integers(3)):
      place, token = rng.integers(len(tokens)), rng.choice(VOCABULARY)
      edit = rng.integers(3)
      if edit == 0:
        tokens[place] = token
      elif edit == 1:
        tokens.insert(place, token)
      elif len(tokens) > 1:
        del tokens[place]
    lengths[b] = min(len(tokens), T)
    ids[b, : lengths[b]] = tokens[:T]
  return ids, lengths, count, incoming


@pytest.mark.parametrize('thinking', [False, True])
@pytest.mark.parametrize('jitted', [False, True])
def test_parses_as_the_oracle_and_meets_every_verdict(thinking, jitted):
  names = assert_as_oracle(
    *random_completions(3, 2000, thinking), thinking, jitted
  )
  assert all(names.count(name) > 20 for name in parsing.VERDICTS)


@settings(max_examples=60, deadline=None)
@given(
  st.integers(0, 2**32 - 1),
  st.booleans(),
  st.lists(
    st.lists(st.sampled_from(VOCABULARY), min_size=T, max_size=T),
    min_size=16,
    max_size=16,
  ),
)
def test_garbage_is_valid_only_where_the_oracle_says_so(seed, thinking, ids):
  rng = np.random.default_rng(seed)
  _, _, count, incoming = oracles.random_slates(seed, 16, K)
  lengths = rng.integers(0, T + 1, 16).astype(np.int32)
  assert_as_oracle(np.array(ids, np.int32), lengths, count, incoming, thinking)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_whatever_the_mask_lets_through_is_valid(seed):
  rng = np.random.default_rng(seed)
  batch = 16
  _, _, count, incoming = oracles.random_slates(seed, batch, K)
  emitted = parsing.start_answer((batch,), K)
  ids = np.full((batch, T), WORD, np.int32)
  lengths = np.zeros(batch, np.int32)
  chosen = [[] for _ in range(batch)]
  for t in range(K + 1):
    allowed = np.asarray(parsing.answer_mask(emitted, count))
    assert allowed.any(axis=-1).all()
    choice = np.array([rng.choice(np.flatnonzero(row)) for row in allowed])
    for b in np.flatnonzero(lengths == 0):
      ids[b, t] = EOS if choice[b] == K else BASE + choice[b]
      if choice[b] == K:
        lengths[b] = t + 1
      else:
        chosen[b].append(choice[b])
    emitted = parsing.step_answer(emitted, choice)
  answer = parser(False)(ids, lengths, count, incoming)
  assert (np.asarray(answer.verdict) == parsing.VALID).all()
  for ranking, names, n in zip(answer.ranking, chosen, count, strict=True):
    assert list(ranking) == [*names, *range(n, K)]


def test_mask_allows_eos_only_at_the_end():
  emitted = jnp.array([[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
  allowed = parsing.answer_mask(emitted, jnp.array([3, 2, 0]))
  expected = [[1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
  np.testing.assert_array_equal(allowed, np.array(expected, bool))


def test_incoming_ranking_ignores_padding():
  incoming = np.array([[2, 0, 1, -7, 0], [1, 0, 0, 0, 0]], np.int32)
  ranking = parsing.incoming_ranking(incoming, np.array([3, 2]))
  np.testing.assert_array_equal(ranking, [[1, 2, 0, 3, 4], [1, 0, 2, 3, 4]])


@pytest.mark.parametrize('thinking', [False, True])
def test_vmap_equals_batch(thinking):
  batch = random_completions(5, 64, thinking)
  mapped = jax.vmap(parser(thinking))(*batch)
  whole = parser(thinking)(*batch)
  np.testing.assert_array_equal(mapped.ranking, whole.ranking)
  np.testing.assert_array_equal(mapped.verdict, whole.verdict)
