"""Study `hacking`: {reward} x {gate} x {order of presentation}.

SFT first trains policies to copy the incoming order: the teacher reads nothing
else, and the read-out is not trained on labels. RL then either abandons the
copy or converges to it.
"""

from ml_collections import ConfigDict

from configs import common

# Trains the copying policy, then RL, in about a minute per run.
RECIPE = {
  'prompt.fields': ('evidence',),
  'prompt.history': 0,
  'traces.evidence_columns': ('incoming_score',),
  'traces.noise': 0.1,
  'sft.rank_by': 'trace',
  'sft.listwise_weight': 0.0,
  'sft.thinking': False,
  'rl.thinking': False,
  'rl.selection_metric': 'last',
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
  """The whole config; `study_hacking` is the target, best with `seeds=3`."""
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
  config.test_slates = 64 if test else 1024  # test slates, fixed sample
  config.resamples = 200 if test else 2000  # bootstrap samples
  return config
