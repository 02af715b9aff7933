"""Token ids: text beside control, slot, evidence and SID tokens.

The text belongs to a SentencePiece model of our own (`train`), or to a
pretrained model's tokenizer in the form of Hugging Face's `tokenizers`
(`extend`). Everything else is a symbol added to that model, so one file holds
the whole vocabulary and decoding shows every token. The symbols of a family
have consecutive ids:

  <think> </think> <answer> ...  control tokens
  <by:COLUMN>                    the candidates sorted by a column follow
  <slot0> <slot1> ...            slots: a candidate's name within its slate
  <COLUMN=0> <COLUMN=1> ...      evidence, in bins
  <grade1> <grade2>              the user's grade of an item of the history
  <age0> <age1> ...              the age of that event, in bins
  <keep=5> <keep=10> ...         percent of a context that a compression keeps
  <memory0> <memory1> ...        memory tokens, which encode a history
  <a0> .. <b0> .. <c0> ..        semantic-ID codes, one letter a level

In a pretrained model the symbols come after the last row of its embedding.
Control tokens are found by name, not by arithmetic: where the model has one
already, as Qwen3 has <think> and </think>, its id and its meaning stay.

Axes: I items, L levels, K candidates, E evidence columns.
"""

import dataclasses
import functools
import io
import itertools
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

# Padding of an embedding to a round number of rows is at most this.
_MOST_UNUSED = 1024

# A word that must become one piece is repeated 50 times, and once more every 50
# lines of text.
_LEAST_REPEATS, _LINES_PER_REPEAT = 50, 50

CONTROLS = (
  '<think>',  # a reasoning span begins the answer
  '</think>',  # ... and ends here
  '<answer>',  # the answer is the ranking alone
  '<history>',
  '<candidates>',
  '<next>',  # semantic IDs in the order of engagement follow
  '<caption>',  # an item's text follows its semantic ID, or the other way
  '<persona>',  # a user in words follows a history, or the other way
  '<text>',  # general text
  '<target>',  # a positive's slot follows, for a privileged teacher
  '<compress>',  # the compressed context follows
)

RATIOS = (5, 10, 15, 20, 30, 50)  # percent, of <keep=..>
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

  def families(self) -> dict[str, list[str]]:
    """Symbols of every family but the control tokens, in the order of ids."""
    return {
      'by': [f'<by:{column}>' for column in self.evidence],
      'slot': [f'<slot{k}>' for k in range(self.num_slots)],
      'bin': [f'<{c}={b}>' for c in self.evidence for b in range(self.bins)],
      'grade': [f'<grade{grade + 1}>' for grade in range(GRADES)],
      'age': [f'<age{b}>' for b in range(self.bins)],
      'ratio': [f'<keep={percent}>' for percent in RATIOS],
      'memory': [f'<memory{m}>' for m in range(self.num_memory)],
      'sid': [
        f'<{chr(ord("a") + level)}{code}>'
        for level in range(self.levels)
        for code in range(self.codebook_size)
      ],
    }

  def symbols(self) -> list[str]:
    """All symbols, the control tokens first."""
    return [*CONTROLS, *itertools.chain(*self.families().values())]


