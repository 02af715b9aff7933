"""Study `hacking`: {reward} x {gate} x {order of presentation}.

Policies are first taught to copy: their teacher believes in the incoming order
and nothing else, and the labels of the read-out are left out. RL then either
leaves the copy, or settles on it.
"""

from ml_collections import ConfigDict

from configs import common

# How a copying start is made, and trained from, in a minute a run.
RECIPE = {
  'prompt.fields': ('evidence',),
  'prompt.history': 0,
  'traces.believes': ('incoming_score',),
  'traces.noise': 0.1,
  'sft.rank_by': 'trace',
  'sft.listwise_weight': 0.0,
  'sft.thinking': False,
  'rl.thinking': False,
  'rl.choose': 'last',
}
SIZES = {
  'sft.steps': 1600,
  'sft.eval_every': 1600,
  'rl.batch_size': 32,
  'rl.refill_size': 32,
  'rl.refills': 1,
  'rl.learning_rate': 2e-4,
  'rl.steps': 300,
  'rl.eval_every': 25,
  'rl.eval_slates': 256,
}


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `study_hacking` as the target; `seeds=3` is meant."""
  config = common.compose('study_hacking', arg)
  config.update_from_flattened_dict(RECIPE)
  if 'test' not in arg.split(','):
    config.update_from_flattened_dict(SIZES)
  return config


def section(test: bool = False) -> ConfigDict:
  """Section `study_hacking`."""
  config = ConfigDict()
  config.rewards = ('auc+ndcg',) if test else ('auc+ndcg', 'promotion')
  config.gates = ('none', 'v2') if test else ('none', 'v1', 'v2')
  config.orders = ('incoming',) if test else ('incoming', 'shuffled', 'mixed')
  config.test_slates = 64 if test else 1024  # of the test split, a fixed draw
  config.resamples = 200 if test else 2000  # of the bootstrap
  return config
