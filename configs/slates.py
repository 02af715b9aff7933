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
  config.path = ''  # folder of source `files`: items.*, interactions.*
  config.liked = 4.0  # stars from which a rating is of grade 2; movielens
  config.min_core = 5  # interactions each kept user and item has; not world
  config.candidates = 10  # K, items in a slate
  config.history = 20  # H, last items a slate shows
  config.prerank_history = 20  # last items that the pre-ranker reads
  config.horizon = 10  # next interactions that count as positives
  config.min_history = 5  # items before a slate, where users are split
  config.min_history_time = 2  # items before a slate, where times are split
  config.split = 'auto'  # user, time, or auto: time for files, else user
  config.split_shares = (0.6, 0.15, 0.25)  # of users: train, validation, test
  config.split_seed = 0  # of user split, folds, ties and world
  config.folds = 5  # parts of train users, each with statistics of the others
  config.max_slates_train = 30 if test else 80  # per user, evenly spaced
  config.max_slates_eval = 15 if test else 40  # per user, evenly spaced
  config.knn_decay = 0.9  # weight kept per place between co-engaged items
  config.knn_window = 50  # largest distance of co-engaged items, in places
  config.knn_neighbours = 200  # neighbours an item keeps
  config.history_decay = 0.9  # weight kept per step back into the history
  config.world = world(test)
  return config


def world(test: bool = False) -> ConfigDict:
  """Sizes of source `world`."""
  config = ConfigDict()
  config.n_items = 200 if test else 800  # catalog
  config.n_users = 200 if test else 1200  # some of them appear later
  config.clusters = 8 if test else 12  # kinds of items
  config.visits = 8 if test else 14  # days a user comes, one slate each
  config.days = 20  # length of the story; items appear during its first half
  config.organic = 30  # items a user engages with before the first slate
  config.position_bias = 0.3  # train clicks: seen with chance rank^-this
  config.noise = 2.5  # standard deviation in the incoming score
  return config
