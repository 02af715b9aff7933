import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.data import slates
from gr2_jax.semantic_ids import co_engagement


def make(users, histories, width=5):
  """Slates with users and histories only."""
  n = len(users)
  padded = np.full((n, width), -1, np.int32)
  for row, history in enumerate(histories):
    padded[row, : len(history)] = history
  lists = {name: np.zeros((n, 2), np.float32) for name in slates.NAMES}
  return slates.Slates(
    **lists
    | {
      'user': np.array(users, np.int32),
      'history': padded,
      'history_length': np.array([len(h) for h in histories], np.int32),
    }
  )


def brute_force(users, histories, items, window):
  """For every item, a counter: neighbor -> users who had both, close."""
  met = collections.defaultdict(set)
  for user, history in zip(users, histories, strict=True):
    for i, a in enumerate(history):
      for j, b in enumerate(history):
        if a != b and abs(i - j) <= window:
          met[a, b].add(user)
  return [
    {b: len(met[a, b]) for b in range(items) if met[a, b]} for a in range(items)
  ]


def counts(found, items):
  assert found.offsets.shape == (items + 1,)
  assert found.offsets[-1] == len(found.items)
  return [
    dict(collections.Counter(found.items[begin:end].tolist()))
    for begin, end in zip(found.offsets[:-1], found.offsets[1:], strict=True)
  ]


@settings(max_examples=60)
@given(
  st.lists(
    st.tuples(
      st.integers(0, 3), st.lists(st.integers(0, 6), min_size=1, max_size=5)
    ),
    min_size=1,
    max_size=8,
  ),
  st.integers(0, 6),
)
def test_neighbors_equal_brute_force(rows, window):
  users, histories = zip(*rows, strict=True)
  found = co_engagement.neighbors(make(users, histories), 7, window=window)
  assert counts(found, 7) == brute_force(users, histories, 7, window)


def test_overlapping_slates_of_one_user_count_once():
  users, histories = [4, 4, 4, 9], [[0, 1], [0, 1, 2], [1, 2, 0], [0, 1]]
  found = co_engagement.neighbors(make(users, histories), 4, window=1)
  assert counts(found, 4) == [{1: 2, 2: 1}, {0: 2, 2: 1}, {1: 1, 0: 1}, {}]


def test_an_item_that_comes_again_is_one_meeting_a_user():
  found = co_engagement.neighbors(make([0], [[0, 1, 0]]), 2, window=3)
  assert counts(found, 2) == [{1: 1}, {0: 1}]


def test_the_window_is_a_distance_in_places():
  slates_ = make([0], [[0, 1, 2, 3]])
  near = co_engagement.neighbors(slates_, 4, window=1)
  wide = co_engagement.neighbors(slates_, 4, window=2)
  assert counts(near, 4) == [{1: 1}, {0: 1, 2: 1}, {1: 1, 3: 1}, {2: 1}]
  assert counts(wide, 4)[0] == {1: 1, 2: 1}


def test_draws_are_neighbors_as_often_as_they_count():
  users = [0, 1, 2, 3]
  histories = [[0, 1], [0, 1], [0, 1], [0, 2]]
  found = co_engagement.neighbors(make(users, histories), 4, window=1)
  drawn = found.draw(np.zeros(4000, np.int64), np.random.default_rng(0))
  assert drawn.dtype == np.int32
  share = np.bincount(drawn, minlength=4) / 4000
  np.testing.assert_allclose(share, [0, 0.75, 0.25, 0], atol=0.03)


@pytest.mark.parametrize('histories', [[[0, 1]], [[2]]])
def test_an_item_without_neighbors_draws_itself(histories):
  found = co_engagement.neighbors(make([0], histories), 5, window=3)
  drawn = found.draw(np.array([2, 3, 4, 4]), np.random.default_rng(0))
  np.testing.assert_array_equal(drawn, [2, 3, 4, 4])
  assert drawn.dtype == np.int32


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(0, 99))
def test_draws_stay_among_the_neighbors(seed, other):
  rng = np.random.default_rng(seed)
  histories = rng.integers(8, size=(6, 4)).tolist()
  found = co_engagement.neighbors(make(range(6), histories), 9, window=2)
  anchors = rng.integers(9, size=30)
  drawn = found.draw(anchors, np.random.default_rng(other))
  known = brute_force(range(6), histories, 9, 2)
  for anchor, neighbour in zip(anchors, drawn, strict=True):
    assert neighbour in (known[anchor] or {anchor})
