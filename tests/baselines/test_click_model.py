import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from gr2_jax.baselines import click_model
from gr2_jax.data import slates as slates_lib

ITEMS, K, H = 40, 6, 5


@pytest.fixture(autouse=True)
def no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield


def settings(**kwargs) -> ConfigDict:
  return ConfigDict(
    dict(
      embedding=6, hidden=(16,), dropout=0.0, learning_rate=1e-2,
      weight_decay=0.01, batch_size=64,
    )
    | kwargs
  )  # fmt: skip


def planted(signal: str, n=600, seed=0) -> slates_lib.Slates:
  """Slates whose clicks follow one column, the item, or history and item."""
  rng = np.random.default_rng(seed)
  candidates = np.argsort(rng.random((n, ITEMS)), axis=1)[:, :K]
  count = rng.integers(3, K + 1, n)
  real = np.arange(K) < count[:, None]
  kind = rng.integers(2, size=(n, 1))  # Users have items of one parity.
  history = 2 * rng.integers(ITEMS // 2, size=(n, H)) + kind
  length = rng.integers(1, H + 1, n)
  evidence = rng.normal(size=(n, K, 3)) * [1.0, 50.0, 0.0] + [0.0, 9.0, 4.0]
  click = {
    'evidence': evidence[..., 0] > 0.5,
    'item': candidates % 3 == 0,
    'history': candidates % 2 == kind,
  }[signal]
  return slates_lib.Slates(
    user=np.arange(n, dtype=np.int32),
    candidates=np.where(real, candidates, -1).astype(np.int32),
    scores=np.zeros((n, K), np.float32),
    grades=np.where(real & click, 2, 0).astype(np.int8),
    count=count.astype(np.int32),
    history=np.where(np.arange(H) < length[:, None], history, -1).astype(
      np.int32
    ),
    history_grades=np.zeros((n, H), np.int8),
    history_ages=np.full((n, H), -1, np.int64),
    history_length=length.astype(np.int32),
    time=np.zeros(n, np.int64),
    evidence=np.where(real[..., None], evidence, 0.0).astype(np.float32),
    utility=np.full((n, K), np.nan, np.float32),
  )


def train(config, slates, steps=200, seed=0):
  model = click_model.make_model(config, ITEMS)
  optimizer = click_model.make_optimizer(config)
  update = click_model.make_update(model, optimizer, seed)
  scaler = click_model.fit_scaler(slates)
  batch = click_model.make_batch(slates, np.arange(2), scaler)
  state = click_model.init(model, optimizer, batch, seed)
  for step in range(steps):
    rows = click_model.batch_rows(len(slates), config.batch_size, seed, step)
    batch = click_model.make_batch(slates, rows, scaler)
    state, metrics = update(state, batch)
  return model, state, scaler, metrics


def pair_accuracy(scores, slates):
  """Share of (clicked, not clicked) pairs of a slate in the right order."""
  real = slates.candidates >= 0
  clicked, other = slates.grades > 0, real & (slates.grades == 0)
  pair = clicked[:, :, None] & other[:, None, :]
  return (scores[:, :, None] > scores[:, None, :])[pair].mean()


@pytest.mark.parametrize('signal', ['evidence', 'item', 'history'])
def test_learns_a_planted_signal_for_new_users(signal):
  model, state, scaler, _ = train(settings(), planted(signal))
  held_out = planted(signal, n=300, seed=1)
  scores = click_model.make_score(model)(state.params, held_out, scaler)
  assert pair_accuracy(scores, held_out) > 0.9


def test_what_stands_at_padding_changes_nothing():
  slates = planted('evidence', n=64)
  padding = slates.candidates < 0
  evidence, grades = slates.evidence.copy(), slates.grades.copy()
  evidence[padding], grades[padding] = 1e6, 1
  other = slates_lib.Slates(
    **{**vars(slates), 'evidence': evidence, 'grades': grades}
  )
  first = train(settings(), slates, steps=3)
  second = train(settings(), other, steps=3)
  jax.tree.map(np.testing.assert_array_equal, first[1], second[1])
  score = click_model.make_score(first[0])
  scores = score(first[1].params, slates, first[2])
  np.testing.assert_array_equal(np.isneginf(scores), padding)
  np.testing.assert_array_equal(
    scores, score(second[1].params, other, second[2])
  )


def test_the_loss_is_the_mean_cross_entropy_of_real_candidates():
  slates = planted('item', n=50)
  config = settings(learning_rate=0.0, weight_decay=0.0)
  model, state, scaler, metrics = train(config, slates, steps=1)
  z = click_model.make_score(model)(state.params, slates, scaler)
  real, click = slates.candidates >= 0, slates.grades > 0
  expected = np.log1p(np.exp(np.where(click, -z, z)[real].astype(np.float64)))
  np.testing.assert_allclose(metrics['loss'], expected.mean(), rtol=1e-5)


def test_a_candidate_is_scored_alone():
  slates = planted('item', n=20)
  model, state, scaler, _ = train(settings(), slates, steps=5)
  score = click_model.make_score(model)
  turned = slates_lib.Slates(
    **{
      **vars(slates),
      'candidates': slates.candidates[:, ::-1],
      'evidence': slates.evidence[:, ::-1],
    }
  )
  np.testing.assert_allclose(
    score(state.params, turned, scaler)[:, ::-1],
    score(state.params, slates, scaler),
    rtol=1e-4, atol=1e-6,
  )  # fmt: skip


def test_scores_do_not_depend_on_how_many_are_scored_at_once(monkeypatch):
  slates = planted('item', n=70)
  model, state, scaler, _ = train(settings(), slates, steps=5)
  whole = click_model.make_score(model)(state.params, slates, scaler)
  monkeypatch.setattr(click_model, 'SCORED_AT_ONCE', 32)
  parts = click_model.make_score(model)(state.params, slates, scaler)
  np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_user_without_history_has_a_score():
  slates = planted('item', n=20)
  model, state, scaler, _ = train(settings(), slates, steps=5)
  bare = slates_lib.Slates(
    **{**vars(slates), 'history': np.full_like(slates.history, -1)}
  )
  scores = click_model.make_score(model)(state.params, bare, scaler)
  assert np.isfinite(scores[slates.candidates >= 0]).all()


def test_features_are_standardised_and_cut():
  slates = planted('item')
  scaler = click_model.fit_scaler(slates)
  batch = click_model.make_batch(slates, np.arange(len(slates)), scaler)
  real = batch.features[slates.candidates >= 0]
  np.testing.assert_allclose(real.mean(axis=0), 0.0, atol=1e-2)
  np.testing.assert_allclose(real.std(axis=0), [1.0, 1.0, 0.0], atol=1e-2)
  far = slates_lib.Slates(**{**vars(slates), 'evidence': slates.evidence * 1e3})
  batch = click_model.make_batch(far, np.arange(5), scaler)
  assert np.abs(batch.features).max() == click_model.CLIP


def test_dropout_depends_on_seed_and_step_alone():
  slates = planted('item', n=64)
  config = settings(dropout=0.5)
  states = [train(config, slates, 4, seed)[1] for seed in (0, 0, 1)]
  jax.tree.map(np.testing.assert_array_equal, states[0], states[1])
  table = [np.asarray(state.params['items']) for state in states]
  assert (table[0] != table[2]).any()
  without = train(settings(), slates, 4)[1].params['items']
  assert (table[0] != np.asarray(without)).any()


def test_batches_are_a_function_of_seed_and_step():
  rows = [click_model.batch_rows(10, 3, 0, step) for step in range(6)]
  for epoch in (rows[:3], rows[3:]):
    drawn = np.concatenate(epoch)
    assert len(np.unique(drawn)) == 9
    assert drawn.min() >= 0
    assert drawn.max() < 10
  assert [*rows[0]] != [*rows[3]]
  np.testing.assert_array_equal(rows[4], click_model.batch_rows(10, 3, 0, 4))
  assert [*rows[4]] != [*click_model.batch_rows(10, 3, 1, 4)]
  assert sorted(click_model.batch_rows(3, 8, 0, 5)) == [0, 1, 2]
