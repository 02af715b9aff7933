import functools
import json
import shutil

import numpy as np
import pytest

from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.stages import opd

from .. import tiny, tiny_world

pytestmark = pytest.mark.slow


def steps_of(workdir):
  rows = reporting.read_metrics(workdir / 'metrics.jsonl')
  return [row for row in rows if 'teacher_kl' in row]


def run(world, workdir, **changes):
  config = tiny_world.config(**{f'opd__{k}': v for k, v in changes.items()})
  inputs = tiny_world.inputs(world, 'rl') | {'midtrain': world['midtrain']}
  return opd.run(config, inputs, workdir)


def test_a_killed_run_ends_bit_for_bit_like_a_whole_one(
  world, tmp_path, monkeypatch
):
  options = dict(
    view='same', start='midtrain', policy=str(world['sft']), steps=5,
    eval_every=2,
  )  # fmt: skip
  wanted = run(world, tmp_path / 'whole', **options)
  write = reporting.MetricsWriter.write

  def dying(self, step, metrics):
    if step == 4:
      raise KeyboardInterrupt
    write(self, step, metrics)

  with monkeypatch.context() as patch:
    patch.setattr(reporting.MetricsWriter, 'write', dying)
    with pytest.raises(KeyboardInterrupt):
      run(world, tmp_path / 'killed', **options)
  assert run(world, tmp_path / 'killed', **options) == wanted
  config = tiny_world.config(**{f'opd__{k}': v for k, v in options.items()})
  one, two = (
    tiny_world.left(world, 'opd', tmp_path / name, config)
    for name in ('killed', 'whole')
  )
  assert one[1:] == two[1:]
  tiny.assert_trees_equal(one[0], two[0])


VIEWS = {
  'same': dict(start='midtrain', thinking=True),
  'privileged': dict(kl_kind='forward'),
  'thinking': dict(kl_kind='k3', thinking=False),
  'readout': dict(kl_kind='reverse'),
}


@pytest.fixture(scope='module')
def teacher(world):
  """An SFT that went somewhere, in its six steps."""
  config = tiny_world.config(
    sft__learning_rate=5e-2, sft__privileged=True, sft__thinking=False
  )
  root = world['sft'].parent
  with artifacts.lock(root):
    return artifacts.run_stage(config, 'sft', root, 0, lambda _: None)


@pytest.fixture(scope='module')
def runs(world, teacher, tmp_path_factory):
  @functools.lru_cache
  def get(view):
    workdir = tmp_path_factory.mktemp(view)
    result = run(
      world, workdir, view=view, policy=str(teacher), steps=20, eval_every=20,
      learning_rate=2e-2, warmup=2, kl_weight=30.0, **VIEWS[view],
    )  # fmt: skip
    return result, workdir

  return get


@pytest.mark.parametrize('view', VIEWS)
def test_the_student_comes_closer_to_its_teacher(runs, view):
  result, workdir = runs(view)
  rows = steps_of(workdir)
  assert [row['step'] for row in rows] == list(range(1, 21))
  apart = [row['teacher_kl'] for row in rows]
  assert apart[0] > 1e-3
  assert np.mean(apart[-5:]) < 0.7 * np.mean(apart[:3])
  assert all(row['sampler_gap'] < 1e-5 for row in rows)
  assert 0 <= result['metrics']['n@5'] <= 1


def test_the_teacher_of_another_shape_is_restored_with_its_own(
  world, runs, tmp_path
):
  """The same student, a teacher of another width: it is read, and other."""
  root = tmp_path / 'root'
  for name in ('slates', 'tokenizer'):
    (root / world[name].name).parent.mkdir(exist_ok=True)
    shutil.copytree(world[name], root / world[name].name)
  config = tiny_world.config(model__d_model=24, model__head_dim=12)
  with artifacts.lock(root):
    wide = artifacts.run_stage(config, 'midtrain', root, 0, lambda _: None)
  run(
    world, tmp_path / 'run', view='same', start='midtrain', policy=str(wide),
    steps=2, eval_every=2,
  )  # fmt: skip
  row, other = steps_of(tmp_path / 'run')[0], steps_of(runs('same')[1])[0]
  assert row['teacher_knows'] == 1
  assert row['teacher_kl'] != other['teacher_kl']
  assert row['reward'] == other['reward']  # The same student, the same draws.


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    (dict(view='above'), "opd.view='above'.*readout"),
    (dict(view='same', policy=''), 'name the folder'),
    (dict(view='thinking', thinking=True), 'opd.thinking=False'),
    (dict(view='readout', kl_kind='k3'), 'opd.kl_kind.*reverse, forward'),
    (dict(view='thinking', thinking=False, kl_kind='k9'), 'opd.kl_kind.*k1'),
    (dict(kl_weight=0.0), 'opd.kl_weight'),
    (dict(view='whole'), 'opd.context, such as memory:16'),
    (dict(context='last'), "context 'last', part 'last'"),
    (dict(context='memory:9'), 'prompt.num_memory=4'),
    (dict(refill_size=3), 'opd.refill_size=3 does not divide opd.batch_size'),
  ],
)
def test_what_cannot_be_is_named(world, tmp_path, changes, match):
  with pytest.raises(ValueError, match=match):
    run(world, tmp_path, **changes)


def test_a_teacher_must_be_a_finished_policy_of_the_same_items(world, tmp_path):
  named = functools.partial(run, world, tmp_path, view='same')
  with pytest.raises(artifacts.ArtifactError, match='config.json: missing'):
    named(policy=str(tmp_path / 'nowhere'))
  with pytest.raises(artifacts.ArtifactError, match="'traces', which leaves"):
    named(policy=str(world['traces']))
  other = tmp_path / 'other'
  shutil.copytree(world['sft'], other)
  found = json.loads((other / 'config.json').read_text())
  found['inputs']['tokenizer'] = 'tokenizer-00000000'
  (other / 'config.json').write_text(json.dumps(found))
  with pytest.raises(artifacts.ArtifactError, match='tokenizer-00000000'):
    named(policy=str(other))
  (other / 'results.json').unlink()
  with pytest.raises(artifacts.ArtifactError, match='results.json: missing'):
    named(policy=str(other))
