import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from gr2_jax.semantic_ids import assignment, ids


def logarithm_of_plan(cost, mass):
  """Balanced transport of one problem, by normalization of logarithms."""
  span = (cost.max() - cost.min()) / 2
  plan = -cost / span / assignment.EPSILON
  for _ in range(assignment.ITERATIONS):
    plan += np.log(mass / mass.sum())[:, None]
    plan -= logsumexp(plan, axis=1, keepdims=True)
    plan += np.log(mass / mass.sum())[:, None]
    plan -= logsumexp(plan, axis=0) + np.log(cost.shape[1])
  return plan


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(2, 8), st.integers(0, 1000))
def test_codes_have_the_largest_share_of_the_plan(rows, columns, seed):
  rng = np.random.default_rng(seed)
  cost = rng.uniform(size=(rows, columns))
  mass = rng.integers(1, 4, size=rows).astype(float)
  # A second problem of other size beside it, and places that hold nothing.
  padded = rng.uniform(size=(2, 8, 9))
  free = np.zeros((2, 9), bool)
  free[0, 1 : columns + 1] = free[1, 3] = True
  padded[0, :rows, 1 : columns + 1] = cost
  masses = np.zeros((2, 8))
  masses[0, :rows], masses[1, 0] = mass, 1
  got = assignment.sinkhorn(padded, masses, free)
  assert got[1, 0] == 3
  codes = got[0, :rows] - 1
  plan = logarithm_of_plan(cost, mass)
  assert (plan[np.arange(rows), codes] >= plan.max(1) - 1e-5).all()


def test_balance_parts_rows_that_want_the_same_column():
  cost = np.array([[[0.0, 0.5, 1.0], [0.1, 0.2, 1.1], [0.0, 0.4, 0.2]]])
  free = np.ones((1, 3), bool)
  got = assignment.sinkhorn(cost, np.ones((1, 3)), free)
  # Of the six pairings, 0 + 0.2 + 0.2 is the cheapest.
  assert got.tolist() == [[0, 1, 2]]


def test_one_row_takes_the_nearest_free_column():
  cost = np.array([[[0.3, 0.1, 0.2]]])
  free = np.array([[True, False, True]])
  assert assignment.sinkhorn(cost, np.ones((1, 1)), free).tolist() == [[2]]


def colliding(codes, taken):
  """Whether each row equals another row or a taken tuple."""
  rows = [tuple(x) for x in codes.tolist()]
  taken = {tuple(x) for x in taken.tolist()}
  return np.array([rows.count(x) > 1 or x in taken for x in rows])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3, 40]))
def test_repair_leaves_single_items_and_parts_others(seed, values):
  rng = np.random.default_rng(seed)
  levels, size = int(rng.integers(1, 4)), int(rng.integers(2, 6))
  items = int(rng.integers(1, min(size**levels, 40) + 1))
  latents = rng.normal(size=(values, 2))[rng.integers(values, size=items)]
  latents = latents.astype(np.float32)
  vectors = rng.normal(size=(levels, size, 2)).astype(np.float32)
  codes, residual = np.zeros((items, levels), np.int32), latents.copy()
  for level in range(levels):
    cost = ((residual[:, None] - vectors[level]) ** 2).sum(-1)
    codes[:, level] = cost.argmin(1)
    residual -= vectors[level, codes[:, level]]
  taken = rng.integers(size, size=(int(rng.integers(0, 4)), levels))
  named = np.unique(ids.prefix_keys(taken, size))
  before = codes.copy()
  got, moved = assignment.repair(codes, vectors, lambda i: latents[i], named)
  np.testing.assert_array_equal(codes, before)
  np.testing.assert_array_equal(got[:, :-1], codes[:, :-1])
  assert moved == (got != codes).any(1).sum()
  was, is_now = colliding(codes, taken), colliding(got, taken)
  np.testing.assert_array_equal(got[~was], codes[~was])
  assert not is_now[~was].any()
  # Where it ends there is nothing left to do: every prefix that still has
  # colliding items has equal ones, or no free code, or freed nobody.
  again, _ = assignment.repair(got, vectors, lambda i: latents[i], named)
  assert colliding(again, taken).sum() == is_now.sum()


def test_distinct_items_are_parted_and_equal_ones_are_not():
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(2, 16, 4)).astype(np.float32)
  latents = (0.1 * rng.normal(size=(10, 4))).astype(np.float32)
  latents[9] = latents[8]
  codes = np.full((10, 2), 3, np.int32)
  got, _ = assignment.repair(
    codes, vectors, lambda i: latents[i], np.zeros(0, np.int64)
  )
  assert len(np.unique(got, axis=0)) == 9
  np.testing.assert_array_equal(got[8], got[9])


def test_a_taken_tuple_is_left_while_there_is_another():
  vectors = np.array([[[0.0], [1.0], [3.0]]], np.float32)
  latents = np.array([[0.1], [2.9]], np.float32)
  codes = np.array([[0], [2]], np.int32)
  for named, want in (([0], [[1], [2]]), ([0, 1], [[0], [2]])):
    got, moved = assignment.repair(
      codes, vectors, lambda i: latents[i], np.array(named)
    )
    assert got.tolist() == want
    assert moved == (got != codes).sum()


def test_without_collisions_nothing_is_asked_for():
  def nobody(items):
    raise AssertionError(f'{items} were asked for')

  codes = np.array([[0, 1], [1, 1], [0, 0]], np.int32)
  vectors = np.zeros((2, 2, 1), np.float32)
  got, moved = assignment.repair(codes, vectors, nobody, np.array([2]))
  np.testing.assert_array_equal(got, codes)
  assert moved == 0
