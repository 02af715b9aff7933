"""What the service does, apart from HTTP: check, queue, answer, reload.

A request is checked by the policy that is to answer it, and stays with it: a
reload swaps the policy between two requests, never under one.
"""

import asyncio
import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from gr2_jax.data import log as log_lib
from gr2_jax.serving import batching, metrics
from gr2_jax.serving import request as requests_lib
from gr2_jax.serving import reranker as reranker_lib


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a client may ask for."""

  body_bytes: int = 1 << 20  # of one request
  slates: int = 64  # of one request
  history: int = 1000  # items of one slate's
  queue: int = 256  # slates that wait
  seconds: float = 2.0  # until the incoming order is the answer
  read_seconds: float = 10.0  # for a request to come in, head and body each
  connections: int = 512  # at a time


class BadRequest(ValueError):
  """What is wrong with a request: place, field and cure."""


class Busy(Exception):
  """A reload is under way."""


@dataclasses.dataclass(frozen=True)
class Request:
  """A checked request for answers."""

  policy: reranker_lib.Reranker  # that checked it, and will answer
  mode: str
  slates: tuple[requests_lib.Request, ...]
  seconds: float


class Service:
  """Serves one policy at a time; lives in one event loop.

  Args:
    policy: that answers first.
    limits: on requests.
    moment: seconds that a short batch waits for more slates.
  """

  def __init__(
    self, policy: reranker_lib.Reranker, limits: Limits, moment: float = 0.002
  ):
    self.limits, self.metrics = limits, metrics.Metrics()
    self.policy = policy
    self._batcher = batching.Batcher(self._run, limits.queue, moment)
    self._reloading = asyncio.Lock()
    self.metrics.serves(policy)
    self.metrics.waiting.set_function(lambda: len(self._batcher))

  def check(self, body: object) -> Request:
    """Checks a request, see `schema.py`.

    Raises:
      BadRequest: it names place, field and cure.
    """
    if not isinstance(body, dict):
      raise BadRequest('the body is not a JSON object: write {"slates": [...]}')
    known = ('slates', 'mode', 'timeout')
    for name in body:
      if name not in known:
        raise BadRequest(
          f'field {_short(name)}: unknown: known are {", ".join(known)}'
        )
    policy, limits = self.policy, self.limits
    modes = tuple(policy.programs)
    mode = body.get('mode', modes[0])
    if mode not in modes:
      raise BadRequest(
        f"field 'mode': {_short(mode)}: it must be one of {', '.join(modes)}"
      )
    seconds = body.get('timeout', limits.seconds)
    if (
      isinstance(seconds, bool)
      or not isinstance(seconds, int | float)
      or not 0 < seconds <= limits.seconds
    ):
      raise BadRequest(
        f"field 'timeout': {_short(seconds)}: it must be a number of seconds "
        f'above 0, at most {limits.seconds:g}'
      )
    rows = body.get('slates')
    if not isinstance(rows, list) or not 0 < len(rows) <= limits.slates:
      found = f'{len(rows)} slates' if isinstance(rows, list) else _short(rows)
      raise BadRequest(
        f"field 'slates': {found}: it must be a list of 1 to {limits.slates}; "
        'send more in further requests'
      )
    slates = tuple(
      self._slate(policy, row, place) for place, row in enumerate(rows)
    )
    return Request(policy, mode, slates, float(seconds))

  async def rank(self, request: Request) -> list[dict[str, Any]]:
    """Answers a request.

    Returns:
      What `Reranker.rank` gives, and `timed_out`: the answer is the incoming
      order, for there was no time for another.

    Raises:
      batching.Refused: not now.
    """
    mode, count = request.mode, self.metrics.slates
    asked = list(zip(request.slates, range(len(request.slates)), strict=True))
    begin = time.monotonic()
    try:
      found = await self._batcher.answer(
        (request.policy, mode),
        request.policy.largest_batch,
        asked,
        request.seconds,
      )
    except batching.Refused:
      count.labels(mode, 'refused').inc(len(asked))
      raise
    self.metrics.seconds.labels(mode).observe(time.monotonic() - begin)
    late = sum(line is None for line in found)
    count.labels(mode, 'timed_out').inc(late)
    count.labels(mode, 'ranked').inc(len(found) - late)
    lines = []
    for slate, line in zip(request.slates, found, strict=True):
      late = line is None
      line = reranker_lib.incoming_order(slate, mode) if late else line
      self.metrics.unknown.inc(len(line['unknown_candidates']))
      self.metrics.described.inc(len(line['described_candidates']))
      lines.append(line | {'timed_out': late})
    return lines

  async def reload(self, name: str) -> None:
    """Loads an artifact that lies beside the present one, then swaps.

    Requests are answered by the present policy meanwhile.

    Args:
      name: of the artifact's folder, without any path.

    Raises:
      Busy: another reload is under way.
      BadRequest: it is no name of a folder.
      ValueError: of `Reranker.load`; the present policy stays.
    """
    if pathlib.PurePath(name).name != name or name in ('', '.', '..'):
      raise BadRequest(
        f"field 'artifact': {_short(name)}: give the name of a folder beside "
        f'{self.policy.artifact.name}, without a path'
      )
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
      self.metrics.serves(policy)

  async def drain(self) -> None:
    """Refuses what comes from now on, and answers what waits."""
    await self._batcher.drain()

  @staticmethod
  def _load(present: reranker_lib.Reranker, name: str) -> reranker_lib.Reranker:
    return reranker_lib.Reranker.load(
      present.artifact.parent / name,
      modes=tuple(present.programs),
      largest_batch=present.largest_batch,
      tensor=present.policy.setup.mesh.shape['tensor'],
      memory_cache_bytes=present.memories.limit,
      beside=present,
    )

  def _slate(
    self, policy: reranker_lib.Reranker, row: object, place: int
  ) -> requests_lib.Request:
    where = f'slates[{place}]'
    try:
      request = policy.parse(row, where, place)
    except log_lib.DataError as e:
      raise BadRequest(str(e)) from e
    items = len(request.history) + request.unknown
    if items > self.limits.history:
      raise BadRequest(
        f"{where}, field 'history': {items} items, room for "
        f'{self.limits.history}: send the last ones'
      )
    return request

  def _run(
    self,
    key: tuple[reranker_lib.Reranker, str],
    asked: Sequence[tuple[requests_lib.Request, int]],
  ) -> list[dict[str, Any]]:
    """Answers one batch; called in the batcher's thread."""
    policy, mode = key
    with self.metrics.batch_seconds.labels(mode).time():
      answers = policy.answer(asked, mode)
    self.metrics.batch_slates.labels(mode).observe(len(asked))
    self.metrics.prefills.labels(mode).inc(answers.prompts)
    self.metrics.decoded.labels(mode).inc(answers.decoded)
    self.metrics.memory_hits.inc(answers.remembered)
    self.metrics.memory_misses.inc(answers.memorized)
    return answers.lines


def _short(value: object) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
