import dataclasses
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gr2_jax.prompts import vocabulary

from .. import tiny_data, tiny_pretrained


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  return tiny_data.words(tmp_path_factory.mktemp('vocabulary'))


def extended(directory, thinks=False, spare=tiny_pretrained.SPARE, **changes):
  """A pretrained model's vocabulary with our symbols."""
  model = tiny_pretrained.tokenizer(thinks)
  fields = dict(
    tokenizer=model.to_str(),
    rows=model.get_vocab_size() + spare,
    layout=tiny_data.LAYOUT,
    source='weights',
    eos_token='<|im_end|>',
  )
  path = directory / vocabulary.EXTENDED
  return vocabulary.extend(path, **(fields | changes))


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  return extended(tmp_path_factory.mktemp('pretrained'))


@pytest.fixture(scope='module', params=['words', 'pretrained'])
def either(request):
  return request.getfixturevalue(request.param)


def test_every_family_of_symbols_stands_together(either):
  layout = tiny_data.LAYOUT
  families = {
    '<think>': (either.control['<think>'], len(vocabulary.CONTROLS)),
    '<by:rank>': (either.by_base, 2),
    '<slot0>': (either.slot_base, 8),
    '<rank=0>': (either.bin_base, 8),
    '<grade1>': (either.grade_base, vocabulary.GRADES),
    '<age0>': (either.age_base, 4),
    '<keep=5>': (either.ratio_base, len(vocabulary.RATIOS)),
    '<memory0>': (either.memory_base, 3),
    '<a0>': (either.sid_base, 15),
  }
  symbols, at = layout.symbols(), 0
  for first, (base, size) in families.items():
    assert symbols[at] == first
    shown = [either.decode([base + i]) for i in range(size)]
    assert shown == symbols[at : at + size]
    at += size
  assert at == len(symbols)
  assert either.sid_base + 15 <= len(either)


def test_where_our_symbols_begin(words, pretrained):
  assert (words.pad, words.bos, words.eos) == (0, 1, 2)
  assert words.first_symbol == words.control['<think>'] == 4
  # A row for every token the model has, named or not; then ours.
  size = tiny_pretrained.tokenizer(False).get_vocab_size()
  first = size + tiny_pretrained.SPARE
  assert pretrained.first_symbol == pretrained.pad == first
  assert pretrained.control['<think>'] == first + 1
  assert pretrained.eos == tiny_pretrained.SPECIAL.index('<|im_end|>')
  own = 1 + len(tiny_data.LAYOUT.symbols())
  assert len(pretrained) == first + own


def test_a_model_that_reasons_keeps_its_own_tokens_for_it(tmp_path, pretrained):
  words = extended(tmp_path, thinks=True)
  model = tiny_pretrained.tokenizer(True)
  for name in tiny_pretrained.THINK:
    assert words.control[name] == model.token_to_id(name) < words.first_symbol
  assert len(words) - words.first_symbol == (
    len(pretrained) - pretrained.first_symbol - 2
  )
  assert words.decode([words.slot_base + 3, words.sid_base]) == '<slot3><a0>'


def test_a_policy_that_comes_back_has_all_its_symbols(tmp_path, pretrained):
  (tmp_path / 'back').mkdir()
  back = extended(
    tmp_path / 'back', tokenizer=pretrained.pieces.json, rows=len(pretrained)
  )
  assert len(back) == len(pretrained)
  for name in ('first_symbol', 'pad', 'eos', 'by_base', 'sid_base', 'control'):
    assert getattr(back, name) == getattr(pretrained, name)


def test_codes_and_bins_are_the_symbols_they_are_called(either):
  ids = either.sid(np.array([[0, 4, 2], [1, 0, 3]]))
  assert [either.decode(row) for row in ids] == ['<a0><b4><c2>', '<a1><b0><c3>']
  ids = either.bins(np.array([[3, 0], [1, 2]]))
  assert ids.dtype == np.int32
  assert [either.decode(row) for row in ids] == [
    '<rank=3><fame:raw=0>',
    '<rank=1><fame:raw=2>',
  ]


def test_words_that_are_worth_a_piece_are_one_piece_among_much_text(tmp_path):
  rng = np.random.default_rng(0)
  letters = np.array(list('abcdefghij'))
  titles = [
    ' '.join(''.join(rng.choice(letters, 5)) for _ in range(3))
    for _ in range(800)
  ]
  wanted = ('likes', 'fits', 'Sci-Fi', 'so')
  for words, most in (((), 5), (wanted, 1)):
    path = tmp_path / f'{len(words)}.model'
    found = vocabulary.train(path, titles, tiny_data.LAYOUT, 120, words)
    sizes = [len(found.encode(word)) for word in ('likes', 'fits', 'so')]
    assert (max(sizes) == 1) == (most == 1), sizes


