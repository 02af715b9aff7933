import json

import jax
import numpy as np
import pytest

from gr2_jax.data import slates
from gr2_jax.distributed import sharding
from gr2_jax.pipeline import checkpoint, reporting
from gr2_jax.semantic_ids import assignment, rqvae, training
from gr2_jax.semantic_ids import ids as ids_lib
from gr2_jax.stages import tokenizer

from .. import tiny_tokenizer

ARRAYS = ('sids.npz', 'features.npy', 'sids.jsonl', 'metrics.jsonl')


@pytest.fixture
def inputs(tmp_path):
  """A catalog of 42 texts; the first stands there five times."""
  return tiny_tokenizer.write_catalog(
    tmp_path, [tiny_tokenizer.ITEMS[0]] * 4 + tiny_tokenizer.ITEMS
  )


def stepping(real, at, otherwise):
  """`rqvae.make_update` whose step calls a function at a step."""

  def make(*arguments):
    update = real(*arguments)

    def step(state, batch):
      if int(state.step) == at:
        otherwise()
      return update(state, batch)

    return step

  return make


# --------------------------------------------------------------- A whole run


def test_every_item_gets_a_tuple_of_its_own(tmp_path, inputs):
  workdir = tmp_path / 'run'
  results = tokenizer.run(
    tiny_tokenizer.settings(pretrain_steps=150), inputs, workdir
  )
  assert results['uniqueness'] == 1.0
  assert results['items'] == results['distinct'] == 46
  assert results['uniqueness_before_last_level'] < 1.0
  assert len(results['usage']) == len(results['dead_codes']) == 4
  assert results['reconstruction_r2'] > 0.3
  json.dumps(results)
  sids = ids_lib.load(workdir)
  np.testing.assert_array_equal(sids.find(sids.codes), np.arange(46))
  # Items of the same text share all but the drawn level.
  assert len(np.unique(sids.codes[:5, :3], axis=0)) == 1
  rows = [json.loads(line) for line in (workdir / 'sids.jsonl').open()]
  assert rows[7] == {'item_id': 'x7', 'codes': sids.codes[7].tolist()}
  assert (workdir / 'sids.parquet').is_file()


def test_a_killed_run_ends_bit_for_bit_like_a_whole_one(
  tmp_path, inputs, monkeypatch
):
  whole = tokenizer.run(tiny_tokenizer.settings(), inputs, tmp_path / 'whole')
  # Between two checkpoints; and once the parameters of step 20 are written,
  # but not its checkpoint.
  with monkeypatch.context() as patch:
    patch.setattr(
      rqvae, 'make_update', stepping(rqvae.make_update, 17, tiny_tokenizer.die)
    )
    with pytest.raises(KeyboardInterrupt):
      tokenizer.run(tiny_tokenizer.settings(), inputs, tmp_path / 'killed')
  monkeypatch.setattr(
    rqvae, 'init', lambda *_: pytest.fail('started from scratch')
  )
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, 'save', tiny_tokenizer.die)
    with pytest.raises(KeyboardInterrupt):
      tokenizer.run(tiny_tokenizer.settings(), inputs, tmp_path / 'killed')
  again = tokenizer.run(tiny_tokenizer.settings(), inputs, tmp_path / 'killed')
  for name in ARRAYS:
    left, right = (tmp_path / run / name for run in ('whole', 'killed'))
    assert left.read_bytes() == right.read_bytes(), name
  stage, mesh = (
    tiny_tokenizer.settings().tokenizer,
    sharding.make_mesh(),
  )
  params = [
    training.load(stage, tmp_path / run / 'params', 16, mesh).params
    for run in ('whole', 'killed')
  ]
  jax.tree.map(np.testing.assert_array_equal, *params)
  del whole['seconds'], again['seconds']
  assert whole == again


