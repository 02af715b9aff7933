import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import sparse

from gr2_jax.semantic_ids import tfidf

TITLES = [
  'Red Nail Lacquer', 'Blue Nail Lacquer', 'Green Nail Polish',
  'Argan Oil Shampoo', 'Argan Oil Conditioner', 'Coconut Shampoo',
]  # fmt: skip
CATEGORIES = [('Makeup', 'Nails')] * 3 + [('Hair', 'Care')] * 3
YEARS = [1990, 1991, 1992, 2010, 2011, 0]


def fit(titles=TITLES, categories=CATEGORIES, years=YEARS, dim=4, **kwargs):
  return tfidf.fit(titles, categories, years, dim=dim, **kwargs)


def embed(titles=TITLES, categories=CATEGORIES, years=YEARS, dim=4, **kwargs):
  space = fit(titles, categories, years, dim, **kwargs)
  return tfidf.embed(space, titles, categories, years)


def test_rows_are_unit_float32():
  rows = embed()
  assert rows.dtype == np.float32
  assert rows.shape == (6, 4)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)


def test_items_alike_in_text_are_closer_than_others():
  likeness = embed() @ embed().T
  within = min(likeness[:3, :3].min(), likeness[3:, 3:].min())
  assert within > likeness[:3, 3:].max() + 0.3


def test_each_field_separates_items():
  base = ('A Title Here', ('Drama',), 1990)
  others = [
    ('Other Words There', ('Drama',), 1990),
    ('A Title Here', ('Comedy',), 1990),
    ('A Title Here', ('Drama',), 2015),
  ]
  rows = embed(*zip(base, *others, base, strict=True), dim=6)
  for row in rows[1:4]:
    assert np.abs(row - rows[0]).max() > 1e-3
  np.testing.assert_array_equal(rows[0], rows[4])


def test_same_text_gives_the_same_row_wherever_it_stands():
  rng = np.random.default_rng(0)
  order = rng.permutation(np.repeat(np.arange(6), 41))
  rows = embed(
    [TITLES[i] for i in order],
    [CATEGORIES[i] for i in order],
    [YEARS[i] for i in order],
  )
  for item in range(6):
    same = rows[order == item]
    np.testing.assert_array_equal(same, np.broadcast_to(same[0], same.shape))


def test_deterministic_across_processes_with_other_hash_seeds(tmp_path):
  program = (
    'import pathlib, sys; from gr2_jax.semantic_ids import tfidf; '
    f'c = {TITLES!r}, {CATEGORIES!r}, {YEARS!r}; '
    'space = tfidf.fit(*c, dim=4, seed=3); '
    'path = pathlib.Path(sys.argv[1]); '
    'space = space if path.exists() else (space.save(path) or space); '
    'x = tfidf.embed(space, *c), tfidf.embed(tfidf.load(path), *c); '
    'sys.stdout.write(" ".join(each.tobytes().hex() for each in x))'
  )
  outputs = {
    output
    for seed in ('1', '2')
    for output in subprocess.run(
      [sys.executable, '-c', program, tmp_path / 'text.npz'],
      env={'PYTHONHASHSEED': seed, 'PYTHONPATH': ':'.join(sys.path)},
      capture_output=True,
      text=True,
      check=True,
    ).stdout.split()
  }
  assert outputs == {embed(seed=3).tobytes().hex()}


WORDS = st.lists(st.sampled_from(['red', 'blue', 'oil', 'nail', 'wax']))
ITEM = st.tuples(
  WORDS.map(' '.join),
  st.lists(st.sampled_from(['Hair', 'Nails', 'Care']), max_size=2),
  st.sampled_from([0, 1990, 2011, 2024]),
)


@hypothesis.given(
  old=st.lists(ITEM, min_size=1, max_size=8),
  new=st.lists(ITEM, max_size=8),
  data=st.data(),
)
def test_new_items_move_no_old_one_and_land_where_their_text_does(
  old, new, data
):
  space = fit(*zip(*old, strict=True))
  first = tfidf.embed(space, *zip(*old, strict=True))
  both = data.draw(st.permutations(list(enumerate(old + new))))
  rows = tfidf.embed(space, *zip(*(item for _, item in both), strict=True))
  found = {}
  for (i, item), row in zip(both, rows, strict=True):
    if i < len(old):
      np.testing.assert_array_equal(row, first[i])
    known = found.setdefault(repr(item), row)
    np.testing.assert_array_equal(row, known)
  norm = np.linalg.norm(rows, axis=1)
  assert ((np.abs(norm - 1) < 1e-5) | (norm == 0)).all()


