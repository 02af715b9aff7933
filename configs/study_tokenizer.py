"""Study `tokenizer`: effects of each technique on semantic IDs and ranking.

`--config=configs/tokenizer.py:sweep,seeds=3` is the same study.
"""

from ml_collections import ConfigDict

from configs import common

# Shorter runs than stage `tokenizer`, because there are a hundred of them.
SIZES = {
  'tokenizer.pretrain_steps': 250,
  'tokenizer.steps': 500,
  'sft.steps': 1600,
  'sft.eval_every': 1600,
}

# All techniques off: random codewords, moved by gradients alone.
PLAIN = {
  'codebook': 'gradient',
  'estimator': 'straight_through',
  'init_items': 0,
  'last_level': 'fitted',
  'diversity_weight': 0.0,
  'reset_after': 0,
  'contrastive_weight': 0.0,
}

# Changes of PLAIN by each technique. The study runs each alone, all pairs, all
# together, and all but one.
TECHNIQUES = {
  'kmeans': {'init_items': 20_000},
  'ema': {'codebook': 'ema'},
  'random': {'last_level': 'unused'},
  'diversity': {'diversity_weight': 0.1},
  'reset': {'reset_after': 20},
  'contrastive': {'contrastive_weight': 0.1},
}

# Further rows, each on top of `kmeans` and `ema`, or alone.
OTHERS = {
  'residual k-means': {'codebook': 'kmeans', 'init_items': 20_000},
  'EMA of gradients': {'codebook': 'ema_gradient', 'init_items': 20_000},
  'rotation': {
    'codebook': 'ema',
    'init_items': 20_000,
    'estimator': 'rotation',
  },
  'beam 5': {'codebook': 'ema', 'init_items': 20_000, 'beam': 5},
  'uniform last': {
    'codebook': 'ema',
    'init_items': 20_000,
    'last_level': 'uniform',
  },
  'digit': {'codebook': 'ema', 'init_items': 20_000, 'last_level': 'digit'},
  'Sinkhorn': {
    'codebook': 'ema',
    'init_items': 20_000,
    'last_level': 'sinkhorn',
  },
}


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `study_tokenizer` as the target."""
  config = common.compose('study_tokenizer', arg)
  if 'test' not in arg.split(','):
    config.update_from_flattened_dict(SIZES)
  return config


def section(test: bool = False) -> ConfigDict:
  """Section `study_tokenizer`."""
  config = ConfigDict()
  config.plain = ConfigDict(PLAIN)  # fields of `tokenizer`, all techniques off
  # Run alone, in pairs, all together, and all but one.
  config.techniques = ('ema', 'random') if test else tuple(TECHNIQUES)
  config.changes = ConfigDict(TECHNIQUES)  # changes of `plain` by technique
  config.others = ConfigDict({} if test else OTHERS)  # further rows
  # Rows with a trained ranker; gains are over the first. (): no ranking.
  config.ranked = ('plain', 'kmeans+ema+random')
  config.test_slates = 64 if test else 2048  # test slates, fixed sample
  config.resamples = 200 if test else 2000  # bootstrap samples
  return config
