"""A loaded policy answers as stage `rerank` does, and compiles nothing."""

import json

import jax
import numpy as np
import pytest

from gr2_jax.data import log as log_lib
from gr2_jax.data import slates as slates_lib
from gr2_jax.pipeline import artifacts
from gr2_jax.policy import policy
from gr2_jax.serving import examples
from gr2_jax.serving import reranker as reranker_lib
from gr2_jax.stages import rerank

from .. import tiny_world


def with_new(reranker, slate, place, **text):
  """The slate with one candidate under another name, described as it is."""
  catalog, name = reranker.knowledge.log.catalog, slate['candidates'][place]
  item = reranker.knowledge.index[name]
  described = {
    'item_id': f'new {name}',
    'title': catalog.titles[item],
    'categories': list(catalog.categories[item]),
    'year': int(catalog.years[item]),
  }
  candidates = list(slate['candidates'])
  candidates[place] = f'new {name}'
  items = [described | text]
  return slate | {'candidates': candidates, 'items': items}


@pytest.mark.parametrize('mode', ['reason', 'rank'])
def test_bulk_answers_are_those_of_the_stage(
  world, reranker, slates, tmp_path, mode
):
  asked = slates[:20]  # Two full batches, and a short one.
  asked.append(with_new(reranker, slates[20], 0))
  source = tmp_path / 'slates.jsonl'
  source.write_text(''.join(json.dumps(row) + '\n' for row in asked))
  config = tiny_world.config(
    rerank__input=str(source),
    rerank__batch_size=8,
    rerank__thinking=mode == 'reason',
  )
  inputs = {name: world[name] for name in ('slates', 'tokenizer', 'backbone')}
  rerank.run(config, inputs | {'rl': world['rl']}, tmp_path)
  lines = (tmp_path / rerank.OUTPUT).read_text().splitlines()
  answers = reranker.rank(asked, mode)
  for line, answer in zip(lines, answers, strict=True):
    own = {name: answer.pop(name) for name in ('mode', 'unknown_candidates')}
    assert own == {'mode': mode, 'unknown_candidates': []}
    assert answer == json.loads(line)


def test_scoring_is_the_read_out_and_decodes_nothing(reranker, slates):
  asked = [
    (reranker.parse(row, '', place), place)
    for place, row in enumerate(slates[:5])
  ]
  scored = reranker.answer(asked, 'score')
  ranked = reranker.answer(asked, 'rank')
  assert (scored.prompts, scored.decoded) == (5, 0)
  counts = [len(row['candidates']) for row in slates[:5]]
  assert ranked.decoded == sum(count + 1 for count in counts)
  for a, b in zip(scored.lines, ranked.lines, strict=True):
    np.testing.assert_allclose(a['scores'], b['scores'], atol=1e-5)
    assert a['order'] == np.argsort(-np.array(a['scores'])).tolist()
    assert a['reasoning'] == ''


def test_an_answer_does_not_depend_on_its_batch(reranker, slates):
  together = reranker.rank(slates[:8], 'reason')
  for place in (0, 3, 7):
    request = reranker.parse(slates[place], '', place)
    (alone,) = reranker.answer([(request, place)], 'reason').lines
    np.testing.assert_allclose(
      alone.pop('scores'), together[place].pop('scores'), atol=1e-5
    )
    assert alone == together[place]


def test_unknown_candidates_keep_their_places(reranker, slates):
  row = slates[0]
  whole = row['candidates'][:4]
  (known,) = reranker.rank([row | {'candidates': whole, 'scores': None}])
  mixed = [whole[0], 'gone', *whole[1:]]
  (answer,) = reranker.rank([row | {'candidates': mixed, 'scores': None}])
  assert answer['unknown_candidates'] == ['gone']
  assert answer['ranking'][1] == 'gone'
  assert sorted(answer['order']) == list(range(5))
  assert [mixed[rank] for rank in answer['order']] == answer['ranking']
  assert answer['scores'][1] is None
  assert None not in answer['scores'][:1] + answer['scores'][2:]
  # Around it the others stand as they do without it, if scores are the same.
  scores = [0.5, 0.4, 0.3, 0.2]
  (known,) = reranker.rank([row | {'candidates': whole, 'scores': scores}])
  scores.insert(1, 0.0)
  (answer,) = reranker.rank([row | {'candidates': mixed, 'scores': scores}])
  rest = [name for name in answer['ranking'] if name != 'gone']
  assert rest == known['ranking']


