"""Token ids: text beside control, slot, evidence and SID tokens.

The text is a SentencePiece model's of our own (`train`), or a pretrained
model's, in the form of Hugging Face's `tokenizers` (`extend`). Everything that
is not text is a symbol of that model, so one file is the whole vocabulary and
decoding shows every token. The symbols of a family stand next to each other in
id space:

  <think> </think> <answer> ...  control tokens
  <by:COLUMN>                    asks for the candidates sorted by a column
  <slot0> <slot1> ...            slots: a candidate's name within its slate
  <COLUMN=0> <COLUMN=1> ...      evidence, in bins
  <grade1> <grade2>              how a user took to an item of the history
  <age0> <age1> ...              how long ago that was, in bins
  <keep=5> <keep=10> ...         percent of a context that is to be left
  <memory0> <memory1> ...        what a history is read into
  <a0> .. <b0> .. <c0> ..        semantic-ID codes, one letter a level

A pretrained model's symbols come after the last row of its embedding. Control
tokens are found by name, not by arithmetic: one that the model already has, as
Qwen3 has <think> and </think>, keeps its id and what it means to the model.

Axes: I items, L levels, K candidates, E evidence columns.
"""

import dataclasses
import functools
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from gr2_jax.data import files

TRAINED = 'vocabulary.model'  # what `train` writes
EXTENDED = 'vocabulary.json'  # what `extend` writes
PAD = '<pad>'  # of an extended vocabulary; never its <eos>

# Embeddings are padded to a round number of rows; more is another tokenizer.
_MOST_UNUSED = 1024

# How often a word that is to be one piece is shown: so many times, and once for
# so many lines of text.
_LEAST_SHOWN, _SHARE_SHOWN = 50, 50

CONTROLS = (
  '<think>',  # the answer opens with a reasoning span
  '</think>',  # ... which ends here
  '<answer>',  # the answer is the ranking alone
  '<history>',
  '<candidates>',
  '<next>',  # semantic IDs in the order of engagement follow
  '<caption>',  # an item's text follows its semantic ID, or the other way
  '<persona>',  # a user in words follows a history, or the other way
  '<text>',  # text that is of no item and no user
  '<target>',  # a positive's slot follows: what a privileged teacher is told
  '<compress>',  # the context in fewer tokens follows
)

KEEPS = (5, 10, 15, 20, 30, 50)  # percent, what <keep=..> can ask for
GRADES = 2


@dataclasses.dataclass(frozen=True)
class Layout:
  """How many tokens each family of symbols has."""

  evidence: tuple[str, ...]  # column names
  bins: int  # tokens per column
  num_slots: int  # longest slate
  levels: int  # L of the semantic IDs
  codebook_size: int  # C of the semantic IDs
  num_memory: int = 0  # memory tokens

  def symbols(self) -> list[str]:
    """All symbols in the order of their ids."""
    names = list(CONTROLS)
    names += [f'<by:{column}>' for column in self.evidence]
    names += [f'<slot{k}>' for k in range(self.num_slots)]
    names += [
      f'<{column}={b}>' for column in self.evidence for b in range(self.bins)
    ]
    names += [f'<grade{grade + 1}>' for grade in range(GRADES)]
    names += [f'<age{b}>' for b in range(self.bins)]
    names += [f'<keep={percent}>' for percent in KEEPS]
    names += [f'<memory{m}>' for m in range(self.num_memory)]
    names += [
      f'<{chr(ord("a") + level)}{code}>'
      for level in range(self.levels)
      for code in range(self.codebook_size)
    ]
    return names


