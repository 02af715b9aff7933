"""The queue: full batches, one key each, bounded, in time or not at all."""

import asyncio
import threading
import time

import pytest

from gr2_jax.serving import batching

MOMENT = 3600.0  # that passes only where a test skips it


class Worker:
  """Doubles numbers; blocks while `gate` is closed."""

  def __init__(self, gate):
    self.batches, self.gate = [], gate

  def __call__(self, key, items):
    self.batches.append((key, list(items)))
    self.gate.wait()
    if 13 in items:
      raise ValueError('unlucky')
    return [2 * item for item in items]


class Turnstile(threading.Semaphore):
  """A gate that lets one batch through for each `release`."""

  def __init__(self):
    super().__init__(0)

  def wait(self):
    self.acquire()

  def set(self):
    self.release(1000)


def run(test, capacity=100, moment=0.0, gate=None, seconds=60.0):
  """Runs a coroutine of (batcher, worker), a batcher of its own."""

  async def main():
    worker = Worker(gate or threading.Event())
    if not gate:
      worker.gate.set()
    batcher = batching.Batcher(worker, capacity, moment)
    try:
      await test(batcher, worker)
    finally:
      worker.gate.set()
      await batcher.drain()

  asyncio.run(asyncio.wait_for(main(), seconds))


async def busy(batcher, worker, key='a'):
  """Keeps the worker in a batch of its own until the gate is opened."""
  worker.gate.clear()
  first = asyncio.create_task(batcher.answer(key, 4, [0], 60))
  while not worker.batches:
    await asyncio.sleep(0.001)
  return first


async def queued(batcher, *requests, timeout=60):
  """Requests (key, items), once they wait."""
  before = len(batcher)
  tasks = [
    asyncio.create_task(batcher.answer(key, 4, items, timeout))
    for key, items in requests
  ]
  while len(batcher) < before + sum(len(items) for _, items in requests):
    await asyncio.sleep(0.001)
  return tasks


def test_every_item_gets_its_own_answer():
  async def test(batcher, worker):
    asked = [batcher.answer('a', 4, [n, n + 1], 60) for n in range(10)]
    found = await asyncio.gather(*asked)
    assert found == [[2 * n, 2 * n + 2] for n in range(10)]
    assert await batcher.answer('a', 4, [], 60) == []

  run(test)


def test_waiting_items_are_answered_together_oldest_first():
  async def test(batcher, worker):
    first = await busy(batcher, worker)
    tasks = await queued(
      batcher, ('a', [1, 2]), ('b', [3]), ('a', [4, 5, 6]), ('b', [7])
    )
    worker.gate.set()
    await asyncio.gather(first, *tasks)
    assert worker.batches[1:] == [
      ('a', [1, 2, 4, 5]),
      ('b', [3, 7]),
      ('a', [6]),
    ]

  run(test)


def test_a_short_batch_waits_a_moment_for_more():
  async def test(batcher, worker):
    first = asyncio.create_task(batcher.answer('a', 4, [1], 60))
    await asyncio.sleep(0)
    await batcher.answer('a', 4, [2], 60)
    await first
    assert worker.batches == [('a', [1, 2])]

  run(test, moment=0.2)


def test_a_full_batch_does_not_wait():
  async def test(batcher, worker):
    assert await batcher.answer('a', 2, [1, 2], 60) == [2, 4]

  run(test, moment=3600.0)


def test_a_full_queue_refuses_whole_requests_and_says_when():
  async def test(batcher, worker):
    first = await busy(batcher, worker)
    tasks = await queued(batcher, ('a', [1, 2]))
    with pytest.raises(
      batching.Refused, match='2 slates wait, room for 3'
    ) as e:
      await batcher.answer('a', 4, [3, 4], 60)
    assert e.value.retry_after >= 1
    tasks += await queued(batcher, ('a', [5]))
    worker.gate.set()
    await asyncio.gather(first, *tasks)
    assert await batcher.answer('a', 4, [3, 4], 60) == [6, 8]

  run(test, capacity=3)


def test_late_items_get_none_and_cost_nothing():
  async def test(batcher, worker):
    first = await busy(batcher, worker)
    assert await batcher.answer('a', 4, [1, 2], 0.01) == [None, None]
    (patient,) = await queued(batcher, ('a', [3]))
    worker.gate.set()
    assert await patient == [6]
    assert await first == [0]
    assert worker.batches[1:] == [('a', [3])]

  run(test)


def test_late_answers_of_a_batch_under_way_are_dropped():
  async def test(batcher, worker):
    worker.gate.clear()
    assert await batcher.answer('a', 4, [1], 0.05) == [None]
    worker.gate.set()
    assert await batcher.answer('a', 4, [2], 60) == [4]

  run(test)


def test_an_error_is_its_batch_s_alone():
  async def test(batcher, worker):
    with pytest.raises(ValueError, match='unlucky'):
      await batcher.answer('a', 4, [12, 13], 60)
    assert await batcher.answer('a', 4, [14], 60) == [28]

  run(test)


def test_draining_answers_what_waits_and_refuses_the_rest():
  async def test(batcher, worker):
    first = await busy(batcher, worker)
    tasks = await queued(batcher, ('a', [1]), ('b', [2]))
    drained = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0)
    with pytest.raises(batching.Refused, match='shutting down'):
      await batcher.answer('a', 4, [3], 60)
    worker.gate.set()
    await drained
    assert await asyncio.gather(first, *tasks) == [[0], [2], [4]]

  run(test)