class SentencePieces:
  """Text pieces of a SentencePiece model that `train` wrote."""

  chat_template = ''
  pad, bos, eos = 0, 1, 2

  def __init__(self, path: pathlib.Path, symbols: Iterable[str]):
    self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    self._symbols = frozenset(symbols)

  def __len__(self) -> int:
    return self._model.vocab_size()

  def id(self, symbol: str) -> int | None:
    """Id of a token, None where there is none of that name."""
    token = self._model.piece_to_id(symbol)
    return None if token == self._model.unk_id() else token

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; a space after its `<` makes a symbol text."""

    def part(match: re.Match) -> str:
      word = match.group()
      return f'< {word[1:]}' if word in self._symbols else word

    return self._model.encode(re.sub('<[^<>]*>', part, text))

  def decode(self, ids: list[int]) -> str:
    """Text of ids."""
    return self._model.decode(ids)

  def spelling(self, token: int) -> str | None:
    """Text of one token, its leading space included."""
    return self._model.id_to_piece(token).replace('\u2581', ' ')


class PretrainedPieces:
  """Text pieces of a pretrained model's tokenizer that `extend` wrote.

  Attributes:
    json: the serialized tokenizer, symbols included.
    chat_template: Jinja, empty for a model that does not chat.
    names: `bos_token`, `eos_token`, `pad_token` -> str, or None.
  """

  def __init__(self, path: pathlib.Path):
    import tokenizers  # Of the extra `hf`.

    names = json.loads(path.read_text(encoding='utf-8'))
    self.json: str = names.pop('tokenizer')
    self.chat_template: str = names.pop('chat_template')
    self.names: dict[str, str | None] = names
    self._marked = tokenizers.Tokenizer.from_str(self.json)
    plain = json.loads(self.json)
    for token in plain['added_tokens']:
      token['special'] = True
    self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
    self._plain.encode_special_tokens = True  # As plain text.
    # Words begin with a space, as in SentencePiece.
    first = self._plain.encode('a', add_special_tokens=False).tokens[0]
    self._space = ' ' if first == 'a' else ''
    shown = self._show(self.encode('a'))
    self._shown_space = shown[: len(shown) - 1]
    eos, pad = self.id(names['eos_token']), self.id(names['pad_token'])
    assert eos is not None  # `extend` requires it.
    assert pad is not None  # `extend` adds it.
    self.eos, self.pad = eos, pad
    self.bos = self.id(names['bos_token'] or names['eos_token'])

  def __len__(self) -> int:
    return self._marked.get_vocab_size()

  def id(self, symbol: str) -> int | None:
    """Id of a token, None where there is none of that name."""
    return self._marked.token_to_id(symbol)

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; symbols and special tokens in it stay text."""
    text = self._space + text
    return self._plain.encode(text, add_special_tokens=False).ids

  def decode(self, ids: list[int]) -> str:
    """Text of ids."""
    return self._show(ids).removeprefix(self._shown_space)

  def spelling(self, token: int) -> str | None:
    """Text of one token; None for a part of a character."""
    text = self._marked.decode([token], skip_special_tokens=False)
    return None if '\ufffd' in text else text

  def markup(self, text: str) -> list[int]:
    """Ids of trusted text, in which special tokens are tokens."""
    return self._marked.encode(text, add_special_tokens=False).ids

  def _show(self, ids: list[int]) -> str:
    return self._marked.decode(ids, skip_special_tokens=False)