class SentencePieces:
  """Text by a SentencePiece model with symbols of its own.

  Args:
    path: what `train` wrote.
    symbols: strings that are tokens.
  """

  chat_template = ''
  pad, bos, eos = 0, 1, 2

  def __init__(self, path: pathlib.Path, symbols: Iterable[str]):
    self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    self._symbols = frozenset(symbols)

  def __len__(self) -> int:
    return self._model.vocab_size()

  def id(self, symbol: str) -> int | None:
    """Id of a token, None where there is none of that name."""
    found = self._model.piece_to_id(symbol)
    return None if found == self._model.unk_id() else found

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; a space is put behind the `<` of a symbol in it."""

    def part(match: re.Match) -> str:
      word = match.group()
      return f'< {word[1:]}' if word in self._symbols else word

    return self._model.encode(re.sub('<[^<>]*>', part, text))

  def decode(self, ids: list[int]) -> str:
    """Text of ids."""
    return self._model.decode(ids)

  def spelling(self, token: int) -> str | None:
    """What one token stands for, its leading space included."""
    return self._model.id_to_piece(token).replace('\u2581', ' ')


class PretrainedPieces:
  """Text by a pretrained model's tokenizer, its symbols added.

  Args:
    path: what `extend` wrote.

  Attributes:
    json: the serialised tokenizer, symbols included.
    chat_template: Jinja, empty for a model that does not chat.
    names: `bos_token`, `eos_token`, `pad_token` -> str, or None.
  """

  def __init__(self, path: pathlib.Path):
    import tokenizers  # Of the extra `hf`.

    found = json.loads(path.read_text(encoding='utf-8'))
    self.json: str = found.pop('tokenizer')
    self.chat_template: str = found.pop('chat_template')
    self.names: dict[str, str | None] = found
    self._marked = tokenizers.Tokenizer.from_str(self.json)
    plain = json.loads(self.json)
    for token in plain['added_tokens']:
      token['special'] = True
    self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
    self._plain.encode_special_tokens = True  # As text, that is.
    # Words follow others, and begin with a space, as SentencePiece has it.
    first = self._plain.encode('a', add_special_tokens=False).tokens[0]
    self._space = ' ' if first == 'a' else ''
    shown = self._show(self.encode('a'))
    self._shown_space = shown[: len(shown) - 1]
    eos, pad = found['eos_token'], found['pad_token']
    self.eos, self.pad = self.id(eos), self.id(pad)
    self.bos = self.id(found['bos_token'] or eos)

  def __len__(self) -> int:
    return self._marked.get_vocab_size()

  def id(self, symbol: str) -> int | None:
    """Id of a token, None where there is none of that name."""
    return self._marked.token_to_id(symbol)

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; no symbol and no special token is read in it."""
    text = self._space + text
    return self._plain.encode(text, add_special_tokens=False).ids

  def decode(self, ids: list[int]) -> str:
    """Text of ids."""
    return self._show(ids).removeprefix(self._shown_space)

  def spelling(self, token: int) -> str | None:
    """What one token stands for; None for a part of a character."""
    text = self._marked.decode([token], skip_special_tokens=False)
    return None if '\ufffd' in text else text

  def markup(self, text: str) -> list[int]:
    """Ids of text that is ours or the model's: special tokens are read."""
    return self._marked.encode(text, add_special_tokens=False).ids

  def _show(self, ids: list[int]) -> str:
    return self._marked.decode(ids, skip_special_tokens=False)


