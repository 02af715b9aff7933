import dataclasses
import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import baselines as config_file
from configs import slates as slates_config
from gr2_jax.data import slates as slates_lib
from gr2_jax.pipeline import artifacts
from gr2_jax.stages import baselines
from gr2_jax.stages import slates as slates_stage

SEEDED = ('legacy', 'gbdt')


def settings(**kwargs) -> ConfigDict:
  config = ConfigDict({'baselines': config_file.section(test=True)})
  config.baselines.update_from_flattened_dict(
    {'gbdt.min_data_in_leaf': 20, 'gbdt.threads': 1} | kwargs
  )
  return config


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """A small world, whose true utilities are known."""
  directory = tmp_path_factory.mktemp('slates')
  data = slates_config.section(test=True)
  data.source = 'world'
  slates_stage.run(ConfigDict({'data': data}), {}, directory)
  return {'slates': directory}


@pytest.fixture(scope='module')
def finished(inputs, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, baselines.run(settings(), inputs, workdir)


def test_the_baselines_stand_in_their_order(finished):
  _, results = finished
  quality = {name: row['n@5'] for name, row in results['validation'].items()}
  assert quality['random'] < quality['incoming'] < quality['legacy']
  assert quality['incoming'] < quality['gbdt']
  assert max(quality['legacy'], quality['gbdt']) < quality['best'] < 1.0
  assert len(results['rounds']) == len(results['steps']) == 2
  json.loads(artifacts.dumps(results))


def test_scores_of_both_splits_with_padding_last(finished, inputs):
  workdir, _ = finished
  for split in baselines.SPLITS:
    slates = slates_lib.read(inputs['slates'], split)
    scores = baselines.read_scores(workdir, split)
    assert set(scores) == {'incoming', 'random', 'best', *SEEDED}
    for name, values in scores.items():
      leading = (2,) if name in SEEDED else ()
      assert values.shape == (*leading, *slates.candidates.shape), name
      assert values.dtype == np.float32
      assert (np.isneginf(values) == (slates.candidates < 0)).all(), name
    order = baselines.rankings(scores['incoming'], slates.count)
    np.testing.assert_array_equal(
      order, np.tile(np.arange(10), (len(slates), 1))
    )
    assert (scores['legacy'][0] != scores['legacy'][1]).any()
    assert (scores['gbdt'][0] != scores['gbdt'][1]).any()
    np.testing.assert_array_equal(scores['best'], slates.utility)


def test_a_killed_run_ends_bit_for_bit_like_a_whole_one(
  finished, inputs, tmp_path, monkeypatch
):
  whole, results = finished
  make_update = baselines.click_model.make_update

  def dying(model, optimizer, seed):
    real = make_update(model, optimizer, seed)

    def update(state, batch):
      if seed == 1 and int(state.step) == 50:
        raise KeyboardInterrupt
      return real(state, batch)

    return update

  with monkeypatch.context() as patch:
    patch.setattr(baselines.click_model, 'make_update', dying)
    with pytest.raises(KeyboardInterrupt):
      baselines.run(settings(), inputs, tmp_path)
  begun = []

  def counting(model, optimizer, seed):
    begun.append(seed)
    return make_update(model, optimizer, seed)

  monkeypatch.setattr(baselines.click_model, 'make_update', counting)
  monkeypatch.setattr(
    baselines.gbdt, 'fit', lambda *_: pytest.fail('fitted twice')
  )
  again = baselines.run(settings(), inputs, tmp_path)
  assert begun == [1]
  for name in (
    'legacy-1/metrics.jsonl', 'validation/scores.npz', 'test/scores.npz'
  ):  # fmt: skip
    assert (whole / name).read_bytes() == (tmp_path / name).read_bytes(), name
  assert again | {'seconds': 0} == results | {'seconds': 0}


def test_a_finished_run_trains_nothing_again(finished, inputs, monkeypatch):
  workdir, results = finished
  modules = ((baselines.gbdt, 'fit'), (baselines.click_model, 'init'))
  for module, name in modules:
    monkeypatch.setattr(module, name, lambda *_: pytest.fail('trained again'))
  again = baselines.run(settings(), inputs, workdir)
  assert again | {'seconds': 0} == results | {'seconds': 0}


def test_labels_of_test_decide_the_best_order_alone(
  inputs, tmp_path, monkeypatch
):
  config = settings(**{'seeds': 1, 'gbdt.rounds': 5, 'legacy.steps': 20})
  before = baselines.run(config, inputs, tmp_path / 'before')
  read = slates_lib.read

  def relabelled(directory, split):
    slates = read(directory, split)
    if split != 'test':
      return slates
    return dataclasses.replace(
      slates,
      grades=slates.grades[:, ::-1],
      utility=np.full_like(slates.utility, np.nan),
    )

  monkeypatch.setattr(baselines.slates_lib, 'read', relabelled)
  after = baselines.run(config, inputs, tmp_path / 'after')
  assert before | {'seconds': 0} == after | {'seconds': 0}
  first = baselines.read_scores(tmp_path / 'before', 'test')
  second = baselines.read_scores(tmp_path / 'after', 'test')
  grades = relabelled(inputs['slates'], 'test').grades
  np.testing.assert_array_equal(second.pop('best'), grades)
  for name, values in second.items():
    np.testing.assert_array_equal(values, first[name], name)


def test_validation_chooses_the_step_and_ends_the_training(inputs, tmp_path):
  config = settings(
    **{
      'seeds': 1, 'gbdt.rounds': 5, 'legacy.steps': 1000,
      'legacy.eval_every': 5, 'legacy.patience': 2,
      'legacy.learning_rate': 0.03,
    }
  )  # fmt: skip
  results = baselines.run(config, inputs, tmp_path)
  lines = (tmp_path / 'legacy-0' / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  name = 'validation/n@5'
  quality = {row['step']: row[name] for row in rows if name in row}
  chosen = max(quality, key=quality.get)
  assert results['steps'] == [chosen]
  assert max(quality) == chosen + 10
  np.testing.assert_allclose(
    results['validation']['legacy']['n@5'], quality[chosen], rtol=1e-6
  )
  # Killed after the last step: what validation chose is not the last state.
  (tmp_path / 'legacy-0' / 'scores.npz').unlink()
  again = baselines.run(config, inputs, tmp_path)
  assert again | {'seconds': 0} == results | {'seconds': 0}
  after = (tmp_path / 'legacy-0' / 'metrics.jsonl').read_text().splitlines()
  assert after == lines


def test_divergence_stops(inputs, tmp_path):
  config = settings(**{'legacy.learning_rate': 1e30, 'gbdt.rounds': 5})
  with pytest.raises(FloatingPointError, match='at step 20'):
    baselines.run(config, inputs, tmp_path)
  assert not (tmp_path / 'legacy-0' / 'scores.npz').exists()


def test_no_seeds_is_refused(tmp_path):
  with pytest.raises(ValueError, match='baselines.seeds=0'):
    baselines.run(settings(seeds=0), {'slates': pathlib.Path()}, tmp_path)


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=50)
def test_rankings_equal_a_sort_of_python(data):
  k = data.draw(st.integers(1, 6))
  value = st.sampled_from([-np.inf, -1.5, 0.0, 1.0, np.inf])
  row = st.lists(value, min_size=k, max_size=k)
  scores = np.array(data.draw(st.lists(row, min_size=1, max_size=4)))
  count = np.array([data.draw(st.integers(0, k)) for _ in scores])
  found = baselines.rankings(scores, count)
  assert found.dtype == np.int32
  for values, real, order in zip(scores, count, found, strict=True):
    expected = sorted(range(real), key=lambda i: -values[i])
    assert order.tolist() == [*expected, *range(real, k)]


def test_rankings_of_seeds_share_the_counts():
  scores = np.array([[[1.0, 2.0, 9.0], [0, 0, 1]], [[2, 1, 9], [1, 1, 0]]])
  found = baselines.rankings(scores, np.array([2, 3]))
  assert found.tolist() == [[[1, 0, 2], [2, 0, 1]], [[0, 1, 2], [0, 1, 2]]]


def test_rankings_read_no_score_of_padding():
  assert baselines.rankings([[1.0, 2.0, np.nan]], [2]).tolist() == [[1, 0, 2]]
  with pytest.raises(ValueError, match='1 scores of real candidates are NaN'):
    baselines.rankings([[1.0, np.nan, np.nan]], [2])
  with pytest.raises(ValueError, match=r'count has shape \(2,\)'):
    baselines.rankings(np.zeros((3, 4)), [1, 2])
