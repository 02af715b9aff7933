"""Folders of logs: a good one loads; an error names file, line and field."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from configs import slates as slates_config
from gr2_jax.data import log as log_lib
from gr2_jax.data.sources import files

ITEMS = [
  {'item_id': 1, 'title': 'Red Polish', 'brand': 'OPI', 'categories': ['N']},
  {'item_id': 2, 'title': '', 'brand': None, 'categories': []},
  {'item_id': 3, 'title': 'Balm', 'brand': 'Unknown', 'categories': ['F']},
]
ROWS = ['user_id,item_id,timestamp', '7,1,0', '7,2,1', '8,3,0', '8,1,1']
SHOWN = {
  'user_id': 7,
  'timestamp': 5,
  'candidates': [3, 1],
  'scores': [0.5, 0.1],
  'grades': [0, 2],
}


def section(folder, min_core=1):
  config = slates_config.section(test=True)
  config.source, config.path, config.min_core = 'files', str(folder), min_core
  return config


def write(folder, items=ITEMS, rows=ROWS, shown=None):
  lines = [x if isinstance(x, str) else json.dumps(x) for x in items]
  (folder / 'items.jsonl').write_text('\n'.join(lines) + '\n')
  (folder / 'interactions.csv').write_text('\n'.join(rows) + '\n')
  if shown is not None:
    text = '\n'.join(json.dumps(x) for x in shown)
    (folder / 'impressions.jsonl').write_text(text)
  return section(folder)


def test_beauty_like_files_load(tmp_path):
  log = files.load(write(tmp_path))
  assert log.catalog.titles == ('OPI Red Polish', '', 'Balm')
  assert log.catalog.categories == (('N',), (), ('F',))
  assert log.user_ids == ('7', '8')
  np.testing.assert_array_equal(log.items, [0, 1, 2, 0])
  assert not log.has_times()


def test_parquet_equals_text(tmp_path):
  text = files.load(write(tmp_path))
  other = tmp_path / 'parquet'
  other.mkdir()
  pyarrow.parquet.write_table(
    pa.Table.from_pylist(ITEMS), other / 'items.parquet'
  )
  columns = dict(user_id=[7, 7, 8, 8], item_id=[1, 2, 3, 1])
  pyarrow.parquet.write_table(
    pa.table(columns | {'timestamp': [0, 1, 0, 1]}),
    other / 'interactions.parquet',
  )
  log = files.load(section(other))
  assert log.catalog.titles == text.catalog.titles
  np.testing.assert_array_equal(log.items, text.items)
  np.testing.assert_array_equal(log.times, text.times)


def test_an_impression_of_a_user_without_history_is_legal(tmp_path):
  log = files.load(write(tmp_path, shown=[SHOWN, SHOWN | {'user_id': 9}]))
  assert log.user_ids == ('7', '8', '9')
  np.testing.assert_array_equal(log.impressions.users, [0, 2])
  np.testing.assert_array_equal(log.impressions.candidates[0], [2, 0])


BAD = {
  'duplicate item': (
    dict(items=[*ITEMS, ITEMS[0]]),
    r"items.jsonl, line 4, field 'item_id': '1' again.*line 1",
  ),
  'cut-off json': (
    dict(items=[ITEMS[0], '{"item_id": 2, "ti']),
    r'items.jsonl, line 2: not valid JSON.*cut off',
  ),
  'item without title': (
    dict(items=[{'item_id': 1}]),
    r"items.jsonl, line 1, field 'title': missing",
  ),
  'missing column': (
    dict(rows=['user_id,timestamp', '7,1']),
    r"interactions.csv, line 1, field 'item_id': missing column.*add",
  ),
  'unknown item': (
    dict(rows=[*ROWS, '7,99,3']),
    r"interactions.csv, line 6, field 'item_id': '99': it is not in the items",
  ),
  'no number': (
    dict(rows=[ROWS[0], '7,1,yesterday']),
    r"interactions.csv, line 2, field 'timestamp': 'yesterday'",
  ),
  'cut-off row': (
    dict(rows=[*ROWS, '8,2']),
    r'interactions.csv.*line 6.*cut off',
  ),
  'no user': (
    dict(rows=[*ROWS, ',2,4']),
    r"interactions.csv, line 6, field 'user_id'",
  ),
  'bad interaction grade': (
    dict(rows=['user_id,item_id,timestamp,grade', '7,1,0,3']),
    r"interactions.csv, line 2, field 'grade': '3'.*1 or 2",
  ),
  'no interactions': (dict(rows=ROWS[:1]), r'interactions.csv: no interact'),
  'unknown candidate': (
    dict(shown=[SHOWN, SHOWN | {'candidates': [3, 42]}]),
    r"impressions.jsonl, line 2, field 'candidates': 42: it is not in",
  ),
  'labels too short': (
    dict(shown=[SHOWN | {'grades': [1]}]),
    r"impressions.jsonl, line 1, field 'grades': 1 values for 2 candidates",
  ),
  'scores too long': (
    dict(shown=[SHOWN | {'scores': [1, 2, 3]}]),
    r"impressions.jsonl, line 1, field 'scores': 3 values for 2 candidates",
  ),
  'NaN score': (
    dict(shown=[SHOWN | {'scores': [0.1, float('nan')]}]),
    r"impressions.jsonl, line 1, field 'scores'.*numbers",
  ),
  'bad grade': (
    dict(shown=[SHOWN | {'grades': [0, 3]}]),
    r"impressions.jsonl, line 1, field 'grades'.*0, 1 or 2",
  ),
  'twice in a slate': (
    dict(shown=[SHOWN | {'candidates': [3, 3]}]),
    r"impressions.jsonl, line 1, field 'candidates'.*twice",
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_names_file_line_and_field(tmp_path, name):
  change, message = BAD[name]
  with pytest.raises(log_lib.DataError, match=message):
    files.load(write(tmp_path, **change))


def test_a_cut_off_parquet_file_is_named(tmp_path):
  write(tmp_path)
  (tmp_path / 'items.jsonl').unlink()
  (tmp_path / 'items.parquet').write_bytes(b'PAR1 and then nothing')
  with pytest.raises(log_lib.DataError, match=r'items.parquet.*cut off'):
    files.load(section(tmp_path))


def test_a_missing_file_or_folder_is_named(tmp_path):
  with pytest.raises(log_lib.DataError, match='items.jsonl or .parquet is mi'):
    files.load(section(tmp_path))
  with pytest.raises(log_lib.DataError, match='is not a folder'):
    files.load(section(tmp_path / 'absent'))