def test_a_run_killed_after_its_training_only_names(
  tmp_path, inputs, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(training, 'assign_ids', tiny_tokenizer.die)
    with pytest.raises(KeyboardInterrupt):
      tokenizer.run(tiny_tokenizer.short(), inputs, tmp_path / 'run')
  monkeypatch.setattr(
    rqvae, 'make_update', lambda *_: lambda *_: pytest.fail('trained again')
  )
  results = tokenizer.run(tiny_tokenizer.short(), inputs, tmp_path / 'run')
  assert results['uniqueness'] == 1.0


def uniqueness_then_r2(found):
  return round(found['uniqueness'], 3), found['r2']


def worst_r2(found):
  return -found['r2']


@pytest.mark.parametrize('merit', [uniqueness_then_r2, worst_r2])
def test_the_best_checkpoint_is_chosen(tmp_path, inputs, monkeypatch, merit):
  states, real = {}, rqvae.make_update

  def make(*arguments):
    update = real(*arguments)

    def step(state, batch):
      state, metrics = update(state, batch)
      states[int(state.step)] = state
      return state, metrics

    return step

  monkeypatch.setattr(rqvae, 'make_update', make)
  if merit is worst_r2:  # Training improves it: an early step is the best.
    monkeypatch.setattr(training, '_merit', merit)
  config = tiny_tokenizer.settings(learning_rate=0.05, checkpoint_every=5)
  results = tokenizer.run(config, inputs, tmp_path / 'run')
  measured = [
    row
    for row in reporting.read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    if 'catalog/r2' in row
  ]
  assert [row['step'] for row in measured] == [5, 10, 15, 20, 25, 30]
  best = max(
    measured,
    key=lambda row: merit(
      {name: row[f'catalog/{name}'] for name in ('uniqueness', 'r2')}
    ),
  )
  assert merit is not worst_r2 or best['step'] < 30
  assert results['step'] == best['step']
  assert results['reconstruction_r2'] == best['catalog/r2']
  chosen = training.load(
    config.tokenizer, tmp_path / 'run' / 'params', 16,
    sharding.make_mesh(),
  )  # fmt: skip
  np.testing.assert_array_equal(
    chosen.params['vectors'], states[best['step']].codebooks['vectors']
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    chosen.params['networks'],
    states[best['step']].moved['networks'],
  )


def test_uniqueness_comes_first_then_reconstruction():
  order = [(0.5, 0.9), (0.9, 0.1), (0.9004, 0.2), (0.92, 0.0)]
  merits = [training._merit({'uniqueness': u, 'r2': r}) for u, r in order]
  assert merits == sorted(merits)


def test_seed_changes_the_codes(tmp_path, inputs):
  runs = []
  for seed in (0, 1):
    tokenizer.run(tiny_tokenizer.short(seed=seed), inputs, tmp_path / str(seed))
    runs.append(ids_lib.load(tmp_path / str(seed)).codes)
  assert (runs[0] != runs[1]).any()


@pytest.mark.parametrize('kind', assignment.LAST_LEVELS)
def test_every_last_level_keeps_its_promise(tmp_path, inputs, kind):
  config = tiny_tokenizer.short(last_level=kind, pretrain_steps=0)
  results = tokenizer.run(config, inputs, tmp_path / 'run')
  sids = ids_lib.load(tmp_path / 'run')
  assert results['uniqueness'] == sids.unique().mean()
  # Equal texts share the prefix, and, where nothing is drawn, everything.
  assert len(np.unique(sids.codes[:5, :3], axis=0)) == 1
  last = sids.codes[:5, 3].tolist()
  if kind in ('unused', 'digit'):
    assert results['uniqueness'] == 1.0
    assert len(set(last)) == 5
  if kind == 'digit':
    assert last == sorted(last)
  if kind in ('fitted', 'sinkhorn'):
    assert results['uniqueness'] <= 1 - 5 / 46
  if kind == 'fitted':
    assert len(set(last)) == 1
    assert results['spilled'] == 0


@pytest.mark.parametrize(
  'change',
  [
    {'codebook': 'ema_gradient'},
    {'codebook': 'gradient', 'init_items': 0},
    {'codebook': 'kmeans'},
    {'estimator': 'rotation', 'beam': 3, 'diversity_weight': 0.1},
    {'reset_after': 1, 'drawn_levels': 2},
    {'steps': 0},
  ],
)
def test_every_recipe_runs_at_tiny_size(tmp_path, inputs, change):
  results = tokenizer.run(
    tiny_tokenizer.short(pretrain_steps=0, **change), inputs, tmp_path / 'run'
  )
  assert results['uniqueness'] == 1.0
  sids = ids_lib.load(tmp_path / 'run')
  shared = 4 - change.get('drawn_levels', 1)
  assert len(np.unique(sids.codes[:5, :shared], axis=0)) == 1
  idle = change.get('codebook') == 'kmeans' or change.get('steps') == 0
  assert results['step'] == 0 if idle else results['step'] in (2, 4)


def test_contrast_draws_from_the_training_split_alone(
  tmp_path, inputs, monkeypatch
):
  fields = {name: np.zeros((9, 2), np.int32) for name in slates.NAMES}
  history = np.random.default_rng(0).integers(46, size=(9, 6))
  train = slates.Slates(**fields | {'user': np.arange(9), 'history': history})
  parts = {'train': train}
  monkeypatch.setattr(slates, 'read', lambda directory, split: parts[split])
  config = tiny_tokenizer.short(contrastive_weight=0.5)
  tokenizer.run(config, inputs, tmp_path / 'run')
  rows = reporting.read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  losses = [row['contrastive'] for row in rows if 'contrastive' in row]
  assert losses
  assert all(loss > 0 for loss in losses)


def test_a_full_prefix_spills(tmp_path, inputs):
  tiny_tokenizer.write_catalog(tmp_path, [('the same', ['x'], 2000)] * 20)
  results = tokenizer.run(tiny_tokenizer.short(), inputs, tmp_path / 'run')
  assert results['uniqueness'] == 1.0
  assert results['spilled'] == 12


# -------------------------------------------------------------------- Errors


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(levels=2, codebook_size=4), r'46 items do not fit in 4\^2 = 16'),
    (dict(last_level='random'), "tokenizer.last_level is 'random'.*'unused'"),
    (dict(codebook='emma'), "tokenizer.codebook is 'emma'.*'ema'"),
    (dict(estimator='st'), "tokenizer.estimator is 'st'.*'straight_through'"),
    (dict(text_encoder='tfid'), "tokenizer.text_encoder='tfid'.*mean tfidf"),
    (dict(levels=1, codebook_size=64), 'tokenizer.levels=1 leaves no level'),
    (dict(drawn_levels=4), 'tokenizer.levels=4 leaves no level to fit'),
    (dict(drawn_levels=0), 'tokenizer.drawn_levels=0.*draws at least 1'),
    (dict(levels=8, codebook_size=256), 'tokenizer.levels=8 .* 63 bits'),
    (dict(codebook='kmeans', init_items=0), 'raise tokenizer.init_items'),
  ],
)
def test_a_config_that_cannot_be_is_named_before_any_training(
  tmp_path, inputs, monkeypatch, change, message
):
  monkeypatch.setattr(rqvae, 'init', lambda *_: pytest.fail('it trains'))
  with pytest.raises(ValueError, match=message):
    tokenizer.run(tiny_tokenizer.settings(**change), inputs, tmp_path / 'run')


