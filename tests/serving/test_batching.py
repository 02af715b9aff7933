"""The queue: full batches, one key each, bounded, in time or not at all."""

import asyncio
import threading

import pytest

from gr2_jax.serving import batching


class Worker:
  """Doubles numbers; while `gate` is closed it does not come back."""

  def __init__(self):
    self.batches, self.gate = [], threading.Event()
    self.gate.set()

  def __call__(self, key, items):
    self.batches.append((key, list(items)))
    self.gate.wait()
    if 13 in items:
      raise ValueError('unlucky')
    return [2 * item for item in items]


def run(test, capacity=100, moment=0.0):
  """Runs a coroutine of (batcher, worker), a batcher of its own."""

  async def main():
    worker = Worker()
    batcher = batching.Batcher(worker, capacity, moment)
    try:
      await test(batcher, worker)
    finally:
      worker.gate.set()
      await batcher.drain()

  asyncio.run(asyncio.wait_for(main(), 60))


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


def test_what_waits_is_answered_together_oldest_first():
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


def test_what_is_late_is_none_and_costs_nothing():
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
