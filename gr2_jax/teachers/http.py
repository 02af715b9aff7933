"""A teacher that is asked in words: any model behind an endpoint."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gr2_jax.ops import parsing
from gr2_jax.prompts import prompt
from gr2_jax.teachers import dialogue as dialogue_lib
from gr2_jax.teachers import endpoint as endpoint_lib
from gr2_jax.teachers import heuristic, ledger


@dataclasses.dataclass(frozen=True)
class _Asked:
  """Every answer about one slate, the last of which counts."""

  trace: heuristic.Trace
  span: dialogue_lib.Span | None
  verdicts: list[str]
  replies: list[ledger.Reply]


class Remote:
  """Asks about slates, several at a time, and counts what came of it.

  Args:
    dialogue: words for slates and tokens for answers.
    endpoint: where the model is.
    order: in which it sees the candidates, of `prompt.ORDERS`.
  """

  def __init__(
    self,
    dialogue: dialogue_lib.Dialogue,
    endpoint: endpoint_lib.Endpoint,
    order: str,
  ):
    self._dialogue, self._endpoint = dialogue, endpoint
    self._order = order
    self._verdicts: collections.Counter = collections.Counter()
    self._usage = np.zeros(3, int)  # answers, tokens read, tokens written
    self._clipped = self._unknown = 0

  def traces(
    self, slates: Any, indices: Iterable[int], kind: str, tries: int, seed: int
  ) -> Iterator[tuple[int, heuristic.Trace]]:
    """See `heuristic.Teacher`. In the order in which answers come.

    A slate without an answer is asked about once more at the end. If many fail
    in a row, the endpoint is down: better to stop than to lose them all.

    Raises:
      endpoint.EndpointError: it is down, or cannot be used.
      ledger.OverLimit: the next request might exceed the limit on tokens.
    """
    most = 2 * self._endpoint.settings.concurrency
    again: list[int] = []

    def work(item):
      return self._ask(*item, kind, tries, seed)

    for last in (False, True):
      items = ((i, slates[i]) for i in (again if last else indices))
      in_a_row = 0
      with contextlib.closing(self._endpoint.map(work, items)) as done:
        for (index, _), future in done:
          error = future.exception()
          if not isinstance(error, endpoint_lib.Unanswered | None):
            raise error
          in_a_row = in_a_row + 1 if error else 0
          if in_a_row >= most and not last:
            raise endpoint_lib.EndpointError(
              f'{self._endpoint.settings.base_url}: {in_a_row} slates in a row '
              f'without an answer, the last: {error}; the answers so far are '
              'kept, the same command goes on from here'
            )
          if error is None:
            asked = future.result()
            self._count(asked)
            yield index, asked.trace
          elif last or isinstance(error, endpoint_lib.Declined):
            declined = isinstance(error, endpoint_lib.Declined)
            verdict = 'declined' if declined else 'unanswered'
            self._verdicts[verdict] += 1
            yield index, _nothing(1, verdict)
          else:
            again.append(index)

  def report(self) -> dict[str, Any]:
    """Counts over the traces so far.

    Returns:
      verdicts: of every answer, by name; answers, prompt_tokens,
      completion_tokens: what they took, answers of an earlier run included;
      clipped: traces whose prose was too long; unknown_citations: left out of
      traces.
    """
    answers, read, written = self._usage.tolist()
    return {
      'verdicts': dict(self._verdicts),
      'answers': answers,
      'prompt_tokens': read,
      'completion_tokens': written,
      'clipped': self._clipped,
      'unknown_citations': self._unknown,
    }

  def _ask(self, index: int, slate, kind: str, tries: int, seed: int) -> _Asked:
    """Asks until an answer is kept, in a thread."""
    rng = np.random.default_rng((seed, index))
    order = prompt.presentation(int(slate['count']), self._order, rng)
    grades, target = slate['grades'], None
    if kind == 'targeted':
      target = int(rng.choice(np.flatnonzero(grades[: len(order)] > 0)))
    messages = self._dialogue.messages(slate, order, target)
    verdicts, replies = [], []
    while len(replies) < tries:
      attempt = len(replies) + 1
      reply = self._endpoint.ask(messages, seed, index, attempt)
      answer = self._dialogue.read(reply.text, order)
      replies.append(reply)
      verdicts.append(_verdict(reply, answer, grades, target))
      if verdicts[-1] in heuristic.KEPT:
        span = self._dialogue.span(answer, slate, order)
        trace = heuristic.Trace(span.ids, answer.ranking, attempt, verdicts[-1])
        return _Asked(trace, span, verdicts, replies)
    trace = _nothing(tries, verdicts[-1])
    if verdicts[-1] == 'rejected':
      span = self._dialogue.span(answer, slate, order)
      trace = dataclasses.replace(
        trace, reasoning=span.ids, ranking=answer.ranking
      )
    return _Asked(trace, None, verdicts, replies)

  def _count(self, asked: _Asked) -> None:
    self._verdicts.update(asked.verdicts)
    for reply in asked.replies:
      self._usage += (1, reply.prompt_tokens, reply.completion_tokens)
    if asked.span:
      self._clipped += asked.span.clipped
      self._unknown += asked.span.unknown


def _verdict(
  reply: ledger.Reply, answer: dialogue_lib.Answer, grades, target: int | None
) -> str:
  """Of `heuristic.VERDICTS`."""
  if reply.finish in ('refusal', 'content_filter'):
    return 'refused'
  if not reply.text.strip():
    return 'empty'
  if answer.verdict != parsing.VALID:
    cut = reply.finish == 'length' and answer.verdict in (
      parsing.WRONG_FORMAT,
      parsing.MISSING,
    )
    return 'cut' if cut else parsing.VERDICTS[answer.verdict]
  first = int(answer.ranking[0])
  if target is not None:
    return 'targeted' if first == target else 'rejected'
  return 'accepted' if grades[first] > 0 else 'rejected'


def _nothing(tries: int, verdict: str) -> heuristic.Trace:
  """A trace without an answer."""
  return heuristic.Trace([], np.zeros(0, np.int32), tries, verdict)
