"""Stage `slates`: from raw logs to slates with evidence."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `slates` as the target."""
  return common.compose('slates', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `data`."""
  config = ConfigDict()
  config.source = 'movielens'  # movielens, files or world
  config.path = ''  # folder with items.* and interactions.*; files
  config.liked = 4.0  # stars of a rating of grade 2; movielens
  config.min_core = 5  # fewest interactions of a user or item; not world
  config.candidates = 10  # K, items in a slate
  config.history = 20  # H, latest items of the user
  config.prerank_history = 20  # latest items that the pre-ranker reads
  config.horizon = 10  # next interactions that count as positives
  config.min_history = 5  # fewest items before a slate; split by user
  config.min_history_time = 2  # fewest items before a slate; split by time
  config.split = 'auto'  # user, time, or auto: time for files, else user
  config.split_shares = (0.6, 0.15, 0.25)  # of users: train, validation, test
  config.split_seed = 0  # seed of user split, folds, ties and world
  config.folds = 5  # folds of train users; statistics come from the others
  config.max_slates_train = 30 if test else 80  # per user, evenly spaced
  config.max_slates_eval = 15 if test else 40  # per user, evenly spaced
  config.knn_decay = 0.9  # weight per position between co-engaged items
  config.knn_window = 50  # largest distance of co-engaged items, in positions
  config.knn_neighbours = 200  # neighbors per item
  config.history_decay = 0.9  # weight per position back into the history
  config.world = world(test)
  return config


def world(test: bool = False) -> ConfigDict:
  """Sizes of source `world`."""
  config = ConfigDict()
  config.n_items = 200 if test else 800  # items of the catalog
  config.n_users = 200 if test else 1200  # users; some appear later
  config.clusters = 8 if test else 12  # clusters of items
  config.visits = 8 if test else 14  # days of a user, with one slate each
  config.days = 20  # length; items appear during the first half
  config.organic = 30  # engagements of a user before the first slate
  config.position_bias = 0.3  # b; train items are seen with chance rank^-b
  config.noise = 2.5  # standard deviation of the incoming score's error
  return config