def test_reasoning_names_ranks_of_the_whole_slate(reranker, slates):
  row = slates[0]
  known = row['candidates'][:4]
  scores = [0.5, 0.4, 0.3, 0.2]
  (plain,) = reranker.rank([row | {'candidates': known, 'scores': scores}])
  shifted = row | {
    'candidates': ['gone', *known],
    'scores': [0.9, *scores],
  }
  (answer,) = reranker.rank([shifted])
  expected = plain['reasoning']
  for rank in reversed(range(4)):
    expected = expected.replace(f'<slot{rank}>', f'<slot{rank + 1}>')
  assert answer['reasoning'] == expected


@pytest.mark.parametrize('mode', ['score', 'rank', 'reason'])
def test_described_candidates_are_ranked_and_flagged(reranker, slates, mode):
  slate = next(row for row in slates if len(row['candidates']) == 5)
  new = with_new(reranker, slate, 2, title='Something else')
  # One of which nothing is known, too, in the place of the last.
  new['candidates'][4] = 'gone'
  (answer,) = reranker.rank([new], mode)
  assert answer['described_candidates'] == [new['candidates'][2]]
  assert answer['unknown_candidates'] == ['gone']
  assert answer['ranking'][4] == 'gone'
  assert sorted(answer['order']) == list(range(5))
  assert [score is None for score in answer['scores']] == [False] * 4 + [True]
  assert answer['verdict'] == 'valid'
  # What is said of it is read.
  scores = {
    tuple(reranker.rank([new | {'items': [item]}], mode)[0]['scores'])
    for other in slates[:8]
    for item in with_new(reranker, other, 0)['items']
    for item in [item | {'item_id': new['candidates'][2]}]
  }
  assert len(scores) > 1
  # Of a known item it is not, nor of one that is not in the slate.
  known = [{'item_id': name, 'title': 'x'} for name in slate['candidates'][:1]]
  unasked = [{'item_id': 'far', 'title': 'y'}]
  assert reranker.rank([slate | {'items': known + unasked}], mode) == (
    reranker.rank([slate], mode)
  )


def test_others_are_answered_to_the_bit_beside_described_ones(reranker, slates):
  others = slates[:7]
  alone = reranker.rank([*others, slates[7]], 'score')
  beside = reranker.rank([*others, with_new(reranker, slates[7], 1)], 'score')
  assert alone[:7] == beside[:7]
  assert alone[7] != beside[7]


def test_a_described_slate_does_not_depend_on_its_batch(reranker, slates):
  described = [
    with_new(reranker, row, 0, title=f'No {i % 2}')
    for i, row in enumerate(slates[:8])
  ]
  together = reranker.rank(described, 'rank')
  for place in (0, 1, 7):
    request = reranker.parse(described[place], '', place)
    (alone,) = reranker.answer([(request, place)], 'rank').lines
    np.testing.assert_allclose(
      alone.pop('scores'), together[place].pop('scores'), atol=1e-5
    )
    assert alone == together[place]


def test_described_items_of_the_history_are_read(reranker, slates):
  new = {'item_id': 'h', 'title': 'Something', 'categories': ['Else']}
  slate = slates[0] | {'history_grades': None, 'history_times': None}
  longer = slate | {'history': [*slate['history'], 'h']}
  (dropped,) = reranker.rank([longer], 'score')
  (read,) = reranker.rank([longer | {'items': [new]}], 'score')
  assert (dropped['unknown_history'], read['unknown_history']) == (1, 0)
  assert dropped['scores'] != read['scores']
  assert read['described_candidates'] == []


def test_without_a_reader_the_described_are_unknown(
  world, reranker, slates, monkeypatch
):
  monkeypatch.setattr(
    reranker_lib.described_items, 'load', lambda *_: (None, 'tokenizer-1: old')
  )
  blind = reranker_lib.Reranker.load(
    world['rl'], modes=('score',), largest_batch=8, beside=reranker
  )
  assert blind.unreadable == 'tokenizer-1: old'
  new = with_new(reranker, slates[0], 1)
  (answer,) = blind.rank([new], 'score')
  assert answer['unknown_candidates'] == [new['candidates'][1]]
  assert answer['described_candidates'] == []
  assert answer['scores'][1] is None


def test_a_slate_of_unknown_candidates_keeps_its_order(reranker, slates):
  asked = [slates[0], {'history': [], 'candidates': ['x', 7]}]
  first, second = reranker.rank(asked)
  assert first['unknown_candidates'] == []
  assert second['ranking'] == second['unknown_candidates'] == ['x', 7]
  assert second['verdict'] is None
  assert reranker.rank(asked[1:])[0]['ranking'] == ['x', 7]
  assert reranker.rank([]) == []


