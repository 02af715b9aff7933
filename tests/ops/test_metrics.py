import functools

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.ops import metrics, parsing

from . import oracles


@pytest.mark.parametrize('jitted', [False, True])
def test_ranking_metrics_equal_the_oracles(jitted):
  ranking, grades, count, _ = oracles.random_slates(0, 300, 12)
  run = metrics.ranking_metrics
  got = (jax.jit(run) if jitted else run)(ranking, grades, count)
  assert set(got) == set(metrics.RANKING_METRICS)
  for name, values in got.items():
    kind, _, k = name.partition('@')
    oracle = {'r': oracles.recall, 'n': oracles.ndcg, 'auc': oracles.auc}[kind]
    oracle = functools.partial(oracle, k=int(k)) if k else oracle
    expected = [
      oracle(*row) for row in zip(ranking, grades, count, strict=True)
    ]
    np.testing.assert_allclose(values, expected, atol=2e-6, err_msg=name)


def test_r_at_1_is_whether_the_first_is_positive():
  ranking, grades, count, _ = oracles.random_slates(1, 100, 5)
  first = np.take_along_axis(grades, ranking, -1)[:, 0] > 0
  got = metrics.ranking_metrics(ranking, grades, count)['r@1']
  np.testing.assert_array_equal(got, first)


