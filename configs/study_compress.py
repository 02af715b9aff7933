"""Study `compress`: tokens and ranking quality of every form of the context.

`configs/compress.py` ends with it.
"""

from ml_collections import ConfigDict

from configs import compress


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with long contexts and `study_compress` as the target."""
  config = compress.get_config(arg)
  config.stage = 'study_compress'
  return config


def section(test: bool = False) -> ConfigDict:
  """Section `study_compress`."""
  config = ConfigDict()
  # Forms besides the full context, see gr2_jax/prompts/context.py.
  config.forms = (
    'last:20',
    'last:5',
    'last:4+history:sid+candidates:sid,evidence',
    'history:sid+candidates:sid',
    'last:0+candidates:evidence',
    'last:0+candidates:evidence+columns:7',
    'last:0+candidates:evidence+columns:5',
    'last:0+candidates:evidence+columns:3',
    'random:0.5',
    'random:0.2',
    'random:0.1',
    'random:0.05',
  )
  config.ratios = (0.05, 0.1, 0.2)  # shares of tokens that the compressor keeps
  # Forms whose policy is distilled from the full context. `text` is the
  # compressor's at `compress.ratio`.
  config.distilled = (
    'text',
    'memory:4+candidates:evidence',
    'memory:16+candidates:evidence',
    'memory:64+candidates:evidence',
  )
  config.opd = distillation(test)
  # Forms trained by RL, starting from the distilled policy if there is one.
  config.reinforced = ('full', 'text')
  config.rl = reinforcement(test)
  config.test_slates = 64 if test else 1500  # test slates, fixed sample
  config.margin = 0.01  # tolerated loss of N@5 and R@1
  config.resamples = 200 if test else 2000  # bootstrap samples
  if test:
    config.forms, config.ratios = config.forms[2:6:3], (0.1,)
    config.distilled = config.distilled[:3:2]
    config.reinforced = config.reinforced[1:]
  return config


def distillation(test: bool) -> ConfigDict:
  """Changes of section `opd`."""
  config = ConfigDict()
  config.view = 'whole'
  config.kl_kind = 'forward'
  config.thinking = False
  config.steps = 6 if test else 200
  config.batch_size = config.refill_size = 8
  config.eval_every = 3 if test else 100
  config.eval_slates = 64 if test else 256
  config.eval_batch_size = 32
  return config


def reinforcement(test: bool) -> ConfigDict:
  """Changes of section `rl`."""
  config = ConfigDict()
  config.thinking = False
  config.steps = 6 if test else 100
  config.batch_size = config.refill_size = 8
  config.eval_every = 3 if test else 50
  config.eval_slates = 64 if test else 256
  config.eval_batch_size = 8
  return config
