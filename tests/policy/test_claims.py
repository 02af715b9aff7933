import dataclasses

import numpy as np
import pytest

from gr2_jax.data import log
from gr2_jax.ops import parsing
from gr2_jax.policy import claims
from gr2_jax.teachers import heuristic

from .. import tiny_data

CATEGORIES = (
  ('Beauty', 'Soap'),
  ('Beauty', 'Hair Care'),
  ('Beauty', 'Hair Care Tools'),
  ("Children's", 'Sci-Fi'),
)
NAN = float('nan')


@pytest.fixture(scope='module')
def reader(tmp_path_factory):
  plain = tiny_data.catalog()
  catalog = dataclasses.replace(
    plain, categories=tuple(CATEGORIES[i % 4] for i in range(len(plain)))
  )
  return claims.Reader(
    tiny_data.prompter(tmp_path_factory.mktemp('claims'), reasoning=90),
    catalog,
  )


def slate(history=(0, 1, 4, 5, 8), candidates=(3, 2, 7)):
  """Of items 0, 1, 4, 5, 8 (soap, hair care); the prompt shows the last 3."""
  found = tiny_data.slate(0, len(candidates), len(history))
  found['history'][: len(history)] = history
  found['candidates'][: len(candidates)] = candidates
  return found


def span(reader, *parts):
  """Ids of text, of items' SIDs (`item`,) and of slots [slot, ..]."""
  words, ids = reader.prompter.vocabulary, []
  for part in parts:
    if isinstance(part, str):
      ids += words.encode(part)
    elif isinstance(part, tuple):
      ids += reader.prompter.items['sid'][part[0]]
    else:
      ids += [words.slot_base + slot for slot in part]
  return ids


def read(reader, *parts, first=0, of=None, presented=(0, 1, 2)):
  return reader.span(span(reader, *parts), of or slate(), presented, first)


def test_the_worked_example(tmp_path):
  own = log.Catalog(
    tuple('abcdefghijkl'),
    tuple(f'title {c}' for c in 'abcdefghijkl'),
    (('Comedy', 'Drama'), ('Horror',), *[('Comedy',)] * 10),
    np.zeros(12, np.int32),
  )
  here = claims.Reader(tiny_data.prompter(tmp_path, own), own)
  found = read(
    here,
    'likes comedy as',
    (0,),
    'so horror fits',
    [1, 0],
    first=1,
    of=slate(history=(0,), candidates=(1, 2)),
  )
  assert found == {
    'exists': 1,
    'shown': 1,
    'citations': 1,
    'categories': 0.5,
    'conclusion': 1,
    'total': pytest.approx(2.5 / 3),
    'cited': 1,
    'claimed': 2,
  }


@pytest.mark.parametrize(
  ('cited', 'exists', 'shown'),
  [
    ([(8,)], 1, 1),  # in the history, shown
    ([(0,)], 1, 0),  # in the history, too old to be shown
    ([(7,)], 1, 1),  # a candidate
    ([(11,)], 1, 0),  # of the catalog alone
    ([(8,), (11,)], 1, 0.5),
  ],
)
def test_citations_are_looked_up(reader, cited, exists, shown):
  found = read(reader, 'as', *cited)
  assert (found['exists'], found['shown']) == (exists, shown)
  assert found['citations'] == (exists + shown) / 2
  assert found['cited'] == len(cited)


def test_what_is_no_semantic_id_is_a_citation_of_nothing(reader):
  base, size = reader.prompter.vocabulary.sid_base, 5
  sid = list(reader.prompter.items['sid'][8])
  free = next(
    [base + a, base + size + b, base + 2 * size + c]
    for a, b, c in np.ndindex(5, 5, 5)
    if (base + a, base + size + b, base + 2 * size + c)
    not in reader.prompter.items['sid']
  )
  for wrong in (sid[:2], sid[1:], sid[::-1], free):
    ids = span(reader, 'as') + sid + span(reader, 'and') + wrong
    found = reader.span(np.array(ids), slate(), np.arange(3), 0)
    runs = 3 if wrong == sid[::-1] else 1
    assert found['cited'] == 1 + runs
    assert found['exists'] == found['shown'] == 1 / (1 + runs)


