import functools

import jax
import numpy as np
import pytest
import scipy.stats

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
    oracle = {
      'r': oracles.recall,
      'n': oracles.ndcg,
      'auc': oracles.auc,
    }[kind]
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
