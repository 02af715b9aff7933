import numpy as np
import pytest

from gr2_jax.data import records


def test_arrays_of_any_shape_come_back(tmp_path):
  rng = np.random.default_rng(0)
  rows = [
    {
      'slate': np.int32(i),
      'ids': rng.integers(0, 9, i).astype(np.int32),
      'values': rng.normal(size=(2, i)).astype(np.float32),
    }
    for i in range(6)
  ]
  path = tmp_path / 'sub' / 'rows.array_record'
  assert records.write(path, iter(rows)) == 6
  found = records.Records(path)
  assert len(found) == 6
  for i in (5, 0, 3):
    row = found[np.int64(i)]
    assert set(row) == set(rows[i])
    for name, value in rows[i].items():
      assert np.asarray(row[name]).dtype == value.dtype
      np.testing.assert_array_equal(row[name], value)
  assert [p.name for p in path.parent.iterdir()] == ['rows.array_record']


def test_a_file_is_replaced_whole_or_left_alone(tmp_path):
  path = tmp_path / 'rows.array_record'
  records.write(path, [{'x': np.int32(1)}] * 3)

  def dying():
    yield {'x': np.int32(2)}
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    records.write(path, dying())
  assert [int(records.Records(path)[i]['x']) for i in range(3)] == [1, 1, 1]
  records.write(path, [{'x': np.int32(2)}])
  assert len(records.Records(path)) == 1


def test_no_examples_make_an_empty_file(tmp_path):
  path = tmp_path / 'none.array_record'
  assert records.write(path, []) == 0
  assert len(records.Records(path)) == 0