@pytest.fixture
def skip(monkeypatch):
  """Lets so many seconds pass."""
  real, skipped = time.monotonic, 0.0

  def skip(seconds):
    nonlocal skipped
    skipped += seconds

  monkeypatch.setattr(time, 'monotonic', lambda: real() + skipped)
  return skip


class Clients:
  """Each asks again as soon as it is answered; no time passes but is skipped.

  Args:
    batcher: that answers.
    worker: of it, with a turnstile.
    skip: the fixture.
    largest: items of a batch.
  """

  def __init__(self, batcher, worker, skip, largest):
    self.batcher, self.worker, self._skip = batcher, worker, skip
    self._largest, self._tasks = largest, {}

  def start(self, *names):
    for name in names:
      self._tasks[name] = asyncio.create_task(self._ask(name))

  def stop(self, *names):
    for name in names or tuple(self._tasks):
      self._tasks.pop(name).cancel()

  async def _ask(self, name):
    while True:
      await self.batcher.answer('a', self._largest, [name], 1e9)

  async def wait(self, batches, waiting):
    """Until so many batches have begun, and so many items wait."""
    for _ in range(5000):
      found = len(self.worker.batches), len(self.batcher)
      if found == (batches, waiting):
        return
      await asyncio.sleep(0.001)
    pytest.fail(f'batches and items that wait: {found}, not {batches, waiting}')

  async def turn(self, batches, waiting):
    """Ends the last of so many batches once so many have waited for long."""
    await self.wait(batches, waiting)
    self._skip(2 * MOMENT)
    self.worker.gate.release()


def closed_loop(test, skip, largest):
  """Runs a coroutine of clients in a closed loop."""

  async def main(batcher, worker):
    clients = Clients(batcher, worker, skip, largest)
    try:
      await test(clients)
    finally:
      clients.stop()

  run(main, moment=MOMENT, gate=Turnstile(), seconds=1e9)


@pytest.mark.parametrize(
  ('ahead', 'behind', 'largest'),
  [(1, 1, 8), (4, 4, 8), (1, 7, 8), (7, 1, 8), (2, 3, 64)],
)
def test_clients_in_a_closed_loop_end_up_in_one_batch(
  skip, ahead, behind, largest
):
  first, second = [*range(ahead)], [*range(ahead, ahead + behind)]

  async def test(clients):
    clients.start(*first)
    await clients.wait(0, ahead)
    skip(MOMENT)
    await clients.wait(1, 0)
    clients.start(*second)
    await clients.turn(1, behind)
    await clients.turn(2, ahead)
    await clients.turn(3, 0)
    await clients.wait(4, 0)
    batches = [sorted(items) for _, items in clients.worker.batches]
    assert batches == [first, second, first + second, first + second]

  closed_loop(test, skip, largest)


def test_more_clients_than_a_batch_holds_fill_every_batch(skip):
  async def test(clients):
    clients.start(*range(7))
    await clients.turn(1, 3)  # The first batch is full.
    await clients.turn(2, 4)  # The second has who waited.
    await clients.turn(3, 3)
    await clients.turn(4, 3)
    await clients.wait(5, 3)
    sizes = [len(items) for _, items in clients.worker.batches]
    assert sizes == [4, 3, 4, 4, 4]

  closed_loop(test, skip, largest=4)


def test_a_single_client_waits_a_moment_at_first_and_then_not(skip):
  async def test(clients):
    clients.start(1)
    await clients.wait(0, 1)
    skip(0.5 * MOMENT)
    await asyncio.sleep(0.01)
    assert not clients.worker.batches
    skip(0.5 * MOMENT)
    await clients.wait(1, 0)
    clients.worker.gate.release()
    await clients.wait(1, 1)  # It came back, as none did before.
    skip(MOMENT)
    await clients.wait(2, 0)
    for batches in (2, 3, 4):
      clients.worker.gate.release()
      await clients.wait(batches + 1, 0)

  closed_loop(test, skip, largest=8)


def test_a_returning_client_waits_one_moment_for_those_who_left(skip):
  async def test(clients):
    clients.start(1, 2, 3, 4)
    await clients.turn(1, 0)
    await clients.wait(2, 0)  # All of them came back.
    clients.stop(2, 3, 4)
    clients.worker.gate.release()
    await clients.wait(2, 1)
    skip(0.5 * MOMENT)
    await asyncio.sleep(0.01)
    assert len(clients.worker.batches) == 2
    skip(0.5 * MOMENT)
    await clients.wait(3, 0)

  closed_loop(test, skip, largest=4)


def test_an_item_that_waited_during_a_batch_goes_at_once(skip):
  async def test(clients):
    ask = clients.batcher.answer
    first = asyncio.create_task(ask('a', 4, [1, 2, 3, 4], 1e9))
    await clients.wait(1, 0)
    second = asyncio.create_task(ask('a', 4, [5], 1e9))
    await clients.turn(1, 1)
    assert await first == [2, 4, 6, 8]
    await clients.wait(2, 0)
    clients.worker.gate.release()
    assert await second == [10]

  closed_loop(test, skip, largest=4)