def test_two_items_of_one_semantic_id_are_either(reader):
  items = dict(reader.prompter.items)
  items['sid'] = (*items['sid'][:11], items['sid'][8])
  twin = dataclasses.replace(
    reader, prompter=dataclasses.replace(reader.prompter, items=items)
  )
  assert read(twin, (11,))['shown'] == 1


@pytest.mark.parametrize(
  ('parts', 'claimed', 'holds'),
  [
    (['likes soap'], 1, 1),  # of the history
    (['likes SOAP and hair care'], 2, 1),
    (['likes hair care tools'], 1, 0),  # the longest, which no item has
    (["children's and sci-fi"], 2, 0),
    (['soaps or soapy hair'], 0, NAN),  # on borders of words
    (['likes anything'], 0, NAN),
    (['so hair care tools fits', [1]], 1, 1),  # of the candidate in slot 1
    (['so hair care tools fits', [0, 1]], 1, 0),  # of the first alone
    (['so soap and sci-fi fits', [0]], 2, 1),  # history and candidate
    (['sci-fi is what now fits', [0]], 1, 0),  # too far: of the history
    (['so sci-fi', (3,), [0]], 1, 0),  # no text leads up to the slots
    (['so sci-fi fits', [5]], 1, 0),  # of no candidate
  ],
)
def test_categories_are_said_of_history_or_candidate(
  reader, parts, claimed, holds
):
  found = read(reader, *parts)
  assert found['claimed'] == claimed
  np.testing.assert_equal(found['categories'], holds)


def test_slots_are_read_as_they_were_presented(reader):
  parts = ['hair care tools fits', [1], 'as', (8,), 'so', [0, 2]]
  straight = read(reader, *parts, first=0)
  assert (straight['categories'], straight['conclusion']) == (1, 1)
  turned = read(reader, *parts, first=0, presented=(1, 2, 0))
  assert (turned['categories'], turned['conclusion']) == (0, 0)
  other = read(reader, *parts, first=1, presented=(1, 2, 0))
  assert (other['categories'], other['conclusion']) == (0, 1)


@pytest.mark.parametrize(
  ('parts', 'first', 'conclusion'),
  [
    (['so', [1, 0]], 1, 1),
    (['so', [1, 0]], 0, 0),
    ([[1], 'no', [0, 1], 'then'], 0, 1),  # the last run
    ([[4]], 0, 0),  # names nothing
    (['so soap'], 0, 0),  # concludes nothing
    ([[0]], None, 0),  # no answer
  ],
)
def test_the_conclusion_is_the_first_pick(reader, parts, first, conclusion):
  assert read(reader, *parts, first=first)['conclusion'] == conclusion


def test_the_total_is_the_mean_of_what_applies(reader):
  assert read(reader, [0])['total'] == 1  # the conclusion alone
  assert read(reader, 'horses')['total'] == 0
  assert read(reader, 'soap', [1])['total'] == 0
  assert read(reader, (11,), [0])['total'] == 0.75
  np.testing.assert_equal(read(reader, [0])['citations'], NAN)
  assert set(read(reader).values()) == {0.0}


def ranked(reader, traces, slates):
  """Traces of the heuristic teacher, as a ranker has answers."""
  words = reader.prompter.vocabulary
  n, K = len(traces), tiny_data.K
  tokens = np.zeros((n, 110), np.int32)
  length = np.zeros(n, np.int32)
  generated = np.tile(np.arange(K, dtype=np.int32), (n, 1))
  presented = generated.copy()
  rng = np.random.default_rng(0)
  for i, trace in enumerate(traces):
    order = rng.permutation(int(slates[i]['count']))
    presented[i, : len(order)] = order
    generated[i, : len(order)] = trace.ranking
    ids = reader.prompter.present(trace.reasoning, order)
    ids += [words.control['</think>']]
    ids += reader.prompter.answer(trace.ranking, order)
    tokens[i, : len(ids)], length[i] = ids, len(ids)
  return dict(
    tokens=tokens,
    length=length,
    presented=presented,
    generated=generated,
    verdict=np.zeros(n, int),
  )