def test_a_new_item_is_closest_to_those_it_is_like():
  space = fit()
  new = tfidf.embed(space, ['Purple Nail Lacquer'], [('Makeup', 'Nails')], [0])
  likeness = (tfidf.embed(space, TITLES, CATEGORIES, YEARS) @ new.T)[:, 0]
  assert likeness[:3].min() > likeness[3:].max() + 0.3


def test_a_new_item_of_unknown_words_is_zero():
  assert not tfidf.embed(fit(), ['zzz qqq'], [('Tools',)], [0]).any()


def test_a_saved_space_is_the_same(tmp_path):
  path = tmp_path / 'text.npz'
  space = fit()
  space.save(path)
  found = tfidf.load(path)
  assert found.buckets == space.buckets
  assert found.dim == 4
  for name in ('columns', 'idf', 'projection'):
    np.testing.assert_array_equal(getattr(found, name), getattr(space, name))
    assert getattr(found, name).dtype == getattr(space, name).dtype
  assert [file.name for file in tmp_path.iterdir()] == ['text.npz']


@pytest.mark.parametrize('size', [0, 10, 2000, -100])
def test_a_damaged_space_is_named(size, tmp_path):
  path = tmp_path / 'text.npz'
  fit().save(path)
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(ValueError, match='text.npz: not a whole text space'):
    tfidf.load(path)


@pytest.mark.parametrize('dim', [5, 8, 12])
def test_singular_vectors_match_the_exact_ones(dim):
  rng = np.random.default_rng(1)
  dense = rng.normal(size=(60, 8)) @ rng.normal(size=(8, 40))
  dense = dense.astype(np.float32)
  got = tfidf.right_singular_vectors(sparse.csr_matrix(dense), dim, seed=0)
  _, s, vt = np.linalg.svd(dense, full_matrices=False)
  rank = min(dim, 8)
  np.testing.assert_allclose(
    np.abs(dense @ got)[:, :rank],
    np.abs(dense @ vt[:rank].T),
    atol=1e-4 * s[0],
  )
  np.testing.assert_allclose(
    got.T @ got, np.diag([1.0] * rank + [0.0] * (dim - rank)), atol=1e-5
  )
  largest = np.abs(got).argmax(0)[:rank]
  assert (got[largest, np.arange(rank)] > 0).all()


def test_tfidf_weights_equal_the_formula():
  texts = [('cat', (), 0), ('cat cat dog', (), 0), ('dog', (), 0)]
  space = tfidf.fit(*zip(*texts, strict=True), dim=2)
  matrix = tfidf.tfidf(space, texts).toarray()
  # Word block first; 'cat' and 'dog' are in two of three texts each, the pairs
  # in one and dropped. tf of 'cat' in the second is 2.
  words = matrix[:, :2]
  want = np.array([1 + np.log(2), 1.0])
  np.testing.assert_allclose(
    np.sort(words[1]), np.sort(want / np.linalg.norm(want)), rtol=1e-5
  )
  assert sorted(words[0]) == [0.0, 1.0]
  np.testing.assert_allclose(space.idf, 1 + np.log(4 / 3), rtol=1e-6)
  # 'cat' and 'dog' again, in a title that came later: tf of 'dog' is 3.
  later = tfidf.tfidf(space, [('dog cat dog dog', (), 0)]).toarray()[0, :2]
  want = np.array([1.0, 1 + np.log(3)])
  np.testing.assert_allclose(
    np.sort(later), want / np.linalg.norm(want), rtol=1e-5
  )


def test_blocks_have_the_length_of_their_weight():
  texts = list(zip(TITLES, CATEGORIES, YEARS, strict=True))
  space = fit()
  matrix = tfidf.tfidf(space, texts).toarray()
  block = space.columns // space.buckets
  for i, weight in enumerate(tfidf.BLOCK_WEIGHTS.values()):
    norm = np.linalg.norm(matrix[:, block == i], axis=1)
    np.testing.assert_allclose(norm[norm > 0], weight, rtol=1e-5)
    assert (norm > 0).any()


def test_half_a_surrogate_pair_is_text_like_any_other():
  rows = embed(['nail', 'oil'], [('\ud83d',), ('Hair',)], [0, 0], dim=2)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)


def test_no_text_gives_zeros_and_narrow_text_is_padded():
  rows = embed(['', 'one word', 'one word more'], [()] * 3, [0] * 3, dim=50)
  assert rows.shape == (3, 50)
  assert not rows[0].any()
  assert np.isfinite(rows).all()
  assert not embed(['', ''], [()] * 2, [0] * 2).any()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(titles=[], categories=[], years=[]), 'catalog is empty'),
    (dict(years=[0]), r'titles \(6\).*years \(1\)'),
    (dict(dim=0), 'dim=0'),
    (dict(buckets=0), 'buckets=0'),
    (dict(buckets=1 << 30), 'buckets=1073741824'),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    embed(**arguments)
