"""Study `distill`: what a small student keeps of a large teacher, six ways.

A teacher is trained on the labels, as ever. Its students, a tenth of its size
or less, never see a label but through rewards and rejections: they imitate its
traces, are distilled on their own rollouts, or are left to RL, from the same
kind of mid-training.
"""

from ml_collections import ConfigDict

from configs import common

# Small vocabularies, so that a small student is not all embedding.
RECIPE = {'tokenizer.codebook_size': 32, 'prompt.text_tokens': 200}

# Sections of who teaches, and of who learns.
TEACHER = {
  'model': dict(
    d_model=64, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=32, d_ff=192
  ),
  'sft': dict(privileged=True),
}
STUDENT = {
  'model': dict(
    d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=48
  ),
  'traces': dict(teacher='policy', temperature=1.0),
  'sft': dict(rank_by='trace', listwise_weight=0.0),
  'opd': dict(start='midtrain', view='same', kl_kind='reverse'),
}
SIZES = {
  'teacher': {'sft': dict(steps=600, eval_every=200, eval_slates=512)},
  'student': {
    'midtrain': dict(steps=150, eval_every=150),
    'traces': dict(slates=4000),
    'sft': dict(steps=600, eval_every=200, eval_slates=512),
    'opd': dict(steps=300, eval_every=100, eval_slates=512),
    'rl': dict(
      steps=150,
      eval_every=50,
      eval_slates=512,
      refills=0,
      refill_size=32,
      learning_rate=1e-3,
    ),
  },
}

# Row of the table -> the stage that makes it, which traces it learned from, and
# where it started.
ROWS = {
  'SFT, targeted traces': dict(stage='sft', kind='targeted'),
  'SFT, rejection traces': dict(stage='sft', kind='rejection'),
  'OPD': dict(stage='opd'),
  'RL': dict(stage='rl', start='midtrain'),
  'SFT, then RL': dict(stage='rl', start='sft', kind='rejection'),
  'OPD, then RL': dict(stage='rl', start='opd'),
}


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `study_distill` as the target; `seeds=3` is meant."""
  config = common.compose('study_distill', arg)
  config.update_from_flattened_dict(RECIPE)
  return config


def section(test: bool = False) -> ConfigDict:
  """Section `study_distill`."""
  config = ConfigDict()
  config.datasets = ('world',) if test else ('world', 'movielens')
  config.evidence = ConfigDict(common.EVIDENCE)  # prompt.evidence of each
  config.teacher = ConfigDict(TEACHER)  # sections that the teacher changes
  config.student = ConfigDict(STUDENT)  # likewise
  if not test:
    config.teacher.update(SIZES['teacher'])
    config.student.update(SIZES['student'])
  config.rows = ConfigDict(ROWS)
  config.test_slates = 64 if test else 2048  # of the test split, a fixed draw
  config.resamples = 200 if test else 2000  # of the bootstrap
  return config
