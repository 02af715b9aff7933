"""A history is read once for its user, and answers are as if it were not."""

import asyncio
import dataclasses
import json
import threading

import hypothesis
import jax
import ml_collections
import numpy as np
import pytest
from hypothesis import strategies as st

from gr2_jax.pipeline import checkpoint
from gr2_jax.policy import policy, ranking
from gr2_jax.serving import answer
from gr2_jax.serving import memories as memories_lib
from gr2_jax.serving import request as requests_lib
from gr2_jax.serving import reranker as reranker_lib
from gr2_jax.serving import service as service_lib

from .. import tiny, tiny_world

pytestmark = pytest.mark.slow

FORM = 'memory:2+candidates:sid,evidence'


@pytest.fixture(scope='module')
def artifacts(world, tmp_path_factory):
  """Two policies that read histories through memory tokens alone."""
  root = tmp_path_factory.mktemp('memories')
  for path in world.values():
    (root / path.name).symlink_to(path)
  run = json.loads((world['sft'] / 'config.json').read_text())
  run['stage'], run['config']['opd'] = 'opd', {'context': FORM}
  run['config']['prompt'] |= {'history': 6, 'history_fields': ['sid', 'grade']}
  run['config']['model']['num_layers'] = 2  # One layer's memory holds nothing.
  spec = policy.load(ml_collections.ConfigDict(run['config']), world, FORM)
  homes = [root / f'opd-{name}' for name in ('one', 'two')]
  for seed, home in enumerate(homes):
    home.mkdir()
    (home / 'config.json').write_text(json.dumps(run))
    (home / 'results.json').write_text('{}')
    own = tiny.params(spec.model, seed)
    checkpoint.save_params(home / policy.PARAMS, own)
  return homes


@pytest.fixture(scope='module')
def loaded(artifacts, reranker):
  found = reranker_lib.Reranker.load(
    artifacts[0], largest_batch=8, beside=reranker
  )
  assert found.knowledge is not reranker.knowledge  # Of another folder.
  return found


@pytest.fixture
def own(loaded):
  """The policy, that knows no history yet."""
  return remembering(loaded, 1 << 20)


def remembering(loaded, limit):
  return dataclasses.replace(loaded, memories=memories_lib.Memories(limit))


def checked(own, rows):
  return [(own.parse(row, '', place), place) for place, row in enumerate(rows)]


def in_one_pass(own, asked, mode):
  """What the policy answers to whole prompts."""
  slates = requests_lib.to_slates(
    [request for request, _ in asked],
    own.knowledge.log,
    own.knowledge.facts,
    own.candidates,
    own.history,
  )
  return ranking.rank(
    own.policy,
    answer.records(slates),
    thinking=mode == 'reason',
    order=own.order,
    batch_size=8,
    seed=0,
  )


def counted(own, rows, mode='score'):
  """(remembered, memorized) of one batch."""
  found = own.answer(checked(own, rows), mode)
  return found.remembered, found.memorized


def scores(own, *rows):
  """Each slate's, in one batch; all are presented alike."""
  asked = [(own.parse(row, '', 0), 0) for row in rows]
  return np.array([a['scores'] for a in own.answer(asked, 'score').lines])


@pytest.mark.parametrize('mode', ranking.MODES)
def test_answers_are_those_of_one_pass(own, slates, mode):
  asked = checked(own, slates[:7])
  wanted = in_one_pass(own, asked, mode)
  for new in (7, 0):  # Read now, and known already.
    found, memorized = own._run(asked, mode)
    assert memorized == new
    for field in dataclasses.fields(ranking.Ranked):
      a, b = getattr(found, field.name), getattr(wanted, field.name)
      if field.name == 'scores':
        assert np.ptp(b) > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5)
      elif mode != 'score' or field.name in ('readout', 'presented', 'count'):
        np.testing.assert_array_equal(a, b, err_msg=field.name)
    if mode == 'score':
      np.testing.assert_array_equal(found.generated, wanted.readout)


