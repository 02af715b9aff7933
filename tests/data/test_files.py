import os

import pytest

from gr2_jax.data import files


@pytest.mark.parametrize(('mode', 'content'), [('w', 'é\n'), ('wb', b'\xff')])
def test_a_file_appears_when_it_is_whole(tmp_path, mode, content):
  path = tmp_path / 'file'
  with files.atomic_write(path, mode) as file:
    file.write(content)
    assert not path.exists()
  read = path.read_text('utf-8') if mode == 'w' else path.read_bytes()
  assert read == content
  assert os.listdir(tmp_path) == ['file']


def test_a_failed_write_keeps_the_earlier_file(tmp_path):
  path = tmp_path / 'file'
  path.write_text('earlier')

  def fail():
    with files.atomic_write(path) as file:
      file.write('torn')
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    fail()
  assert path.read_text() == 'earlier'
  assert os.listdir(tmp_path) == ['file']


def test_two_writers_of_a_shared_file_do_not_meet(tmp_path):
  path = tmp_path / 'file'
  with (
    files.atomic_path(path, shared=True) as first,
    files.atomic_path(path, shared=True) as second,
  ):
    assert first != second
    first.write_text('first')
    second.write_text('second')
  assert path.read_text() == 'first'
  assert os.listdir(tmp_path) == ['file']
