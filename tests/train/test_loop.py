import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from gr2_jax.distributed import sharding
from gr2_jax.pipeline import checkpoint, reporting
from gr2_jax.prompts import examples
from gr2_jax.train import learner, loop

from .. import tiny

RISING = [0.1 * i for i in range(1, 9)]


def config(**changes):
  own = ConfigDict(
    dict(steps=8, eval_every=1, learning_rate=1e-3, warmup=1, weight_decay=0.0,
         max_grad_norm=1.0, patience=0, reward_divergence_patience=0,
         resume='', init_from='')
  )  # fmt: skip
  own.update(changes)
  return own


def render(record, rng):
  return {'index': np.int32(record), 'draw': rng.random()}


@pytest.fixture(scope='module')
def spec():
  return tiny.spec()


@pytest.fixture(scope='module')
def fit(spec):
  def run(
    workdir, held_out, rewards=RISING, die_at=None, start_counts=False,
    **changes,
  ):  # fmt: skip
    """A loop whose read-out counts the steps; returns (result, steps taken)."""
    own = config(**changes)
    iterator = examples.iterate(examples.dataset(range(9), render, 3, 0))
    taken = []

    def take_step(state, frozen, step):
      assert frozen == {}
      row = next(iterator)
      if step == die_at:
        raise KeyboardInterrupt
      taken.append(step)
      params = state.params | {
        'readout': state.params['readout'] + 1,
        'embedding': state.params['embedding'] * (1 + 0.1 * row['draw'].mean()),
      }
      state = state.replace(step=state.step + 1, params=params)
      metrics = {'drawn': row['index'].sum()}
      if rewards:
        metrics['reward'] = rewards[step - 1]
      return state, metrics

    result = loop.fit(
      loop.LoopOptions.from_config(own),
      spec=spec,
      mesh=tiny.one_device(),
      workdir=workdir,
      seed=0,
      optimizer=learner.make_optimizer(
        learner.OptimizerOptions.from_config(own)
      ),
      take_step=take_step,
      iterator=iterator,
      validate=lambda params: {'n@5': held_out[int(params['readout'][0])]},
      selection_metric='n@5',
      start_counts=start_counts,
    )
    return result, taken

  return run


def test_a_data_set_is_made_of_the_rows_of_this_process(spec, monkeypatch):
  whole = examples.dataset(range(12), render, 4, seed=3)
  own = loop.dataset(tiny.one_device(), range(12), render, 4, seed=3)
  monkeypatch.setattr(sharding, 'local_rows', lambda *_: np.array([1, 3]))
  half = loop.dataset(tiny.one_device(), range(12), render, 4, seed=3)
  for i in range(6):
    for name, rows in whole[i].items():
      np.testing.assert_array_equal(own[i][name], rows)
      np.testing.assert_array_equal(half[i][name], rows[[1, 3]])


def record(workdir, spec):
  """(parameters, last state, the record beside it)."""
  with sharding.activate(tiny.one_device()):
    state, _ = learner.init_state(
      spec.model,
      learner.make_optimizer(learner.OptimizerOptions.from_config(config())),
      jax.random.key(0),
      tiny.one_device(),
    )
  with checkpoint.Checkpointer(workdir / 'checkpoints') as saved:
    state, step, found = saved.restore(state)
  params = spec.load_params(workdir, tiny.one_device())
  return jax.device_get({'params': params, 'state': state}), step, found


def lines(workdir):
  rows = reporting.read_metrics(workdir / 'metrics.jsonl')
  return [
    {k: v for k, v in row.items() if k != 'steps_per_second'} for row in rows
  ]


def history(held_out, rewards=None):
  rewards = rewards or [None] * len(held_out)
  return [
    {'step': i, 'held_out': h, 'reward': r}
    for i, (h, r) in enumerate(zip(held_out, rewards, strict=True))
  ]


@pytest.mark.parametrize(
  ('held_out', 'rewards', 'patience', 'divergence', 'wanted'),
  [
    ([0.5], [0.1], 1, 1, 'no'),
    ([0.5, 0.4, 0.3], None, 0, 0, 'no'),
    ([0.5, 0.4], None, 2, 0, 'no'),
    ([0.5, 0.4, 0.45], None, 2, 0, 'patience'),
    ([0.5, 0.4, 0.6], None, 2, 0, 'no'),
    ([0.5, 0.6, 0.4, 0.3], None, 2, 0, 'patience'),
    ([0.5, 0.5, 0.5], None, 2, 0, 'patience'),  # A tie is no new best.
    ([0.5, 0.4, 0.3], [1, 2, 3], 0, 2, 'divergence'),
    ([0.5, 0.4, 0.3], [1, 2, 2], 0, 2, 'no'),  # The reward stood still.
    ([0.5, 0.4, 0.4], [1, 2, 3], 0, 2, 'no'),  # The ranking did.
    ([0.5, 0.4], [1, 2], 0, 2, 'no'),  # Too early.
    ([0.1, 0.5, 0.4, 0.3], [9, 1, 2, 3], 0, 2, 'divergence'),
    ([0.5, 0.4, 0.3], [None, 2, 3], 0, 2, 'no'),  # Before the first step.
    ([0.5, 0.4, 0.3], None, 0, 2, 'no'),
    ([0.5, 0.4, 0.3], [1, 2, 3], 2, 2, 'divergence'),
  ],
)
def test_when_to_stop(held_out, rewards, patience, divergence, wanted):
  found = loop.stop_reason(history(held_out, rewards), patience, divergence)
  assert found == wanted


