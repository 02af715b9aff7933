"""Study `distill`: six ways to train a small student of a large teacher.

The teacher is trained on the labels, as in the main job. The students have a
tenth of its parameters or less, and see labels only through rewards and
rejections: they imitate the teacher's traces, are distilled on their own
rollouts, or learn by RL, all after the same kind of mid-training.
"""

from ml_collections import ConfigDict

from configs import common

# Small vocabularies, so that embeddings do not dominate a small student.
RECIPE = {'tokenizer.codebook_size': 32, 'prompt.text_tokens': 200}

# Changes of the sections for the teacher and for the students.
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
  # A small model learns slowly to compare candidates, so it points more.
  'midtrain': dict(
    learning_rate=4e-3, pointers=4, mixture=dict(pointing=0.8, sequence=0.1)
  ),
  'traces': dict(teacher='policy', temperature=1.0),
  'sft': dict(rank_by='trace', listwise_weight=0.0, learning_rate=4e-3),
  'opd': dict(start='midtrain', kl_kind='forward', learning_rate=4e-3),
  'rl': dict(learning_rate=5e-4, credit='placement', warmup=10),
}
# On MovieLens, written answers improve long after the read-out does.
STEPS = {
  'world': dict(teacher=400, opd=600),
  'movielens': dict(teacher=1200, opd=900),
}
# `readout` would suit a teacher whose written answers rank poorly.
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

# Rows of the table: name, stage, kind of traces that the policy or its start
# learned from ('': none), stage of the initial policy ('': none).
ROWS = (
  ('SFT, targeted traces', 'sft', 'targeted', ''),
  ('SFT, rejection traces', 'sft', 'rejection', ''),
  ('OPD', 'opd', '', 'midtrain'),
  ('RL', 'rl', '', 'midtrain'),
  ('SFT, then RL', 'rl', 'rejection', 'sft'),
  ('OPD, then RL', 'rl', '', 'opd'),
)


def get_config(arg: str = '') -> ConfigDict:
  """The whole config; `study_distill` is the target, best with `seeds=3`."""
  config = common.compose('study_distill', arg)
  config.update_from_flattened_dict(RECIPE)
  return config


def section(test: bool = False) -> ConfigDict:
  """Section `study_distill`."""
  config = ConfigDict()
  config.datasets = ('world',) if test else ('world', 'movielens')
  config.evidence = ConfigDict(common.EVIDENCE)  # prompt.evidence by data set
  config.views = ConfigDict(VIEWS)  # opd.view for each data set
  config.teacher = ConfigDict(TEACHER)  # changes of sections for the teacher
  config.student = ConfigDict(STUDENT)  # changes of sections for the students
  config.steps = ConfigDict(STEPS)  # per data set: sft of the teacher, opd
  if test:
    config.steps = ConfigDict(dict.fromkeys(STEPS, dict(teacher=10, opd=6)))
  if not test:
    config.teacher.update(SIZES['teacher'])
    config.student.update(SIZES['student'])
  config.rows = ROWS
  config.test_slates = 64 if test else 1024  # test slates, fixed sample
  config.resamples = 200 if test else 2000  # bootstrap samples
  return config