def test_programs_of_every_size_agree(artifacts, loaded, slates, monkeypatch):
  one = dataclasses.replace(
    loaded,
    programs={'score': {n: loaded.programs['score'][n] for n in (1, 2)}},
    encoders={n: loaded.encoders[n] for n in (1, 2)},
    memories=memories_lib.Memories(1 << 20),
  )
  tiny_world.on_all_devices(monkeypatch)
  eight = reranker_lib.Reranker.load(
    artifacts[0], modes=('score',), largest_batch=8, beside=loaded
  )
  assert eight.knowledge is loaded.knowledge
  assert list(eight.programs['score']) == list(eight.encoders) == [8]
  assert list(loaded.encoders) == [1, 2, 4, 8]
  for a, b in zip(
    one.rank(slates[:5], 'score'), eight.rank(slates[:5], 'score'), strict=True
  ):
    np.testing.assert_allclose(a.pop('scores'), b.pop('scores'), atol=2e-5)
    assert a == b


def test_what_is_known_is_counted_and_not_read_again(own, slates):
  a, b, c = slates[0], slates[5], slates[10]
  assert counted(own, [a, b, a]) == (1, 2)  # Twice in a batch: read once.
  assert len(own.memories) == 2
  other = a | {'candidates': b['candidates'], 'scores': b['scores']}
  assert counted(own, [other, c], 'rank') == (1, 1)
  assert counted(own, [a, b, c, other], 'reason') == (4, 0)
  # Nothing is read where no candidate is known.
  strangers = slates[15] | {'candidates': ['x', 'y'], 'scores': None}
  assert counted(own, [strangers]) == (0, 0)


@pytest.mark.parametrize(
  'change',
  [
    lambda items: {'history': items[:-1]},
    lambda items: {'history': [*items, items[0]]},
    lambda items: {'history': items[::-1]},
    lambda items: {'history': items, 'history_grades': [1] * len(items)},
  ],
)
def test_a_changed_history_is_another(own, slates, change):
  row = {k: slates[0][k] for k in ('candidates', 'scores')}
  items = slates[0]['history'][-4:]
  assert len(set(items)) == 4
  plain, changed = row | {'history': items}, row | change(items)
  assert counted(own, [plain]) == (0, 1)
  assert counted(own, [changed]) == (0, 1)
  assert counted(own, [plain, changed]) == (2, 0)
  first, second = scores(own, plain, changed)
  assert np.abs(first - second).max() > 1e-4


def test_items_that_the_prompt_does_not_show_change_nothing(own, slates):
  row = slates[0] | {'history': slates[0]['history'][:1] * 6}
  for name in ('history_grades', 'history_times'):
    row.pop(name, None)
  longer = row | {'history': slates[5]['history'][:1] + row['history']}
  assert counted(own, [row]) == (0, 1)
  assert counted(own, [longer]) == (1, 0)


def test_users_are_not_mixed(own, slates):
  candidates = {k: slates[0][k] for k in ('candidates', 'scores')}
  a, b, c = (slates[i] | candidates for i in (0, 5, 10))
  alone = [scores(own, row)[0] for row in (a, b, c)]
  for x, y in zip(alone, alone[1:] + alone[:1], strict=True):
    assert np.abs(x - y).max() > 1e-3
  memories = own.memories
  for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0, 1)):
    found = scores(own, *((a, b, c)[i] for i in order))
    wanted = [alone[i] for i in order]
    np.testing.assert_allclose(found, wanted, atol=2e-5)
  assert len(memories) == 3
  # A memory is the user's: with another's the answer is another.
  for key in memories._kept:
    memories._kept[key] = next(iter(memories._kept.values()))
  mixed = scores(own, a, b, c)
  assert np.abs(mixed - alone).max() > 1e-3


def test_the_longest_unused_makes_room(loaded, own, slates):
  a, b, c = slates[0], slates[5], slates[10]
  counted(own, [a, b, c])
  assert own.memories.bytes > 0
  small = remembering(loaded, own.memories.bytes - 1)
  assert counted(small, [a, b]) == (0, 2)
  assert counted(small, [a]) == (1, 0)
  assert counted(small, [c]) == (0, 1)  # In the place of b.
  assert counted(small, [a, c]) == (2, 0)
  assert counted(small, [b]) == (0, 1)
  assert small.memories.bytes <= small.memories.limit
  none = remembering(loaded, 0)
  np.testing.assert_allclose(
    scores(none, a, b, a), scores(own, a, b, a), atol=2e-5
  )
  assert counted(none, [a, b, a]) == (1, 2)
  assert (len(none.memories), none.memories.bytes) == (0, 0)


