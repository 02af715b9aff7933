import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.ops import compression

from . import oracles

SYMBOLS = compression.Symbols(
  history=1, candidates=2, slot_base=10, num_slots=6, eos=4, marks=(7, 8)
)
WORDS = {'<history>': 1, '<candidates>': 2, '<eos>': 4, '..': 7, '...': 8}
SOURCE = '<bos> <history> a b a c <candidates> x u s0 y u v s1 go'
EXTRACT = 'a c <candidates> x s0 y v s1 <eos>'
P, G, K, S, T = 4, 6, 4, 40, 28

source_segments = jax.jit(
  functools.partial(compression.source_segments, symbols=SYMBOLS)
)
segments = jax.jit(functools.partial(compression.segments, symbols=SYMBOLS))
verify = jax.jit(functools.partial(compression.verify, symbols=SYMBOLS))
compression_reward = jax.jit(compression.compression_reward)
preservation = jax.jit(compression.preservation)
order_grades = jax.jit(compression.order_grades)
judge = jax.jit(compression.judge, static_argnames=('k', 'top'))
ellipsis_factor = jax.jit(
  functools.partial(compression.ellipsis_factor, symbols=SYMBOLS)
)
reward = jax.jit(compression.reward)


def ids(text):
  found = []
  for word in text.split():
    if word in WORDS:
      found.append(WORDS[word])
    elif word[0] == 's' and word[1:].isdigit():
      found.append(10 + int(word[1:]))
    else:
      found.append(100 + sum(map(ord, word)))
  return found


# What no function may read: it would change every result.
GARBAGE = ids('a s0 <eos> .. <candidates> x s1 <history> u')


def row(found, size):
  assert len(found) <= size
  return (list(found) + GARBAGE * size)[:size]


def batch(texts, source=SOURCE):
  """Compressions of one source as full batches of P equal prompts."""
  texts = texts + [texts[-1]] * (G - len(texts))
  tokens = np.array([[row(ids(t), T) for t in texts]] * P, np.int32)
  length = np.array([[len(ids(t)) for t in texts]] * P, np.int32)
  shown = np.array([row(ids(source), S)] * P, np.int32)
  return tokens, length, shown, np.full(P, len(ids(source)), np.int32)


def full(value):
  return np.full(P, value, np.int32)


def verdicts(texts, *, source=SOURCE, count=2, budget=9, spread=1):
  got = verify(
    *batch(texts, source), full(count), full(budget), spread=np.int32(spread)
  )
  assert got.dtype == np.int32
  return [compression.VERDICTS[v] for v in np.asarray(got)[0, : len(texts)]]


def earned(texts, *, budget=9, spread=1, cost=1.0, weight=0.5):
  """Rewards of compressions whose scores put the positive first."""
  tokens, length, source, source_length = batch(texts)
  verdict = verify(
    tokens,
    length,
    source,
    source_length,
    full(2),
    full(budget),
    spread=np.int32(spread),
  )
  kept = preservation(
    source,
    source_segments(source, source_length) == 0,
    tokens,
    segments(tokens, length) == 0,
  )
  scores = np.full((P, G, K), 5.0, np.float32)
  scores[..., :2] = 0.2, 0.9
  grades = np.tile(np.array([0, 2, 1, 1], np.int32), (P, 1))
  got = reward(
    verdict,
    compression_reward(length, source_length),
    judge(scores, grades, full(2), kept).total,
    ellipsis_factor(tokens, length, cost=np.float32(cost)),
    np.float32(weight),
  )
  return np.asarray(got)[0, : len(texts)]


def test_the_worked_example():
  tokens, length, source, source_length = batch([EXTRACT])
  spans = source_segments(source, source_length)
  assert spans[0, :15].tolist() == [
    *(-1, -1, 0, 0, 0, 0, -1, 1, 1, -1, 2, 2, 2, -1, -1)
  ]
  found = segments(tokens, length)
  assert found[0, 0, :9].tolist() == [0, 0, -1, 1, -1, 2, 2, -1, -1]
  assert verdicts([EXTRACT]) == ['valid']
  assert verdicts([EXTRACT], budget=8) == ['over_budget']
  assert verdicts([EXTRACT], spread=0) == ['uneven']
  saved = compression_reward(length, source_length)
  np.testing.assert_allclose(saved[0, 0], 0.4, rtol=1e-6)
  kept = preservation(source, spans == 0, tokens, found == 0)
  assert kept[0, 0] == 0.75
  factor = functools.partial(ellipsis_factor, *batch([EXTRACT])[:2])
  assert (factor(cost=np.float32(1.0)) == 1).all()
  marked = batch([EXTRACT.replace('x', '..')])[:2]
  assert (ellipsis_factor(*marked, cost=np.float32(1.0)) == 0).all()
  assert (ellipsis_factor(*marked, cost=np.float32(0.25)) == 0.75).all()
  # (0.4 + (0.2 * 0.75 + 0.8)) / 2, and other weights a.
  np.testing.assert_allclose(earned([EXTRACT]), 0.675, rtol=1e-6)
  np.testing.assert_allclose(earned([EXTRACT], weight=0.0), 0.95, rtol=1e-6)
  np.testing.assert_allclose(earned([EXTRACT], weight=1.0), 0.4, rtol=1e-6)