@pytest.fixture(scope='module')
def told(reader):
  """Slates and what the heuristic teacher says of them."""
  teacher = heuristic.Heuristic(reader.prompter, reader.catalog, (0, 1), 1.0)
  slates = [tiny_data.slate(s, 2 + s % 5, s % 6) for s in range(200)]
  traces = [
    teacher.rejection(slate, np.random.default_rng(s), 1)
    for s, slate in enumerate(slates)
  ]
  return slates, ranked(reader, traces, slates)


def test_the_heuristic_teacher_says_what_is_so(reader, told):
  slates, answers = told
  found = claims.judge(reader.prompter, reader.catalog, slates, **answers)
  grounded = np.array([slate['history_length'] > 0 for slate in slates])
  assert 100 < grounded.sum() < 200
  np.testing.assert_array_equal(found['conclusion'], 1)
  assert np.isnan(found['citations'][~grounded]).all()
  for name in ('exists', 'shown', 'citations', 'categories', 'total'):
    applies = ~np.isnan(found[name])
    assert applies.sum() > 100
    np.testing.assert_array_equal(found[name][applies], 1)
  assert claims.summary(found)['total'] == 1


def test_another_users_reasoning_is_found_out(reader, told):
  slates, answers = told
  own = claims.judge(reader.prompter, reader.catalog, slates, **answers)
  others = slates[1:] + slates[:1]
  found = claims.judge(reader.prompter, reader.catalog, others, **answers)
  for name in ('shown', 'categories', 'total'):
    assert np.nanmean(found[name]) < np.nanmean(own[name]) - 0.1
  assert np.nanmean(found['exists']) == 1


def test_shuffled_reasoning_claims_less_that_is_so(reader, told):
  slates, answers = told
  rng = np.random.default_rng(0)
  tokens = answers['tokens'].copy()
  end = reader.prompter.vocabulary.control['</think>']
  for row in tokens:
    stop = int(np.argmax(row == end))
    row[:stop] = rng.permutation(row[:stop])
  found = claims.judge(
    reader.prompter, reader.catalog, slates, **answers | {'tokens': tokens}
  )
  assert np.nanmean(found['exists']) < 0.2
  assert np.mean(found['conclusion']) < 0.8
  assert np.mean(found['total']) < 0.6


def test_marks_are_shares_and_say_when_they_do_not_apply(reader, told):
  slates, answers = told
  rng = np.random.default_rng(1)
  words = reader.prompter.vocabulary
  end = words.control['</think>']
  tokens = rng.integers(words.eos + 1, len(words), answers['tokens'].shape)
  tokens = np.where(tokens == end, words.slot_base, tokens)
  tokens[:, 20] = end
  changed = {'tokens': tokens, 'length': np.full(len(tokens), 30)}
  found = claims.judge(
    reader.prompter, reader.catalog, slates, **answers | changed
  )
  np.testing.assert_array_equal(
    np.isnan(found['citations']), found['cited'] == 0
  )
  np.testing.assert_array_equal(
    np.isnan(found['categories']), found['claimed'] == 0
  )
  for name in ('exists', 'shown', *claims.PARTS, 'total'):
    given = found[name][~np.isnan(found[name])]
    assert ((given >= 0) & (given <= 1)).all()


def test_reasoning_that_never_ends_is_none(reader, told):
  slates, answers = told
  words = reader.prompter.vocabulary
  end = answers['tokens'] == words.control['</think>']
  for token in (words.eos, words.slot_base):  # An early end, and no end.
    tokens = np.where(end, token, answers['tokens'])
    found = claims.judge(
      reader.prompter, reader.catalog, slates, **answers | {'tokens': tokens}
    )
    assert all((values == 0).all() for values in found.values())


def test_an_invalid_answer_has_no_first_pick(reader, told):
  slates, answers = told
  verdict = np.full(len(slates), parsing.MISSING)
  found = claims.judge(
    reader.prompter, reader.catalog, slates, **answers | {'verdict': verdict}
  )
  np.testing.assert_array_equal(found['conclusion'], 0)
  assert np.nanmean(found['categories']) == 1


def test_a_summary_leaves_out_what_does_not_apply():
  marks = {'a': np.array([NAN, 1.0, 0.0]), 'b': np.array([NAN, NAN, NAN])}
  assert claims.summary(marks) == {'a': 0.5, 'b': None}
