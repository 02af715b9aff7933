"""A teacher that answers chats: any model behind an endpoint."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from gr2_jax.ops import parsing
from gr2_jax.prompts import prompt
from gr2_jax.teachers import dialogue as dialogue_lib
from gr2_jax.teachers import endpoint as endpoint_lib
from gr2_jax.teachers import heuristic, ledger


@dataclasses.dataclass(frozen=True)
class _Result:
  """All answers about one slate."""

  trace: heuristic.Trace  # of the last answer
  span: dialogue_lib.Span | None  # of a kept trace
  verdicts: list[str]
  replies: list[ledger.Reply]


class HttpTeacher:
  """Requests traces concurrently and counts the outcomes.

  Args:
    dialogue: converts slates to chats and answers to tokens.
    endpoint: the model.
    order: presentation of the candidates, one of `prompt.ORDERS`.
  """

  def __init__(
    self,
    dialogue: dialogue_lib.Dialogue,
    endpoint: endpoint_lib.Endpoint,
    order: str,
  ):
    self._dialogue, self._endpoint = dialogue, endpoint
    self._order = order
    self._results: list[_Result] = []

  def traces(
    self, slates: Any, indices: Iterable[int], kind: str, tries: int, seed: int
  ) -> heuristic.Traces:
    """See `heuristic.Teacher`; yields traces in the order of the answers.

    Slates without an answer are repeated once at the end. Many failures in a
    row stop the run, since the endpoint is probably down.

    Raises:
      endpoint.EndpointError: the endpoint is down, or cannot be used.
      ledger.OverLimit: the next request might exceed the limit on tokens.
    """
    failed: list[int] = []

    def work(item: tuple[int, Any]) -> _Result:
      return self._answer(*item, kind, tries, seed)

    for last in (False, True):
      items = ((i, slates[i]) for i in (failed if last else indices))
      in_a_row = 0
      with contextlib.closing(self._endpoint.map(work, items)) as results:
        for (index, _), result, error in results:
          in_a_row = in_a_row + 1 if error else 0
          if not last:
            self._endpoint.raise_if_down(in_a_row, 'slates', error)
          declined = isinstance(error, endpoint_lib.Declined)
          if error and not (last or declined):
            failed.append(index)
            continue
          if error:
            verdict = 'declined' if declined else 'unanswered'
            result = _Result(_empty_trace(1, verdict), None, [verdict], [])
          self._results.append(result)
          yield index, result.trace

  def report(self) -> dict[str, Any]:
    """Counts over the traces so far, stored answers included.

    Returns:
      verdicts: number of answers by verdict; `ledger.usage`; clipped: traces
      with truncated prose; unknown_citations: citations dropped from traces.
    """
    verdicts = collections.Counter(v for r in self._results for v in r.verdicts)
    spans = [result.span for result in self._results if result.span]
    return {
      'verdicts': dict(verdicts),
      **ledger.usage(reply for r in self._results for reply in r.replies),
      'clipped': sum(span.clipped for span in spans),
      'unknown_citations': sum(span.unknown for span in spans),
    }

  def _answer(
    self, index: int, slate: dict[str, Any], kind: str, tries: int, seed: int
  ) -> _Result:
    """Repeats a request until an answer is accepted; runs in a thread."""
    rng = np.random.default_rng((seed, index))
    order = prompt.presentation(int(slate['count']), self._order, rng)
    grades, target = slate['grades'], None
    if kind == 'targeted':
      target = int(rng.choice(np.flatnonzero(grades[: len(order)] > 0)))
    messages = self._dialogue.messages(slate, order, target)
    verdicts, replies = [], []
    for attempt in range(1, tries + 1):
      reply = self._endpoint.complete(messages, seed, index, attempt)
      answer = self._dialogue.read(reply.text, order)
      replies.append(reply)
      verdicts.append(_verdict(reply, answer, grades, target))
      if verdicts[-1] in heuristic.KEPT:
        break
    verdict = verdicts[-1]
    if verdict not in (*heuristic.KEPT, 'rejected'):
      return _Result(_empty_trace(tries, verdict), None, verdicts, replies)
    span = self._dialogue.span(answer, slate, order)
    trace = heuristic.Trace(span.ids, answer.ranking, attempt, verdict)
    kept = verdict in heuristic.KEPT
    return _Result(trace, span if kept else None, verdicts, replies)


def _verdict(
  reply: ledger.Reply,
  answer: dialogue_lib.Answer,
  grades: np.ndarray,
  target: int | None,
) -> str:
  """Classifies an answer as one of `heuristic.VERDICTS`."""
  if reply.finish in ('refusal', 'content_filter'):
    return 'refused'
  if not reply.text.strip():
    return 'empty'
  incomplete = (parsing.WRONG_FORMAT, parsing.MISSING)
  if reply.finish == 'length' and answer.verdict in incomplete:
    return 'cut'
  if answer.verdict != parsing.VALID:
    return parsing.VERDICTS[answer.verdict]
  first = int(answer.ranking[0])
  if target is not None:
    return 'targeted' if first == target else 'rejected'
  return 'accepted' if grades[first] > 0 else 'rejected'


def _empty_trace(tries: int, verdict: str) -> heuristic.Trace:
  return heuristic.Trace([], np.zeros(0, np.int32), tries, verdict)