class Vocabulary:
  """Text <-> ids, and the ids of every family of symbols.

  Attributes:
    pieces: the model of the text.
    pad: id that fills up; masks come from lengths, not from it.
    bos: id that begins a text without a prompt.
    eos: id that ends an answer.
    control: name -> id.
    first_symbol: all ids from here on are symbols of ours.

  Raises:
    ValueError: the file was made with another layout.
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
    tokens: list[int] = []
    for place, symbol in enumerate(symbols, -len(CONTROLS)):
      token = self.pieces.id(symbol)
      if token is None or (place > 0 and token != tokens[-1] + 1):
        state = 'missing' if token is None else f'token {token}, out of order'
        raise ValueError(
          f'{path}: symbol {symbol!r} is {state}; the file was trained with '
          'another prompt or tokenizer config'
        )
      tokens.append(token)
    self.control = dict(zip(CONTROLS, tokens, strict=False))
    first = tokens[len(CONTROLS)]
    self.first_symbol = first
    marks = self.pieces.id(PAD), *self.control.values()
    while self.first_symbol - 1 in marks:
      self.first_symbol -= 1
    sizes = map(len, layout.families().values())
    (
      self.by_base,
      self.slot_base,
      self.bin_base,
      self.grade_base,
      self.age_base,
      self.ratio_base,
      self.memory_base,
      self.sid_base,
      self._end,
    ) = itertools.accumulate(sizes, initial=first)

  def __len__(self) -> int:
    return len(self.pieces)

  @functools.cached_property
  def ellipses(self) -> tuple[int, ...]:
    """Tokens that mark an omission."""
    spellings = (
      self.pieces.spelling(token) or '' for token in range(len(self))
    )
    return tuple(
      token
      for token, text in enumerate(spellings)
      if text.strip() in ('..', '...', '\u2026')
    )

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; a title that spells `<slot3>` does not become it."""
    ids = self.pieces.encode(text)
    return [token for token in ids if token not in self._symbols]

  @functools.cached_property
  def _symbols(self) -> frozenset[int]:
    """Ids that are not text; a normal form of some text may spell them."""
    marks = self.pad, self.bos, self.eos, *self.control.values()
    return frozenset((*marks, *range(self.by_base, self._end)))

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids with their symbols, without padding."""
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
    """Mask of the ids that are slot tokens."""
    ids = np.asarray(ids)
    return (ids >= self.slot_base) & (ids < self.bin_base)


def translate(source: Vocabulary, target: Vocabulary) -> np.ndarray:
  """Maps the tokens of one vocabulary to equal tokens of another.

  Symbols match by name; <pad>, <bos> and <eos> by role; text by its spelling.

  Returns:
    int32 [len(source)], ids of `target`; -1 where it has no such token.
  """
  before, after = (
    [words.pieces.spelling(token) for token in range(len(words))]
    for words in (source, target)
  )
  if before == after:  # Also where two tokens share a spelling, or have none.
    return np.arange(len(before), dtype=np.int32)
  ids = {name: token for token, name in reversed(list(enumerate(after)))}
  tokens = np.array(
    [ids.get(name, -1) if name else -1 for name in before], np.int32
  )
  for role in ('pad', 'bos', 'eos'):
    tokens[getattr(source, role)] = getattr(target, role)
  return tokens


def train(
  path: os.PathLike[str] | str,
  sentences: Iterable[str],
  layout: Layout,
  text_tokens: int,
  words: Iterable[str] = (),
) -> Vocabulary:
  """Trains the SentencePiece model and writes it.

  Args:
    path: the file to write.
    sentences: the catalog's text; repeated ones count once.
    layout: the symbol families.
    text_tokens: most pieces of text to learn; a short text has fewer. Bytes
      spell characters outside the text.
    words: words that must become one piece each. They are repeated, alone and
      before a comma, since the trainer drops a piece with only one spelling.
  """
  symbols = layout.symbols()
  model = io.BytesIO()
  text = sorted({s for s in sentences if s.strip()})
  repeated = [
    f'{word}{end}' for word in sorted(set(words)) for end in ('', ',')
  ]
  text += repeated * (_LEAST_REPEATS + len(text) // _LINES_PER_REPEAT)
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

  Rows of the embedding without a token get a name each, so that the first
  symbol's id is the number of rows. A policy that was exported with this very
  layout has all the symbols, and none is added.

  Args:
    path: the file to write, of suffix `.json`.
    tokenizer: as Hugging Face's `tokenizers` serializes it.
    rows: of the model's embedding.
    layout: the symbol families.
    source: where the model came from, for errors.
    eos_token: ends a turn. The padding token is always PAD.
    bos_token: begins a text; None where the model has none.
    chat_template: Jinja.

  Raises:
    ValueError: tokenizer and embedding differ in size, no token can end an
      answer, or the tokenizer has some, but not all, of our symbols.
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
      'symbols; use the prompt and tokenizer config that this policy was '
      'trained with, or another model'
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
  fields = {'tokenizer': model.to_str(), 'chat_template': chat_template}
  path = pathlib.Path(path)
  with files.atomic_write(path) as file:
    json.dump(fields | names, file)
  return Vocabulary(path, layout)


def find(directory: os.PathLike[str] | str) -> pathlib.Path:
  """Finds the vocabulary's file in an artifact; FileNotFoundError if absent."""
  for name in (EXTENDED, TRAINED):
    if (path := pathlib.Path(directory) / name).exists():
      return path
  raise FileNotFoundError(
    f'{directory}: neither {EXTENDED} nor {TRAINED} exists; delete the folder '
    'to make it again'
  )