@pytest.mark.parametrize(
  ('ids', 'message'),
  [
    (['same', 'other', 'same'], "item id 'same' occurs twice.*items 0 and 2"),
    (['a', '', 'c'], 'item 1 of the catalog has no id'),
  ],
)
def test_an_id_that_names_no_single_item_is_an_error(tmp_path, ids, message):
  inputs = tiny_tokenizer.write_catalog(tmp_path, tiny_tokenizer.ITEMS[:3], ids)
  with pytest.raises(ValueError, match=message):
    tokenizer.run(tiny_tokenizer.short(), inputs, tmp_path / 'run')


def test_empty_titles_are_named_and_still_get_tuples(tmp_path, capsys):
  items = [
    *tiny_tokenizer.ITEMS,
    ('', [], 0),
    ('', ['beauty'], 0),
    (' ', [], 0),
  ]
  inputs = tiny_tokenizer.write_catalog(tmp_path, items)
  results = tokenizer.run(tiny_tokenizer.short(), inputs, tmp_path / 'run')
  assert results['uniqueness'] == 1.0
  assert '2 of 45 items have neither title nor category' in (
    said := capsys.readouterr().out
  )
  assert "'x42'" in said


def test_a_vector_that_is_not_finite_is_named(tmp_path, inputs):
  workdir = tmp_path / 'run'
  tokenizer.run(tiny_tokenizer.short(), inputs, workdir)
  features = np.load(workdir / 'features.npy')
  features[9, 2] = np.nan
  np.save(workdir / 'features.npy', features)
  with pytest.raises(ValueError, match="vector of item 'x9' is not finite"):
    tokenizer.run(tiny_tokenizer.short(), inputs, workdir)


def test_features_of_another_catalog_are_refused(tmp_path, inputs):
  tokenizer.run(tiny_tokenizer.short(), inputs, tmp_path / 'run')
  tiny_tokenizer.write_catalog(tmp_path, tiny_tokenizer.ITEMS)
  with pytest.raises(ValueError, match=r'features\.json: made with texts'):
    tokenizer.run(tiny_tokenizer.short(), inputs, tmp_path / 'run')


def test_divergence_stops_and_saves_nothing(tmp_path, inputs):
  config = tiny_tokenizer.settings(
    learning_rate=1e30, pretrain_steps=0, warmup_steps=0
  )
  with pytest.raises(FloatingPointError, match='is nan at step'):
    tokenizer.run(config, inputs, tmp_path / 'run')
  with checkpoint.Checkpointer(tmp_path / 'run' / 'checkpoints') as saver:
    assert saver.restore({}) is None
