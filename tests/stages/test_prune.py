import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gr2_jax.pipeline import artifacts, checkpoint, reporting
from gr2_jax.policy import policy
from gr2_jax.serving import Reranker
from gr2_jax.stages import prune
from gr2_jax.studies import prune as prune_lib
from gr2_jax.train import pruning

from .. import tiny, tiny_world

pytestmark = pytest.mark.slow

CONFIG = dict(
  model__num_layers=3,
  prune__start='sft',
  prune__layers=2,
  prune__batch_size=8,
  prune__refill_size=8,
  prune__measured=16,
  prune__eval_slates=8,
  prune__eval_batch_size=8,
  prune__steps=3,
  prune__eval_every=2,
  prune__warmup=1,
)


@pytest.fixture(scope='module')
def start(world, tmp_path_factory):
  """A policy of three layers, of which the middle one does nothing."""
  home = tmp_path_factory.mktemp('start')
  spec = tiny_world.spec(world, tiny_world.config(**CONFIG))
  params = tiny.idle(tiny.params(spec.model), [1])
  checkpoint.save_params(home / policy.PARAMS, params)
  tiny_world.finish(home, 'sft')
  return home


def run(world, start, workdir, **changes):
  config = tiny_world.config(**CONFIG | changes)
  inputs = tiny_world.inputs(world, 'rl') | {'sft': start}
  return prune.run(config, inputs, workdir)


def test_the_idle_layer_goes_and_the_policy_is_as_it_was(
  world, start, tmp_path
):
  found = run(world, start, tmp_path, prune__steps=0)
  assert found['kept'] == [0, 2]
  ((*effects,),) = found['effects']
  assert effects[1] == pytest.approx(0.0, abs=1e-5)
  assert min(effects[0], effects[2]) > 1e-3
  spec = tiny_world.spec(world, tiny_world.config(**CONFIG))
  whole = spec.load_params(start, tiny_world.mesh())
  model = dataclasses.replace(spec.model, num_layers=2)
  left = dataclasses.replace(spec, model=model).load_params(
    tmp_path, tiny_world.mesh()
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x, np.asarray(y)[[0, 2]]),
    left['layers'],
    whole['layers'],
  )


def test_a_killed_run_keeps_its_layers_and_ends_bit_for_bit(
  world, start, tmp_path, monkeypatch
):
  wanted = run(world, start, tmp_path / 'whole')
  write = reporting.MetricsWriter.write

  def dying(self, step, metrics):
    if step == 2:
      raise KeyboardInterrupt
    write(self, step, metrics)

  with monkeypatch.context() as patch:
    patch.setattr(reporting.MetricsWriter, 'write', dying)
    with pytest.raises(KeyboardInterrupt):
      run(world, start, tmp_path / 'killed')
  with monkeypatch.context() as patch:  # What was measured is not again.
    patch.setattr(pruning, 'choose', None)
    assert run(world, start, tmp_path / 'killed') == wanted
  steps = reporting.read_metrics(tmp_path / 'whole' / 'metrics.jsonl')
  apart = [row['teacher_kl'] for row in steps if 'teacher_kl' in row]
  assert len(apart) == 3
  assert all('readout_kl' in row for row in steps if 'teacher_kl' in row)


def test_weights_that_teach_nothing_are_refused(world, start, tmp_path):
  with pytest.raises(ValueError, match=r'prune.kl_weight=0: must be above 0'):
    run(world, start, tmp_path, prune__kl_weight=0.0)
  with pytest.raises(ValueError, match=r'prune.readout_weight=-1.0: must not'):
    run(world, start, tmp_path, prune__readout_weight=-1.0)
  with pytest.raises(ValueError, match=r'prune.layers=3: must be'):
    run(world, start, tmp_path, prune__layers=3)


@pytest.fixture(scope='module')
def study(world):
  """The study, and the runs that it made, of policies of two layers."""
  root = world['rl'].parent
  before = set(root.iterdir())
  own = tiny_world.config(
    **CONFIG
    | dict(
      model__num_layers=2, study_prune__layers=(1,), study_prune__test_slates=8
    )
  )
  with artifacts.lock(root):
    home = artifacts.run_stage(own, 'study_prune', root, log=lambda _: None)
  yield home, own
  for path in set(root.iterdir()) - before:
    if path.is_dir():
      shutil.rmtree(path)


def test_the_study_compares_with_the_whole_policy(study):
  home, _ = study
  results = artifacts.read_results(home)
  whole, cut, distilled = results['rows']
  assert [row['layers'] for row in results['rows']] == [2, 1, 1]
  assert (cut['policy'], distilled['policy']) == ('cut', 'distilled')
  for measure in prune_lib.MEASURES:
    assert whole[f'{measure}_lost']['estimate'] == 0
    for row in (cut, distilled):
      lost = row[f'{measure}_lost']
      assert lost['low'] <= lost['estimate'] <= lost['high']
      np.testing.assert_allclose(
        lost['estimate'], whole[measure] - row[measure], atol=1e-6
      )
  assert cut['kept'] == distilled['kept']  # The same layers were measured.
  table = (home / prune_lib.TABLE).read_text()
  assert table.strip() == prune_lib.summary(results)


def test_a_pruned_policy_is_restored_and_served(study):
  home, own = study
  run, = (
    path for path in home.parent.glob('prune-*')
    if json.loads((path / 'config.json').read_text())['config']['prune'][
      'steps'
    ]
  )  # fmt: skip
  assert policy.form_of(run) == ('full', 1)
  restored = policy.restore(run, own.mesh)
  assert restored.spec.model.num_layers == 1
  leaves = jax.tree.leaves(restored.params['layers'])
  assert {leaf.shape[0] for leaf in leaves} == {1}
  service = Reranker.load(run, modes=('score',), largest_batch=8)
  items = list(restored.spec.catalog.item_ids[:4])
  (line,) = service.rank([{'history': [], 'candidates': items}], 'score')
  assert sorted(line['ranking']) == sorted(items)
