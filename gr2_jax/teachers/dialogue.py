"""Slates as words for a model that is not ours, and its words as our tokens.

The outside model sees no semantic IDs: candidates are [1], [2], .. in the
order of presentation, items of the history [h1], [h2], .., oldest first, each
with title, category path and year. It reasons in prose that cites these, then
ranks in one line. A citation becomes what our policies cite by: the slot token
of a candidate, the semantic ID of an item of the history.

Axes: K candidates.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

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
_CONCLUSION = 3  # picks that a reasoning span ends with


@dataclasses.dataclass(frozen=True)
class Answer:
  """What an outside model answered.

  Attributes:
    reasoning: its prose, citations as it wrote them.
    ranking: int32, incoming ranks, best first; empty where the verdict is not
      `parsing.VALID`.
    verdict: index into `parsing.VERDICTS`.
  """

  reasoning: str
  ranking: np.ndarray
  verdict: int


@dataclasses.dataclass(frozen=True)
class Span:
  """A reasoning span in our tokens."""

  ids: list[int]  # slots are incoming ranks
  clipped: bool  # the prose was longer
  unknown: int  # citations of what is not there; they are left out


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """Renders slates of one data set as chats, and reads the answers.

  Attributes:
    prompter: of the policy: its layout, its history, its tokens.
    catalog: titles, category paths, years.
    system: who the model is told to be; may be empty.
    words: of the reasoning, at most, as the model is told.
    knowledge: whether it is told what tends to hold (KP).
  """

  prompter: prompt.Prompter
  catalog: log_lib.Catalog
  system: str
  words: int
  knowledge: bool

  def messages(
    self, slate, order: np.ndarray, target: int | None = None
  ) -> list[Message]:
    """The chat that asks for reasoning and a ranking.

    Args:
      slate: one record of `slates.SlateSource`.
      order: int [count], incoming ranks in the order of presentation.
      target: incoming rank of the candidate that is shown as the target.
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

  def describe(self, slate, order: np.ndarray, symbols: bool = False) -> str:
    """History and candidates, a line an item, in the policy's layout.

    Args:
      slate: one record of `slates.SlateSource`; of labels nothing is read.
      order: int [count], incoming ranks in the order of presentation.
      symbols: whether a line ends with what the policy reads of it and words
        lack: semantic ID, evidence, grade, age.
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
      read = self.prompter.lines(slate)
      own = {
        'history': read.history,
        'candidates': [read.candidates[rank] for rank in order],
      }
      for block, shown in lines.items():
        lines[block] = [
          ' | '.join(filter(None, [line, self._symbols(more)]))
          for line, more in zip(shown, own[block], strict=True)
        ]
    return _blocks({block: lines[block] for block in self.prompter.layout})

  def read(self, text: str, order: np.ndarray) -> Answer:
    """Parses an answer; what is before the ranking is the reasoning.

    Args:
      text: as the model wrote it. A span of thoughts before the answer, closed
        by </think>, is left out.
      order: of presentation.
    """
    text = text.rpartition('</think>')[2]
    found = [*_RANKING.finditer(text)][-1:]
    reasoning = text[: found[0].start()] if found else text
    reasoning = re.sub(r'^\W*reasoning\W*?:', '', reasoning, flags=re.I)
    tail = text[found[0].end() :] if found else ''
    numbers = []
    if _NUMBERS.fullmatch(tail):
      numbers = [int(n) for n in re.findall(r'\d+', tail)]
    count = len(order)
    if not numbers:
      verdict = parsing.WRONG_FORMAT
    elif not all(1 <= n <= count for n in numbers):
      verdict = parsing.OUT_OF_SET
    elif len(set(numbers)) < len(numbers):
      verdict = parsing.REPETITION
    elif len(numbers) < count:
      verdict = parsing.MISSING
    else:
      verdict = parsing.VALID
    places = np.array(numbers if verdict == parsing.VALID else [], int) - 1
    ranking = np.asarray(order)[places].astype(np.int32)
    return Answer(' '.join(reasoning.split()), ranking, verdict)

  def span(self, answer: Answer, slate, order: np.ndarray) -> Span:
    """A valid answer's reasoning in our tokens.

    It ends with the slots of the first picks, as that of every teacher here,
    so that a policy can be held to its conclusion; prose gives way to them.

    Args:
      answer: of `read`.
      slate: which it is about.
      order: of presentation.
    """
    words, room = self.prompter.vocabulary, self.prompter.reasoning
    end = [words.slot_base + int(rank) for rank in answer.ranking[:_CONCLUSION]]
    end = end[:room]
    room -= len(end)
    ids, clipped, unknown = [], False, 0
    for piece in self._pieces(answer.reasoning, slate, order):
      if piece is None:
        unknown += 1
      elif clipped or len(ids) + len(piece.ids) > room:
        if piece.divisible and not clipped:
          ids += piece.ids[: room - len(ids)]
        clipped = True
      else:
        ids += piece.ids
    while ids and words.is_slot(ids[-1]):
      ids.pop()
    return Span(ids + end, clipped, unknown)

  def show(self, ids: np.ndarray, slate, order: np.ndarray) -> str:
    """Tokens of a reasoning span as words, with citations: `span` reversed.

    Args:
      ids: of a stored trace, slots are incoming ranks.
      slate: which it is about.
      order: of presentation.

    Returns:
      Prose. What cites no item of the slate shows as the symbols it is.
    """
    slots = {
      (self.prompter.vocabulary.slot_base + int(rank),): f'[{place}]'
      for place, rank in enumerate(order, 1)
    }
    return self._cite(ids, slots | self._identifiers(slate, order))

  def show_context(self, ids: np.ndarray, slate, order: np.ndarray) -> str:
    """Tokens of a compression as words, a line a candidate; any tokens.

    Args:
      ids: as the compressor wrote them, slots are places; what stands behind
        an <eos> is left out.
      slate: which it is about.
      order: of presentation.

    Returns:
      A block of the history and one of candidates. A whole semantic ID shows as
      the item of the slate it is of, other symbols as they are.
    """
    words, names = self.prompter.vocabulary, self._identifiers(slate, order)
    lines: dict[str, list[str]] = {'history': []}
    line: list[int] = []
    block = 'history'

    def end(name: str = '') -> None:
      told = ' '.join(filter(None, [name, self._cite(line, names)]))
      lines[block] += [told] if told else []
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
    self, slate, order: np.ndarray
  ) -> dict[tuple[int, ...], str]:
    """Semantic IDs of a slate's items -> how they are cited."""
    sids = self.prompter.items['sid']
    names = {
      sids[slate['candidates'][rank]]: f'[{place}]'
      for place, rank in enumerate(order, 1)
    }
    shown = enumerate(self.prompter.shown(slate), 1)
    return names | {sids[item]: f'[h{place}]' for place, item in shown}

  def _cite(self, ids: Iterable[int], names: dict[tuple[int, ...], str]) -> str:
    """Tokens as words, some runs of them by name."""
    words = self.prompter.vocabulary
    ids, shown, text = [int(i) for i in ids], [], []
    while ids:
      sizes = (words.layout.levels, 1)
      size = next((n for n in sizes if tuple(ids[:n]) in names), 0)
      if size or not 0 <= ids[0] < len(words):
        name = names.get(tuple(ids[:size]), '<?>')
        shown += [words.decode(text), name]
        ids, text = ids[size or 1 :], []
      else:
        text.append(ids.pop(0))
    return ' '.join(filter(None, [*shown, words.decode(text)]))

  def _symbols(self, line: context.Line) -> str:
    """What of a line is no text."""
    told = (ids for f, ids in line.items() if f not in ('title', 'categories'))
    return self.prompter.vocabulary.decode([i for ids in told for i in ids])

  def _line(self, name: str, item: int) -> str:
    year = int(self.catalog.years[item])
    parts = [
      self.catalog.titles[item] or 'untitled',
      ' > '.join(self.catalog.categories[item]),
      str(year or ''),
    ]
    shown = filter(None, (' '.join(part.split()) for part in parts))
    return f'[{name}] {" | ".join(shown)}'

  def _pieces(
    self, text: str, slate, order: np.ndarray
  ) -> Iterator['_Piece | None']:
    """Prose and citations in turn; None for what is not there."""
    words, sids = self.prompter.vocabulary, self.prompter.items['sid']
    history = self.prompter.shown(slate)
    at = 0
    for match in _CITATION.finditer(text):
      yield _Piece(self._encode(text[at : match.start()]), True)
      at = match.end()
      for name in re.findall(r'h?\d+', match.group(1)):
        place = int(name.removeprefix('h')) - 1
        past = name.startswith('h')
        if not 0 <= place < len(history if past else order):
          yield None
        elif past:
          yield _Piece(list(sids[history[place]]), False)
        else:
          yield _Piece([words.slot_base + int(order[place])], False)
    yield _Piece(self._encode(text[at:]), True)

  def _encode(self, text: str) -> list[int]:
    text = text.strip()
    return self.prompter.vocabulary.encode(text) if text else []


def _blocks(lines: dict[str, list[str]]) -> str:
  """Blocks with their headings, those of no line too."""
  return '\n\n'.join(
    '\n'.join([f'{block.capitalize()}:', *(own or ['(none)'])])
    for block, own in lines.items()
  )


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Tokens of prose, or of one citation."""

  ids: list[int]
  divisible: bool  # may be cut anywhere
