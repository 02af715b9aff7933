"""Dynamic batching: what waits is answered together, in bounded time.

Items wait in one queue. Whenever the worker is free it takes the oldest and
whatever waits behind it under the same key, up to a full batch; if the queue is
short it gives others a moment to arrive. Batches run one at a time, in a
thread, so the event loop stays free.

The moment counts from the arrival of the oldest: what waited through a batch
goes at once. Askers that send the next item as soon as they have an answer
would so be split for good into groups that take turns. Hence, where the askers
of a batch came back within a moment, those of the next are waited for: until as
many wait as stayed and were answered, or nobody came for a moment. A batch then
holds all such askers, and one that is alone does not wait.

An item whose asker no longer waits is dropped before it costs anything.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any


class Refused(Exception):
  """The queue takes nothing now.

  Attributes:
    retry_after: whole seconds after which it may.
  """

  def __init__(self, message: str, retry_after: int):
    super().__init__(message)
    self.retry_after = retry_after


@dataclasses.dataclass(eq=False)
class _Waiting:
  key: Hashable
  item: Any
  answer: asyncio.Future
  since: float


class _Askers:
  """Watches whether those who are answered ask again at once.

  Items are taken for theirs as long as each comes within a moment of the one
  before, the first within a moment of an answer's hand-over.

  Attributes:
    come_back: those of the batch before the last one mostly did.
    answered: items of the last batch.
    last: when the last of them was told, or came back.
  """

  def __init__(self, moment: float):
    self.come_back, self.answered, self.last = False, 0, -math.inf
    self._moment, self._back = moment, 0

  def are_answered(self, count: int) -> None:
    """A batch has ended."""
    self.come_back = 2 * self._back >= self.answered > 0
    self.answered, self._back, self.last = count, 0, time.monotonic()

  def are_told(self) -> None:
    """One of them has the answer; the event loop may have been slow to it."""
    self.last = time.monotonic()

  def ask(self, count: int, now: float) -> None:
    """Somebody asks: one of them, or another."""
    if now - self.last <= self._moment:
      self._back += count
      self.last = now


class Batcher:
  """Answers items in batches; lives in one event loop.

  Args:
    run: (key, items) -> answers, one for each; called in a thread.
    capacity: items that may wait, beside those in the batch under way.
    moment: seconds that a short batch waits for more.
  """

  def __init__(
    self,
    run: Callable[[Any, Sequence[Any]], Sequence[Any]],
    capacity: int,
    moment: float,
  ):
    self._run, self._capacity, self._moment = run, capacity, moment
    self._queue: collections.deque[_Waiting] = collections.deque()
    self._askers = _Askers(moment)
    self._stayed = 0  # items that waited when the last batch had ended
    self._changed = asyncio.Event()  # an item came, or the end
    self._draining = False
    self._batch_seconds = 0.0  # of the last batch
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'batches')
    self._worker = asyncio.get_running_loop().create_task(self._work())

  def __len__(self) -> int:
    return len(self._queue)

  async def answer(
    self, key: Hashable, largest: int, items: Sequence[Any], timeout: float
  ) -> list[Any | None]:
    """Answers items, or as many as it can within a time.

    Args:
      key: what may share a batch.
      largest: items of such a batch, at most.
      items: all of them wait, or none.
      timeout: seconds.

    Returns:
      An answer for each item, None where the time was over.

    Raises:
      Refused: the queue is full, or drains.
      Exception: what `run` raised.
    """
    if self._draining:
      raise Refused('shutting down', 1)
    if len(self._queue) + len(items) > self._capacity:
      left = math.ceil(len(self._queue) / largest) * self._batch_seconds
      raise Refused(
        f'{len(self._queue)} slates wait, room for {self._capacity}',
        max(1, math.ceil(left)),
      )
    if not items:
      return []
    loop, now = asyncio.get_running_loop(), time.monotonic()
    waiting = [
      _Waiting((key, largest), item, loop.create_future(), now)
      for item in items
    ]
    self._queue.extend(waiting)
    self._askers.ask(len(waiting), now)
    self._changed.set()
    futures = [w.answer for w in waiting]
    try:
      await asyncio.wait(futures, timeout=timeout)
      self._askers.are_told()
      return [f.result() if f.done() else None for f in futures]
    finally:
      for future in futures:
        future.cancel()

  async def drain(self) -> None:
    """Refuses what comes from now on, and answers what waits."""
    self._draining = True
    self._changed.set()
    await self._worker
    self._thread.shutdown()

  async def _work(self) -> None:
    while True:
      while not self._queue and not self._draining:
        await self._change()
      if not self._queue:
        return
      await self._fill()
      if batch := self._take():
        await self._answer(batch)
        self._askers.are_answered(len(batch))
        self._stayed = len(self._queue)

  async def _change(self, seconds: float | None = None) -> None:
    """Waits until there is something new, or for so long."""
    self._changed.clear()
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(seconds):
        await self._changed.wait()

  async def _fill(self) -> None:
    """Waits until the batch of the oldest is full, or need not wait longer."""
    oldest, askers = self._queue[0], self._askers
    enough = oldest.key[1]
    if askers.come_back:
      enough = min(enough, self._stayed + askers.answered)
    while len(self._queue) < enough and not self._draining:
      begin = max(oldest.since, askers.last if askers.come_back else 0.0)
      left = begin + self._moment - time.monotonic()
      if left <= 0:
        return
      await self._change(left)

  def _take(self) -> list[_Waiting]:
    """The oldest that still waits, and those behind it that fit its batch."""
    batch, others = [], collections.deque()
    while self._queue:
      waiting = self._queue.popleft()
      if waiting.answer.done():
        continue
      key, largest = batch[0].key if batch else waiting.key
      if waiting.key == (key, largest) and len(batch) < largest:
        batch.append(waiting)
      else:
        others.append(waiting)
    self._queue = others
    return batch

  async def _answer(self, batch: list[_Waiting]) -> None:
    begin = time.monotonic()
    try:
      answers = await asyncio.get_running_loop().run_in_executor(
        self._thread, self._run, batch[0].key[0], [w.item for w in batch]
      )
    except Exception as e:  # Its askers are told; others are served on.
      for waiting in batch:
        if not waiting.answer.done():
          waiting.answer.set_exception(e)
      return
    finally:
      self._batch_seconds = time.monotonic() - begin
    for waiting, answer in zip(batch, answers, strict=True):
      if not waiting.answer.done():
        waiting.answer.set_result(answer)
