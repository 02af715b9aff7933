import numpy as np
import pytest

from gr2_jax.models import embedding_init

TEXTS = ([3, 5, 5], [], [0])


@pytest.fixture(scope='module')
def rows():
  rng = np.random.default_rng(1)
  return (0.3 * rng.normal(size=(50, 400)) + 0.7).astype(np.float32)


def oracle(rows, texts):
  for ids in texts:
    chosen = [rows[i] for i in ids] or list(rows)
    yield sum(row.astype(np.float64) for row in chosen) / len(chosen)


@pytest.mark.parametrize(
  ('kind', 'texts'),
  [('mean', ([], [], [])), ('text', TEXTS)],
)
def test_rows_start_at_a_mean_with_a_little_noise(rows, kind, texts):
  found = embedding_init.new_rows(rows, TEXTS, kind)
  assert found.dtype == np.float32
  rest = found - np.stack(list(oracle(rows, texts)))
  # Zero mean and a tenth of the rows' spread, within four standard errors.
  spread = rows.std() / 10
  assert np.all(np.abs(rest.mean(1)) < 4 * spread / 400**0.5)
  np.testing.assert_allclose(rest.std(1), spread, rtol=4 / 800**0.5)
  assert np.linalg.matrix_rank(rest) == 3


def test_noise_has_the_spread_of_the_rows_and_no_mean(rows):
  found = embedding_init.new_rows(rows, TEXTS, 'noise')
  assert np.all(np.abs(found.mean(1)) < 4 * rows.std() / 400**0.5)
  np.testing.assert_allclose(found.std(1), rows.std(), rtol=4 / 800**0.5)


def test_the_seed_decides(rows):
  one, again, other = (
    embedding_init.new_rows(rows, TEXTS, 'text', seed) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, again)
  assert not np.isclose(one, other).all(axis=1).any()


def test_an_unknown_start_is_named(rows):
  with pytest.raises(ValueError, match="model.new_rows='zeros': must be one"):
    embedding_init.new_rows(rows, TEXTS, 'zeros')
