import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gr2_jax.semantic_ids import text_store


def vectors_of(texts, width=3):
  """A vector that only this text has."""
  seeds = [int.from_bytes(text.encode(), 'big') for text in texts]
  rows = [np.random.default_rng(seed).normal(size=width) for seed in seeds]
  return np.array(rows, np.float32).reshape(len(texts), width)


def append(directory, texts):
  text_store.append(directory, text_store.digests(texts), vectors_of(texts))


def read(directory, texts, width=3):
  return text_store.read(directory, text_store.digests(texts), width)


TEXTS = st.lists(st.text(max_size=4), unique=True, max_size=12)


@hypothesis.given(
  shards=st.lists(TEXTS.filter(len), max_size=3), wanted=TEXTS.filter(len)
)
def test_a_text_has_the_vector_it_was_given(shards, wanted, tmp_path_factory):
  directory = tmp_path_factory.mktemp('store') / 'encoder'
  for texts in shards:
    append(directory, texts)
  vectors, found = read(directory, wanted)
  held = {text for texts in shards for text in texts}
  assert found.tolist() == [text in held for text in wanted]
  np.testing.assert_array_equal(
    vectors, np.where(found[:, None], vectors_of(wanted), 0.0)
  )


def test_hashes_are_of_128_bits_and_ours_alone():
  found = text_store.digests([str(i) for i in range(5000)])
  assert found.dtype == 'S16'
  assert len(np.unique(found)) == 5000
  np.testing.assert_array_equal(text_store.digests(['7']), found[7:8])


def test_the_same_texts_again_replace_their_shard(tmp_path):
  append(tmp_path, ['a', 'b'])
  append(tmp_path, ['a', 'b'])
  append(tmp_path, ['b', 'a'])
  assert len(list(tmp_path.iterdir())) == 2
  assert read(tmp_path, ['a'])[1].all()


def flip(content):
  """Changes one bit of the vectors, which stand near the end."""
  at = content.rindex(b'NUMPY') + 130
  return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
  'damage',
  [lambda x: b'', lambda x: x[:40], lambda x: x[:-30], flip],
  ids=['empty', 'head', 'tail', 'bit'],
)
def test_a_damaged_shard_is_named_and_can_be_deleted(damage, tmp_path):
  append(tmp_path, ['a', 'b'])
  (shard,) = tmp_path.iterdir()
  append(tmp_path, ['c'])
  shard.write_bytes(damage(shard.read_bytes()))
  with pytest.raises(ValueError, match=f'{shard.name}: damaged .*delete it'):
    read(tmp_path, ['a', 'c'])
  shard.unlink()
  assert read(tmp_path, ['a', 'c'])[1].tolist() == [False, True]


def test_vectors_of_another_width_are_named(tmp_path):
  append(tmp_path, ['a', 'b'])
  with pytest.raises(ValueError, match=r'vectors \(2, 3\) of 2 texts'):
    read(tmp_path, ['b'], width=4)


def test_a_write_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
  def fail(file, **unused):
    file.write(b'half')
    raise OSError('no space left')

  monkeypatch.setattr(np, 'savez', fail)
  with pytest.raises(OSError, match='no space left'):
    append(tmp_path, ['a'])
  assert not list(tmp_path.iterdir())


def test_the_folder_is_in_the_cache_of_the_user(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert text_store.folder('abc') == tmp_path / 'gr2_jax' / 'text' / 'abc'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  found = text_store.folder('abc')
  assert found == tmp_path / '.cache' / 'gr2_jax' / 'text' / 'abc'
