import numpy as np
import pytest

from gr2_jax import reporting
from gr2_jax.data import prompts
from gr2_jax.data import slates as slates_lib
from gr2_jax.stages import midtrain, rl, sft, training

from .. import tiny, tiny_world

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
  start = training._start

  def watching(*arguments):
    found = start(*arguments)
    begun.append(found[2])
    return found

  monkeypatch.setattr(training, '_start', watching)
  result = run(config, tiny_world.inputs(world, stage), tmp_path)
  assert begun == [4]
  found, step, meta = tiny_world.left(world, stage, tmp_path)
  wanted, *rest = tiny_world.left(world, stage, world[stage])
  assert [step, meta] == rest
  assert result == meta['best'] | {'stopped': 'no'}
  tiny.assert_trees_equal(found, wanted)
  assert lines(tmp_path) == lines(world[stage])
  assert {row['step'] for row in lines(tmp_path)} >= {1, 2, 3, 4, 5, 6}


@pytest.fixture(scope='module')
def setup(world):
  return tiny_world.setup(world)


@pytest.fixture(scope='module')
def render(setup):
  return midtrain.renderers(setup, tiny_world.config().midtrain)


def test_pointing_sorts_the_candidates_by_the_named_column(
  world, setup, render
):
  words, prompter = setup.vocabulary, setup.prompter
  for index in range(5):
    slate = slates_lib.source(world['slates'], 'train')[index]
    row = render['pointing'](slate, np.random.default_rng(index))
    order = prompts.presentation(
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


def test_a_sequence_is_the_last_items_of_a_history(world, setup, render):
  slate = slates_lib.source(world['slates'], 'train')[0]
  row = render['sequence'](slate, None)
  items = slate['history'][: int(slate['history_length'])][-3:]
  sids = setup.prompter.items['sid']
  wanted = [setup.vocabulary.control['<next>']]
  for item in items:
    wanted += sids[item]
  assert row['completion'][0, : len(wanted)].tolist() == wanted
  assert row['weights'][0].sum() == len(wanted)
  assert row['prompt'].tolist()[: int(row['prompt_length'])] == [1]
  assert row['count'] == 0


def test_captions_go_both_ways(setup, render):
  caption = setup.vocabulary.control['<caption>']
  sid, title = (list(setup.prompter.items[k][7]) for k in ('sid', 'title'))
  found = set()
  for seed in range(8):
    ids = render['caption'](7, np.random.default_rng(seed))['completion'][0]
    both = ids.tolist()[: 1 + len(sid) + len(title)]
    forward = both == [caption, *sid, *title][: len(ids)]
    assert forward or both == [caption, *title, *sid][: len(ids)]
    found.add(forward)
  assert found == {True, False}


def test_held_out_losses_are_of_every_task_of_the_mixture(world):
  rows = reporting.read_metrics(world['midtrain'] / 'metrics.jsonl')
  rows = [row for row in rows if 'validation/score' in row]
  shares = tiny_world.config().midtrain.mixture.to_dict()
  for row in rows:
    mean = sum(
      share * row[f'validation/{task}_loss'] for task, share in shares.items()
    )
    np.testing.assert_allclose(
      row['validation/score'], -mean / sum(shares.values()), rtol=1e-5
    )
  assert rows[-1]['validation/score'] > rows[0]['validation/score']


def test_a_task_without_a_share_is_left_out(world, tmp_path):
  config = tiny_world.config(midtrain__mixture__caption=0.0, midtrain__steps=2)
  result = midtrain.run(config, tiny_world.inputs(world, 'midtrain'), tmp_path)
  assert set(result['metrics']) == {'pointing_loss', 'sequence_loss', 'score'}
