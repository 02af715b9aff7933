"""Stage `baselines`: rankers of the results table without a language model."""

from ml_collections import ConfigDict

from configs import common


def section(test: bool = False) -> ConfigDict:
  """Section `baselines`."""
  config = ConfigDict()
  config.seeds = 2 if test else 3  # seeds 0..seeds-1 of the trained rankers
  config.random_seed = 0  # seed of the random order
  config.legacy = legacy(test)
  config.gbdt = gbdt(test)
  return config


def legacy(test: bool) -> ConfigDict:
  """The pointwise click model."""
  config = ConfigDict()
  config.embedding = 8  # width of an item's vector
  config.hidden = (32,)  # widths of the hidden layers
  config.dropout = 0.1  # dropout of the first layer's inputs
  config.learning_rate = 1e-3  # of AdamW, constant
  config.weight_decay = 3.0  # of AdamW, multiplied by the learning rate
  config.batch_size = 256  # slates per update
  config.steps = 100 if test else 2_000  # most updates
  config.eval_every = 20 if test else 50  # updates between validations
  config.patience = 6  # validations without a better N@5 before the end
  return config


def gbdt(test: bool) -> ConfigDict:
  """The gradient-boosted trees."""
  config = ConfigDict()
  config.rounds = 50 if test else 500  # most trees
  config.patience = 50  # rounds without a better N@5 before the end
  config.learning_rate = 0.05  # weight of a tree
  config.num_leaves = 15  # leaves of a tree
  config.min_data_in_leaf = 100  # fewest candidates in a leaf
  config.bagging = 0.7  # share of candidates per tree
  config.feature_fraction = 0.6  # share of columns per tree
  config.l2 = 5.0  # penalty on leaf values
  config.threads = 0  # threads of LightGBM; 0: one per core
  return config


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `baselines` as the target."""
  return common.compose('baselines', arg)
