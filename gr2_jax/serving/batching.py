"""Dynamic batching: waiting items are answered together, in bounded time.

Items wait in one queue. Whenever the worker is free, it takes the oldest item
and the items behind it with the same key, up to a full batch. If the queue is
too short for that, it waits a moment for more. Batches run one at a time, in a
thread, so that the event loop stays free.

The moment counts from the arrival of the oldest item: items that waited during
a batch go at once. Clients that send the next item as soon as they have an
answer would so be split into groups that take turns for ever. Therefore, if the
clients of a batch returned within a moment, the worker waits for those of the
next batch too, until as many items wait as were left over and were answered, or
until no client returned for a moment. A batch then holds all such clients, and
a single client does not wait.

An item is dropped, at no cost, when its client no longer waits.
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
  """The queue does not accept items now.

  Attributes:
    retry_after: whole seconds after which it may accept them.
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


class _Clients:
  """Detects whether answered clients return at once.

  Items count as those of returning clients while each arrives within a moment
  of the one before, and the first within a moment of an answer.

  Attributes:
    return_at_once: whether most clients of the batch before the last one did.
    answered: items of the last batch.
    last: time when the last of its clients was answered or returned.
  """

  def __init__(self, moment: float):
    self.return_at_once, self.answered, self.last = False, 0, -math.inf
    self._moment, self._returned = moment, 0

  def batch_ended(self, count: int) -> None:
    """A batch of so many items has ended."""
    self.return_at_once = 2 * self._returned >= self.answered > 0
    self.answered, self._returned, self.last = count, 0, time.monotonic()

  def got_answer(self) -> None:
    """A client has its answer, which the event loop may have delayed."""
    self.last = time.monotonic()

  def arrived(self, count: int, now: float) -> None:
    """A client sent so many items."""
    if now - self.last <= self._moment:
      self._returned += count
      self.last = now


class Batcher:
  """Answers items in batches; lives in one event loop.

  Args:
    run: (key, items) -> an answer for each; called in a thread.
    capacity: items that may wait, not counting the running batch.
    moment: seconds that a short batch waits for more items.
  """

  def __init__(
    self,
    run: Callable[[Any, Sequence[Any]], Sequence[Any]],
    capacity: int,
    moment: float,
  ):
    self._run, self._capacity, self._moment = run, capacity, moment
    self._queue: collections.deque[_Waiting] = collections.deque()
    self._clients = _Clients(moment)
    self._left_over = 0  # items that waited when the last batch ended
    self._changed = asyncio.Event()  # an item arrived, or draining began
    self._draining = False
    self._batch_seconds = 0.0  # of the last batch
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'batches')
    self._worker = asyncio.get_running_loop().create_task(self._work())

  def __len__(self) -> int:
    return len(self._queue)

  async def answer(
    self, key: Hashable, largest: int, items: Sequence[Any], timeout: float
  ) -> list[Any | None]:
    """Answers as many items as the time allows.

    Args:
      key: items of one batch have equal keys.
      largest: size of a full batch of this key.
      items: they are queued all together or not at all.
      timeout: seconds.

    Returns:
      An answer for each item, None where the time was up.

    Raises:
      Refused: the queue is full or drains.
      Exception: raised by `run`.
    """
    if self._draining:
      raise Refused('shutting down', 1)
    if len(self._queue) + len(items) > self._capacity:
      seconds = math.ceil(len(self._queue) / largest) * self._batch_seconds
      raise Refused(
        f'{len(self._queue)} slates wait, room for {self._capacity}',
        max(1, math.ceil(seconds)),
      )
    if not items:
      return []
    loop, now = asyncio.get_running_loop(), time.monotonic()
    waiting = [
      _Waiting((key, largest), item, loop.create_future(), now)
      for item in items
    ]
    self._queue.extend(waiting)
    self._clients.arrived(len(waiting), now)
    self._changed.set()
    futures = [w.answer for w in waiting]
    try:
      await asyncio.wait(futures, timeout=timeout)
      self._clients.got_answer()
      return [f.result() if f.done() else None for f in futures]
    finally:
      for future in futures:
        future.cancel()

  async def drain(self) -> None:
    """Refuses new items, and answers those that wait."""
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
        self._clients.batch_ended(len(batch))
        self._left_over = len(self._queue)

  async def _change(self, seconds: float | None = None) -> None:
    """Waits for a change of the queue, at most so many seconds."""
    self._changed.clear()
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(seconds):
        await self._changed.wait()

  async def _fill(self) -> None:
    """Waits until the oldest item's batch is full or need not wait longer."""
    oldest, clients = self._queue[0], self._clients
    enough = oldest.key[1]
    if clients.return_at_once:
      enough = min(enough, self._left_over + clients.answered)
    while len(self._queue) < enough and not self._draining:
      begin = max(oldest.since, clients.last if clients.return_at_once else 0.0)
      left = begin + self._moment - time.monotonic()
      if left <= 0:
        return
      await self._change(left)

  def _take(self) -> list[_Waiting]:
    """Takes the oldest item that still waits, and others of its batch."""
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
    except Exception as e:  # It goes to the clients of this batch only.
      for waiting in batch:
        if not waiting.answer.done():
          waiting.answer.set_exception(e)
      return
    finally:
      self._batch_seconds = time.monotonic() - begin
    for waiting, answer in zip(batch, answers, strict=True):
      if not waiting.answer.done():
        waiting.answer.set_result(answer)
