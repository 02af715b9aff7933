import numpy as np
import pytest

from gr2_jax.pipeline import artifacts
from gr2_jax.stages import internalize
from gr2_jax.studies import internalize as internalize_lib

from .. import tiny_world

pytestmark = pytest.mark.slow

CONFIG = dict(
  study_internalize__test_slates=8,
  internalize__steps=2,
  internalize__eval_every=2,
  internalize__batch_size=8,
  internalize__eval_slates=8,
  internalize__eval_batch_size=8,
)


@pytest.fixture(scope='module')
def study(world):
  root = world['rl'].parent
  with artifacts.lock(root):
    directory = artifacts.run_stage(
      tiny_world.config(**CONFIG),
      'study_internalize',
      root,
      log=lambda _: None,
    )
  return directory, artifacts.read_results(directory)


def test_the_second_pass_starts_from_the_policy_that_reasons(world, study):
  directory, _ = study
  (run,) = directory.parent.glob('internalize-*')
  made = artifacts.read_run(run)
  assert made['inputs']['rl'] == world['rl'].name
  measured = {path.stem for path in directory.glob('*.npz')}
  rl = world['rl'].name
  assert measured == {rl, f'{rl}-direct', f'{run.name}-direct'}


def test_rows_are_compared_with_the_answers_that_have_reasoning(study):
  _, results = study
  rows = {row['answers']: row for row in results['rows']}
  base = rows[internalize_lib.BASE]
  assert base['all']['n@5_lost']['estimate'] == 0
  for row in rows.values():
    for kind in ('all', 'hard'):
      for metric in internalize_lib.METRICS if row[kind] else ():
        lost = row[kind][f'{metric}_lost']
        assert lost['low'] <= lost['estimate'] <= lost['high']
        np.testing.assert_allclose(
          lost['estimate'], base[kind][metric] - row[kind][metric], atol=1e-6
        )


def test_what_is_decoded_is_counted(study):
  _, results = study
  tokens = {row['answers']: row['tokens'] for row in results['rows']}
  # Candidates and <eos>; before them at least </think>.
  assert tokens['internalized'] == tokens[internalize_lib.DROPPED]
  assert tokens[internalize_lib.BASE] >= tokens['internalized'] + 1
  assert tokens['read-out'] == 0


def test_hard_slates_are_those_whose_first_pick_reasoning_changed(world, study):
  directory, results = study
  found = [
    np.load(directory / f'{world["rl"].name}{end}.npz')['generated'][:, 0]
    for end in ('', '-direct')
  ]
  np.testing.assert_allclose(results['hard'], (found[0] != found[1]).mean())


def test_the_table_has_a_row_for_each(study):
  directory, results = study
  table = (directory / internalize_lib.TABLE).read_text()
  assert table.strip() == internalize_lib.summary(results)
  for row in results['rows']:
    assert f'| {row["answers"]}' in table


def test_reasoning_is_refused(world, tmp_path):
  own = tiny_world.config(internalize__thinking=True)
  with pytest.raises(ValueError, match='internalize.thinking=True'):
    internalize.run(own, tiny_world.inputs(world, 'rl'), tmp_path)
