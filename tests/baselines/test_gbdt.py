import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from gr2_jax.baselines import gbdt
from gr2_jax.data import slates as slates_lib

COLUMNS = ('first', 'second', 'noise')


def settings(**kwargs) -> ConfigDict:
  return ConfigDict(
    dict(
      rounds=40, patience=40, learning_rate=0.1, num_leaves=7,
      min_data_in_leaf=20, bagging=0.7, feature_fraction=0.7, l2=1.0,
      threads=1,
    )
    | kwargs
  )  # fmt: skip


def planted(n=400, k=6, seed=0, signal=True) -> slates_lib.Slates:
  """Clicks where the first two columns agree in sign, which no line parts."""
  rng = np.random.default_rng(seed)
  count = rng.integers(3, k + 1, n)
  real = np.arange(k) < count[:, None]
  evidence = rng.normal(size=(n, k, 3))
  click = evidence[..., 0] * evidence[..., 1] > 0.3
  if not signal:
    click = rng.random((n, k)) < 0.3
  return slates_lib.Slates(
    user=np.arange(n, dtype=np.int32),
    candidates=np.where(real, np.arange(k), -1).astype(np.int32),
    scores=np.zeros((n, k), np.float32),
    grades=np.where(real & click, rng.integers(1, 3, (n, k)), 0).astype(
      np.int8
    ),
    count=count.astype(np.int32),
    history=np.full((n, 2), -1, np.int32),
    history_grades=np.zeros((n, 2), np.int8),
    history_ages=np.full((n, 2), -1, np.int64),
    history_length=np.zeros(n, np.int32),
    time=np.zeros(n, np.int64),
    evidence=np.where(real[..., None], evidence, 0.0).astype(np.float32),
    utility=np.full((n, k), np.nan, np.float32),
  )


def fit(config, seed=0, **kwargs):
  train, held_out = planted(**kwargs), planted(seed=1, **kwargs)
  return gbdt.fit(config, train, held_out, COLUMNS, seed), held_out


def test_learns_a_planted_interaction():
  booster, held_out = fit(settings())
  scores = gbdt.score(booster, held_out)
  clicked = held_out.grades > 0
  other = (held_out.candidates >= 0) & ~clicked
  pair = clicked[:, :, None] & other[:, None, :]
  right = (scores[:, :, None] > scores[:, None, :])[pair].mean()
  assert right > 0.9
  assert booster.feature_name() == list(COLUMNS)


def test_padding_has_no_score_and_no_part_in_the_fit():
  booster, held_out = fit(settings(rounds=5))
  scores = gbdt.score(booster, held_out)
  padding = held_out.candidates < 0
  np.testing.assert_array_equal(np.isneginf(scores), padding)
  train = planted()
  evidence = train.evidence.copy()
  evidence[train.candidates < 0] = 1e6
  other = slates_lib.Slates(**{**vars(train), 'evidence': evidence})
  again = gbdt.fit(settings(rounds=5), other, held_out, COLUMNS, 0)
  np.testing.assert_array_equal(gbdt.score(again, held_out), scores)


def test_the_seed_and_not_the_threads_decide():
  scores = []
  for seed, threads in ((0, 1), (0, 2), (1, 2)):
    booster, held_out = fit(settings(rounds=10, threads=threads), seed)
    scores.append(gbdt.score(booster, held_out))
  np.testing.assert_array_equal(scores[0], scores[1])
  assert (scores[0] != scores[2]).any()


def test_stops_early_where_validation_gains_nothing():
  booster, held_out = fit(settings(rounds=200, patience=5), signal=False)
  assert booster.best_iteration < 100
  expected = booster.predict(
    held_out.evidence[0, :3], num_iteration=booster.best_iteration
  )
  np.testing.assert_allclose(
    gbdt.score(booster, held_out)[0, :3], expected, rtol=1e-6
  )


def test_a_missing_lightgbm_names_the_cure(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lightgbm', None)
  with pytest.raises(ImportError, match=r"pip install -e '\.\[demo\]'"):
    fit(settings())
