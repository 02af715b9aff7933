"""Judges that are asked in words: any model behind an endpoint.

One judges reasoning, on the axes that `ops/judge` verifies: history grounding,
consistency, flow, identifier correctness. One judges compressed contexts: what
of the history they keep, how well they can be ranked from, whether they can be
at all. Marks are in [0, 1], and are opinions: a judge reads what is said, and
may be wrong or flattered. None is told a label.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from gr2_jax.teachers import dialogue as dialogue_lib
from gr2_jax.teachers import endpoint as endpoint_lib

_TRIES = 2  # answers per request

_ASK_REASONING = """\
You judge reasoning about which candidates suit a user. You are given the \
user's history, the candidates, a reasoning that cites items by their numbers \
in brackets, and the ranking it led to. Judge four things, each from 0 (not at \
all) to 1 (wholly):
grounding: what it says of the history is in the history
consistency: its conclusion is the top of the ranking
flow: it goes from evidence to conclusion, and says nothing twice
identifiers: the items it names are there, and are what it says they are
Do not judge whether the ranking is right, nor length or style. Answer with \
four lines and nothing else, such as:
grounding: 0.5
consistency: 1
flow: 0.75
identifiers: 0.5"""


_ASK_COMPRESSION = """\
You judge how much a short form of a text keeps. The full text has a user's \
history and candidates, a line an item: title, category path, year, and \
behind these symbols such as <a3>, a part of the item's code whose first \
letter is the broadest, or <popularity=7>, evidence from low to high numbers. \
The short form has the same two blocks, of each line only some words and \
symbols. In it [h2] or [3] inside a line stands for the whole code of that \
item. Judge three things:
preservation: from 0 to 1, the share of what matters in the history (tastes, \
their change, recent items) that the short form still tells
ranking: from 0 to 1, how well who reads the short form alone could put the \
candidates in the order that the full text calls for
solvable: 0 or 1, whether who reads the short form alone would still put a \
candidate that fits this user near the top
Do not judge length or style. Answer with three lines and nothing else, such as:
preservation: 0.5
ranking: 0.75
solvable: 1"""


@dataclasses.dataclass(frozen=True)
class Rubric:
  """What a judge is asked for.

  Attributes:
    ask: what it is told.
    axes: names of its marks, each in [0, 1].
    binary: those of them that must be 0 or 1.
  """

  ask: str
  axes: tuple[str, ...]
  binary: tuple[str, ...] = ()


REASONING = Rubric(
  _ASK_REASONING, ('grounding', 'consistency', 'flow', 'identifiers')
)
COMPRESSION = Rubric(
  _ASK_COMPRESSION, ('preservation', 'ranking', 'solvable'), ('solvable',)
)


@dataclasses.dataclass(frozen=True)
class Case:
  """Reasoning to be judged, of a trace or of a rollout.

  Attributes:
    slate: one record of `slates.SlateSource`.
    order: int [count], incoming ranks in the order of presentation.
    reasoning: token ids; slots are incoming ranks.
    ranking: int [count], incoming ranks, best first.
  """

  slate: Any
  order: np.ndarray
  reasoning: np.ndarray
  ranking: np.ndarray

  def shown(self, dialogue: dialogue_lib.Dialogue) -> str:
    """As the judge reads it."""
    place = np.argsort(self.order)[self.ranking] + 1
    reasoning = dialogue.show(self.reasoning, self.slate, self.order)
    return '\n\n'.join(
      [
        dialogue.describe(self.slate, self.order),
        f'Reasoning:\n{reasoning}',
        f'Ranking:\n{" ".join(f"[{p}]" for p in place)}',
      ]
    )


@dataclasses.dataclass(frozen=True)
class Compression:
  """A compressed context to be judged.

  Attributes:
    slate: one record of `slates.SlateSource`; it may lack labels, none is read.
    order: int [count], incoming ranks in the order of presentation.
    tokens: ids, as the compressor wrote them; slots are places.
  """

  slate: Any
  order: np.ndarray
  tokens: np.ndarray

  def shown(self, dialogue: dialogue_lib.Dialogue) -> str:
    """As the judge reads it."""
    full = dialogue.describe(self.slate, self.order, symbols=True)
    short = dialogue.show_context(self.tokens, self.slate, self.order)
    return f'# The full text\n\n{full}\n\n# The short form\n\n{short}'


class Judge:
  """Asks for marks, several requests at a time.

  Args:
    rubric: which.
    endpoint: where the judge is.
  """

  def __init__(self, rubric: Rubric, endpoint: endpoint_lib.Endpoint):
    self._rubric, self._endpoint = rubric, endpoint
    self._unanswered = 0  # in a row, over all calls

  def __call__(self, texts: Iterable[str]) -> np.ndarray:
    """Marks of each text, in its order; equal ones are asked about once.

    Args:
      texts: n of them, each with all that is to be judged.

    Returns:
      float64 [n, axes]; a row of NaN where there is no readable answer.

    Raises:
      endpoint.EndpointError: the endpoint cannot be used, or left many in a row
        without an answer.
      ledger.OverLimit: the next request might exceed the limit on tokens.
    """
    texts = list(texts)
    found: dict[str, list[float] | None] = dict.fromkeys(texts)
    asked = self._endpoint.map(self._ask, list(found))
    with contextlib.closing(asked) as done:
      for text, future in done:
        error = future.exception()
        if not isinstance(error, endpoint_lib.Unanswered | None):
          raise error
        self._watch(error)
        found[text] = None if error else future.result()
    axes = self._rubric.axes
    rows = [found[text] or [np.nan] * len(axes) for text in texts]
    return np.array(rows, np.float64).reshape(-1, len(axes))

  def _ask(self, text: str) -> list[float] | None:
    """Asks until an answer is readable, in a thread."""
    messages = [
      {'role': 'system', 'content': self._rubric.ask},
      {'role': 'user', 'content': text},
    ]
    for attempt in range(_TRIES):
      reply = self._endpoint.ask(messages, 'judge', attempt)
      if marks := read(reply.text, self._rubric):
        return marks
    return None

  def _watch(self, error: endpoint_lib.Unanswered | None) -> None:
    """Raises where the endpoint is down: better than marks that all lack."""
    if isinstance(error, endpoint_lib.Declined):
      return
    self._unanswered = self._unanswered + 1 if error else 0
    settings = self._endpoint.settings
    if self._unanswered >= 2 * settings.concurrency:
      raise endpoint_lib.EndpointError(
        f'{settings.base_url}: {self._unanswered} requests in a row without an '
        f'answer, the last: {error}; the answers so far are kept, the same '
        'command goes on from here'
      )


def judge(
  cases: Iterable[Case],
  dialogue: dialogue_lib.Dialogue,
  endpoint: endpoint_lib.Endpoint,
) -> np.ndarray:
  """Marks of reasoning.

  Args:
    cases: n of them.
    dialogue: words for slates and tokens.
    endpoint: where the judge is.

  Returns:
    float64 [n, 4], of `REASONING`; see `Judge`, also for what it raises.
  """
  texts = (case.shown(dialogue) for case in cases)
  return Judge(REASONING, endpoint)(texts)


def read(text: str, rubric: Rubric = REASONING) -> list[float] | None:
  """The marks in an answer; None where one lacks or is out of its range."""
  text = text.rpartition('</think>')[2]
  marks = []
  for axis in rubric.axes:
    form = rf'{axis}\W*?[:=]\s*(\d+(?:\.\d+)?)(?!\d|[.,]\d|\s*[%/])'
    found = re.findall(form, text, re.I)
    if not found or not 0 <= float(found[-1]) <= 1:
      return None
    marks.append(float(found[-1]))
    if axis in rubric.binary and marks[-1] not in (0, 1):
      return None
  return marks


def summary(marks: np.ndarray, rubric: Rubric = REASONING) -> dict[str, Any]:
  """Mean of each axis and of all, over the cases that have marks.

  Args:
    marks: of `judge`.
    rubric: which they are of.
  """
  told = marks[~np.isnan(marks).any(1)]
  means = told.mean(0).tolist() if len(told) else [None] * len(rubric.axes)
  return {
    **dict(zip(rubric.axes, means, strict=True)),
    'total': float(told.mean()) if len(told) else None,
    'judged': len(told),
    'unjudged': len(marks) - len(told),
  }
