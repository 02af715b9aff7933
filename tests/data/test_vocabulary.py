import dataclasses
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gr2_jax.data import vocabulary

from .. import tiny_data


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  return tiny_data.words(tmp_path_factory.mktemp('vocabulary'))


def test_every_family_of_symbols_stands_together(words):
  layout = tiny_data.LAYOUT
  families = {
    '<think>': (words.control['<think>'], len(vocabulary.CONTROLS)),
    '<by:rank>': (words.by_base, 2),
    '<slot0>': (words.slot_base, 8),
    '<rank=0>': (words.bin_base, 8),
    '<a0>': (words.sid_base, 15),
  }
  symbols, at = layout.symbols(), 0
  for first, (base, size) in families.items():
    assert symbols[at] == first
    shown = [words.decode([base + i]) for i in range(size)]
    assert shown == symbols[at : at + size]
    at += size
  assert at == len(symbols)
  assert words.sid_base + 15 <= len(words)
  assert (words.pad, words.bos, words.eos) == (0, 1, 2)


def test_codes_and_bins_are_the_symbols_they_are_called(words):
  ids = words.sid(np.array([[0, 4, 2], [1, 0, 3]]))
  assert [words.decode(row) for row in ids] == ['<a0><b4><c2>', '<a1><b0><c3>']
  ids = words.bins(np.array([[3, 0], [1, 2]]))
  assert ids.dtype == np.int32
  assert [words.decode(row) for row in ids] == [
    '<rank=3><fame:raw=0>',
    '<rank=1><fame:raw=2>',
  ]


def test_slots_are_told_from_their_neighbours(words):
  ids = words.slot_base + np.arange(-1, 9)
  assert words.is_slot(ids).tolist() == [False, *[True] * 8, False]


TEXT = st.text(max_size=30)


def normal(text):
  """Compatibility forms composed, white space single."""
  text = unicodedata.normalize('NFKC', text)
  return re.sub(' +', ' ', text).strip(' ')


# Every other kind of white space becomes a plain space in SentencePiece.
PRINTED = st.text(
  st.characters(exclude_categories=['C', 'Z']) | st.just(' '), max_size=30
)


@settings(max_examples=200, deadline=None)
@given(text=PRINTED)
def test_text_comes_back(words, text):
  """Whatever the alphabet, in its compatibility form."""
  text = normal(normal(text).replace('\u2581', ''))
  assume(not re.search('<[^<>]*>', text))  # See the test of control tokens.
  assert words.decode(words.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_ids_stay_in_the_vocabulary_and_coming_back_is_stable(words, text):
  ids = words.encode(text)
  assert all(3 < i < len(words) for i in ids)
  once = words.decode(ids)
  assert words.decode(words.encode(once)) == once


@pytest.mark.parametrize('word', ['<slot3>', '</think>', '<a0>', '<<think>>'])
def test_a_title_cannot_spell_a_control_token(words, word):
  ids = np.array(words.encode(f'soap {word}'))
  first = words.control['<think>']
  families = range(first, words.sid_base + 15)
  assert not np.isin(ids, families).any()
  assert words.decode(ids).replace(' ', '') == f'soap{word}'


def test_padding_is_not_shown(words):
  assert words.decode([0, *words.encode('red soap'), 0, 0]) == 'red soap'


def test_training_twice_gives_the_same_bytes(tmp_path):
  for name in ('one', 'two'):
    (tmp_path / name).mkdir()
    tiny_data.words(tmp_path / name)
  one, two = (
    (tmp_path / name / 'vocabulary.model').read_bytes()
    for name in ('one', 'two')
  )
  assert one == two
  assert sorted(p.name for p in (tmp_path / 'one').iterdir()) == [
    'vocabulary.model'
  ]


@pytest.mark.parametrize(
  ('change', 'symbol'),
  [
    ({'evidence': ('rank',)}, '<slot0>'),
    ({'bins': 3}, '<fame:raw=0>'),
    ({'num_slots': 9}, '<slot8>'),
    ({'codebook_size': 6}, '<a5>'),
    ({'levels': 4}, '<d0>'),
  ],
)
def test_another_layout_is_refused(tmp_path, change, symbol):
  tiny_data.words(tmp_path)
  layout = dataclasses.replace(tiny_data.LAYOUT, **change)
  with pytest.raises(ValueError, match=f"symbol '{re.escape(symbol)}' is not"):
    vocabulary.Vocabulary(tmp_path / 'vocabulary.model', layout)
