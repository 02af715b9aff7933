import dataclasses
import functools
import inspect

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.ops import judge, parsing

from . import oracles

pytestmark = pytest.mark.slow

# Two levels of four codes: A is (0, 0), B (0, 1), .. as in the docstring.
SYMBOLS = judge.Symbols(
  history=1,
  candidates=2,
  sid_base=100,
  levels=2,
  codebook_size=4,
  slot_base=10,
  num_slots=6,
  think_end=3,
  eos=4,
)
WORDS = {'<history>': 1, '<candidates>': 2, '</think>': 3, '<eos>': 4}
PROMPT = '<history> A B <candidates> C c0 D c1 E c2'
ANSWER = '</think> c1 c2 c0 <eos>'
K = 4


def codes(letter):
  return divmod(ord(letter) - ord('A'), 4)


def ids(text):
  found = []
  for word in text.split():
    if word in WORDS:
      found.append(WORDS[word])
    elif len(word) == 1 and word.isupper():
      found += [100 + codes(word)[0], 104 + codes(word)[1]]
    elif word.startswith('code'):  # One code alone: code0.3 is of level 0.
      level, code = map(int, word[4:].split('.'))
      found.append(100 + 4 * level + code)
    elif word[0] == 'c' and word[1:].isdigit():
      found.append(10 + int(word[1:]))
    else:
      found.append(200 + sum(map(ord, word)))
  return found


def row(text, size):
  found = ids(text)
  assert len(found) <= size
  padded = np.zeros(size, np.int32)
  padded[: len(found)] = found
  return padded, np.int32(len(found))


def quality(
  reasoning, *, prompt=PROMPT, prompt_size=30, answer=ANSWER, verdict=0
):
  tokens, length = row(f'{reasoning} {answer}', 40)
  shown, shown_length = row(prompt, prompt_size)
  found = judge.judge(
    tokens[None, None],
    length[None, None],
    shown[None],
    shown_length[None],
    np.array([3]),
    np.array([[[1, 2, 0, 3]]]),
    np.full((1, 1), verdict, np.int32),
    SYMBOLS,
  )
  return judge.Quality(*(float(axis[0, 0]) for axis in found))


def test_judge_example():
  found = quality('likes comedy as B so comedy fits c1 c0')
  np.testing.assert_allclose(found, [1, 0.75, 1, 1, 0.9375], rtol=1e-6)


def test_symbols_example():
  symbols = dataclasses.replace(
    SYMBOLS, sid_base=100, levels=2, codebook_size=4
  )
  found = judge._complete_sids(
    np.array([7, 103, 105]), np.ones(3, bool), symbols
  )
  np.testing.assert_array_equal(found.place, [1])
  np.testing.assert_array_equal(found.words, [[3 * 4 + 1]])
  assert 'codes (3, 1) is the tokens 103 105' in inspect.getdoc(judge.Symbols)


@pytest.mark.parametrize(
  ('reasoning', 'grounding'),
  [
    ('as A and B so c1', 1),
    ('as A and C so c1', 0.5),  # C is a candidate, no history.
    ('as A and A and F so c1', 2 / 3),  # F is nowhere.
    ('likes comedy so c1', 0),  # Nothing cited is nothing grounded.
    ('as code0.0 so c1', 0),  # Half a SID cites nothing.
  ],
)
def test_grounding(reasoning, grounding):
  assert quality(reasoning).grounding == pytest.approx(grounding)


@pytest.mark.parametrize(
  ('reasoning', 'consistency'),
  [
    ('B so c1 c2 c0', 1),
    ('B so c1 c2', 1),
    ('B so c1', 1),
    ('B so c2 c1', 0.5),  # The same set, another first pick.
    ('B so c1 c0', 0.75),
    ('B so c0', 0),
    ('c0 is bad so c1', 1),  # The last run concludes.
    ('c1 is bad so c0 then', 0),
    ('B so c1 c1', 1),  # A slot named twice is one.
    ('B so c5 c1', 0.25),  # A slot without a candidate is in no top.
    ('likes comedy', 0),
  ],
)
def test_consistency(reasoning, consistency):
  assert quality(reasoning).consistency == pytest.approx(consistency)


