"""Language models behind an endpoint that mark reasoning and compressions.

Reasoning is marked on the axes of `ops/judge`: history grounding, consistency,
flow, identifier correctness. Compressed contexts are marked for the history
that they preserve and for the ranking that they allow. Marks lie in [0, 1].
They are opinions, not verified facts. No judge receives a label.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from gr2_jax.teachers import dialogue as dialogue_lib
from gr2_jax.teachers import endpoint as endpoint_lib

_TRIES = 2  # requests per text until an answer is readable

_REASONING = """\
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

_COMPRESSION = """\
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
  """The instructions of a judge and the axes of its marks."""

  instructions: str
  axes: tuple[str, ...]  # each in [0, 1]
  binary: tuple[str, ...] = ()  # axes that must be 0 or 1


REASONING = Rubric(
  _REASONING, ('grounding', 'consistency', 'flow', 'identifiers')
)
COMPRESSION = Rubric(
  _COMPRESSION, ('preservation', 'ranking', 'solvable'), ('solvable',)
)


@dataclasses.dataclass(frozen=True)
class Case:
  """Reasoning of a trace or of a rollout."""

  slate: dialogue_lib.Slate
  order: np.ndarray  # int [count], incoming ranks in presentation order
  reasoning: np.ndarray  # token ids; slots are incoming ranks
  ranking: np.ndarray  # int [count], incoming ranks, best first

  def shown(self, dialogue: dialogue_lib.Dialogue) -> str:
    """The text for the judge."""
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
  """A compressed context; its slate may lack labels."""

  slate: dialogue_lib.Slate
  order: np.ndarray  # int [count], incoming ranks in presentation order
  tokens: np.ndarray  # token ids; slots are places

  def shown(self, dialogue: dialogue_lib.Dialogue) -> str:
    """The text for the judge."""
    full = dialogue.describe(self.slate, self.order, symbols=True)
    short = dialogue.show_context(self.tokens, self.slate, self.order)
    return f'# The full text\n\n{full}\n\n# The short form\n\n{short}'


class Judge:
  """Marks texts by one rubric, with several requests in flight."""

  def __init__(self, rubric: Rubric, endpoint: endpoint_lib.Endpoint):
    self._rubric, self._endpoint = rubric, endpoint
    self._failures = 0  # in a row, over all calls

  def __call__(self, texts: Iterable[str]) -> np.ndarray:
    """Marks n texts; equal texts share one request.

    Returns:
      float64 [n, axes]; NaN in the rows without a readable answer.

    Raises:
      endpoint.EndpointError: the endpoint cannot be used, or failed many times
        in a row.
      ledger.OverLimit: the next request might exceed the limit on tokens.
    """
    texts = list(texts)
    marks: dict[str, list[float] | None] = dict.fromkeys(texts)
    results = self._endpoint.map(self._mark, list(marks))
    with contextlib.closing(results):
      for text, result, error in results:
        if not isinstance(error, endpoint_lib.Declined):
          self._failures = self._failures + 1 if error else 0
          self._endpoint.raise_if_down(self._failures, 'requests', error)
        marks[text] = result
    missing = [np.nan] * len(self._rubric.axes)
    rows = [marks[text] or missing for text in texts]
    return np.array(rows, np.float64).reshape(-1, len(missing))

  def _mark(self, text: str) -> list[float] | None:
    """Repeats a request until an answer is readable; runs in a thread."""
    messages = [
      {'role': 'system', 'content': self._rubric.instructions},
      {'role': 'user', 'content': text},
    ]
    for attempt in range(_TRIES):
      reply = self._endpoint.complete(messages, 'judge', attempt)
      if marks := read(reply.text, self._rubric):
        return marks
    return None


def read(text: str, rubric: Rubric = REASONING) -> list[float] | None:
  """Reads the marks of an answer; None if one is missing or out of range."""
  text = text.rpartition('</think>')[2]
  marks = []
  for axis in rubric.axes:
    form = rf'{axis}\W*?[:=]\s*(\d+(?:\.\d+)?)(?!\d|[.,]\d|\s*[%/])'
    matches = re.findall(form, text, re.I)
    if not matches or not 0 <= float(matches[-1]) <= 1:
      return None
    marks.append(float(matches[-1]))
    if axis in rubric.binary and marks[-1] not in (0, 1):
      return None
  return marks


def summary(marks: np.ndarray, rubric: Rubric = REASONING) -> dict[str, Any]:
  """Mean of each axis and of all axes, over the rows of `Judge` with marks."""
  valid = marks[~np.isnan(marks).any(1)]
  means = valid.mean(0).tolist() if len(valid) else [None] * len(rubric.axes)
  return {
    **dict(zip(rubric.axes, means, strict=True)),
    'total': float(valid.mean()) if len(valid) else None,
    'judged': len(valid),
    'unjudged': len(marks) - len(valid),
  }
