import json

import numpy as np
import pytest

from configs import study_hacking as recipe
from gr2_jax.pipeline import artifacts
from gr2_jax.studies import hacking

from .. import tiny_world

pytestmark = pytest.mark.slow

CONFIG = dict(
  study_hacking__orders=('shuffled',),
  study_hacking__rewards=('auc+ndcg',),
  study_hacking__gates=('none', 'v2'),
  study_hacking__test_slates=8,
)


@pytest.fixture(scope='module')
def study(world):
  root = world['rl'].parent
  before = set(root.glob('rl-*'))
  config = tiny_world.config(**CONFIG)
  with artifacts.lock(root):
    directory = artifacts.run_stage(
      config, 'study_hacking', root, log=lambda _: None
    )
  made = {path.name for path in set(root.glob('rl-*')) - before}
  return directory, artifacts.read_results(directory), made


def test_a_run_that_is_there_is_not_made_again(world, study):
  directory, _, made = study
  assert len(made) == 1
  measured = {path.stem for path in directory.glob('*.npz')}
  assert measured == {*made, world['rl'].name, world['sft'].name}


def test_the_study_says_what_became_of_each_policy(study):
  _, results, _ = study
  assert set(results['start']) == {'shuffled'}
  assert [(c['reward'], c['gate']) for c in results['cells']] == [
    ('auc+ndcg', 'none'),
    ('auc+ndcg', 'v2'),
  ]
  for cell in [*results['cells'], results['start']['shuffled']]:
    low, high = cell['n@5_gain_ci']
    assert low <= cell['n@5_gain'] <= high
    np.testing.assert_allclose(sum(cell['first_pick']), 1, atol=1e-6)
    for name in ('copied', 'top3_unchanged', 'order_sensitivity', 'n@5'):
      assert 0 <= cell[name] <= 1


def test_the_table_has_a_row_for_each_and_the_figure_is_a_picture(study):
  directory, results, _ = study
  table = (directory / hacking.TABLE).read_text()
  assert table.strip() == hacking.summary(results)
  rows = [line for line in table.splitlines() if 'shuffled' in line]
  assert len(rows) == 3
  assert '(start)' in rows[0]
  picture = (directory / hacking.FIGURE).read_bytes()
  assert picture[:4] == b'\x89PNG'


def test_curves_average_steps_and_keep_seeds_apart():
  rows = [{'step': s, 'reward': float(s)} for s in range(1, 42)]
  other = [{'step': s, 'reward': 2.0 * s} for s in range(1, 42)]
  rows.append({'step': 42, 'validation/n@5': 0.5})
  steps, values = hacking._curve([rows, other], 'reward')
  np.testing.assert_allclose(steps, np.arange(1.5, 41, 2))
  np.testing.assert_allclose(values, [steps, 2 * steps])
  assert hacking._rise([rows, other]) == np.mean([33, 66])


def test_the_recipe_names_fields_that_exist():
  config = recipe.get_config('dataset=world,seeds=3')
  assert config.stage == 'study_hacking'
  assert config.rl.selection_metric == 'last'
  assert config.sft.rank_by == 'trace'
  assert list(config.seeds) == [0, 1, 2]
  json.dumps(config.to_dict())