@pytest.mark.parametrize('verdict', range(1, len(parsing.VERDICTS)))
def test_no_conclusion_is_consistent_with_an_invalid_answer(verdict):
  found = quality('as B so c1 c2', verdict=verdict)
  assert found.consistency == 0
  assert found.grounding == found.flow == found.identifiers == 1


@pytest.mark.parametrize(
  ('reasoning', 'flow'),
  [
    ('as B so c1', 1),
    ('c1 as B', 0),  # The candidate before the evidence.
    ('c0 as B so c1 c2', 2 / 3),
    ('so c1', 0),  # No evidence.
    ('as B', 0),  # No candidate.
    # as b0 b1 as b0 b1 as b0 b1 so c1: 10 bigrams, 5 of them different.
    ('as B as B as B so c1', 0.5),
    ('B c1', 1),
  ],
)
def test_flow(reasoning, flow):
  assert quality(reasoning).flow == pytest.approx(flow)


@pytest.mark.parametrize(
  ('reasoning', 'identifiers'),
  [
    ('A C c0', 1),
    ('A F c0', 2 / 3),  # F is no item of the prompt.
    ('A c3', 0.5),  # The slate has three candidates.
    ('A code0.1 c0', 2 / 3),  # Unfinished.
    ('code1.0 A', 0.5),  # A second level without a first.
    ('code0.0 A', 0.5),
    ('A code1.1', 0.5),
    ('likes comedy', 0),
  ],
)
def test_identifiers(reasoning, identifiers):
  assert quality(reasoning).identifiers == pytest.approx(identifiers)


@pytest.mark.parametrize(
  ('reasoning', 'answer'),
  [
    ('', ANSWER),  # An empty span.
    ('as B so c1 c2', 'c1 c2 c0 <eos>'),  # Never closed.
    ('as B so c1 c2 <eos>', ANSWER),  # Closed after the end.
    ('as B so c1 c2', ''),
  ],
)
def test_without_a_closed_span_every_axis_is_zero(reasoning, answer):
  assert quality(reasoning, answer=answer) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
  ('prompt', 'grounding', 'identifiers'),
  [
    ('<candidates> C c0 D c1 E c2 <history> A B', 0.5, 1),
    ('<candidates> C c0 D c1 E c2', 0, 2 / 3),
    ('<history> A B', 0.5, 2 / 3),
    ('A B <history> <candidates> c0 c1 c2', 0, 1 / 3),  # Outside the blocks.
    ('<history> <candidates> C A', 0, 1),
  ],
)
def test_blocks_are_found_in_either_order(prompt, grounding, identifiers):
  found = quality('as A not C so c1', prompt=prompt)
  assert found.grounding == pytest.approx(grounding)
  assert found.identifiers == pytest.approx(identifiers)


def test_the_edge_of_a_full_prompt_makes_no_sid():
  # The last code, 1 of level 1, and nothing: not the SID (1, 0), which is E.
  prompt = '<candidates> C c0 D c1 E c2 <history> A B'
  found = quality('as E so c1', prompt=prompt, prompt_size=len(ids(prompt)))
  assert found.grounding == 0
  assert found.identifiers == 1


@pytest.mark.parametrize(('levels', 'size'), [(5, 256), (4, 256), (3, 3000)])
def test_sids_are_equal_only_where_every_level_is(levels, size):
  symbols = dataclasses.replace(
    SYMBOLS, levels=levels, codebook_size=size, num_slots=K
  )
  rng = np.random.default_rng(0)
  sid = rng.integers(1, size, levels)
  base = 100 + size * np.arange(levels)
  prompt = np.r_[1, base + sid, 2].astype(np.int32)
  # Each rollout changes one level, the last none.
  cited = np.tile(sid, (levels + 1, 1))
  cited[np.arange(levels), np.arange(levels)] -= 1
  tokens = np.concatenate(
    [base + cited, np.tile([3, 10, 4], (levels + 1, 1))], axis=-1
  )
  found = judge.judge(
    tokens[None].astype(np.int32),
    np.full((1, levels + 1), levels + 3),
    prompt[None],
    np.array([levels + 2]),
    np.array([1]),
    np.tile(np.arange(K), (1, levels + 1, 1)),
    np.zeros((1, levels + 1), np.int32),
    symbols,
  )
  np.testing.assert_array_equal(found.grounding[0], [0.0] * levels + [1.0])


