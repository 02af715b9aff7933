"""Token ids: SentencePiece text beside control, slot, evidence and SID tokens.

Everything that is not text is a user-defined symbol of the SentencePiece
model, so one file is the whole vocabulary and decoding shows every token. The
symbols of a family stand next to each other in id space:

  <think> </think> <answer> ...  control tokens
  <by:COLUMN>                    asks for the candidates sorted by a column
  <c0> <c1> ...                  slots: a candidate's name within its slate
  <COLUMN=0> <COLUMN=1> ...      evidence, in bins
  <a0> .. <b0> .. <c_0> ..       semantic-ID codes, one letter a level

Axes: I items, L levels, K candidates, E evidence columns.
"""

import dataclasses
import io
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

CONTROLS = (
  '<think>',  # the answer opens with a reasoning span
  '</think>',  # ... which ends here
  '<answer>',  # the answer is the ranking alone
  '<history>',
  '<candidates>',
  '<next>',  # semantic IDs in the order of engagement follow
  '<caption>',  # an item's text follows its semantic ID, or the other way
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How many tokens each family of symbols has."""

  evidence: tuple[str, ...]  # column names
  bins: int  # tokens per column
  num_slots: int  # longest slate
  levels: int  # L of the semantic IDs
  codebook_size: int  # C of the semantic IDs

  def symbols(self) -> list[str]:
    """All symbols in the order of their ids."""
    names = list(CONTROLS)
    names += [f'<by:{column}>' for column in self.evidence]
    names += [f'<slot{k}>' for k in range(self.num_slots)]
    names += [
      f'<{column}={b}>' for column in self.evidence for b in range(self.bins)
    ]
    names += [
      f'<{chr(ord("a") + level)}{code}>'
      for level in range(self.levels)
      for code in range(self.codebook_size)
    ]
    return names


class Vocabulary:
  """Text <-> ids, and the ids of every family of symbols.

  Args:
    path: a model file that `train` wrote.
    layout: the layout it was trained with.

  Raises:
    ValueError: the file lacks one of the layout's symbols.
  """

  def __init__(self, path: os.PathLike[str] | str, layout: Layout):
    self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    self.layout = layout
    self.pad, self.bos, self.eos = 0, 1, 2
    symbols = layout.symbols()
    self._symbols = frozenset(symbols)
    first = self._model.piece_to_id(symbols[0])
    for offset, symbol in enumerate(symbols):
      if self._model.piece_to_id(symbol) != first + offset:
        raise ValueError(
          f'{path}: symbol {symbol!r} is not token {first + offset}; the '
          'file was trained with another prompt or tokenizer config'
        )
    self.control = {name: first + i for i, name in enumerate(CONTROLS)}
    self.by_base = first + len(CONTROLS)
    self.slot_base = self.by_base + len(layout.evidence)
    self.bin_base = self.slot_base + layout.num_slots
    self.sid_base = self.bin_base + len(layout.evidence) * layout.bins

  def __len__(self) -> int:
    return self._model.vocab_size()

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; what looks like a symbol in it stays text.

    A title that spells `<slot3>` or `</think>` must not become that token, so
    a space is put behind the `<` of such a word.
    """

    def part(match: re.Match) -> str:
      word = match.group()
      return f'< {word[1:]}' if word in self._symbols else word

    return self._model.encode(re.sub('<[^<>]*>', part, text))

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids, symbols shown as they are written, padding left out."""
    return self._model.decode([int(i) for i in ids if i != self.pad])

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


def train(
  path: os.PathLike[str] | str,
  sentences: Iterable[str],
  layout: Layout,
  text_tokens: int,
) -> Vocabulary:
  """Trains the SentencePiece model and writes it.

  Args:
    path: where to; appears whole or not at all.
    sentences: titles, categories and phrases; the catalog's text.
    layout: the symbol families.
    text_tokens: pieces of text to learn at most; fewer where the text is
      short. Bytes stand in for characters never seen.

  Returns:
    The vocabulary.
  """
  symbols = layout.symbols()
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sorted({s for s in sentences if s.strip()})),
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
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_bytes(model.getvalue())
  os.replace(temporary, path)
  return Vocabulary(path, layout)