def test_a_token_is_translated_by_its_spelling(tmp_path, words, pretrained):
  same = vocabulary.translate(words, words)
  spelt = [words.pieces.spelling(i) for i in range(len(words))]
  assert [spelt[i] for i in same] == spelt  # Equal spellings are one token.
  found = vocabulary.translate(words, pretrained)
  assert found.shape == (len(words),)
  for role in ('pad', 'bos', 'eos', 'slot_base', 'sid_base', 'bin_base'):
    assert found[getattr(words, role)] == getattr(pretrained, role)
  for name, number in words.control.items():
    assert found[number] == pretrained.control[name]
  text = [i for i in range(len(words)) if 0 <= found[i] < 200]
  for i in text:
    if i not in (words.pad, words.bos, words.eos):
      spelling = pretrained.pieces.spelling(int(found[i]))
      assert words.pieces.spelling(i) == spelling
  assert (found == -1).any()  # It has no bytes, and other pieces.


def test_slots_are_told_from_their_neighbours(either):
  ids = either.slot_base + np.arange(-1, 9)
  assert either.is_slot(ids).tolist() == [False, *[True] * 8, False]


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


@settings(max_examples=300, deadline=None)
@given(
  text=st.lists(
    st.text(max_size=8)
    | st.sampled_from(
      [*tiny_pretrained.SPECIAL, *tiny_data.LAYOUT.symbols(), '<|row350|>']
    )
  ).map(''.join)
)
def test_pretrained_pieces_give_any_text_back_exactly(pretrained, text):
  """Spaces, control characters, and what looks like a token included."""
  ids = pretrained.encode(text)
  assert pretrained.decode(ids) == text
  special = range(len(tiny_pretrained.SPECIAL))
  assert not np.isin(ids, special).any()
  assert all(i < pretrained.first_symbol - tiny_pretrained.SPARE for i in ids)


def test_text_after_a_symbol_begins_with_a_space(either):
  ids = [either.slot_base, *either.encode('red soap'), either.slot_base + 1]
  assert either.decode(ids) == '<slot0> red soap<slot1>'


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_ids_stay_in_the_vocabulary_and_coming_back_is_stable(words, text):
  ids = words.encode(text)
  assert all(3 < i < len(words) for i in ids)
  once = words.decode(ids)
  assert words.decode(words.encode(once)) == once


@pytest.mark.parametrize('word', ['<slot3>', '</think>', '<a0>', '<<think>>'])
def test_a_title_cannot_spell_a_control_token(either, word):
  ids = np.array(either.encode(f'soap {word}'))
  first = either.control['<think>']
  families = range(first, either.sid_base + 15)
  assert not np.isin(ids, families).any()
  assert either.decode(ids).replace(' ', '') == f'soap{word}'


@pytest.mark.parametrize('word', ['\uff1cslot3\uff1e', '<sl\x01ot3>'])
def test_nor_can_a_title_whose_normal_form_spells_one(either, word):
  ids = np.array(either.encode(f'soap {word} red'))
  families = range(either.control['<think>'], either.sid_base + 15)
  assert not np.isin(ids, families).any()
  assert either.decode(ids).startswith('soap')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'spare': -1},
      r'weights: .* 3\d\d tokens, .* 3\d\d rows: they are of dif',
    ),
    ({'spare': 1025}, r'weights: .* 3\d\d tokens, .* 1\d\d\d rows'),
    ({'eos_token': None}, 'weights: .* no token None to end an answer'),
    ({'eos_token': '</s>'}, "weights: .* no token '</s>' to end an answer"),
  ],
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    extended(tmp_path, **changes)
  assert not list(tmp_path.iterdir())


def test_some_of_our_symbols_in_a_model_are_refused(tmp_path, pretrained):
  layout = dataclasses.replace(tiny_data.LAYOUT, codebook_size=6)
  with pytest.raises(ValueError, match="has a token '<by:rank>', but not all"):
    extended(
      tmp_path,
      tokenizer=pretrained.pieces.json,
      rows=len(pretrained),
      layout=layout,
    )


def test_padding_is_not_shown(either):
  ids = [either.pad, *either.encode('red soap'), either.pad, either.pad]
  assert either.decode(ids) == 'red soap'


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
@pytest.mark.parametrize('make', [tiny_data.words, extended])
def test_another_layout_is_refused(tmp_path, make, change, symbol):
  make(tmp_path)
  layout = dataclasses.replace(tiny_data.LAYOUT, **change)
  message = f"symbol '{re.escape(symbol)}' is (missing|token .*, out of order);"
  with pytest.raises(ValueError, match=message):
    vocabulary.Vocabulary(vocabulary.find(tmp_path), layout)


def test_a_folder_without_a_vocabulary_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='neither vocabulary.json nor'):
    vocabulary.find(tmp_path)
