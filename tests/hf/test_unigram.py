"""SentencePiece models as `tokenizers`, beside the original."""

import sys

import pytest

from gr2_jax.hf import unigram
from gr2_jax.prompts import vocabulary

from .. import tiny_data

tokenizers = pytest.importorskip('tokenizers')

TEXTS = [
  *tiny_data.catalog().titles,
  'likes red and pink brush as so fits',
  '  two  spaces,\ta tab \n and an end ',
  'Ｆｕｌｌ ｗｉｄｔｈ ﬁts ½ café cafe\u0301',
  '東京 🧼 soap\u200b',
  'a<b c>d < slot3>',
  '',
]


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """A vocabulary and the same in the other form."""
  folder = tmp_path_factory.mktemp('words')
  words = tiny_data.words(folder)
  model = (folder / 'vocabulary.model').read_bytes()
  text = unigram.tokenizer_json(model)
  return words, tokenizers.Tokenizer.from_str(text)


def encode(tokenizer, text):
  return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer, ids):
  return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize('text', TEXTS)
def test_text_has_the_same_ids_and_comes_back_the_same(pair, text):
  words, theirs = pair
  ids = words.encode(text)
  assert encode(theirs, text) == ids
  assert decode(theirs, ids) == words.decode(ids)


def test_every_piece_keeps_its_id(pair):
  words, theirs = pair
  assert theirs.get_vocab_size() == len(words)
  names = [theirs.id_to_token(id) for id in range(len(words))]
  names.remove('<unk>')
  ids = [words.pieces.id(name) for name in names]
  assert ids == [theirs.token_to_id(name) for name in names]
  assert {'<pad>', '<s>', '</s>', *tiny_data.LAYOUT.symbols()} < set(names)


def test_symbols_between_text_are_read_and_shown(pair):
  words, theirs = pair
  slot, code = (words.pieces.id(name) for name in ('<slot3>', '<b2>'))
  ids = [words.bos, slot, *words.encode('red soap'), code, code]
  ids += [*words.encode('東京 for you'), slot, words.eos]
  text = decode(theirs, ids)
  assert text == '<s><slot3> red soap<b2><b2> 東京 for you<slot3></s>'
  assert encode(theirs, text) == ids


def test_a_server_leaves_out_control_pieces_but_no_symbol(pair):
  words, theirs = pair
  symbols = [words.pieces.id(name) for name in tiny_data.LAYOUT.symbols()]
  shown = theirs.decode([words.bos, *symbols, words.eos])
  assert shown == ''.join(tiny_data.LAYOUT.symbols())
  assert vocabulary.CONTROLS[0] in shown


def test_without_the_extra_the_error_names_it(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ModuleNotFoundError, match=r"pip install 'gr2_jax\[hf\]'"):
    unigram.tokenizer_json(b'')
