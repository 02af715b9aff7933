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
    d_model=96, num_layers=4, num_heads=3, num_kv_heads=3, head_dim=32, d_ff=288
  ),
  'sft': dict(privileged=True),
}
STUDENT = {
  'model': dict(
    d_model=32, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64
  ),
  # A small model is slow to learn to compare candidates: it points first.
  'midtrain': dict(
    learning_rate=4e-3, pointers=4, mixture=dict(pointing=0.8, sequence=0.1)
  ),
  'traces': dict(teacher='policy', temperature=1.0),
  'sft': dict(rank_by='trace', listwise_weight=0.0, learning_rate=4e-3),
  'opd': dict(start='midtrain', kl_kind='forward', learning_rate=4e-3),
  'rl': dict(learning_rate=5e-4, credit='placement', warmup=10),
}
# On MovieLens the answer learns to rank long after the read-out does.
STEPS = {
  'world': dict(teacher=400, opd=600),
  'movielens': dict(teacher=1200, opd=900),
}
# `readout` is for a teacher whose answers do not rank yet.
VIEWS = {'world': 'same', 'movielens': 'same'}
SIZES = {
  'teacher': {'sft': dict(batch_size=32, eval_every=200, eval_slates=512)},
  'student': {
    'midtrain': dict(steps=500, batch_size=32, eval_every=250),
    'traces': dict(slates=2000),
    'sft': dict(steps=300, batch_size=32, eval_every=150, eval_slates=512),
    'opd': dict(eval_every=150, eval_slates=512),
    'rl': dict(
      steps=50, eval_every=50, eval_slates=512, refills=0, refill_size=32
    ),
  },
}

# Rows of the table: name, the stage that makes it, the kind of traces that it
# or its start learned from, and the stage it starts from; empty where there is
# none.
ROWS = (
  ('SFT, targeted traces', 'sft', 'targeted', ''),
  ('SFT, rejection traces', 'sft', 'rejection', ''),
  ('OPD', 'opd', '', 'midtrain'),
  ('RL', 'rl', '', 'midtrain'),
  ('SFT, then RL', 'rl', 'rejection', 'sft'),
  ('OPD, then RL', 'rl', '', 'opd'),
)


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
  config.views = ConfigDict(VIEWS)  # opd.view on each
  config.teacher = ConfigDict(TEACHER)  # sections that the teacher changes
  config.student = ConfigDict(STUDENT)  # likewise
  config.steps = ConfigDict(STEPS)  # on each: sft of the teacher, opd
  if test:
    config.steps = ConfigDict(dict.fromkeys(STEPS, dict(teacher=10, opd=6)))
  if not test:
    config.teacher.update(SIZES['teacher'])
    config.student.update(SIZES['student'])
  config.rows = ROWS
  config.test_slates = 64 if test else 1024  # of the test split, a fixed draw
  config.resamples = 200 if test else 2000  # of the bootstrap
  return config
