import shutil

import jax
import numpy as np
import pytest

from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.pipeline import artifacts, checkpoint, reporting
from gr2_jax.policy import policy
from gr2_jax.prompts import packing, prompt
from gr2_jax.stages import midtrain, rl, sft
from gr2_jax.train import loop

from .. import tiny, tiny_world

pytestmark = pytest.mark.slow

STAGES = {'midtrain': midtrain, 'sft': sft, 'rl': rl}


def lines(workdir):
  rows = reporting.read_metrics(workdir / 'metrics.jsonl')
  return [
    {k: v for k, v in row.items() if k != 'steps_per_second'} for row in rows
  ]


@pytest.mark.parametrize('stage', STAGES)
def test_a_killed_run_ends_bit_for_bit_like_a_whole_one(
  world, tmp_path, monkeypatch, stage
):
  run, config = STAGES[stage].run, tiny_world.config()
  write = reporting.MetricsWriter.write

  def dying(self, step, metrics):
    if step == 5:
      raise KeyboardInterrupt
    write(self, step, metrics)

  with monkeypatch.context() as patch:
    patch.setattr(reporting.MetricsWriter, 'write', dying)
    with pytest.raises(KeyboardInterrupt):
      run(config, tiny_world.inputs(world, stage), tmp_path)
  assert lines(tmp_path)[-1]['step'] == 4
  begun = []
  start = loop._start

  def watching(*arguments):
    found = start(*arguments)
    begun.append(found[2])
    return found

  monkeypatch.setattr(loop, '_start', watching)
  result = run(config, tiny_world.inputs(world, stage), tmp_path)
  assert begun == [4]
  found, step, meta = tiny_world.left(world, stage, tmp_path)
  wanted, *rest = tiny_world.left(world, stage, world[stage])
  assert [step, meta] == rest
  assert meta['best'].items() <= result.items()
  assert result['stopped'] == 'no'
  tiny.assert_trees_equal(found, wanted)
  assert lines(tmp_path) == lines(world[stage])
  assert {row['step'] for row in lines(tmp_path)} >= {1, 2, 3, 4, 5, 6}


@pytest.fixture(scope='module')
def spec(world):
  return tiny_world.spec(world)


def test_pointing_sorts_the_candidates_by_the_named_column(world, spec):
  render = midtrain.pointing_renderer(spec.prompter, 2)
  words, prompter = spec.vocabulary, spec.prompter
  for index in range(5):
    slate = slates_lib.SlateSource(world['slates'], 'train')[index]
    row = render(slate, np.random.default_rng(index))
    order = prompt.presentation(
      int(slate['count']), 'shuffled', np.random.default_rng(index)
    )
    bins = prompter.bins(slate['evidence'], 5)[order]
    assert row['completion'].shape == (2, 1 + prompter.answer_tokens)
    columns = set()
    for ids, weights in zip(row['completion'], row['weights'], strict=True):
      column = ids[0] - words.by_base
      places = ids[1:6] - words.slot_base
      assert sorted(places) == [0, 1, 2, 3, 4]
      assert (np.diff(bins[places, column]) <= 0).all()
      assert ids[6] == words.eos
      assert weights.tolist() == [0, 1, 1, 1, 1, 1, 1]
      columns.add(int(column))
    assert columns == {0, 1}
    slots = row['prompt'][row['slots']]
    assert slots.tolist() == [words.slot_base + k for k in range(5)]


TASKS = {'pointing', 'sequence', 'persona', 'caption'}  # No text is given.


def test_held_out_losses_are_of_every_task_of_the_mixture(world):
  rows = reporting.read_metrics(world['midtrain'] / 'metrics.jsonl')
  rows = [row for row in rows if 'validation/score' in row]
  shares = artifacts.read_results(world['midtrain'])['shares']
  assert set(shares) == TASKS
  given = tiny_world.config().midtrain.mixture.to_dict()
  for task, share in shares.items():
    np.testing.assert_allclose(share, given[task] / (1 - given['text']))
  for row in rows:
    mean = sum(
      share * row[f'validation/{task}_loss'] for task, share in shares.items()
    )
    np.testing.assert_allclose(row['validation/score'], -mean, rtol=1e-5)
  assert rows[-1]['validation/score'] > rows[0]['validation/score']


def test_results_tell_retrieval_beside_popularity_and_what_was_packed(world):
  results = artifacts.read_results(world['midtrain'])
  baseline = results['popularity']
  assert set(baseline) == {'histories', 'r@5', 'r@10', 'mrr'}
  assert 0 < baseline['histories'] <= 16
  for name in ('r@5', 'r@10', 'mrr'):
    assert 0 <= results['metrics'][f'retrieval_{name}'] <= 1
  assert results['warm_rows'] == 0
  packed = results['packed']
  assert packed['rows'] == len(
    records.Records(world['midtrain'] / packing.ROWS)
  )
  assert set(packed['tokens']) == TASKS - {'pointing'}
  real = sum(packed['tokens'].values())
  np.testing.assert_allclose(packed['fill'], real / (packed['rows'] * 128))