def test_every_slate_is_checked_before_any_is_ranked(reranker, slates):
  with pytest.raises(log_lib.DataError, match="slate 1, field 'candidates'"):
    reranker.rank([slates[0], {'history': [], 'candidates': []}])
  with pytest.raises(ValueError, match="mode 'fast': loaded: score, rank"):
    reranker.rank(slates[:1], 'fast')


def test_batches_come_in_powers_of_two(world, monkeypatch, reranker, slates):
  def load(largest_batch):
    return reranker_lib.Reranker.load(
      world['rl'],
      modes=('score',),
      largest_batch=largest_batch,
      beside=reranker,
    )

  assert list(reranker.programs['score']) == [1, 2, 4, 8]
  one = load(5)
  assert list(one.programs['score']) == [1, 2, 4]
  tiny_world.on_all_devices(monkeypatch)
  eight = load(9)
  assert list(eight.programs['score']) == [8]
  assert one.knowledge is eight.knowledge is reranker.knowledge
  for size in (1, 2, 3, 7):
    for a, b in zip(
      one.rank(slates[:size], 'score'),
      eight.rank(slates[:size], 'score'),
      strict=True,
    ):
      np.testing.assert_allclose(a.pop('scores'), b.pop('scores'), atol=1e-5)
      assert a == b
  tiny_world.on_one_device(monkeypatch)
  with pytest.raises(ValueError, match='largest_batch=0: .* 1 devices'):
    reranker_lib._sizes(tiny_world.mesh(), 0)


def test_no_request_compiles(reranker, slates):
  compiled = []

  def listen(event, duration, **unused):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.jit(lambda x: x * 3)(np.arange(3))
    assert len(compiled) == 1  # The listener works.
    for mode in reranker.programs:
      for size in (1, 7, 8, 9):
        reranker.rank(slates[:size], mode)
        reranker.rank(
          [with_new(reranker, row, 0, title='Red') for row in slates[:size]],
          mode,
        )
    assert len(compiled) == 1
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_second_policy_shares_what_is_the_same(world, reranker, slates):
  other = reranker_lib.Reranker.load(
    world['sft'], largest_batch=8, beside=reranker
  )
  assert other.knowledge is reranker.knowledge
  for mode, programs in reranker.programs.items():
    for size, program in programs.items():
      assert other.programs[mode][size] is program
  answers = other.rank(slates[:8], 'score')
  scores = [answer['scores'] for answer in answers]
  before = [answer['scores'] for answer in reranker.rank(slates[:8], 'score')]
  restored = policy.restore(world['sft'], tiny_world.config().mesh)
  same = jax.tree.map(np.array_equal, restored.params, other.policy.params)
  assert all(jax.tree.leaves(same))
  unchanged = jax.tree.map(
    np.array_equal, reranker.policy.params, other.policy.params
  )
  # RL may have kept the SFT parameters; otherwise the scores differ.
  assert (scores == before) == all(jax.tree.leaves(unchanged))


def test_an_example_is_a_slate_to_be_ranked(world, reranker):
  stored = slates_lib.read(world['slates'], 'test')
  names = slates_lib.read_catalog(world['slates']).item_ids
  found = examples.example(reranker, len(stored) + 3)
  slate, length = found['slate'], stored.history_length[3]
  assert slate['history'] == [names[i] for i in stored.history[3, :length]]
  grades, ages = stored.history_grades[3], stored.history_ages[3]
  assert slate['history_grades'] == grades[:length].tolist()
  times = stored.time[3] - ages[:length]
  assert slate['history_times'] == times.tolist()
  assert found['slates'] == len(stored)
  (answer,) = reranker.rank([slate])
  assert sorted(answer['ranking']) == sorted(slate['candidates'])
  assert set(found['relevant']) < set(slate['candidates'])
  # The policy is told how and when.
  request = reranker.parse(slate, '', 0)
  assert request.grades == tuple(grades[:length].tolist())
  assert request.times == tuple(times.tolist())


def test_other_artifacts_are_refused(world, tmp_path):
  with pytest.raises(artifacts.ArtifactError, match='finished artifact'):
    reranker_lib.Reranker.load(tmp_path)
  with pytest.raises(artifacts.ArtifactError, match='leaves no policy'):
    reranker_lib.Reranker.load(world['tokenizer'])
  with pytest.raises(ValueError, match="mode 'fast': known: score, rank"):
    reranker_lib.Reranker.load(world['rl'], modes=('fast',))