class Vocabulary:
  """Text <-> ids, and the ids of every family of symbols.

  Args:
    path: a file that `train` or `extend` wrote.
    layout: the layout it was made with.

  Attributes:
    pieces: the model of the text.
    pad: id that fills up; masks come from lengths, not from it.
    bos: id that a text without a prompt begins with.
    eos: id that ends an answer.
    control: name -> id.
    first_symbol: all ids from here on are symbols of ours.

  Raises:
    ValueError: the file lacks one of the layout's symbols.
  """

  def __init__(self, path: os.PathLike[str] | str, layout: Layout):
    path = pathlib.Path(path)
    symbols = layout.symbols()
    self.layout = layout
    self.pieces = (
      PretrainedPieces(path)
      if path.suffix == '.json'
      else SentencePieces(path, symbols)
    )
    self.pad, self.bos = self.pieces.pad, self.pieces.bos
    self.eos = self.pieces.eos
    self.control = {name: self.pieces.id(name) for name in CONTROLS}
    first = self.pieces.id(symbols[len(CONTROLS)])
    for place, symbol in enumerate(symbols, -len(CONTROLS)):
      found = self.pieces.id(symbol)
      if found is None or (place >= 0 and found != first + place):
        raise ValueError(
          f'{path}: symbol {symbol!r} is not where it should be, but '
          f'{"nowhere" if found is None else f"token {found}"}; the file '
          'was trained with another prompt or tokenizer config'
        )
    self.first_symbol = self.by_base = first
    while self.first_symbol - 1 in (
      self.pieces.id(PAD),
      *self.control.values(),
    ):
      self.first_symbol -= 1
    self.slot_base = self.by_base + len(layout.evidence)
    self.bin_base = self.slot_base + layout.num_slots
    self.grade_base = self.bin_base + len(layout.evidence) * layout.bins
    self.age_base = self.grade_base + GRADES
    self.keep_base = self.age_base + layout.bins
    self.memory_base = self.keep_base + len(KEEPS)
    self.sid_base = self.memory_base + layout.num_memory

  def __len__(self) -> int:
    return len(self.pieces)

  @functools.cached_property
  def ellipses(self) -> tuple[int, ...]:
    """Tokens that say that something was left out."""
    spelt = (self.pieces.spelling(token) for token in range(len(self)))
    return tuple(
      token
      for token, text in enumerate(spelt)
      if text and text.strip() in ('..', '...', '\u2026')
    )

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; what looks like a symbol in it stays text.

    A title that spells `<slot3>` or `</think>` must not become that token.
    """
    ids = self.pieces.encode(text)
    return [token for token in ids if token not in self._symbols]

  @functools.cached_property
  def _symbols(self) -> frozenset[int]:
    """Ids that are no text; normal forms of text may spell them as well."""
    layout = self.layout
    end = self.sid_base + layout.levels * layout.codebook_size
    marks = self.pad, self.bos, self.eos, *self.control.values()
    return frozenset((*marks, *range(self.by_base, end)))

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids, symbols shown as they are written, padding left out."""
    return self.pieces.decode([int(i) for i in ids if i != self.pad])

  def sid(self, codes: np.ndarray) -> np.ndarray:
    """Ids of semantic-ID codes: int32 [..., L] -> int32 [..., L]."""
    level = np.arange(self.layout.levels, dtype=np.int32)
    return self.sid_base + level * self.layout.codebook_size + codes

  def bins(self, bins: np.ndarray) -> np.ndarray:
    """Ids of evidence bins: int [..., E] -> int32 [..., E]."""
    column = np.arange(len(self.layout.evidence), dtype=np.int32)
    return (self.bin_base + column * self.layout.bins + bins).astype(np.int32)

  def is_slot(self, ids: np.ndarray) -> np.ndarray:
    """bool, which ids are slot tokens."""
    ids = np.asarray(ids)
    return (ids >= self.slot_base) & (ids < self.bin_base)


def translate(source: Vocabulary, target: Vocabulary) -> np.ndarray:
  """The token of another vocabulary that stands for the same.

  Symbols are found by name; <pad>, <bos> and <eos> by what they do; a piece of
  text by its spelling.

  Returns:
    int32 [len(source)], ids of `target`; -1 where it has no such token.
  """
  own, other = (
    [words.pieces.spelling(token) for token in range(len(words))]
    for words in (source, target)
  )
  if own == other:  # Also where two tokens, or parts of characters, look alike.
    return np.arange(len(own), dtype=np.int32)
  spelt = {name: token for token, name in reversed(list(enumerate(other)))}
  found = np.array(
    [spelt.get(name, -1) if name else -1 for name in own], np.int32
  )
  for role in ('pad', 'bos', 'eos'):
    found[getattr(source, role)] = getattr(target, role)
  return found


