import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import tokenizer as config_file
from gr2_jax import checkpoint
from gr2_jax.models import semantic_ids
from gr2_jax.stages import tokenizer

ARRAYS = ('sids.npz', 'features.npy', 'sids.jsonl', 'metrics.jsonl')
COLOURS = ('red', 'blue', 'green', 'pink', 'black', 'white')
THINGS = ('shampoo', 'lipstick', 'brush', 'soap', 'perfume', 'mirror', 'cream')


def settings(**kwargs) -> ConfigDict:
  config = ConfigDict({'tokenizer': config_file.section(test=True)})
  config.tokenizer.update(
    dict(
      codebook_size=8, text_dim=16, hidden=(16,), latent=8, batch_size=32,
      pretrain_steps=150, steps=30, checkpoint_every=10, log_every=5,
      learning_rate=1e-2, warmup_steps=3,
    )
    | kwargs
  )  # fmt: skip
  return config


@pytest.fixture
def inputs(tmp_path):
  """A catalog of 42 texts; the first stands there five times."""
  items = [
    (f'{colour} {thing} for you', ['beauty', thing], 1990 + 5 * number)
    for number, colour in enumerate(COLOURS)
    for thing in THINGS
  ]
  write_catalog(tmp_path, [items[0]] * 4 + items)
  return {'slates': tmp_path}


def write_catalog(directory, items, item_ids=None):
  with (directory / 'catalog.jsonl').open('w') as file:
    for row, (title, categories, year) in enumerate(items):
      line = {
        'item_id': item_ids[row] if item_ids else f'x{row}',
        'title': title,
        'categories': categories,
        'year': year,
      }
      file.write(json.dumps(line) + '\n')


def test_every_item_gets_a_tuple_of_its_own(tmp_path, inputs):
  workdir = tmp_path / 'run'
  results = tokenizer.run(settings(), inputs, workdir)
  assert results['uniqueness'] == 1.0
  assert results['items'] == results['distinct'] == 46
  assert results['uniqueness_before_last_level'] < 1.0
  assert len(results['usage']) == len(results['dead_codes']) == 4
  assert results['reconstruction_r2'] > 0.3
  json.dumps(results)
  sids = semantic_ids.load(workdir)
  np.testing.assert_array_equal(sids.find(sids.codes), np.arange(46))
  # Items of the same text share all but the drawn level.
  assert len(np.unique(sids.codes[:5, :3], axis=0)) == 1
  rows = [json.loads(line) for line in (workdir / 'sids.jsonl').open()]
  assert rows[7] == {'item_id': 'x7', 'codes': sids.codes[7].tolist()}


def test_a_killed_run_ends_bit_for_bit_like_a_whole_one(
  tmp_path, inputs, monkeypatch
):
  whole = tokenizer.run(settings(), inputs, tmp_path / 'whole')
  update = tokenizer.rqvae.make_update

  def dying(*arguments):
    real = update(*arguments)

    def step(state, batch):
      if int(state.step) == 17:
        raise KeyboardInterrupt
      return real(state, batch)

    return step

  monkeypatch.setattr(tokenizer.rqvae, 'make_update', dying)
  with pytest.raises(KeyboardInterrupt):
    tokenizer.run(settings(), inputs, tmp_path / 'killed')
  monkeypatch.setattr(tokenizer.rqvae, 'make_update', update)
  monkeypatch.setattr(
    tokenizer.rqvae, 'init', lambda *_: pytest.fail('started from scratch')
  )
  again = tokenizer.run(settings(), inputs, tmp_path / 'killed')
  for name in ARRAYS:
    left, right = (tmp_path / run / name for run in ('whole', 'killed'))
    assert left.read_bytes() == right.read_bytes(), name
  del whole['seconds'], again['seconds']
  assert whole == again


def test_seed_changes_the_codes(tmp_path, inputs):
  runs = []
  for seed in (0, 1):
    tokenizer.run(settings(seed=seed), inputs, tmp_path / str(seed))
    runs.append(semantic_ids.load(tmp_path / str(seed)).codes)
  assert (runs[0] != runs[1]).any()


def test_fitted_last_level_cannot_part_equal_texts(tmp_path, inputs):
  config = settings(last_level='fitted', codebook='gradient')
  results = tokenizer.run(config, inputs, tmp_path / 'run')
  assert results['uniqueness'] < 1.0
  codes = semantic_ids.load(tmp_path / 'run').codes
  assert len(np.unique(codes[:5], axis=0)) == 1


def test_a_full_prefix_spills(tmp_path, inputs):
  write_catalog(tmp_path, [('the same', ['x'], 2000)] * 20)
  results = tokenizer.run(settings(), inputs, tmp_path / 'run')
  assert results['uniqueness'] == 1.0
  assert results['spilled'] == 12


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(levels=2, codebook_size=4), r'46 items do not fit in 4\^2 = 16'),
    (dict(last_level='random'), "tokenizer.last_level is 'random'"),
    (dict(levels=1), 'tokenizer.levels=1 leaves no level to fit'),
  ],
)
def test_a_config_that_cannot_fit_is_named(tmp_path, inputs, change, message):
  with pytest.raises(ValueError, match=message):
    tokenizer.run(settings(**change), inputs, tmp_path / 'run')


def test_a_duplicate_item_is_named(tmp_path, inputs):
  write_catalog(tmp_path, [('a', [], 0), ('b', [], 0)], ['same', 'same'])
  with pytest.raises(ValueError, match="item id 'same' occurs twice"):
    tokenizer.run(settings(), inputs, tmp_path / 'run')


def test_features_of_another_catalog_are_refused(tmp_path, inputs):
  (tmp_path / 'run').mkdir()
  np.save(tmp_path / 'run' / 'features.npy', np.zeros((3, 16)))
  with pytest.raises(ValueError, match=r'features\.npy: \(3, 16\)'):
    tokenizer.run(settings(), inputs, tmp_path / 'run')


def test_divergence_stops_and_saves_nothing(tmp_path, inputs):
  config = settings(learning_rate=1e30, pretrain_steps=0, warmup_steps=0)
  with pytest.raises(FloatingPointError, match='is nan at step'):
    tokenizer.run(config, inputs, tmp_path / 'run')
  with checkpoint.Checkpointer(tmp_path / 'run' / 'checkpoints') as saver:
    assert saver.restore({}) is None
