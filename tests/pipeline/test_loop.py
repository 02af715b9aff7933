import jax.numpy as jnp
import pytest

from gr2_jax.pipeline import checkpoint, loop, reporting


def run(workdir, die_at=None, stop_at=None, **changes):
  """Counts up to `steps`; returns the last state and the evaluated steps."""
  evaluated = []

  def take_step(state, step):
    if step == die_at:
      raise KeyboardInterrupt
    state = {'sum': state['sum'] + step}
    return state, state

  def evaluate(state, step):
    evaluated.append(step)
    return loop.Evaluation(state, {'evaluated': step})

  with checkpoint.Checkpointer(workdir / 'checkpoints') as checkpoints:
    start = {'sum': jnp.int32(0)}
    state, done, _ = checkpoints.restore(start) or (start, 0, {})
    options = dict(steps=7, eval_every=3, log_every=2) | changes
    state = loop.run(
      'count', workdir, checkpoints, state=state, done=done,
      take_step=take_step, evaluate=evaluate, meta=lambda: {'n': 1},
      stopped=lambda step: step == stop_at, **options,
    )  # fmt: skip
  return int(state['sum']), evaluated


def rows(workdir):
  return reporting.read_metrics(workdir / 'metrics.jsonl')


def test_the_last_step_and_every_third_are_evaluated(tmp_path):
  assert run(tmp_path) == (28, [3, 6, 7])
  logged = [row['step'] for row in rows(tmp_path) if 'sum' in row]
  assert logged == [2, 3, 4, 6, 7]
  assert [r['step'] for r in rows(tmp_path) if 'evaluated' in r] == [3, 6, 7]


def test_a_killed_run_ends_as_the_whole_one(tmp_path):
  whole = run(tmp_path / 'whole')
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / 'killed', die_at=5)
  assert run(tmp_path / 'killed') == (whole[0], [6, 7])
  assert rows(tmp_path / 'killed') == rows(tmp_path / 'whole')


def test_the_start_is_evaluated_where_it_counts(tmp_path):
  assert run(tmp_path, evaluate_start=True, steps=0) == (0, [0])
  assert rows(tmp_path) == [{'step': 0, 'evaluated': 0}]


def test_a_run_stops_where_it_should(tmp_path):
  assert run(tmp_path, stop_at=3) == (6, [3])


def test_the_first_metric_that_is_not_finite_ends_a_run(tmp_path):
  def diverge(state, step):
    return state, {'loss': jnp.float32(jnp.nan if step == 2 else 0.0)}

  with (
    checkpoint.Checkpointer(tmp_path / 'checkpoints') as checkpoints,
    pytest.raises(FloatingPointError, match='step 2'),
  ):
    loop.run(
      'diverge', tmp_path, checkpoints, state=jnp.int32(0), done=0, steps=4,
      eval_every=2, take_step=diverge, meta=dict,
      evaluate=lambda state, step: loop.Evaluation(state, {}),
    )  # fmt: skip
