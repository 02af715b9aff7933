import dataclasses
import json
import types

import numpy as np
import pytest

from gr2_jax.data import log
from gr2_jax.prompts import documents, vocabulary

from .. import tiny_data

TOKENS = 40


@pytest.fixture(scope='module')
def catalog():
  years = np.array([1994, 1999, 2003, 0] * 3, np.int32)
  return dataclasses.replace(tiny_data.catalog(), years=years)


@pytest.fixture(scope='module')
def prompter(tmp_path_factory):
  return tiny_data.prompter(tmp_path_factory.mktemp('words'))


@pytest.fixture(scope='module')
def render(prompter, catalog):
  return documents.renderers(prompter, catalog, 4, 12, TOKENS)


def parts(prompter, ids):
  """Codes and words of a document, and whether the codes stand first."""
  base, layout = prompter.vocabulary.sid_base, prompter.vocabulary.layout
  known = range(base, base + layout.levels * layout.codebook_size)
  codes = [i for i in ids if i in known]
  words = [i for i in ids[1:-1] if i not in known]
  return codes, words, ids[1] in known


def test_a_sequence_is_the_last_items_of_a_history(prompter, render):
  slate = tiny_data.slate(length=5)
  (ids,) = render['sequence'](slate, None)
  wanted = [prompter.vocabulary.control['<next>']]
  for item in slate['history'][1:5]:
    wanted += prompter.items['sid'][item]
  assert ids == wanted


def test_a_persona_tells_a_history_both_ways(prompter, catalog, render):
  slate = tiny_data.slate(seed=2, length=5)
  words, ways = prompter.vocabulary, set()
  for seed in range(8):
    (ids,) = render['persona'](slate, np.random.default_rng(seed))
    assert ids[0] == words.control['<persona>']
    assert ids[-1] == words.eos
    assert len(ids) <= TOKENS
    codes, told, first = parts(prompter, ids)
    ways.add(first)
    items = slate['history'][5 - len(codes) // 3 : 5]
    assert codes == [c for i in items for c in prompter.items['sid'][i]]
    whole = words.decode(told)
    described = ' '.join(documents.describe(slate['history'][1:5], catalog))
    assert described.startswith(whole[:10])
  assert ways == {True, False}


def test_a_persona_of_many_words_has_fewer_items(prompter, catalog):
  slate = tiny_data.slate(length=5)
  found = []
  for tokens in (20, 200):
    render = documents.renderers(prompter, catalog, 4, 6, tokens)
    (ids,) = render['persona'](slate, np.random.default_rng(0))
    codes, told, _ = parts(prompter, ids)
    found.append((len(codes) // 3, len(told)))
    assert len(ids) <= tokens
  assert found[0][0] == 1 < found[1][0] == 4
  assert found[0][1] < found[1][1]


def test_no_history_makes_no_document(render):
  slate = tiny_data.slate(length=0)
  rng = np.random.default_rng(0)
  assert render['sequence'](slate, rng) == render['persona'](slate, rng) == []


def test_a_description_says_what_is_frequent_recent_and_when(catalog):
  # soap 0..3, brush 4..7, cream 8..11; all are beauty.
  said = documents.describe(np.array([8, 4, 5, 7, 0, 2]), catalog)
  assert ' '.join(said) == (
    'mostly beauty and brush and soap lately beauty and soap '
    'from decades 1990 and 2000'
  )
  assert documents.describe(np.array([3]), catalog)[-1] == 'soap'
  bare = types.SimpleNamespace(categories=((),), years=np.array([0]))
  assert documents.describe(np.array([0, 0]), bare) == []


def test_captions_are_of_title_and_path_both_ways(prompter, catalog, render):
  words, ways = prompter.vocabulary, set()
  for seed in range(8):
    (ids,) = render['caption'](7, np.random.default_rng(seed))
    codes, told, first = parts(prompter, ids)
    assert ids[0] == words.control['<caption>']
    assert ids[-1] == words.eos
    assert codes == list(prompter.items['sid'][7])
    assert words.decode(told) == 'pink brush for you beauty > brush'
    ways.add(first)
  assert ways == {True, False}


def test_a_long_text_goes_on_in_further_documents(prompter, render):
  words, said = prompter.vocabulary, 'red soap for you ' * 12
  found = render['text'](said.strip(), None)
  assert len(found) > 1
  assert {ids[0] for ids in found} == {words.control['<text>']}
  assert [len(ids) for ids in found[:-1]] == [TOKENS] * (len(found) - 1)
  whole = [i for ids in found for i in ids[1:]]
  assert whole == [*words.encode(said.strip()), words.eos]


def test_a_row_without_room_for_a_history_is_refused(prompter, catalog):
  with pytest.raises(ValueError, match=r'row_tokens=16.* need 17'):
    documents.renderers(prompter, catalog, 4, 6, 16)
  documents.renderers(prompter, catalog, 4, 6, 17)


def test_phrases_make_the_fixed_words_pieces(tmp_path):
  own = tiny_data.catalog()
  words = vocabulary.train(
    tmp_path / 'vocabulary.model',
    own.titles,
    tiny_data.LAYOUT,
    100,
    words=' '.join(documents.PHRASES).split(),
  )
  for word in ('mostly', 'and', 'lately', 'from', 'decades', '1990', '2000'):
    assert len(words.encode(word)) == 1, word


def write(path, lines):
  path.write_bytes(b'\n'.join(lines))
  return path


def test_texts_of_both_forms_are_read_and_some_held_out(tmp_path):
  said = [f'text {i}' for i in range(45)]
  plain = write(tmp_path / 'a.txt', [t.encode() for t in [*said, '', '  ']])
  line = write(
    tmp_path / 'a.jsonl', [json.dumps({'text': t}).encode() for t in said]
  )
  for path in (plain, line):
    train, held = documents.read_texts(path)
    assert held == ['text 1', 'text 21', 'text 41']
    assert sorted(train + held) == sorted(said)


@pytest.mark.parametrize(
  ('name', 'lines', 'message'),
  [
    ('a.txt', [b'fine', b'\xff\xfe'], r'a\.txt:2: not UTF-8'),
    ('a.jsonl', [b'{"text": "x"}', b'', b'{'], r'a\.jsonl:3: not valid JSON'),
    ('a.jsonl', [b'{"txt": "x"}'], r'a\.jsonl:1: field text is None'),
    ('a.jsonl', [b'{"text": 3}'], r'a\.jsonl:1: field text is 3'),
    ('a.jsonl', [b'["text"]'], r'a\.jsonl:1: field text is None'),
    ('a.txt', [b'one', b''], r'a\.txt: 1 documents'),
  ],
)
def test_bad_texts_are_named_by_file_and_line(tmp_path, name, lines, message):
  with pytest.raises(log.DataError, match=message):
    documents.read_texts(write(tmp_path / name, lines))


def test_a_missing_text_file_is_named(tmp_path):
  with pytest.raises(log.DataError, match=r'none\.txt: midtrain\.text_file'):
    documents.read_texts(tmp_path / 'none.txt')