def test_no_request_compiles(own, slates):
  compiled = []

  def listen(event, duration, **unused):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.jit(lambda x: x * 5)(np.arange(3))
    assert len(compiled) == 1  # The listener works.
    for mode in own.programs:
      for size in (1, 7, 8, 9):
        own.rank(slates[:size], mode)
    assert len(compiled) == 1
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_reload_forgets(artifacts, own, slates):
  async def serve():
    service = service_lib.Service(own, service_lib.Limits(seconds=60.0))
    value = service.metrics.registry.get_sample_value

    async def ask():
      answers = await service.rank(service.check({'slates': slates[:3]}))
      assert not any(a['timed_out'] for a in answers)
      sums = [value(f'gr2_memory_{x}_total') for x in ('hits', 'misses')]
      return [a['scores'] for a in answers], sums, value('gr2_memory_bytes')

    assert value('gr2_memory_bytes') == 0
    first = await ask()
    assert first[1:] == ([0, 3], own.memories.bytes)
    assert (await ask())[1:] == ([3, 3], own.memories.bytes)
    await service.reload(artifacts[1].name)
    assert value('gr2_memory_bytes') == 0
    second = await ask()
    assert second[1] == [3, 6]
    await service.drain()
    return first[0], second[0], service.policy

  first, second, other = asyncio.run(serve())
  assert other.memories is not own.memories
  assert other.memories.limit == own.memories.limit
  assert other.encoders == own.encoders  # Compiled once.
  assert other.programs == own.programs
  wanted = in_one_pass(other, checked(other, slates[:3]), 'score').scores
  for line, scores in zip(second, wanted, strict=True):
    np.testing.assert_allclose(line, scores[: len(line)], atol=2e-5)
  assert first != second


def test_a_policy_without_memory_tokens_keeps_nothing(reranker, slates):
  assert reranker.encoders == {}
  assert counted(reranker, slates[:3]) == (0, 0)
  assert len(reranker.memories) == 0


@hypothesis.given(
  st.integers(0, 100),
  st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=12),
)
def test_memories_are_a_list_with_the_last_used_at_its_end(limit, batches):
  """Key i is i letters long, and its memory i times four bytes."""
  memories, kept = memories_lib.Memories(limit), []

  def made(i):
    return np.full(i, i, np.float32)

  for batch in batches:
    asked = []

    def encode(places, batch=batch, asked=asked):
      asked.extend(batch[place] for place in places)
      return [made(batch[place]) for place in places]

    found, new = memories.recall([b'x' * i for i in batch], encode)
    for i, memory in zip(batch, found, strict=True):
      np.testing.assert_array_equal(memory, made(i))
    wanted = list(dict.fromkeys(i for i in batch if i not in kept))
    assert asked == wanted
    assert new == len(wanted)
    for i in batch:
      if i in kept:
        kept.append(kept.pop(kept.index(i)))
    for i in wanted:
      if 5 * i <= limit:
        kept.append(i)
      while 5 * sum(kept) > limit:
        kept.pop(0)
    assert memories.bytes == 5 * sum(kept)
    assert len(memories) == len(kept)


def test_two_threads_may_make_the_same_memory():
  memories, both = memories_lib.Memories(100), threading.Barrier(2, timeout=60)

  def encode(places):
    both.wait()  # Neither keeps its own before the other looked for it.
    return [np.zeros(4, np.float32) for _ in places]

  threads = [
    threading.Thread(target=memories.recall, args=([b'key'], encode))
    for _ in range(2)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(memories), memories.bytes) == (1, 3 + 16)


def test_a_kept_memory_does_not_hold_its_batch():
  memories = memories_lib.Memories(100)
  batch = np.arange(6.0, dtype=np.float32).reshape(2, 3)
  memories.recall([b'a', b'b'], lambda places: batch[places[0] :])
  batch[:] = 0
  (found,), new = memories.recall([b'b'], lambda places: [])
  assert new == 0
  np.testing.assert_array_equal(found, [3, 4, 5])