HELD_OUT = [0.0, 0.1, 0.3, 0.2, 0.25, 0.9, 0.9, 0.9, 0.9]


def test_patience_ends_a_run_and_its_rerun_trains_no_more(fit, spec, tmp_path):
  result, taken = fit(tmp_path, HELD_OUT, patience=2)
  assert taken == [1, 2, 3, 4]
  assert result == {
    'step': 2,
    'metrics': {'n@5': 0.3},
    'stopped': 'patience',
  }
  found, step, kept = record(tmp_path, spec)
  assert step == 4
  assert kept['stopped'] == 'patience'
  assert float(found['params']['readout'][0]) == 2.0
  before = lines(tmp_path)
  assert [row['step'] for row in before if 'drawn' in row] == [1, 2, 3, 4]
  assert fit(tmp_path, HELD_OUT, patience=2) == (result, [])
  assert lines(tmp_path) == before


def test_a_rising_reward_on_a_falling_ranking_ends_a_run(fit, tmp_path):
  held_out = [0.0, 0.4, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
  result, taken = fit(tmp_path, held_out, reward_divergence_patience=2)
  assert taken == [1, 2, 3, 4]
  assert result['stopped'] == 'divergence'
  assert result['step'] == 2
  result, taken = fit(
    tmp_path / 'falling',
    held_out,
    rewards=RISING[::-1],
    reward_divergence_patience=2,
  )
  assert (result['stopped'], len(taken)) == ('no', 8)
  result, taken = fit(
    tmp_path / 'none', held_out, rewards=None, reward_divergence_patience=2
  )
  assert (result['stopped'], len(taken)) == ('no', 8)


@pytest.mark.parametrize('die_at', [2, 5, 6])
def test_a_killed_run_stops_where_the_whole_one_does(
  fit, spec, tmp_path, die_at
):
  held_out = [0.1, 0.1, 0.6, 0.0, 0.5, 0.0, 0.4, 0.9, 0.9]
  options = dict(
    eval_every=2, patience=2, reward_divergence_patience=2, start_counts=True
  )
  whole, taken = fit(tmp_path / 'whole', held_out, **options)
  assert taken == [1, 2, 3, 4, 5, 6]
  assert (whole['step'], whole['stopped']) == (2, 'divergence')
  with pytest.raises(KeyboardInterrupt):
    fit(tmp_path / 'killed', held_out, die_at=die_at, **options)
  result, rest = fit(tmp_path / 'killed', held_out, **options)
  assert rest[0] == (die_at - 1) // 2 * 2 + 1
  assert result == whole
  found, wanted = (record(tmp_path / w, spec) for w in ('killed', 'whole'))
  assert found[1:] == wanted[1:]
  tiny.assert_trees_equal(found[0], wanted[0])
  assert lines(tmp_path / 'killed') == lines(tmp_path / 'whole')
  # The reward of a validation is the mean since the one before.
  kept = wanted[2]['history']
  assert [entry['step'] for entry in kept] == [0, 2, 4, 6]
  assert kept[0]['reward'] is None
  np.testing.assert_allclose(
    [entry['reward'] for entry in kept[1:]], [0.15, 0.35, 0.55]
  )


def test_the_first_step_that_is_not_finite_ends_a_run(fit, spec, tmp_path):
  rewards = [0.1, 0.2, np.nan, 0.4]
  with pytest.raises(FloatingPointError, match='step 3'):
    fit(tmp_path, HELD_OUT, rewards=rewards, steps=4, eval_every=2)
  assert record(tmp_path, spec)[1] == 2


def test_without_a_step_the_start_is_left_as_it_was(fit, spec, tmp_path):
  result, taken = fit(tmp_path, [0.5], steps=0)
  assert taken == []
  assert result['step'] == 0
  found = spec.load_params(tmp_path, tiny.one_device())
  start, _ = learner.init_state(
    spec.model,
    learner.make_optimizer(learner.OptimizerOptions.from_config(config())),
    jax.random.key(0),
    tiny.one_device(),
  )
  tiny.assert_trees_equal(found, start.params)
