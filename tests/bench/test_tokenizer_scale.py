import json

import numpy as np
import pytest

from gr2_jax.bench import tokenizer_scale

pytestmark = pytest.mark.slow


def test_a_catalog_repeats_texts_and_has_unit_vectors(tmp_path):
  path = tmp_path / 'vectors.npy'
  texts = tokenizer_scale.write_vectors(path, 3000, 8, seed=1)
  vectors = np.load(path)
  assert vectors.shape == (3000, 8)
  assert len(np.unique(vectors, axis=0)) == texts < 2500
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  again = tmp_path / 'again.npy'
  tokenizer_scale.write_vectors(again, 3000, 8, seed=1)
  np.testing.assert_array_equal(vectors, np.load(again))


def test_every_item_of_a_repeating_catalog_gets_a_tuple(tmp_path):
  path = tmp_path / 'vectors.npy'
  tokenizer_scale.write_vectors(path, 2000, 16, seed=0)
  found = tokenizer_scale.name_catalog(str(path), str(tmp_path / 'run'), 3)
  assert found['uniqueness'] == 1
  assert min(found[phase] for phase in tokenizer_scale.PHASES) > 0
  assert 0 < found['memory'] < 64
  json.dumps(found)


def test_a_billion_is_computed_from_the_largest_catalog():
  row = {'train': 60.0, 'assign': 3.6, 'complete': 1.8, 'items': 10**6}
  small = row | {'items': 10**4, 'assign': 3600.0}
  line = tokenizer_scale.billion([small, row], dim=250)
  assert '1.0 TB' in line
  assert 'assignment 1.0 h' in line  # 3.6 s for a million
  # n log n: 0.5 h x log2(1e9) / log2(1e6) = 0.75 h.
  assert f'completion {0.75:.1f} h' in line


def test_a_process_that_fails_is_named(monkeypatch, tmp_path):
  monkeypatch.setattr(tokenizer_scale, 'write_vectors', lambda *a, **k: 0)
  with pytest.raises(RuntimeError, match='naming 10 items: exit code'):
    tokenizer_scale.measure(10, 4, 1, str(tmp_path))