COPY = 'a b a c <candidates> x u s0 y u v s1 <eos>'
CHEATS = {
  'the source copied': (COPY, 'over_budget'),
  'cut with an ellipsis': ('a .. <candidates> x s0 y s1 <eos>', 'marked'),
  'a label': ('a c <candidates> x s0 y best s1 <eos>', 'ungrounded'),
  'a label in the history': (
    'a best <candidates> x s0 y s1 <eos>',
    'ungrounded',
  ),
  'evidence of another candidate': (
    'a c <candidates> y s0 y s1 <eos>',
    'ungrounded',
  ),
  'evidence of a candidate in the history': (
    'a y <candidates> x s0 y s1 <eos>',
    'ungrounded',
  ),
  'history in a line': ('c <candidates> x s0 y a s1 <eos>', 'ungrounded'),
  'what stands behind the last slot': (
    'a go <candidates> x s0 y s1 <eos>',
    'ungrounded',
  ),
  'the answer in the history': (
    's1 s0 <candidates> x s0 y s1 <eos>',
    'malformed',
  ),
  'the first pick in the history': (
    'a s1 <candidates> x s0 y s1 <eos>',
    'malformed',
  ),
  'only the preferred one': ('a c <candidates> s0 y u s1 <eos>', 'uneven'),
  'another order': ('a c <candidates> y s1 x s0 <eos>', 'malformed'),
  'a slot missing': ('a c <candidates> y v s1 <eos>', 'malformed'),
  'the last slot missing': ('a c <candidates> x s0 <eos>', 'malformed'),
  'a slot twice': ('a <candidates> x s0 x s0 y s1 <eos>', 'malformed'),
  'a slot too many': ('a <candidates> x s0 y s1 s2 <eos>', 'malformed'),
  'a line without a slot': ('<candidates> x s0 y s1 u <eos>', 'malformed'),
  'no candidates': ('a c x s0 y s1 <eos>', 'malformed'),
  'candidates twice': (
    '<candidates> a <candidates> x s0 y s1 <eos>',
    'malformed',
  ),
  'a history of its own': (
    '<history> a <candidates> x s0 y s1 <eos>',
    'malformed',
  ),
  'something behind the end': ('a <candidates> x s0 y s1 <eos> y', 'malformed'),
  'two ends': ('a <candidates> x s0 y s1 <eos> <eos>', 'malformed'),
  'nothing but an end': ('<eos>', 'malformed'),
  'no end': ('a c <candidates> x s0 y v s1', 'cut_off'),
  'a cut in a line': ('a c <candidates> x s0 y', 'cut_off'),
  'nothing': ('', 'cut_off'),
}


@pytest.mark.parametrize('name', CHEATS)
def test_a_cheat_earns_nothing(name):
  text, wanted = CHEATS[name]
  assert verdicts([text]) == [wanted]
  assert earned([text])[0] == 0


def test_a_mark_costs_what_it_is_told_to():
  text = 'a .. <candidates> x s0 y s1 <eos>'  # 8 tokens; a is half of the four.
  wanted = 0.5 * (7 / 15 + (0.2 * 0.5 + 0.8))
  for cost, left in ((0.0, 1.0), (0.25, 0.75), (1.0, 0.0), (3.0, 0.0)):
    np.testing.assert_allclose(earned([text], cost=cost), wanted * left)
  # No cost buys what is no extract.
  assert earned([text.replace('y', 'best')], cost=0.0)[0] == 0


