"""Gradient-boosted trees on the evidence: a ranker that reads no language.

LambdaMART by LightGBM, imported only for training. Axis letters: K candidates,
E evidence columns; n slates of a split.
"""

from typing import TYPE_CHECKING

import numpy as np

from gr2_jax.data import slates as slates_lib

if TYPE_CHECKING:
  import lightgbm


def fit(
  config,
  train: slates_lib.Slates,
  validation: slates_lib.Slates,
  columns: tuple[str, ...],
  seed: int,
) -> 'lightgbm.Booster':
  """Trains trees, and stops once NDCG@5 on validation no longer improves.

  `config` is section `baselines.gbdt`, `columns` the names of the E evidence
  columns, `seed` that of bagging and feature sampling. `score` uses the
  booster's `best_iteration` rounds. The same arguments and number of threads
  give the same trees. Raises ImportError where LightGBM is not installed.
  """
  try:
    import lightgbm
  except ImportError as e:
    raise ImportError(
      "the baseline gbdt needs LightGBM: pip install -e '.[demo]'"
    ) from e
  parameters = {
    'objective': 'lambdarank',
    'label_gain': [0, 1, 3],  # 2^grade - 1
    'metric': 'ndcg',
    'eval_at': [5],
    'learning_rate': config.learning_rate,
    'num_leaves': config.num_leaves,
    'min_data_in_leaf': config.min_data_in_leaf,
    'bagging_fraction': config.bagging,
    'bagging_freq': 1,
    'feature_fraction': config.feature_fraction,
    'lambda_l2': config.l2,
    'num_threads': config.threads,
    'seed': seed,
    'deterministic': True,
    'force_row_wise': True,  # Not chosen by a timing.
    'verbosity': -1,
  }
  data = _dataset(train, columns, None)
  held_out = _dataset(validation, columns, data)
  return lightgbm.train(
    parameters,
    data,
    num_boost_round=config.rounds,
    valid_sets=[held_out],
    callbacks=[lightgbm.early_stopping(config.patience, verbose=False)],
  )


def score(booster: 'lightgbm.Booster', slates: slates_lib.Slates) -> np.ndarray:
  """Scores of a split's candidates: float32 [n, K], -inf at padding."""
  real = slates.candidates >= 0
  scores = np.full(real.shape, -np.inf, np.float32)
  scores[real] = booster.predict(slates.evidence[real])
  return scores


def _dataset(
  slates: slates_lib.Slates,
  columns: tuple[str, ...],
  reference: 'lightgbm.Dataset | None',
) -> 'lightgbm.Dataset':
  """The real candidates of a split, one row each, grouped by slate."""
  import lightgbm

  real = slates.candidates >= 0
  return lightgbm.Dataset(
    slates.evidence[real],
    slates.grades[real].astype(np.int32),
    group=real.sum(axis=1),
    feature_name=list(columns),
    reference=reference,
  )