def random_case(seed, prompts=6, group=4, size=40, prompt_size=50):
  """Prompts and completions from a small alphabet, garbage in the padding."""
  rng = np.random.default_rng(seed)
  letters = [chr(ord('A') + i) for i in range(12)]

  def fill(text, size):
    found = ids(text)[:size]
    garbage = ids('A c0 </think> <eos> <history> B c1 <candidates> F') * size
    row = np.array((found + garbage)[:size], np.int32)
    return row, len(found)

  prompt, prompt_length, count = [], [], rng.integers(1, K + 1, prompts)
  tokens, length = [], []
  for n in count:
    history = rng.choice(letters, rng.integers(0, 5))
    items = rng.choice(letters, n)
    blocks = [
      ' '.join(['<history>', *history]),
      ' '.join(['<candidates>', *(f'{x} c{i}' for i, x in enumerate(items))]),
    ]
    if rng.random() < 0.5:
      blocks.reverse()
    row, found = fill(' '.join(['bos', *blocks, 'go']), prompt_size)
    prompt.append(row)
    prompt_length.append(found)
    words = [*letters, *(f'c{i}' for i in range(6)), 'so', 'as', 'code0.1']
    words += [*history, *items, 'code1.2', 'c0', 'c1', 'c0', 'c1']
    for _ in range(group):
      text = ' '.join(rng.choice(words, rng.integers(0, 14)))
      end = rng.choice(['</think>', '</think>', '</think>', '<eos>', 'as'])
      row, found = fill(f'{text} {end} c1 c0 <eos>', size)
      tokens.append(row)
      length.append(found)
  ranking = np.tile(np.arange(K), (prompts, group, 1))
  for p, g in np.ndindex(prompts, group):
    ranking[p, g, : count[p]] = rng.permutation(count[p])
  verdict = rng.choice([0, 0, 0, 4], (prompts, group))
  return (
    np.array(tokens).reshape(prompts, group, size),
    np.array(length).reshape(prompts, group),
    np.array(prompt),
    np.array(prompt_length),
    count,
    ranking,
    verdict,
  )


@functools.cache
def compiled():
  return jax.jit(functools.partial(judge.judge, symbols=SYMBOLS))


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_judge_equals_the_oracle(seed):
  case = random_case(seed)
  tokens, length, prompt, prompt_length, count, ranking, verdict = case
  got = compiled()(*case)
  for p, g in np.ndindex(length.shape):
    expected = oracles.judge(
      tokens[p, g],
      length[p, g],
      prompt[p],
      prompt_length[p],
      count[p],
      ranking[p, g],
      verdict[p, g] == 0,
      SYMBOLS,
    )
    found = [float(axis[p, g]) for axis in got]
    np.testing.assert_allclose(found, [*expected, sum(expected) / 4], atol=1e-6)
    assert min(found) >= 0
    assert max(found) <= 1


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_what_stands_beyond_the_lengths_is_not_read(seed):
  tokens, length, prompt, prompt_length, *rest = random_case(seed)
  plain = compiled()(tokens, length, prompt, prompt_length, *rest)
  tokens = np.where(np.arange(40) < length[..., None], tokens, 0)
  prompt = np.where(np.arange(50) < prompt_length[..., None], prompt, 0)
  padded = compiled()(tokens, length, prompt, prompt_length, *rest)
  for a, b in zip(plain, padded, strict=True):
    np.testing.assert_array_equal(a, b)


def test_eager_equals_jitted():
  case = random_case(0)
  plain = judge.judge(*case, symbols=SYMBOLS)
  for a, b in zip(plain, compiled()(*case), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
