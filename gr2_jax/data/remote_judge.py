"""A judge of reasoning that is asked in words: any model behind an endpoint.

It gives marks on the axes that `ops/judge` verifies: history grounding,
consistency, flow, identifier correctness, each in [0, 1]. Its marks are
opinions: it reads what an argument says, and may be wrong or flattered.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from gr2_jax.data import dialogue as dialogue_lib
from gr2_jax.data import endpoint as endpoint_lib

AXES = ('grounding', 'consistency', 'flow', 'identifiers')
_TRIES = 2  # answers per case

_ASK = """\
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


@dataclasses.dataclass(frozen=True)
class Case:
  """Reasoning to be judged, of a trace or of a rollout.

  Attributes:
    slate: one record of `slates.source`.
    order: int [count], incoming ranks in the order of presentation.
    reasoning: token ids; slots are incoming ranks.
    ranking: int [count], incoming ranks, best first.
  """

  slate: Any
  order: np.ndarray
  reasoning: np.ndarray
  ranking: np.ndarray


def judge(
  cases: Iterable[Case],
  dialogue: dialogue_lib.Dialogue,
  endpoint: endpoint_lib.Endpoint,
) -> np.ndarray:
  """Marks of each case, in its order.

  Args:
    cases: n of them.
    dialogue: words for slates and tokens.
    endpoint: where the judge is.

  Returns:
    float64 [n, 4], columns AXES; a row of NaN where there is no readable
    answer.

  Raises:
    endpoint.EndpointError: the endpoint cannot be used.
    ledger.OverLimit: the next request might exceed the limit on tokens.
  """

  def work(item):
    place, case = item
    messages = _messages(case, dialogue)
    for attempt in range(_TRIES):
      reply = endpoint.ask(messages, 'judge', place, attempt)
      marks = read(reply.text)
      if marks is not None:
        return marks
    return None

  found = {}
  with contextlib.closing(endpoint.map(work, enumerate(cases))) as done:
    for (place, _), future in done:
      error = future.exception()
      if not isinstance(error, endpoint_lib.Unanswered | None):
        raise error
      marks = None if error else future.result()
      found[place] = [np.nan] * len(AXES) if marks is None else marks
  rows = [found[place] for place in range(len(found))]
  return np.array(rows, np.float64).reshape(-1, len(AXES))


def read(text: str) -> list[float] | None:
  """The marks in an answer; None where one lacks or is outside [0, 1]."""
  text = text.rpartition('</think>')[2]
  marks = []
  for axis in AXES:
    found = re.findall(rf'{axis}\W*?[:=]\s*(\d+(?:\.\d+)?)', text, re.I)
    if not found or not 0 <= float(found[-1]) <= 1:
      return None
    marks.append(float(found[-1]))
  return marks


def summary(marks: np.ndarray) -> dict[str, Any]:
  """Mean of each axis and of all, over the cases that have marks.

  Args:
    marks: of `judge`.
  """
  told = marks[~np.isnan(marks).any(1)]
  means = told.mean(0).tolist() if len(told) else [None] * len(AXES)
  return {
    **dict(zip(AXES, means, strict=True)),
    'total': float(told.mean()) if len(told) else None,
    'judged': len(told),
    'unjudged': len(marks) - len(told),
  }


def _messages(
  case: Case, dialogue: dialogue_lib.Dialogue
) -> list[endpoint_lib.Message]:
  place = np.argsort(case.order)[case.ranking] + 1
  user = [
    dialogue.describe(case.slate, case.order),
    f'Reasoning:\n{dialogue.show(case.reasoning, case.slate, case.order)}',
    f'Ranking:\n{" ".join(f"[{p}]" for p in place)}',
  ]
  return [
    {'role': 'system', 'content': _ASK},
    {'role': 'user', 'content': '\n\n'.join(user)},
  ]
