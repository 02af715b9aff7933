import subprocess
import sys

import numpy as np
import pytest

from gr2_jax.data import text

TITLES = [
  'Red Nail Lacquer', 'Blue Nail Lacquer', 'Green Nail Polish',
  'Argan Oil Shampoo', 'Argan Oil Conditioner', 'Coconut Shampoo',
]  # fmt: skip
CATEGORIES = [('Makeup', 'Nails')] * 3 + [('Hair', 'Care')] * 3
YEARS = [1990, 1991, 1992, 2010, 2011, 0]


def embed(titles=TITLES, categories=CATEGORIES, years=YEARS, dim=4, **kwargs):
  return text.features(titles, categories, years, dim=dim, **kwargs)


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


def test_deterministic_across_processes_with_other_hash_seeds():
  program = (
    'import sys; from gr2_jax.data import text; '
    f'x = text.features({TITLES!r}, {CATEGORIES!r}, {YEARS!r}, dim=4, seed=3); '
    'sys.stdout.write(x.tobytes().hex())'
  )
  outputs = {
    subprocess.run(
      [sys.executable, '-c', program],
      env={'PYTHONHASHSEED': seed, 'PYTHONPATH': ':'.join(sys.path)},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in ('1', '2')
  }
  assert outputs == {embed(seed=3).tobytes().hex()}


def test_truncated_svd_matches_the_exact_one():
  rng = np.random.default_rng(1)
  dense = rng.normal(size=(60, 8)) @ rng.normal(size=(8, 40))
  dense = dense.astype(np.float32)
  got = text.truncated_svd(text.sparse.csr_matrix(dense), 5, seed=0)
  u, s, _ = np.linalg.svd(dense, full_matrices=False)
  want = u[:, :5] * s[:5]
  np.testing.assert_allclose(np.abs(got), np.abs(want), atol=2e-3)


def test_tfidf_weights_equal_the_formula():
  texts = [('cat', (), 0), ('cat cat dog', (), 0), ('dog', (), 0)]
  matrix = text.tfidf(texts, buckets=1 << 16).toarray()
  # Word block first; 'cat' and 'dog' are in two of three texts each, the pairs
  # in one and dropped. tf of 'cat' in the second is 2.
  words = matrix[:, :2]
  want = np.array([1 + np.log(2), 1.0])
  np.testing.assert_allclose(
    np.sort(words[1]), np.sort(want / np.linalg.norm(want)), rtol=1e-5
  )
  assert sorted(words[0]) == [0.0, 1.0]


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
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    embed(**arguments)