def test_the_first_fault_is_the_verdict():
  texts = [
    's1 best .. <candidates> x s0 y y y s1',
    's1 best .. <candidates> x s0 y y y s1 <eos>',
    'best .. <candidates> x s0 y y y s1 <eos>',
    'best .. <candidates> x s0 y y y s1 <eos>',
    '.. <candidates> x s0 y y y s1 <eos>',
    '.. <candidates> x s0 y y s1 <eos>',
  ]
  tight = verdicts(texts, budget=8)
  assert tight[:3] == ['cut_off', 'malformed', 'over_budget']
  assert verdicts(texts, budget=10)[3:] == ['ungrounded', 'uneven', 'marked']


def test_a_spread_of_the_lines_and_a_budget_are_inclusive():
  lines = 'a <candidates> s0 y u s1 <eos>'
  assert verdicts([lines], spread=2, budget=7) == ['valid']
  assert verdicts([lines], spread=1, budget=7) == ['uneven']
  assert verdicts([lines], spread=2, budget=6) == ['over_budget']


def random_case(seed):
  """Sources of any count and compressions that are extracts or almost so."""
  rng = np.random.default_rng(seed)
  count = rng.integers(1, K + 1, P)
  source, source_length, tokens, length = [], [], [], []
  for n in count:
    parts = [list(rng.choice(range(20, 28), rng.integers(0, 6)))]
    parts += [
      list(rng.choice(range(20 + 4 * k, 28 + 4 * k), rng.integers(0, 5)))
      for k in range(n)
    ]

    def written(parts):
      found = [*parts[0], 2]
      for k, line in enumerate(parts[1:]):
        found += [*line, 10 + k]
      return found

    whole = [9] * rng.integers(0, 2) + [1, *written(parts)]
    whole += [29] * rng.integers(0, 3)
    source.append(row(whole, S))
    source_length.append(len(whole))
    for _ in range(G):
      size = rng.integers(1, 4)
      found = written([rng.permutation(p)[:size] for p in parts]) + [4]
      for _ in range(rng.choice([0, 0, 1, 2])):
        at = rng.integers(0, len(found))
        word = rng.choice([1, 2, 4, 7, 8, 10, 11, 20, 24, 25, 29, 35])
        change = int(rng.integers(3))
        found[at : at + (change > 0)] = [word] * (change < 2)
      tokens.append(row(found, T))
      length.append(len(found))
  return dict(
    tokens=np.array(tokens, np.int32).reshape(P, G, T),
    length=np.array(length, np.int32).reshape(P, G),
    source=np.array(source, np.int32),
    source_length=np.array(source_length, np.int32),
    count=count.astype(np.int32),
    budget=rng.integers(4, 20, P).astype(np.int32),
    spread=np.int32(rng.integers(0, 4)),
  )


def is_slot(token):
  return 10 <= token < 16


def parts_of(tokens):
  """Segment -> list of its places; the tokens begin in the history."""
  found, segment, open_line = {}, 0, []
  for place, token in enumerate(tokens):
    if token == 2 and segment == 0:
      found[0], open_line, segment = open_line, [], 1
    elif is_slot(token) and segment > 0:
      found[segment], open_line, segment = open_line, [], segment + 1
    elif token not in (1, 2, 4) and not is_slot(token):
      open_line.append(place)
  if segment == 0:
    found[0] = open_line
  return found


def labels(parts, size, offset=0):
  found = [-1] * size
  for segment, places in parts.items():
    for place in places:
      found[place + offset] = segment
  return found


def source_parts(tokens):
  """The segments of a source, and where its history begins."""
  start = tokens.index(1) + 1 if 1 in tokens else len(tokens)
  return parts_of(tokens[start:]), start


def before_eos(tokens):
  return tokens[: tokens.index(4)] if 4 in tokens else tokens


def oracle_verdict(tokens, source, n, budget, spread):
  if 4 not in tokens:
    return 'cut_off'
  body = before_eos(tokens)
  anchors = [t for t in body if t in (1, 2) or is_slot(t)]
  if anchors != [2, *range(10, 10 + n)] or tokens != [*body, 4]:
    return 'malformed'
  if body[-1] != anchors[-1]:
    return 'malformed'
  if len(tokens) > budget:
    return 'over_budget'
  found, (shown, start) = parts_of(body), source_parts(source)
  for segment, places in found.items():
    has = {source[start + place] for place in shown.get(segment, [])}
    if not {body[place] for place in places} - {7, 8} <= has:
      return 'ungrounded'
  sizes = [len(found[1 + k]) for k in range(n)]
  if max(sizes) - min(sizes) > spread:
    return 'uneven'
  return 'marked' if {7, 8} & set(body) else 'valid'


