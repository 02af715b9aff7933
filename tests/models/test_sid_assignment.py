import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.models import codebooks, semantic_ids, sid_assignment


@st.composite
def prefixes_with_room(draw, size=5):
  """[I, 2] prefixes, none held by more than `size` items, in any order."""
  counts = draw(
    st.dictionaries(
      st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)),
      st.integers(1, size),
      min_size=1,
    )
  )
  rows = [prefix for prefix, count in counts.items() for _ in range(count)]
  return np.array(draw(st.permutations(rows)))


@settings(max_examples=60, deadline=None)
@given(prefixes_with_room(), st.integers(0, 2**32))
def test_drawn_level_makes_tuples_unique_and_keeps_prefixes(prefixes, seed):
  codes = sid_assignment.draw_last_level(prefixes, 5, seed=seed)
  np.testing.assert_array_equal(codes[:, :2], prefixes)
  assert semantic_ids.SemanticIds(codes, 5).statistics()['uniqueness'] == 1.0


@settings(max_examples=30, deadline=None)
@given(prefixes_with_room(), st.data())
def test_appended_items_leave_earlier_codes_alone(prefixes, data):
  kept = data.draw(st.integers(1, len(prefixes)))
  whole = sid_assignment.draw_last_level(prefixes, 5, seed=0)
  part = sid_assignment.draw_last_level(prefixes[:kept], 5, seed=0)
  np.testing.assert_array_equal(whole[:kept], part)


def test_drawn_codes_are_uniform_and_seeded():
  prefixes = np.stack(np.indices((32, 32)), -1).reshape(-1, 2)
  codes = sid_assignment.draw_last_level(prefixes, 32, seed=0)[:, 2]
  # 1,024 draws of 32 codes: the statistic has mean 31 and deviation 7.9.
  counts = np.bincount(codes, minlength=32)
  assert ((counts - 32) ** 2 / 32).sum() < 31 + 4 * 7.9
  again = sid_assignment.draw_last_level(prefixes, 32, seed=0)[:, 2]
  other = sid_assignment.draw_last_level(prefixes, 32, seed=1)[:, 2]
  np.testing.assert_array_equal(codes, again)
  assert (codes != other).mean() > 0.8


def test_uniform_draws_may_collide():
  prefixes = np.zeros((50, 2), int)
  codes = sid_assignment.draw_last_level(prefixes, 64, seed=0, kind='uniform')
  assert 1 < len(np.unique(codes[:, 2])) < 50


def test_a_full_prefix_is_named():
  with pytest.raises(ValueError, match=r'6 items share the prefix \[1, 2\]'):
    sid_assignment.draw_last_level(np.array([[0, 0]] + [[1, 2]] * 6), 5, seed=0)


def test_an_unknown_kind_is_named():
  with pytest.raises(ValueError, match="not 'random'"):
    sid_assignment.draw_last_level(
      np.zeros((1, 2), int), 5, seed=0, kind='random'
    )


def fit(latents, size, seed=0):
  books = codebooks.residual_codebooks(
    latents, levels=2, size=size, batch_size=8, iterations=3, seed=seed
  )
  vectors = books['vectors']
  return vectors, np.asarray(codebooks.quantise(latents, vectors)[0])


def test_no_item_moves_while_there_is_room():
  latents = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
  vectors, codes = fit(latents, 8)
  assert np.unique(codes, axis=0, return_counts=True)[1].max() <= 8
  got, moved = sid_assignment.spill(latents, vectors, codes, levels=3)
  np.testing.assert_array_equal(got, codes)
  assert moved == 0


@settings(max_examples=25, deadline=None)
@given(
  st.integers(1, 27), st.integers(0, 1000), st.sampled_from([0.0, 0.1, 1.0])
)
def test_unique_up_to_the_last_tuple_of_the_code_space(items, seed, spread):
  """C = 3, L = 3: all 27 tuples can be given, however alike the items."""
  rng = np.random.default_rng(seed)
  latents = (1 + spread * rng.normal(size=(27, 2))).astype(np.float32)
  vectors = rng.normal(size=(2, 3, 2)).astype(np.float32)
  codes = np.asarray(codebooks.quantise(latents, vectors)[0])[:items]
  latents = latents[:items]
  spilled, moved = sid_assignment.spill(latents, vectors, codes, levels=3)
  changed = (spilled != codes).any(1)
  assert changed.sum() <= moved
  got = sid_assignment.draw_last_level(spilled, 3, seed=seed)
  assert len(np.unique(got, axis=0)) == items
  # Appending an item moves no earlier one.
  kept = max(1, items - 1)
  fewer, _ = sid_assignment.spill(
    latents[:kept], vectors, codes[:kept], levels=3
  )
  np.testing.assert_array_equal(fewer, spilled[:kept])


def test_overflow_goes_to_the_nearest_sibling_with_room():
  vectors = np.array(
    [[[0.0], [100.0], [200.0]], [[0.0], [10.0], [4.0]]], np.float32
  )
  latents = np.array([[1.0], [1.0], [1.0], [1.0], [9.0], [1.0]], np.float32)
  codes = np.asarray(codebooks.quantise(latents, vectors)[0])
  np.testing.assert_array_equal(codes[:, 1], [0, 0, 0, 0, 1, 0])
  got, moved = sid_assignment.spill(latents, vectors, codes, levels=3)
  # Three fit under (0, 0); the fourth and the sixth go to 4.0, not to 10.0.
  np.testing.assert_array_equal(got[:, 1], [0, 0, 0, 2, 1, 2])
  np.testing.assert_array_equal(got[:, 0], 0)
  assert moved == 2


def test_a_catalog_beyond_the_code_space_says_what_to_raise():
  with pytest.raises(ValueError, match=r'28 items.*3\^3 = 27.*codebook_size'):
    sid_assignment.spill(
      np.zeros((28, 2)), np.zeros((2, 3, 2)), np.zeros((28, 2), int), levels=3
    )
