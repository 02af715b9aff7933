"""Pre-ranker and evidence against cases worked by hand."""

import numpy as np
import pytest

from gr2_jax.data import evidence, prerank
from gr2_jax.data import log as log_lib

DAY = 86_400


@pytest.fixture
def log():
  """Users 0 and 1 are known; user 2 has [A] and asks. Items A B C D."""
  catalog = log_lib.Catalog(
    tuple('ABCD'),
    ('red fox', 'red fox two', 'blue whale', 'green'),
    (('Farm',), ('Farm',), ('Sea',), ()),
    np.array([2000, 2004, 1990, 0], np.int32),
  )
  return log_lib.make_log(
    catalog,
    ('u', 'v', 'w'),
    np.array([0, 0, 0, 1, 1, 2]),
    np.array([0, 1, 2, 0, 1, 0]),
    np.array([1, 2, 3, 4, 5, 6]) * DAY,
    np.array([1, 2, 1, 1, 2, 1]),
    seed=0,
  )


@pytest.fixture
def statistics(log):
  return prerank.fit(log, log.users < 2, decay=0.5, window=5, neighbours=10)


def test_co_engagement_decays_with_distance(statistics):
  np.testing.assert_allclose(
    statistics.directed.toarray(),
    [[0, 2, 0.5, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
  )
  np.testing.assert_array_equal(statistics.counts, [2, 2, 1, 0])
  similarity = statistics.similarity.toarray()
  np.testing.assert_allclose(similarity, similarity.T)
  np.testing.assert_allclose(
    similarity[0], [0, 2 / 2, 0.5 / np.sqrt(2), 0], rtol=1e-6
  )


def test_pruning_keeps_the_nearest(log):
  one = prerank.fit(log, log.users < 2, decay=0.5, window=5, neighbours=1)
  assert (one.similarity.toarray() > 0).sum(axis=1).tolist() == [1, 1, 1, 0]
  assert one.similarity.toarray()[0, 1] == pytest.approx(1.0)


def test_score_sums_over_the_decayed_history(log, statistics):
  args = np.array([0, 2]), np.array([2, 1])
  candidates, scores = prerank.score(log, statistics, *args, 3, 0.5, 20)
  root = np.sqrt(2)
  np.testing.assert_array_equal(candidates, [[2, -1, -1], [1, 2, -1]])
  # User 0 knows A then B: C has B's 1/sqrt(2), and half of A's .5/sqrt(2).
  np.testing.assert_allclose(scores[0, 0], 1.25 / root, rtol=1e-4)
  np.testing.assert_allclose(scores[1, :2], [1, 0.5 / root], rtol=1e-4)


@pytest.fixture
def columns(log, statistics):
  titles = evidence.text_neighbours(log.catalog)
  genres = evidence.category_matrix(log.catalog)
  facts = evidence.fit(log, statistics, titles, genres)
  values = evidence.compute(
    log,
    facts,
    np.array([2]),
    np.array([1]),
    np.array([6 * DAY]),
    np.array([[1, 2, 3, -1]]),
    np.array([[0.9, 0.3, 0.1, 0.0]], np.float32),
  )
  return dict(zip(evidence.EVIDENCE, values[0].T, strict=True))


def test_columns_by_hand(columns):
  root = np.sqrt(2)
  expected = {
    'incoming_score': [0.9, 0.3, 0.1, 0],
    'incoming_rank': [0, 1, 2, 0],
    'co_last': [1, 0.5 / root, 0, 0],
    'co_max': [1, 0.5 / root, 0, 0],
    'co_hits': [1, 1, 0, 0],
    'directed': [1, 0.5 / root, 0, 0],
    'direction': [np.log(2.5 / 0.5), np.log(1 / 0.5), 0, 0],
    'genre': [1, 0, 0, 0],
    'leaf': [1, 0, 0, 0],
    'popularity': [np.log(3), np.log(2), 0, 0],
    'year_gap': [np.log(5), np.log(11), 0, 0],
  }
  for name, values in expected.items():
    np.testing.assert_allclose(
      columns[name], values, rtol=1e-5, atol=1e-6, err_msg=name
    )


def test_columns_point_the_right_way(columns):
  for name in ('latent', 'joint_mean', 'text_mean', 'quality'):
    assert columns[name][0] > columns[name][1], name
  assert columns['text_max'][1] == 0


def test_a_pad_has_no_evidence(columns):
  assert all(values[3] == 0 for values in columns.values())


def test_an_order_without_times_tells_no_direction(log):
  timeless = log_lib.make_log(
    log.catalog,
    log.user_ids,
    log.users,
    log.items,
    log.positions(),
    log.grades,
    seed=0,
  )
  statistics = prerank.fit(timeless, timeless.users < 2, 0.5, 5, 10)
  facts = evidence.fit(
    timeless,
    statistics,
    evidence.text_neighbours(log.catalog),
    evidence.category_matrix(log.catalog),
  )
  values = evidence.compute(
    timeless,
    facts,
    np.array([2]),
    np.array([1]),
    np.array([1]),
    np.array([[1, 2, 3]]),
    np.array([[0.9, 0.3, 0.1]], np.float32),
  )
  for name in evidence.ORDERED:
    assert (values[..., evidence.EVIDENCE.index(name)] == 0).all(), name
  assert values[..., evidence.EVIDENCE.index('co_last')].any()


def test_transition_finds_what_follows_what():
  names = ('Tent', 'Lamp', 'Rope')
  catalog = log_lib.Catalog(
    tuple('ABCDEF'),
    ('',) * 6,
    tuple((name,) for name in names * 2),
    np.zeros(6, np.int32),
  )
  # A tent is followed by a lamp; ropes come alone, at the end.
  items = np.array([0, 1, 3, 4, 2, 5] * 4)
  users = np.repeat(np.arange(4), 6)
  log = log_lib.make_log(
    catalog,
    tuple('uvwx'),
    users,
    items,
    np.tile([1, 2, 1000, 1001, 2000, 2001], 4),
    np.ones(24),
    seed=0,
  )
  facts = evidence.fit(
    log,
    prerank.fit(log, np.ones(24, bool), 0.9, 1, 10),
    evidence.text_neighbours(catalog),
    evidence.category_matrix(catalog),
  )
  values = evidence.compute(
    log,
    facts,
    np.array([0]),
    np.array([1]),
    np.array([2]),
    np.array([[4, 3, 5]]),
    np.array([[0.3, 0.2, 0.1]], np.float32),
  )
  lift = values[0, :, evidence.EVIDENCE.index('transition_max')]
  assert lift[0] > lift[1]
  assert lift[0] > lift[2]
