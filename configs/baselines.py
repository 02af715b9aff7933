"""The rankers of the results table that read no language.

`--config=configs/baselines.py` runs them and what they need; `:test` in
seconds.
"""

from ml_collections import ConfigDict

from configs import common


def section(test: bool = False) -> ConfigDict:
  """The `baselines` section."""
  config = ConfigDict()
  config.seeds = 2 if test else 3  # of legacy and gbdt: 0..seeds-1
  config.random_seed = 0  # of the random order
  config.legacy = legacy(test)
  config.gbdt = gbdt(test)
  return config


def legacy(test: bool) -> ConfigDict:
  """The pointwise click model."""
  config = ConfigDict()
  config.embedding = 8  # width of an item's vector
  config.hidden = (32,)  # widths of the hidden layers
  config.dropout = 0.1  # share of the first layer's inputs dropped
  config.learning_rate = 1e-3  # of AdamW, constant
  config.weight_decay = 3.0  # of AdamW; times the learning rate
  config.batch_size = 256  # slates per update
  config.steps = 100 if test else 2_000  # updates at most
  config.eval_every = 20 if test else 50  # steps per look and checkpoint
  config.patience = 6  # looks at validation without a better N@5 before the end
  return config


def gbdt(test: bool) -> ConfigDict:
  """The gradient-boosted trees."""
  config = ConfigDict()
  config.rounds = 50 if test else 500  # trees at most
  config.patience = 50  # rounds without a better N@5 before the end
  config.learning_rate = 0.05  # weight of a tree
  config.num_leaves = 15  # of a tree
  config.min_data_in_leaf = 100  # candidates, at least
  config.bagging = 0.7  # share of candidates a tree sees
  config.feature_fraction = 0.6  # share of columns a tree sees
  config.l2 = 5.0  # penalty on leaf values
  config.threads = 0  # of LightGBM; 0: one a core
  return config


def get_config(arg: str = '') -> ConfigDict:
  """The whole config with this stage as the target."""
  return common.compose('baselines', arg)
