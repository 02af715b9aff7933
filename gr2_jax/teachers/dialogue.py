"""Slates as chats for an outside model, and its answers as the policy's tokens.

The outside model receives no semantic IDs: candidates are numbered [1], [2], ..
in the order of presentation, items of the history [h1], [h2], .., oldest first,
each with title, category path and year. It cites them in prose and ends with a
ranking in one line. A cited candidate becomes its slot token, a cited item of
the history its semantic ID.

In all functions `slate` is one record of `slates.SlateSource`, whose labels are
not read, and `order`, int [count], holds the incoming ranks of its candidates
in the order of presentation.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gr2_jax.data import log as log_lib
from gr2_jax.ops import parsing
from gr2_jax.prompts import chat, context, prompt
from gr2_jax.teachers.endpoint import Message

_FORMAT = """\
You are given a user's history, oldest item first, and numbered candidates in \
no particular order. First write your reasoning, at most {words} words of \
plain prose: the pattern in the history, the categories that follow from it, \
the candidates that match. Name items only by their numbers in brackets: [h2] \
for one of the history, [3] for a candidate. Then write one last line with the \
numbers of all {count} candidates, each once, the most relevant first:
RANKING: {example}"""

_TARGET = """\
The user engaged with [{target}] next. Put it first, and reason towards it \
from the history as if you did not know: do not mention that you were told."""

_RANKING = re.compile(r'^\W*ranking\W*?:', re.IGNORECASE | re.MULTILINE)
_NUMBERS = re.compile(r'[\s\[(*`]*\d{1,6}(?:[\s,;>\[\]()*`]+\d{1,6})*\W*')
_CITATION = re.compile(r'\[\s*(h?\d{1,6}(?:\s*,\s*h?\d{1,6})*)\s*\]')
_CONCLUSION = 3  # candidates at the end of a reasoning span

Slate = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Answer:
  """A parsed answer of an outside model."""

  reasoning: str  # prose with the model's citations
  ranking: np.ndarray  # int32, incoming ranks, best first; [0] unless valid
  verdict: int  # index into `parsing.VERDICTS`


@dataclasses.dataclass(frozen=True)
class Span:
  """A reasoning span in the policy's tokens."""

  ids: list[int]  # slots are incoming ranks
  clipped: bool  # whether prose was truncated
  unknown: int  # dropped citations of items that the slate lacks


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """Renders the slates of one data set as chats and reads the answers."""

  prompter: prompt.Prompter  # layout, history and tokens of the policy
  catalog: log_lib.Catalog
  system: str  # system message; may be empty
  words: int  # longest reasoning that the chat requests
  knowledge: bool  # whether the system message has general rules (KP)

  def messages(
    self, slate: Slate, order: np.ndarray, target: int | None = None
  ) -> list[Message]:
    """The chat that requests reasoning and a ranking.

    `target` is the incoming rank of a candidate that is revealed as the target.
    """
    count = len(order)
    example = ', '.join(map(str, range(count, 0, -1)))
    form = _FORMAT.format(words=self.words, count=count, example=example)
    system = [self.system, form, chat.KNOWLEDGE if self.knowledge else '']
    user = [self.describe(slate, order)]
    if target is not None:
      place = int(np.argsort(order)[target])
      user.append(_TARGET.format(target=place + 1))
    return [
      {'role': 'system', 'content': '\n\n'.join(filter(None, system))},
      {'role': 'user', 'content': '\n\n'.join(user)},
    ]

  def describe(
    self, slate: Slate, order: np.ndarray, symbols: bool = False
  ) -> str:
    """History and candidates, one line per item, in the policy's layout.

    With `symbols` a line also has the policy's symbols for its item: semantic
    ID, evidence, grade, age.
    """
    lines = {
      'history': [
        self._line(f'h{place}', item)
        for place, item in enumerate(self.prompter.shown(slate), 1)
      ],
      'candidates': [
        self._line(str(place), slate['candidates'][rank])
        for place, rank in enumerate(order, 1)
      ],
    }
    if symbols:
      fields = self.prompter.lines(slate)
      extras = {
        'history': fields.history,
        'candidates': [fields.candidates[rank] for rank in order],
      }
      for block, texts in lines.items():
        lines[block] = [
          ' | '.join(filter(None, [text, self._symbols(extra)]))
          for text, extra in zip(texts, extras[block], strict=True)
        ]
    return _blocks({block: lines[block] for block in self.prompter.layout})

  def read(self, text: str, order: np.ndarray) -> Answer:
    """Parses an answer; drops thoughts that end with </think>."""
    text = text.rpartition('</think>')[2]
    headings = [match.span() for match in _RANKING.finditer(text)]
    start, end = headings[-1] if headings else (len(text), len(text))
    tail = text[end:]
    reasoning = re.sub(r'^\W*reasoning\W*?:', '', text[:start], flags=re.I)
    digits = re.findall(r'\d+', tail) if _NUMBERS.fullmatch(tail) else []
    numbers, count = [int(n) for n in digits], len(order)
    faults = {
      parsing.WRONG_FORMAT: not numbers,
      parsing.OUT_OF_SET: not all(1 <= n <= count for n in numbers),
      parsing.REPETITION: len(set(numbers)) < len(numbers),
      parsing.MISSING: len(numbers) < count,
    }
    verdict = next((v for v, found in faults.items() if found), parsing.VALID)
    places = np.array(numbers if verdict == parsing.VALID else [], int) - 1
    ranking = np.asarray(order)[places].astype(np.int32)
    return Answer(' '.join(reasoning.split()), ranking, verdict)

  def span(self, answer: Answer, slate: Slate, order: np.ndarray) -> Span:
    """Converts the reasoning of a valid answer to the policy's tokens.

    The span ends with the slots of the first candidates of the ranking, like
    those of all teachers, so that a policy can be rewarded for a consistent
    conclusion. Prose is truncated to leave room for them.
    """
    words, room = self.prompter.vocabulary, self.prompter.reasoning
    ranks = answer.ranking[: min(_CONCLUSION, room)]
    end = [words.slot_base + int(rank) for rank in ranks]
    room -= len(end)
    ids, clipped, unknown = [], False, 0
    for piece, divisible in self._pieces(answer.reasoning, slate, order):
      if piece is None:
        unknown += 1
      elif clipped or len(ids) + len(piece) > room:
        if divisible and not clipped:
          ids += piece[: room - len(ids)]
        clipped = True
      else:
        ids += piece
    while ids and words.is_slot(ids[-1]):
      ids.pop()
    return Span(ids + end, clipped, unknown)

  def show(self, ids: np.ndarray, slate: Slate, order: np.ndarray) -> str:
    """The inverse of `span`: prose with citations.

    In `ids` slots are incoming ranks. Semantic IDs of items that the slate
    lacks appear as symbols.
    """
    slots = {
      (self.prompter.vocabulary.slot_base + int(rank),): f'[{place}]'
      for place, rank in enumerate(order, 1)
    }
    return self._cite(ids, slots | self._identifiers(slate, order))

  def show_context(
    self, ids: np.ndarray, slate: Slate, order: np.ndarray
  ) -> str:
    """A compressed context as a block of history and one of candidates.

    In `ids`, any tokens up to an <eos>, slots are places in the order of
    presentation. A whole semantic ID of an item of the slate appears as its
    citation, other symbols as they are.
    """
    words, names = self.prompter.vocabulary, self._identifiers(slate, order)
    lines: dict[str, list[str]] = {'history': []}
    line: list[int] = []
    block = 'history'

    def end(name: str = '') -> None:
      text = ' '.join(filter(None, [name, self._cite(line, names)]))
      lines[block] += [text] if text else []
      line.clear()

    for token in map(int, ids):
      if token == words.eos:
        break
      if token == words.control['<candidates>']:
        end()
        block = 'candidates'
        lines.setdefault(block, [])
      elif words.is_slot(token):
        end(f'[{token - words.slot_base + 1}]')
      else:
        line.append(token)
    end()
    return _blocks(lines)

  def _identifiers(
    self, slate: Slate, order: np.ndarray
  ) -> dict[tuple[int, ...], str]:
    """Maps the semantic IDs of a slate's items to their citations."""
    sids = self.prompter.items['sid']
    names = {
      sids[slate['candidates'][rank]]: f'[{place}]'
      for place, rank in enumerate(order, 1)
    }
    shown = enumerate(self.prompter.shown(slate), 1)
    return names | {sids[item]: f'[h{place}]' for place, item in shown}

  def _cite(self, ids: Iterable[int], names: dict[tuple[int, ...], str]) -> str:
    """Decodes tokens, with a name for each run of tokens in `names`."""
    words = self.prompter.vocabulary
    ids, parts, text = [int(i) for i in ids], [], []
    while ids:
      sizes = (words.layout.levels, 1)
      size = next((n for n in sizes if tuple(ids[:n]) in names), 0)
      if size or not 0 <= ids[0] < len(words):
        name = names.get(tuple(ids[:size]), '<?>')
        parts += [words.decode(text), name]
        ids, text = ids[size or 1 :], []
      else:
        text.append(ids.pop(0))
    return ' '.join(filter(None, [*parts, words.decode(text)]))

  def _symbols(self, line: context.Line) -> str:
    """The fields of a line that are not text."""
    fields = (v for f, v in line.items() if f not in ('title', 'categories'))
    return self.prompter.vocabulary.decode([i for ids in fields for i in ids])

  def _line(self, name: str, item: int) -> str:
    year = int(self.catalog.years[item])
    parts = [
      self.catalog.titles[item] or 'untitled',
      ' > '.join(self.catalog.categories[item]),
      str(year or ''),
    ]
    texts = filter(None, (' '.join(part.split()) for part in parts))
    return f'[{name}] {" | ".join(texts)}'

  def _pieces(
    self, text: str, slate: Slate, order: np.ndarray
  ) -> Iterator[tuple[list[int] | None, bool]]:
    """Yields prose (divisible) and citations; None for an unknown citation."""
    words, sids = self.prompter.vocabulary, self.prompter.items['sid']
    history = self.prompter.shown(slate)
    at = 0
    for match in _CITATION.finditer(text):
      yield self._encode(text[at : match.start()]), True
      at = match.end()
      for name in re.findall(r'h?\d+', match.group(1)):
        place = int(name.removeprefix('h')) - 1
        past = name.startswith('h')
        if not 0 <= place < len(history if past else order):
          yield None, False
        elif past:
          yield list(sids[history[place]]), False
        else:
          yield [words.slot_base + int(order[place])], False
    yield self._encode(text[at:]), True

  def _encode(self, text: str) -> list[int]:
    text = text.strip()
    return self.prompter.vocabulary.encode(text) if text else []


def _blocks(lines: dict[str, list[str]]) -> str:
  """Joins blocks under headings; an empty block has the line (none)."""
  return '\n\n'.join(
    '\n'.join([f'{block.capitalize()}:', *(texts or ['(none)'])])
    for block, texts in lines.items()
  )