def rows(case):
  for p, g in np.ndindex(P, G):
    tokens = case['tokens'][p, g, : case['length'][p, g]].tolist()
    source = case['source'][p, : case['source_length'][p]].tolist()
    yield p, g, tokens, source


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_segments_and_verdicts_equal_the_oracle(seed):
  case = random_case(seed)
  got = np.asarray(verify(**case))
  found = np.asarray(segments(case['tokens'], case['length']))
  shown = np.asarray(source_segments(case['source'], case['source_length']))
  for p, g, tokens, source in rows(case):
    wanted = oracle_verdict(
      tokens, source, case['count'][p], case['budget'][p], case['spread']
    )
    assert compression.VERDICTS[got[p, g]] == wanted
    parts = parts_of(before_eos(tokens))
    assert found[p, g].tolist() == labels(parts, T)
    parts, start = source_parts(source)
    assert shown[p].tolist() == labels(parts, S, start)


def test_the_random_cases_have_every_verdict():
  seen = np.concatenate(
    [np.asarray(verify(**random_case(seed))).ravel() for seed in range(20)]
  )
  assert set(seen.tolist()) == set(range(len(compression.VERDICTS)))


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_preservation_and_factors_equal_the_oracle(seed):
  case = random_case(seed)
  rng = np.random.default_rng(seed)
  evidence = rng.random((P, S)) < rng.choice([0.0, 0.3, 0.9], (P, 1))
  written = rng.random((P, G, T)) < 0.3
  kept = preservation(case['source'], evidence, case['tokens'], written)
  cost = np.float32(rng.random())
  factor = ellipsis_factor(case['tokens'], case['length'], cost=cost)
  saved = compression_reward(case['length'], case['source_length'])
  for p, g, tokens, source in rows(case):
    has = set(case['tokens'][p, g][written[p, g]].tolist())
    wanted = [t in has for t in case['source'][p][evidence[p]]]
    wanted = sum(wanted) / len(wanted) if wanted else 1.0
    np.testing.assert_allclose(kept[p, g], wanted, rtol=1e-6)
    marks = sum(t in (7, 8) for t in before_eos(tokens))
    wanted = max(0.0, 1 - cost * marks) if 4 in tokens else 0.0
    np.testing.assert_allclose(factor[p, g], wanted, atol=1e-6)
    wanted = max(0.0, 1 - len(tokens) / len(source))
    np.testing.assert_allclose(saved[p, g], wanted, atol=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_judge_and_reward_equal_the_oracle(seed):
  rng = np.random.default_rng(seed)
  count = rng.integers(1, K + 1, P).astype(np.int32)
  scores = rng.integers(-2, 3, (P, G, K)).astype(np.float32)  # With ties.
  scores[rng.random(scores.shape) < 0.1] = -np.inf
  grades = rng.choice([0, 0, 1, 2], (P, K)).astype(np.int32)
  kept = rng.random((P, G)).astype(np.float32)
  got = judge(scores, grades, count, kept, k=3, top=2)
  verdict = rng.integers(0, len(compression.VERDICTS), (P, G))
  saved, factor = rng.random((2, P, G)).astype(np.float32)
  weight = np.float32(rng.random())
  final = np.asarray(reward(verdict, saved, got.total, factor, weight))
  assert final.dtype == got.total.dtype == got.ranking.dtype == np.float32
  for p, g in np.ndindex(P, G):
    n = count[p]
    order = sorted(range(n), key=lambda j: -scores[p, g, j])  # noqa: B023
    quality = oracles.ndcg(order, grades[p], n, 3)
    solvable = any(grades[p, j] > 0 for j in order[:2])
    assert bool(got.solvable[p, g]) == solvable
    np.testing.assert_allclose(got.ranking[p, g], quality, atol=1e-6)
    share = 0.2 if solvable else 0.8
    total = share * kept[p, g] + (1 - share) * quality
    np.testing.assert_allclose(got.total[p, g], total, atol=1e-6)
    wanted = (weight * saved[p, g] + (1 - weight) * total) * factor[p, g]
    if compression.VERDICTS[verdict[p, g]] not in ('valid', 'marked'):
      assert final[p, g] == 0
    else:
      np.testing.assert_allclose(final[p, g], wanted, atol=1e-6)


def test_judge_by_hand():
  scores = np.zeros((P, G, K), np.float32)
  scores[:, 0, :2] = 0.2, 0.9
  scores[:, 1, :2] = 0.9, 0.2
  scores[..., 2:] = 9.0  # Padding, whatever its grade.
  grades = np.tile(np.array([0, 2, 2, 2], np.int32), (P, 1))
  kept = np.full((P, G), 0.75, np.float32)
  got = judge(scores, grades, full(2), kept, k=5, top=1)
  assert got.solvable[0, :2].tolist() == [True, False]
  wanted = [1, 1 / math.log2(3)]
  np.testing.assert_allclose(got.ranking[0, :2], wanted, rtol=1e-6)
  np.testing.assert_allclose(got.total[0, :2], [0.95, 0.7262], atol=5e-5)
  # A slate without a positive is not solvable, and preservation is left.
  got = judge(scores, 0 * grades, full(2), kept)
  assert not got.solvable.any()
  np.testing.assert_allclose(got.total, 0.6, rtol=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_grades_of_an_order_equal_the_oracle(seed):
  rng = np.random.default_rng(seed)
  count = rng.integers(1, K + 1, P).astype(np.int32)
  scores = rng.integers(-2, 3, (P, K)).astype(np.float32)  # With ties.
  got = np.asarray(order_grades(scores, count))
  for p in range(P):
    order = sorted(range(count[p]), key=lambda j: -scores[p, j])  # noqa: B023
    wanted = np.zeros(K, np.int32)
    wanted[order[1:3]] = 1
    wanted[order[0]] = 2
    assert got[p].tolist() == wanted.tolist()


def test_who_keeps_the_order_of_the_whole_is_judged_best():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(P, K)).astype(np.float32)
  grades = order_grades(scores, full(K))
  same = np.stack([scores] * G, 1)
  kept = np.ones((P, G), np.float32)
  best = judge(3 * same - 1, grades, full(K), kept)
  np.testing.assert_allclose(best.total, 1, rtol=1e-6)
  assert (judge(-same, grades, full(K), kept).ranking < 1).all()


def test_an_empty_source_saves_nothing():
  _, length, _, source_length = batch([EXTRACT, ''])
  assert (compression_reward(length, 0 * source_length) == 0).all()
  assert (compression_reward(length, full(5))[0, 0]) == 0


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_what_stands_beyond_the_lengths_is_not_read(seed):
  case = random_case(seed)
  beyond = np.arange(T) >= case['length'][..., None]
  tokens = np.where(beyond, 0, case['tokens'])
  beyond = np.arange(S) >= case['source_length'][:, None]
  source = np.where(beyond, 0, case['source'])
  np.testing.assert_array_equal(
    verify(**case), verify(**case | dict(tokens=tokens, source=source))
  )
  np.testing.assert_array_equal(
    segments(case['tokens'], case['length']), segments(tokens, case['length'])
  )
  np.testing.assert_array_equal(
    source_segments(case['source'], case['source_length']),
    source_segments(source, case['source_length']),
  )


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_more_is_never_less(seed):
  case = random_case(seed)
  rng = np.random.default_rng(seed)
  evidence = rng.random((P, S)) < 0.5
  written = rng.random((P, G, T)) < 0.3
  some = preservation(case['source'], evidence, case['tokens'], written)
  more = written | (rng.random((P, G, T)) < 0.3)
  more = preservation(case['source'], evidence, case['tokens'], more)
  assert (some <= more).all()
  fault = np.asarray(verify(**case))
  looser = case | dict(budget=case['budget'] + 3, spread=case['spread'] + 1)
  kind = np.asarray(verify(**looser))
  # Valid stays valid, and no other fault goes away.
  lifted = [compression.OVER_BUDGET, compression.UNEVEN]
  assert ((kind == fault) | np.isin(fault, lifted)).all()


def test_eager_equals_jitted():
  case = random_case(0)
  np.testing.assert_array_equal(
    compression.verify(**case, symbols=SYMBOLS), verify(**case)
  )


def test_without_marks_nothing_is_marked():
  plain = compression.Symbols(1, 2, 10, 6, 4)
  tokens, length, *_ = batch(['a .. <candidates> x s0 y s1 <eos>'])
  assert (compression.ellipsis_factor(tokens, length, plain) == 1).all()


def test_arrays_that_do_not_fit_are_errors():
  case = random_case(0) | dict(budget=np.full(P + 1, 9))
  with pytest.raises(AssertionError):
    compression.verify(**case, symbols=SYMBOLS)
