"""The stage writes a whole data set and says what it dropped."""

import pytest
from ml_collections import ConfigDict

from configs import slates as slates_config
from gr2_jax.data import log as log_lib
from gr2_jax.data import slates
from gr2_jax.stages import slates as stage


def config(source='world'):
  section = slates_config.section(test=True)
  section.source = source
  section.world.update(n_users=60, visits=4)
  return ConfigDict({'data': section})


def test_results_count_every_request(tmp_path):
  results = stage.run(config(), {}, tmp_path)
  for name, count in results['splits'].items():
    dropped = count['no_positive'] + count['no_negative']
    assert count['requests'] == count['slates'] + dropped
    assert len(slates.read(tmp_path, name)) == count['slates']
  assert sum(c['user_share'] for c in results['splits'].values()) == 1.0
  assert slates.read_meta(tmp_path)['counts'] == results['splits']


def test_a_killed_run_is_made_again(tmp_path):
  (tmp_path / '.partial' / slates.SlateDataset.name).mkdir(parents=True)
  (tmp_path / slates.SlateDataset.name).mkdir()
  (tmp_path / slates.SlateDataset.name / 'half').write_text('half')
  results = stage.run(config(), {}, tmp_path)
  assert (
    len(slates.read(tmp_path, 'test')) == results['splits']['test']['slates']
  )
  assert not (tmp_path / '.partial').exists()
  assert not (tmp_path / slates.SlateDataset.name / 'half').exists()


def test_bad_input_leaves_nothing_behind(tmp_path):
  settings = config('files')
  settings.data.path = str(tmp_path)
  (tmp_path / 'items.jsonl').write_text('{"item_id": 1, "title": "a"}\n')
  (tmp_path / 'interactions.csv').write_text(
    'user_id,item_id,timestamp\n1,2,3\n'
  )
  workdir = tmp_path / 'work'
  workdir.mkdir()
  with pytest.raises(log_lib.DataError, match='interactions.csv, line 2'):
    stage.run(settings, {}, workdir)
  assert not list(workdir.iterdir())


def test_an_unknown_source_is_named():
  with pytest.raises(ValueError, match=r"data.source is 'web'.*movielens"):
    stage.run(config('web'), {}, None)
