"""Pre-ranker and evidence against cases worked by hand."""

import numpy as np
import pytest

from configs import common
from gr2_jax.data import evidence, item_text, preranker
from gr2_jax.data import log as log_lib
from gr2_jax.prompts import bins

DAY = 86_400


def reading(reads):
  """Names of the columns that read this."""
  return [evidence.NAMES[place] for place in evidence.places(reads)]


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
  return preranker.fit(log, log.users < 2, decay=0.5, window=5, neighbours=10)


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
  one = preranker.fit(log, log.users < 2, decay=0.5, window=5, neighbours=1)
  assert (one.similarity.toarray() > 0).sum(axis=1).tolist() == [1, 1, 1, 0]
  assert one.similarity.toarray()[0, 1] == pytest.approx(1.0)


def test_score_sums_over_the_decayed_history(log, statistics):
  args = np.array([0, 2]), np.array([2, 1])
  candidates, scores = preranker.score(log, statistics, *args, 3, 0.5, 20)
  root = np.sqrt(2)
  np.testing.assert_array_equal(candidates, [[2, -1, -1], [1, 2, -1]])
  # User 0 knows A then B: C has B's 1/sqrt(2), and half of A's .5/sqrt(2).
  np.testing.assert_allclose(scores[0, 0], 1.25 / root, rtol=1e-4)
  np.testing.assert_allclose(scores[1, :2], [1, 0.5 / root], rtol=1e-4)


def compute(log, statistics):
  facts = evidence.fit(log, statistics, item_text.fit(log.catalog))
  return evidence.compute(
    log,
    facts,
    np.array([2]),
    np.array([1]),
    np.array([6 * DAY]),
    np.array([[1, 2, 3, -1]]),
    np.array([[0.9, 0.3, 0.1, 0.0]], np.float32),
  )


@pytest.fixture
def columns(log, statistics):
  values = compute(log, statistics)
  return dict(zip(evidence.NAMES, values[0].T, strict=True))


def test_a_column_is_added_by_one_entry_in_the_list(
  monkeypatch, log, statistics
):
  column = evidence.Column(
    'score_gap',
    evidence.SLATE,
    lambda s: s.scores[:, :1] - s.scores,
    'distance to the first score',
  )
  monkeypatch.setattr(evidence, 'COLUMNS', (*evidence.COLUMNS, column))
  values = compute(log, statistics)
  assert values.shape == (1, 4, len(evidence.NAMES) + 1)
  np.testing.assert_allclose(values[0, :, -1], [0, 0.6, 0.8, 0], rtol=1e-6)


def test_every_column_has_a_name_of_its_own_and_a_meaning():
  assert len(set(evidence.NAMES)) == len(evidence.COLUMNS)
  for column in evidence.COLUMNS:
    assert column.meaning, column.name
    # Both are parts of a token or of a setting.
    assert not set('<>=: ') & set(column.name)


def test_configs_name_columns_that_exist():
  for columns in common.EVIDENCE.values():
    assert {c.removesuffix(bins.RAW) for c in columns} <= set(evidence.NAMES)


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


@pytest.fixture
def beside(log, statistics):
  """Facts of the catalog with A and D again beside it, as 4 and 5."""
  facts = evidence.fit(log, statistics, item_text.fit(log.catalog))
  return facts.beside(log.catalog.take(np.array([0, 3])))


def asked(log, facts, history, candidates):
  """Column -> values of one slate's candidates."""
  values = evidence.compute_from_histories(
    facts,
    np.array([history]),
    np.array([len(history)]),
    np.array([6 * DAY]),
    np.array([candidates]),
    np.zeros((1, len(candidates)), np.float32),
  )
  return dict(zip(evidence.NAMES, values[0].T, strict=True))


@pytest.mark.parametrize('history', [[2, 0], [2, 4], [5, 4], [-1]])
def test_text_says_of_a_described_item_what_it_says_of_any(
  log, beside, history
):
  columns = asked(log, beside, history, [0, 3, 4, 5, -1])
  for name in set(evidence.NAMES) - {
    *reading(evidence.INTERACTIONS),
    'incoming_rank',
  }:
    own, copies = columns[name][:2], columns[name][2:4]
    if not name.startswith('text') or 5 not in history:
      np.testing.assert_allclose(own, copies, atol=1e-6, err_msg=name)
  assert not any(column[4] for column in columns.values())


def test_interactions_of_a_described_item_are_those_of_its_neighbours(
  log, beside
):
  columns = asked(log, beside, [2, 0], [1, 4, 3, 5, 0])
  for name in reading(evidence.INTERACTIONS):
    first, second, third = columns[name][::2]
    expected = (first + second) / 2, (second + third) / 2
    np.testing.assert_allclose(columns[name][1::2], expected, rtol=1e-6)
  assert columns['popularity'][1] > 0
  # Nothing else is changed by who stands beside.
  alone = asked(log, beside, [2, 0], [1, -1, 3, -1, 0])
  for name, column in columns.items():
    np.testing.assert_array_equal(column[::2], alone[name][::2])


def test_a_slate_of_described_items_has_the_evidence_of_who_was_never_met(
  log, beside
):
  columns = asked(log, beside, [2, 0], [5])
  never_met = asked(log, beside, [2, 0], [3])
  for name, column in columns.items():
    np.testing.assert_array_equal(column, never_met[name], err_msg=name)


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
  statistics = preranker.fit(timeless, timeless.users < 2, 0.5, 5, 10)
  facts = evidence.fit(
    timeless,
    statistics,
    item_text.fit(log.catalog),
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
  for name in reading(evidence.TIMES):
    assert (values[..., evidence.NAMES.index(name)] == 0).all(), name
  assert values[..., evidence.NAMES.index('co_last')].any()


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
    preranker.fit(log, np.ones(24, bool), 0.9, 1, 10),
    item_text.fit(catalog),
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
  lift = values[0, :, evidence.NAMES.index('transition_max')]
  assert lift[0] > lift[1]
  assert lift[0] > lift[2]