def train(
  path: os.PathLike[str] | str,
  sentences: Iterable[str],
  layout: Layout,
  text_tokens: int,
  words: Iterable[str] = (),
) -> Vocabulary:
  """Trains the SentencePiece model and writes it.

  Args:
    path: where to; appears whole or not at all.
    sentences: the catalog's text; one that is there often counts once.
    layout: the symbol families.
    text_tokens: pieces of text to learn at most; fewer where the text is
      short. Bytes stand in for characters never seen.
    words: each is worth a piece of its own, and is made as frequent as that
      takes; beside itself it is shown with a comma, since a piece that but one
      spelling has is left out.

  Returns:
    The vocabulary.
  """
  symbols = layout.symbols()
  model = io.BytesIO()
  text = sorted({s for s in sentences if s.strip()})
  shown = [f'{word}{end}' for word in sorted(set(words)) for end in ('', ',')]
  text += shown * (_LEAST_SHOWN + len(text) // _SHARE_SHOWN)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text),
    model_writer=model,
    vocab_size=3 + 1 + 256 + len(symbols) + text_tokens,
    hard_vocab_limit=False,
    model_type='unigram',
    byte_fallback=True,
    user_defined_symbols=symbols,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    num_threads=1,  # The result must not depend on the machine.
    minloglevel=2,
  )
  path = pathlib.Path(path)
  with files.atomic_write(path, 'wb') as file:
    file.write(model.getvalue())
  return Vocabulary(path, layout)


def extend(
  path: os.PathLike[str] | str,
  tokenizer: str,
  rows: int,
  layout: Layout,
  *,
  source: str,
  eos_token: str | None,
  bos_token: str | None = None,
  chat_template: str = '',
) -> Vocabulary:
  """Adds the symbols to a pretrained model's tokenizer and writes it.

  Rows of the embedding that have no token get a name each, so that the first
  symbol's id is the number of rows. Where the model is a policy that left here
  with this very layout, it has all the symbols, and none is added.

  Args:
    path: where to, of suffix `.json`; appears whole or not at all.
    tokenizer: as Hugging Face's `tokenizers` serialises it.
    rows: of the model's embedding.
    layout: the symbol families.
    source: where the model came from, for errors.
    eos_token: ends a turn.
    bos_token: begins a text; None where the model has none.
    chat_template: Jinja.

  Returns:
    The vocabulary. Its padding token is its own, whatever the model's is.

  Raises:
    ValueError: tokenizer and embedding differ in size, there is no token to
      end an answer with, or the tokenizer has some of our symbols.
  """
  import tokenizers  # Of the extra `hf`.

  model = tokenizers.Tokenizer.from_str(tokenizer)
  size = max(model.get_vocab().values()) + 1
  if not 0 <= rows - size <= _MOST_UNUSED:
    raise ValueError(
      f'{source}: the tokenizer has {size} tokens, the embedding of the '
      f'weights {rows} rows: they are of different models'
    )
  if eos_token is None or model.token_to_id(eos_token) is None:
    raise ValueError(
      f'{source}: the tokenizer has no token {eos_token!r} to end an answer '
      'with: name one as eos_token in its tokenizer_config.json'
    )
  families = layout.symbols()[len(CONTROLS) :]
  known = [s for s in families if model.token_to_id(s) is not None]
  if known and len(known) < len(families):
    raise ValueError(
      f'{source}: the tokenizer has a token {known[0]!r}, but not all of our '
      'symbols; take the prompt and tokenizer config that this policy was '
      'trained with, or a model that was none'
    )
  unused = [f'<|row{row}|>' for row in range(size, rows)]
  model.add_tokens(
    [
      tokenizers.AddedToken(symbol, normalized=False, special=symbol == PAD)
      for symbol in (*unused, PAD, *layout.symbols())
      if model.token_to_id(symbol) is None
    ]
  )
  names = dict(bos_token=bos_token, eos_token=eos_token, pad_token=PAD)
  found = {'tokenizer': model.to_str(), 'chat_template': chat_template}
  path = pathlib.Path(path)
  with files.atomic_write(path) as file:
    json.dump(found | names, file)
  return Vocabulary(path, layout)


def find(directory: os.PathLike[str] | str) -> pathlib.Path:
  """The vocabulary's file in an artifact.

  Raises:
    FileNotFoundError: there is none.
  """
  for name in (EXTENDED, TRAINED):
    if (path := pathlib.Path(directory) / name).exists():
      return path
  raise FileNotFoundError(
    f'{directory}: neither {EXTENDED} nor {TRAINED} is there; delete the '
    'folder to have it made again'
  )
