import numpy as np
import pytest

from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.pipeline import checkpoint, reporting
from gr2_jax.stages import sft, traces
from gr2_jax.train import loop

from .. import tiny, tiny_world


@pytest.fixture(scope='module')
def spec(world):
  return tiny_world.spec(world)


def rows(world, spec, **changes):
  """Records, their slates, and what is rendered of them."""
  config = tiny_world.config(**changes)
  render = sft.renderer(spec, config)
  kept = records.Records(world['traces'] / traces.ACCEPTED)
  slates = slates_lib.SlateSource(world['slates'], 'train')
  for i in range(6):
    trace = kept[i]
    named = trace['ranking'][:3] + spec.grammar.slot_base
    trace = trace | {'reasoning': named}  # As long ones end; these are cut.
    slate = slates[int(trace['slate'])]
    rng = np.random.default_rng(i)
    yield trace, slate, render({'trace': trace, 'slate': slate}, rng)


@pytest.mark.parametrize('rank_by', ['trace', 'readout'])
def test_a_trace_is_learned_with_and_without_its_reasoning(
  world, spec, rank_by
):
  words, prompter = spec.vocabulary, spec.prompter
  for trace, slate, row in rows(world, spec, sft__rank_by=rank_by):
    grades = row['grades'][:5]
    places = row['prompt'][row['slots'][:5]] - words.slot_base
    assert places.tolist() == [0, 1, 2, 3, 4]
    thinking, direct = row['completion'].tolist()
    n = len(trace['reasoning'])
    assert thinking[0] == words.control['<think>']
    assert thinking[n + 1] == words.control['</think>']
    assert direct[0] == words.control['<answer>']
    answer = direct[1:6]
    assert direct[6] == words.eos
    assert thinking[n + 2 : n + 8] == [*answer, words.eos]
    assert thinking[1 : n + 1] == answer[:3]
    slots = np.array(answer) - words.slot_base
    # The teacher's order, told by the labels of what it ranked.
    np.testing.assert_array_equal(
      grades[slots], slate['grades'][trace['ranking']]
    )
    sft = tiny_world.config().sft
    l_r, l_o = sft.reasoning_weight, sft.ranking_weight
    own = 0.0 if rank_by == 'readout' else l_o
    weights = [0.0, *[l_r] * (n + 1), *[own] * 5, l_o]
    np.testing.assert_allclose(row['weights'][0, : n + 8], weights)
    np.testing.assert_allclose(row['weights'][1, :7], [0, *[own] * 5, l_o])
    assert not row['weights'][0, n + 8 :].any()
    assert not row['weights'][1, 7:].any()
    by_readout = rank_by == 'readout'
    assert row['rank_by_readout'].tolist() == [by_readout] * 2
    if by_readout:
      assert row['answer_at'].tolist() == [n + 2, 1]
    assert row['completion'].shape[1] == 1 + prompter.thinking_tokens


def test_the_best_step_on_validation_is_what_is_left(world):
  _, _, meta = tiny_world.left(world, 'sft', world['sft'])
  found = {
    row['step']: row['validation/n@5']
    for row in reporting.read_metrics(world['sft'] / 'metrics.jsonl')
    if 'validation/n@5' in row
  }
  assert set(found) == {2, 4, 6}
  assert meta['best']['step'] == max(found, key=found.get)
  assert meta['best']['metrics']['n@5'] == max(found.values())
  assert meta['stopped'] == loop.NOT_STOPPED


def test_training_starts_from_the_stage_before(world, tmp_path):
  config = tiny_world.config(sft__steps=2, sft__learning_rate=1e-12)
  sft.run(config, tiny_world.inputs(world, 'sft'), tmp_path)
  spec = tiny_world.spec(world, config)
  tiny.assert_trees_close(
    spec.load_params(tmp_path, tiny_world.mesh()),
    spec.load_params(world['midtrain'], tiny_world.mesh()),
    1e-9,
  )
  config = tiny_world.config(
    sft__steps=2, sft__learning_rate=1e-12, sft__init_from=str(world['rl'])
  )
  sft.run(config, tiny_world.inputs(world, 'sft'), tmp_path / 'other')
  tiny.assert_trees_close(
    spec.load_params(tmp_path / 'other', tiny_world.mesh()),
    spec.load_params(world['rl'], tiny_world.mesh()),
    1e-9,
  )


def test_resume_goes_on_from_another_run_and_leaves_parameters(
  world, tmp_path, monkeypatch
):
  begun = []
  start = loop._start

  def watching(*arguments):
    found = start(*arguments)
    begun.append(found[2])
    return found

  monkeypatch.setattr(loop, '_start', watching)
  config = tiny_world.config(
    sft__steps=8, sft__resume=str(world['sft'] / 'checkpoints')
  )
  result = sft.run(config, tiny_world.inputs(world, 'sft'), tmp_path)
  assert begun == [6]
  # The other run's best must not hide that this one has chosen nothing.
  assert result['step'] == 8
  found, step, meta = tiny_world.left(world, 'sft', tmp_path, config)
  assert step == 8
  assert [entry['step'] for entry in meta['history']] == [8]
  tiny.assert_trees_equal(found['params'], found['state'].params)


def test_a_resume_that_cannot_be_says_why(world, tmp_path):
  inputs = tiny_world.inputs(world, 'sft')
  config = tiny_world.config(sft__resume=str(tmp_path / 'nothing'))
  with pytest.raises(ValueError, match='no checkpoint there'):
    sft.run(config, inputs, tmp_path / 'a')
  config = tiny_world.config(sft__resume=str(world['sft'] / 'checkpoints'))
  with pytest.raises(ValueError, match='is at step 6.*steps=6 leaves nothing'):
    sft.run(config, inputs, tmp_path / 'b')


def test_divergence_stops_before_the_checkpoint(world, tmp_path):
  config = tiny_world.config(sft__learning_rate=1e30)
  with pytest.raises(FloatingPointError, match='step'):
    sft.run(config, tiny_world.inputs(world, 'sft'), tmp_path)
  with checkpoint.Checkpointer(tmp_path / 'checkpoints') as saved:
    found = saved.restore({})
  assert found is None


def test_too_few_traces_are_an_error_that_says_so(world, tmp_path):
  records.write(tmp_path / traces.ACCEPTED, [])
  inputs = tiny_world.inputs(world, 'sft') | {'traces': tmp_path}
  with pytest.raises(ValueError, match='0 examples are fewer than'):
    sft.run(tiny_world.config(), inputs, tmp_path / 'run')
