"""What titles and categories say of items, and of items beside the catalog."""

import numpy as np
import pytest

from gr2_jax.data import item_text
from gr2_jax.data import log as log_lib

N = 300


@pytest.fixture(scope='module')
def catalog():
  """Titles of common and rare words; every row has more than 100 neighbors."""
  rng = np.random.default_rng(0)
  words = np.array([f'w{i}' for i in range(24)])
  return log_lib.Catalog(
    tuple(f'item-{i}' for i in range(N)),
    tuple(' '.join(words[rng.permutation(24)[:3]]) for _ in range(N)),
    tuple((f'c{i % 3}', f'd{i % 7}')[: i % 4] for i in range(N)),
    (1990 + np.arange(N) % 30).astype(np.int32),
  )


@pytest.fixture(scope='module')
def fitted(catalog):
  return item_text.fit(catalog)


def test_a_copy_of_an_item_is_read_as_the_item(catalog, fitted):
  rows = np.array([5, 0, 17, 250])
  beside = fitted.beside(catalog.take(rows))
  copies = N + np.arange(4)
  for name in ('genres', 'leaf', 'years'):
    read = getattr(beside, name)
    np.testing.assert_array_equal(read(copies), read(rows), err_msg=name)
    np.testing.assert_array_equal(read(rows), getattr(fitted, name)(rows))
  history = np.arange(N).reshape(10, 30)
  own = fitted.cosine(history, np.tile(rows, (10, 1)))
  copied = beside.cosine(history, np.tile(copies, (10, 1)))
  # Like the item, a copy is left out where it is not among the nearest.
  assert (own == 0).mean() > 0.2
  np.testing.assert_allclose(copied, own, atol=1e-6)
  # Of its own it has no list of nearest ones: nothing is left out.
  turned = beside.cosine(np.tile(copies, (10, 1)), history)
  assert (turned.swapaxes(1, 2) >= own - 1e-6).all()


def test_known_items_are_read_as_without_others(catalog, fitted):
  beside = fitted.beside(catalog.take(np.array([3, 4])))
  history = np.array([[1, 2, N, -1], [7, -1, -1, -1]])
  candidates = np.array([[5, N + 1, 6], [8, 9, -1]])
  found = beside.cosine(history, candidates)
  met = (
    np.where(history < N, history, -1),
    np.where(candidates < N, candidates, -1),
  )
  known = (met[0] >= 0)[:, :, None] & (met[1] >= 0)[:, None]
  np.testing.assert_array_equal(found[known], fitted.cosine(*met)[known])
  assert not found[(history < 0)[:, :, None] | (candidates < 0)[:, None]].any()


def test_an_item_beside_is_weighed_as_one_more_row_would_be(catalog, fitted):
  new = log_lib.Catalog(
    ('x', 'y', 'z'),
    ('w1 w2 unheard', 'w1 W2', '...'),
    (('c0', 'new'), ('new',), ()),
    np.array([0, 1999, 0], np.int32),
  )
  beside = fitted.beside(new)
  items = N + np.arange(3)
  genres = beside.genres(items)
  # A category of nobody's weighs as the rarest, and matches nothing.
  rarest = fitted.weights.max()
  weight = fitted.weights[fitted.categories['c0']]
  assert genres[0, fitted.categories['c0']] == pytest.approx(
    weight / np.hypot(weight, rarest)
  )
  assert (genres[0] > 0).sum() == 1
  assert not genres[1].any()
  assert genres[2, -1] == 1
  leaf = beside.leaf(items)
  assert leaf[0] == leaf[1] == len(fitted.leaves)
  assert leaf[2] == fitted.leaves['']
  # Two titles beside the catalog: cosine of what they share, by its idf.
  cosine = beside.cosine(items[None], items[None])[0]
  np.testing.assert_allclose(np.diag(cosine), [1, 1, 0], atol=1e-6)
  np.testing.assert_allclose(cosine, cosine.T, atol=1e-6)
  assert 0 < cosine[0, 1] < 1


def test_titles_without_any_word_are_like_nothing():
  catalog = log_lib.Catalog(
    ('a', 'b'), ('', '...'), ((), ()), np.zeros(2, np.int32)
  )
  beside = item_text.fit(catalog).beside(catalog)
  assert not beside.cosine(np.arange(4)[None], np.arange(4)[None]).any()
