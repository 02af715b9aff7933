import itertools
import shutil

import numpy as np
import pytest

from configs import study_distill as recipe
from gr2_jax.pipeline import artifacts
from gr2_jax.studies import distill

from .. import tiny_world

pytestmark = pytest.mark.slow

ROWS = ('SFT, rejection traces', 'OPD', 'OPD, then RL')
SMALL = dict(d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, d_ff=12)


def make_config():
  config = tiny_world.config(study_distill__test_slates=24).unlock()
  own = config.study_distill
  own.datasets = ('world',)
  own.evidence.world = config.prompt.evidence
  own.rows = tuple(row for row in recipe.ROWS if row[0] in ROWS)
  own.teacher = {}  # The world's own SFT.
  own.steps.world = {'teacher': config.sft.steps, 'opd': config.opd.steps}
  own.student = recipe.STUDENT | {'model': SMALL, 'traces': {
    'teacher': 'policy', 'tries': 3, 'batch_size': 8,
  }}  # fmt: skip
  return config.lock()


@pytest.fixture(scope='module')
def study(world, tmp_path_factory):
  root = tmp_path_factory.mktemp('study')
  for name in ('slates', 'tokenizer', 'backbone', 'midtrain', 'traces', 'sft'):
    shutil.copytree(world[name], root / world[name].name)
  with artifacts.lock(root):
    directory = artifacts.run_stage(
      make_config(), 'study_distill', root, log=lambda _: None
    )
  return directory, artifacts.read_results(directory)


def test_every_row_is_a_run_of_its_own(world, study):
  directory, _ = study
  measured = {path.stem for path in directory.glob('*.npz')}
  assert len(measured) == 1 + len(ROWS)
  assert world['sft'].name in measured
  stages = sorted(name.partition('-')[0] for name in measured)
  assert stages == ['opd', 'rl', 'sft', 'sft']


def test_the_rows_say_what_is_kept_of_the_teacher(study):
  _, results = study
  (found,) = results['data']
  rows = {row['row']: row for row in found['rows']}
  assert list(rows) == [
    'incoming', 'teacher', 'teacher, read-out', *ROWS
  ]  # fmt: skip
  for name in ('teacher', *ROWS):
    row = rows[name]
    for interval in (row['n@5_gain'], row['n@5_kept']):
      assert interval['low'] <= interval['estimate'] <= interval['high']
    gain = row['n@5'] - rows['incoming']['n@5']
    np.testing.assert_allclose(row['n@5_gain']['estimate'], gain, atol=1e-6)
    assert 0 <= row['claims']['total'] <= 1
  kept = rows['teacher']['n@5_kept']
  assert kept['low'] == kept['estimate'] == kept['high'] == 1
  sizes = found['parameters']
  assert sizes['student'] < sizes['teacher']
  assert [pair['pair'] for pair in found['pairs']] == [
    f'{b} - {a}' for a, b in itertools.combinations(ROWS, 2)
  ]
  kept = found['traces']['rejection']
  assert kept['traces'] + kept['rejected'] > 0
  assert kept['teacher'] == 'policy'


def test_the_table_has_every_row_and_the_figure_is_a_picture(study):
  directory, results = study
  table = (directory / distill.TABLE).read_text()
  assert table.strip() == distill.summary(results)
  for name in ('incoming', 'teacher', *ROWS):
    assert name in table
  assert 'times fewer' in table
  picture = (directory / distill.FIGURE).read_bytes()
  assert picture[:8] == b'\x89PNG\r\n\x1a\n'


def test_the_recipe_is_a_student_a_tenth_of_its_teacher():
  config = recipe.get_config('seeds=3')
  own = config.study_distill
  for section in (own.teacher, own.student):
    changed = config.copy_and_resolve_references()
    changed.update(section.to_dict())  # Every field is one that there is.
  assert {row[1] for row in own.rows} == {'sft', 'opd', 'rl'}
  assert own.student.sft.listwise_weight == 0  # It sees no label.