def test_the_best_order_scores_one():
  ranking, grades, count, _ = oracles.random_slates(2, 100, 8, 8)
  grades[:, 0], grades[:, 1] = 0, 1
  best = np.argsort(-grades, axis=-1, kind='stable').astype(np.int32)
  for name, values in metrics.ranking_metrics(best, grades, count).items():
    np.testing.assert_allclose(values, 1, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('jitted', [False, True])
def test_kendall_tau_equals_scipy(jitted):
  ranking, _, count, incoming = oracles.random_slates(3, 200, 7, 2)
  run = metrics.kendall_tau
  got = (jax.jit(run) if jitted else run)(ranking, incoming, count)
  expected = [
    scipy.stats.kendalltau(np.argsort(r[:n]), i[:n]).statistic
    for r, i, n in zip(ranking, incoming, count, strict=True)
  ]
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_kendall_tau_of_copy_reverse_and_single():
  incoming = np.array([[2, 0, 1, 3], [2, 0, 1, 3], [0, 5, 5, 5]])
  ranking = np.array([[1, 2, 0, 3], [3, 0, 2, 1], [0, 1, 2, 3]])
  got = metrics.kendall_tau(ranking, incoming, np.array([4, 4, 1]))
  np.testing.assert_allclose(got, [1, -1, 1])


def test_order_sensitivity_equals_the_oracle():
  a, _, count, _ = oracles.random_slates(4, 200, 7)
  rng = np.random.default_rng(0)
  b = a.copy()
  for row, n in zip(b, count, strict=True):
    row[:n] = rng.permutation(n)
  got = jax.jit(metrics.order_sensitivity)(a, b, count)
  expected = [
    oracles.discordant_share(*row) for row in zip(a, b, count, strict=True)
  ]
  np.testing.assert_allclose(got, expected, atol=1e-6)


def groups(seed, batch=20, group=5, size=7):
  """Two groups of orders of the same slates, garbage at padding."""
  rng = np.random.default_rng(seed)
  count = rng.integers(1, size + 1, batch).astype(np.int32)
  twins = rng.integers(-9, 9, (2, batch, group, size)).astype(np.int32)
  for twin, b, g in np.ndindex(2, batch, group):
    twins[twin, b, g, : count[b]] = rng.permutation(count[b])
  valid = rng.random((2, batch, group)) < 0.7
  valid[1, 0] = False
  return twins, count, valid


def test_preferences_example():
  got = metrics.preferences(
    np.array([[0, 1, 2], [1, 0, 2]]), np.int32(3), np.array([True, True])
  )
  np.testing.assert_allclose(got, [[0, 0.5, 1], [0.5, 0, 1], [0, 0, 0]])


def test_order_disagreement_example():
  valid = np.array([True, True])
  other = metrics.preferences(
    np.array([[0, 1, 2], [1, 0, 2]]), np.int32(3), valid
  )
  answers = np.array([[2, 0, 1], [0, 1, 2]])
  got = metrics.order_disagreement(answers, other, np.int32(3), valid)
  np.testing.assert_allclose(got, [2.5 / 3, 0.5 / 3], rtol=1e-6)


@pytest.mark.parametrize('jitted', [False, True])
def test_order_disagreement_equals_the_oracle(jitted):
  twins, count, valid = groups(6)
  assert not valid[1].any(-1).all()  # A group without a valid answer.
  wrap = jax.jit if jitted else lambda op: op
  other = wrap(metrics.preferences)(twins[1], count, valid[1])
  got = wrap(metrics.order_disagreement)(twins[0], other, count, valid[0])
  assert got.shape == valid[0].shape
  for b, g in np.ndindex(got.shape):
    expected = valid[0, b, g] * oracles.order_disagreement(
      twins[0, b, g], twins[1, b][valid[1, b]], count[b]
    )
    np.testing.assert_allclose(got[b, g], expected, atol=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_preferences_are_shares_of_the_pairs_that_are_there(seed):
  twins, count, valid = groups(seed)
  got = np.asarray(jax.jit(metrics.preferences)(twins[0], count, valid[0]))
  real = np.arange(7) < count[:, None]
  pair = real[:, :, None] & real[:, None, :] & ~np.eye(7, dtype=bool)
  pair &= valid[0].any(-1)[:, None, None]
  np.testing.assert_allclose(got + got.swapaxes(-2, -1), pair, atol=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_twins_disagree_as_much_with_each_other(seed):
  twins, count, valid = groups(seed)
  # Both at once: [2, batch, ...], flipped along the axis of the twins.
  counts = np.stack([count, count])
  shares = jax.jit(metrics.preferences)(twins, counts, valid)
  got = np.asarray(
    jax.jit(metrics.order_disagreement)(
      twins, np.flip(np.asarray(shares), 0), counts, valid
    )
  )
  assert (got >= 0).all()
  assert (got <= 1 + 1e-6).all()
  voters = valid.sum(-1)
  both = (voters > 0).all(0)
  mean = got.sum(-1)[:, both] / voters[:, both]
  np.testing.assert_allclose(mean[0], mean[1], atol=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_disagreement_of_one_answer_is_order_sensitivity(seed):
  twins, count, _ = groups(seed, group=1)
  valid = np.ones((20, 1), bool)
  other = jax.jit(metrics.preferences)(twins[1], count, valid)
  got = jax.jit(metrics.order_disagreement)(twins[0], other, count, valid)
  expected = metrics.order_sensitivity(twins[0, :, 0], twins[1, :, 0], count)
  np.testing.assert_allclose(got[:, 0], expected, atol=1e-6)


def test_answers_that_are_all_equal_do_not_disagree():
  twins, count, _ = groups(7)
  same = np.broadcast_to(twins[0, :, :1], twins[0].shape)
  valid = np.ones(same.shape[:-1], bool)
  other = metrics.preferences(same, count, valid)
  assert not metrics.order_disagreement(same, other, count, valid).any()
  turned = same.copy()
  for row, n in zip(turned, count, strict=True):
    row[:, :n] = row[:, :n][:, ::-1]
  got = metrics.order_disagreement(turned, other, count, valid)
  expected = np.broadcast_to(count[:, None] > 1, got.shape)
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_disagreement_does_not_read_padding():
  twins, count, valid = groups(8)
  real = np.arange(7) < count[:, None]
  clean = np.where(real[None, :, None], twins, np.arange(7))
  wide = np.pad(clean, [(0, 0)] * 3 + [(0, 3)], constant_values=-1)

  def run(twins):
    other = metrics.preferences(twins[1], count, valid[1])
    return metrics.order_disagreement(twins[0], other, count, valid[0])

  np.testing.assert_array_equal(run(twins), run(clean))
  np.testing.assert_allclose(run(twins), run(wide), atol=1e-6)


def test_examples_of_the_watches():
  grades = np.array([0, 2, 0, 1])
  got = metrics.ranking_metrics(np.array([1, 0, 3, 2]), grades, np.int32(4))
  n = (3 + 1 / 2) / (3 + 1 / np.log2(3))
  np.testing.assert_allclose(n, 0.9639, atol=1e-4)
  np.testing.assert_allclose(
    [got[name] for name in metrics.RANKING_METRICS],
    [1, 1, 1, n, n, n, 0.75],
    rtol=1e-6,
  )
  incoming = np.array([2, 0, 1])
  got = metrics.in_incoming_ranks(np.array([1, 2, 0]), incoming)
  np.testing.assert_array_equal(got, [0, 1, 2])
  first, second = np.array([0, 1, 2]), np.array([0, 2, 1])
  got = metrics.order_sensitivity(first, second, np.int32(3))
  np.testing.assert_allclose(got, 1 / 3, rtol=1e-6)
  got = metrics.kendall_tau(second, first, np.int32(3))
  np.testing.assert_allclose(got, 1 / 3, rtol=1e-6)
  turned, same = np.array([0, 1, 3, 2]), np.arange(4)
  assert metrics.top_unchanged(turned, same, np.int32(4), k=2) == 1
  assert metrics.top_unchanged(turned, same, np.int32(4), k=3) == 0
  got = metrics.first_pick_histogram(
    np.array([[0, 1, 2], [2, 1, 0]]),
    np.array([[1, 0, 2]] * 2),
    np.ones(2, bool),
  )
  np.testing.assert_array_equal(got, [0, 1, 1])
  got = metrics.verdict_shares(np.array([0, 0, 4, 0]))
  assert got == {
    'valid': 0.75, 'wrong_format': 0, 'out_of_set': 0, 'repetition': 0,
    'missing': 0.25,
  }  # fmt: skip


def test_an_answer_that_ignores_presentation_has_no_order_sensitivity():
  rng = np.random.default_rng(5)
  answer = rng.permutation(6)  # In incoming ranks, whatever is shown.
  count = np.int32(6)
  seen = []
  for _ in range(2):
    incoming = rng.permutation(6)
    ranking = np.argsort(incoming)[answer]
    seen.append(metrics.in_incoming_ranks(ranking, incoming))
  np.testing.assert_array_equal(seen[0], answer)
  assert metrics.order_sensitivity(*seen, count) == 0
  assert metrics.order_sensitivity(seen[0], seen[1][::-1], count) == 1


def test_top_unchanged_looks_at_the_top_only():
  incoming = np.array([1, 0, 2, 4, 3, 9])
  ranking = np.array(
    [
      [1, 0, 2, 3, 4, 5],  # Changed below the top 3.
      [1, 0, 2, 4, 3, 5],  # A copy.
      [0, 1, 2, 4, 3, 5],  # The same set in another order.
      [1, 0, 4, 2, 3, 5],
    ]
  )
  batch = (np.tile(incoming, (4, 1)), np.full(4, 5))
  np.testing.assert_array_equal(
    metrics.top_unchanged(ranking, *batch), [1, 1, 0, 0]
  )
  np.testing.assert_array_equal(
    metrics.top_unchanged(ranking, *batch, k=2), [1, 1, 0, 1]
  )


def test_top_unchanged_of_a_short_slate_compares_it_whole():
  incoming = np.array([1, 0, 7, 7])
  got = [
    float(metrics.top_unchanged(np.array(r), incoming, np.int32(2)))
    for r in ([1, 0, 2, 3], [0, 1, 2, 3])
  ]
  assert got == [1, 0]


def test_first_pick_histogram_counts_the_masked():
  incoming = np.array([[1, 0, 2], [0, 1, 2], [2, 1, 0], [0, 1, 2]])
  ranking = np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0], [2, 1, 0]])
  mask = np.array([True, True, True, False])
  got = jax.jit(metrics.first_pick_histogram)(ranking, incoming, mask)
  np.testing.assert_array_equal(got, [1, 2, 0])
  grouped = metrics.first_pick_histogram(
    ranking.reshape(2, 2, 3), incoming.reshape(2, 2, 3), mask.reshape(2, 2)
  )
  np.testing.assert_array_equal(grouped, got)


def test_verdict_shares():
  verdict = np.array([[0, 0, 1], [4, 0, 3]])
  shares = metrics.verdict_shares(verdict)
  assert tuple(shares) == parsing.VERDICTS
  np.testing.assert_allclose(
    list(shares.values()), np.array([3, 1, 0, 1, 1]) / 6, rtol=1e-6
  )
