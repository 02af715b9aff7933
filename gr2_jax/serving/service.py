"""The service without HTTP: check, queue, answer, reload.

The policy that checks a request also answers it: a reload swaps the policy
between two requests, never during one.
"""

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from gr2_jax.serving import answer as answer_lib
from gr2_jax.serving import batching, metrics
from gr2_jax.serving import request as requests_lib
from gr2_jax.serving import reranker as reranker_lib
from gr2_jax.serving.fields import Field, Kind, List, Object


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of the service on its clients."""

  body_bytes: int = 1 << 20  # of one request
  slates: int = 64  # of one request
  history: int = 1000  # items of one slate's
  queue: int = 256  # slates that wait
  seconds: float = 2.0  # until the incoming order is the answer
  read_seconds: float = 10.0  # for a request to arrive, head and body each
  connections: int = 512  # at a time


RELOAD = Object(
  'body',
  '{"artifact": "<name of a folder>"}',
  Field(
    'artifact',
    Kind(
      "the name of a folder beside the present policy's, without a path",
      {'type': 'string', 'pattern': r'^(?!\.{1,2}$)[^/]+$'},
    ),
    required=True,
  ),
)


def rank_body(policy: reranker_lib.Reranker, limits: Limits) -> Object:
  """The fields of a body of /rank."""
  slate = requests_lib.slate(policy.candidates, limits.history)
  modes, seconds = list(policy.programs), limits.seconds
  return Object(
    'body',
    '{"slates": [...]}',
    Field(
      'slates',
      List(slate, 1, limits.slates, 'send more in further requests'),
      required=True,
    ),
    Field(
      'mode',
      Kind(f'one of {", ".join(modes)}', {'enum': modes}),
      'score: the read-out, no decoding; rank: the ranking is decoded; reason: '
      'reasoning is decoded, then the ranking',
      default=modes[0],
    ),
    Field(
      'timeout',
      Kind(
        f'a number of seconds above 0, at most {seconds:g}',
        {'type': 'number', 'exclusiveMinimum': 0, 'maximum': seconds},
      ),
      'seconds until the incoming order is the answer',
      default=seconds,
    ),
  )


class Busy(Exception):
  """A reload is under way."""


@dataclasses.dataclass(frozen=True)
class RankRequest:
  """A checked body of /rank, and the policy that will answer it."""

  policy: reranker_lib.Reranker
  mode: str
  slates: tuple[requests_lib.Request, ...]
  seconds: float


class Service:
  """Serves one policy at a time; lives in one event loop.

  Args:
    policy: the first one.
    limits: on clients.
    moment: seconds that a short batch waits for more slates.
  """

  def __init__(
    self, policy: reranker_lib.Reranker, limits: Limits, moment: float = 0.002
  ):
    self.policy, self.limits, self.metrics = policy, limits, metrics.Metrics()
    self._batcher = batching.Batcher(self._run, limits.queue, moment)
    self._reloading = asyncio.Lock()
    self.metrics.set_policy(policy)
    self.metrics.waiting.set_function(lambda: len(self._batcher))

  def check(self, body: Any) -> RankRequest:
    """Checks a body of /rank.

    Raises:
      DataError: with place, field, finding and cure.
    """
    policy = self.policy
    fields = rank_body(policy, self.limits).check(body)
    slates = tuple(
      policy.request(slate, place)
      for place, slate in enumerate(fields['slates'])
    )
    return RankRequest(policy, fields['mode'], slates, float(fields['timeout']))

  async def rank(self, request: RankRequest) -> list[dict[str, Any]]:
    """Answers a request.

    Returns:
      The lines of `Reranker.rank` with `timed_out`: whether the time was up and
      the line is the incoming order.

    Raises:
      batching.Refused: the queue is full, or the service is shutting down.
    """
    mode, slates = request.mode, request.slates
    count = self.metrics.slates
    begin = time.monotonic()
    try:
      answers = await self._batcher.answer(
        (request.policy, mode),
        request.policy.largest_batch,
        [(slate, place) for place, slate in enumerate(slates)],
        request.seconds,
      )
    except batching.Refused:
      count.labels(mode, 'refused').inc(len(slates))
      raise
    self.metrics.seconds.labels(mode).observe(time.monotonic() - begin)
    late = sum(answer is None for answer in answers)
    count.labels(mode, 'timed_out').inc(late)
    count.labels(mode, 'ranked').inc(len(answers) - late)
    lines = []
    for slate, answer in zip(slates, answers, strict=True):
      line = answer or answer_lib.incoming_order(slate, mode)
      self.metrics.unknown.inc(len(line['unknown_candidates']))
      self.metrics.described.inc(len(line['described_candidates']))
      lines.append(line | {'timed_out': answer is None})
    return lines

  async def reload(self, name: str) -> None:
    """Loads another policy, then swaps it for the present one.

    The present policy answers requests in the meantime. See RELOAD for `name`.

    Raises:
      Busy: another reload is under way.
      ValueError: raised by `Reranker.load`; the present policy stays.
    """
    if self._reloading.locked():
      raise Busy
    async with self._reloading:
      outcome = 'failed'
      try:
        policy = await asyncio.to_thread(self._load, self.policy, name)
        outcome = 'done'
      finally:
        self.metrics.reloads.labels(outcome).inc()
      self.policy = policy
      self.metrics.set_policy(policy)

  async def drain(self) -> None:
    """Refuses new requests, and answers those that wait."""
    await self._batcher.drain()

  @staticmethod
  def _load(present: reranker_lib.Reranker, name: str) -> reranker_lib.Reranker:
    return reranker_lib.Reranker.load(
      present.artifact.parent / name,
      modes=tuple(present.programs),
      largest_batch=present.largest_batch,
      tensor=present.policy.mesh.shape['tensor'],
      memory_cache_bytes=present.memories.limit,
      beside=present,
    )

  def _run(
    self,
    key: tuple[reranker_lib.Reranker, str],
    requests: Sequence[reranker_lib.Placed],
  ) -> list[dict[str, Any]]:
    """Answers one batch; runs in the batcher's thread."""
    policy, mode = key
    with self.metrics.batch_seconds.labels(mode).time():
      answers = policy.answer(requests, mode)
    self.metrics.batch_slates.labels(mode).observe(len(requests))
    self.metrics.prefills.labels(mode).inc(answers.prompts)
    self.metrics.decoded.labels(mode).inc(answers.decoded)
    self.metrics.memory_hits.inc(answers.remembered)
    self.metrics.memory_misses.inc(answers.memorized)
    return answers.lines