def test_questions_are_of_validation_users_and_counts_of_train_users(
  world, spec, monkeypatch
):
  read = []
  whole = slates_lib.read
  monkeypatch.setattr(
    slates_lib, 'read', lambda d, split: read.append(split) or whole(d, split)
  )
  stage = tiny_world.config().midtrain
  _, baseline = midtrain.retriever(world, spec, tiny_world.mesh(), stage)
  assert read == ['validation', 'train']
  assert baseline['histories'] == min(16, len(whole(world['slates'], read[0])))


def test_general_text_joins_where_there_is_a_file(world, tmp_path):
  said = tmp_path / 'said.txt'
  said.write_text('\n'.join(f'number {i} of the texts' for i in range(30)))
  config = tiny_world.config(
    midtrain__text_file=str(said),
    midtrain__mixture__pointing=0.0,
    midtrain__mixture__sequence=0.0,
    midtrain__mixture__text=0.15,
    midtrain__steps=2,
  )
  result = midtrain.run(config, tiny_world.inputs(world, 'midtrain'), tmp_path)
  assert result['shares'].keys() == {'persona', 'caption', 'text'}
  assert result['packed']['tokens'].keys() == result['shares'].keys()
  assert result['metrics']['text_loss'] > 0


def test_a_task_without_a_share_is_left_out(world, tmp_path):
  config = tiny_world.config(
    midtrain__mixture__persona=0.0,
    midtrain__mixture__caption=0.0,
    midtrain__mixture__sequence=0.0,
    midtrain__steps=2,
  )
  result = midtrain.run(config, tiny_world.inputs(world, 'midtrain'), tmp_path)
  assert set(result['metrics']) == {'pointing_loss', 'score'}
  assert result['packed'] == result['popularity'] == {}
  assert result['shares'] == {'pointing': 1.0}


@pytest.mark.parametrize(
  ('mixture', 'message'),
  [
    (dict.fromkeys(TASKS, 0.0), r'no task has a share .*text_file'),
    ({'caption': -0.1}, r'mixture\.caption=-0\.1'),
  ],
)
def test_a_mixture_of_nothing_or_less_is_refused(mixture, message):
  changes = {f'midtrain__mixture__{k}': v for k, v in mixture.items()}
  with pytest.raises(ValueError, match=message):
    midtrain.shares(tiny_world.config(**changes).midtrain)


def test_new_rows_warm_up_only_where_a_backbone_is_pretrained():
  def steps(pretrained, **changes):
    changes = {f'midtrain__{name}': value for name, value in changes.items()}
    return midtrain.warm_steps(
      tiny_world.config(**changes).midtrain, pretrained
    )

  assert steps(False, steps=400, warm_rows=50) == 0
  assert steps(True, steps=400, warm_rows=50) == 50
  assert steps(True, steps=100, warm_rows=50) == 25
  assert steps(True, steps=400, warm_rows=50, init_from='somewhere') == 0


def test_a_warm_up_freezes_bits_and_resumes_across_its_border(
  world, tmp_path, monkeypatch
):
  """The world's policy, as if it were a pretrained backbone."""
  home = tmp_path / 'backbone'
  shutil.copytree(world['backbone'], home)
  shutil.copytree(world['midtrain'] / policy.PARAMS, home / policy.PARAMS)
  inputs = tiny_world.inputs(world | {'backbone': home}, 'midtrain')
  config = tiny_world.config(
    midtrain__steps=8,
    midtrain__warm_rows=5,
    midtrain__warmup=0,
    midtrain__eval_every=1,
    midtrain__eval_batches=1,
    midtrain__mixture__sequence=0.0,
    midtrain__mixture__persona=0.0,
    midtrain__mixture__caption=0.0,
  )
  # A quarter of the steps are of new rows alone: the first two.
  states, save = {}, checkpoint.Checkpointer.save

  def watch(self, step, state, *rest):
    states[step] = jax.device_get(state.params)
    save(self, step, state, *rest)
    if dies and step == 1:
      raise KeyboardInterrupt

  monkeypatch.setattr(checkpoint.Checkpointer, 'save', watch)
  dies = False
  result = midtrain.run(config, inputs, tmp_path / 'whole')
  assert result['warm_rows'] == 2
  whole = dict(states)
  states.clear()
  dies = True
  with pytest.raises(KeyboardInterrupt):
    midtrain.run(config, inputs, tmp_path / 'killed')
  dies = False
  assert midtrain.run(config, inputs, tmp_path / 'killed') == result
  assert sorted(states) == sorted(whole) == list(range(1, 9))
  for step in states:
    tiny.assert_trees_equal(states[step], whole[step])
  assert lines(tmp_path / 'killed') == lines(tmp_path / 'whole')

  # What was frozen has its bits; what was not moves.
  words = tiny_world.spec(world, config).vocabulary
  first = words.first_symbol
  for step, moves in ((2, False), (8, True)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole[step]):
      before = whole[1]
      for entry in path:
        before = before[entry.key]
      name = path[0].key
      if name == 'embedding':
        assert (leaf[first:] != before[first:]).any()
        assert (leaf[:first] != before[:first]).any() == moves
      elif name in ('layers', 'final_norm'):
        assert (leaf != before).any() == moves, path
