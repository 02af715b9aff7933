import numpy as np
import pytest
import scipy.stats

from gr2_jax.ops import statistics


def paired(seed=0, n=800, shift=0.05, users=None):
  rng = np.random.default_rng(seed)
  second = rng.random(n)
  first = second + shift + rng.normal(scale=0.3, size=n)
  clusters = np.arange(n) if users is None else rng.integers(users, size=n)
  return first, second, clusters


def test_bootstrap_of_single_slate_users_is_the_normal_interval():
  first, second, clusters = paired()
  got = statistics.paired_bootstrap(first, second, clusters, resamples=4000)
  difference = first - second
  error = scipy.stats.sem(difference)
  assert got.estimate == pytest.approx(difference.mean())
  assert got.low == pytest.approx(difference.mean() - 1.96 * error, abs=2e-3)
  assert got.high == pytest.approx(difference.mean() + 1.96 * error, abs=2e-3)


def test_bootstrap_equals_scipy():
  first, second, clusters = paired(1, 300)
  got = statistics.paired_bootstrap(first, second, clusters, level=0.9)
  expected = scipy.stats.bootstrap(
    (first - second,),
    np.mean,
    n_resamples=2000,
    confidence_level=0.9,
    method='percentile',
    rng=np.random.default_rng(0),
  ).confidence_interval
  assert got.low == pytest.approx(expected.low, abs=3e-3)
  assert got.high == pytest.approx(expected.high, abs=3e-3)


def test_bootstrap_is_the_plain_loop_over_users():
  first, second, clusters = paired(2, 60, users=12)
  got = statistics.paired_bootstrap(first, second, clusters, resamples=4000)
  rng = np.random.default_rng(7)
  groups = [(first - second)[clusters == u] for u in np.unique(clusters)]
  replicas = []
  for _ in range(4000):
    drawn = rng.integers(len(groups), size=len(groups))
    replicas.append(np.concatenate([groups[u] for u in drawn]).mean())
  low, high = np.percentile(replicas, [2.5, 97.5])
  assert got.low == pytest.approx(low, abs=8e-3)
  assert got.high == pytest.approx(high, abs=8e-3)


def test_repeating_a_users_slates_does_not_narrow_the_interval():
  first, second, clusters = paired(3, 200)
  once = statistics.paired_bootstrap(first, second, clusters)
  many = statistics.paired_bootstrap(
    np.repeat(first, 9), np.repeat(second, 9), np.repeat(clusters, 9)
  )
  np.testing.assert_allclose(many, once, rtol=1e-9)
  naive = statistics.paired_bootstrap(
    np.repeat(first, 9), np.repeat(second, 9), np.arange(1800)
  )
  assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_bootstrap_is_seeded_and_takes_any_labels():
  first, second, clusters = paired(4, 100, users=9)
  names = np.array([f'user {c}' for c in clusters])
  one = statistics.paired_bootstrap(first, second, clusters, seed=5)
  assert one == statistics.paired_bootstrap(first, second, names, seed=5)
  assert one != statistics.paired_bootstrap(first, second, clusters, seed=6)


def test_chunks_do_not_change_what_is_drawn(monkeypatch):
  first, second, clusters = paired(5, 100)
  whole = statistics.paired_bootstrap(first, second, clusters)
  monkeypatch.setattr(statistics, '_CHUNK', 700)
  parts = statistics.paired_bootstrap(first, second, clusters)
  np.testing.assert_allclose(parts, whole, rtol=1e-12)


def test_two_levels_with_one_seed_is_the_paired_bootstrap():
  first, second, clusters = paired(6, 200, users=40)
  one = statistics.paired_bootstrap(first, second, clusters)
  two = statistics.two_level_bootstrap(first[None], second, clusters)
  np.testing.assert_allclose(two, one, rtol=1e-12)


def test_two_levels_widen_with_the_spread_of_seeds():
  first, second, clusters = paired(7, 400, users=80)
  calm = np.stack([first] * 5)
  spread = 0.2 * np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
  wild = calm + spread[:, None]
  one = statistics.paired_bootstrap(first, second, clusters)
  alike = statistics.two_level_bootstrap(calm, second, clusters)
  apart = statistics.two_level_bootstrap(wild, second, clusters)
  np.testing.assert_allclose(alike, one, rtol=1e-9)
  assert apart.estimate == pytest.approx(one.estimate)
  # Users and seeds add their variances: sd of a mean of 5 of the 5 seeds.
  within = (one.high - one.low) / 3.92
  between = spread.std() / np.sqrt(5)
  assert (apart.high - apart.low) / 3.92 == pytest.approx(
    np.hypot(within, between), rel=0.06
  )


def test_two_levels_pair_seed_with_seed():
  rng = np.random.default_rng(8)
  second = rng.random((4, 50)) + 10 * np.arange(4)[:, None]
  got = statistics.two_level_bootstrap(second + 0.1, second, np.arange(50))
  np.testing.assert_allclose(got, 0.1, atol=1e-9)


@pytest.mark.parametrize(
  ('first', 'second', 'clusters', 'message'),
  [
    (np.ones(3), np.ones(4), np.arange(3), 'second has shape'),
    (np.ones(3), np.ones(3), np.arange(4), 'clusters'),
    (np.ones((2, 3)), np.ones(3), np.arange(3), 'two_level_bootstrap'),
    (np.array([1, np.nan, 1]), np.ones(3), np.arange(3), '1 non-finite'),
    (np.ones(0), np.ones(0), np.ones(0), 'nothing to compare'),
  ],
)
def test_bad_arrays_are_errors(first, second, clusters, message):
  with pytest.raises(ValueError, match=message):
    statistics.paired_bootstrap(first, second, clusters)


def test_bad_levels_and_seedless_values_are_errors():
  flat = (np.ones(3), np.ones(3), np.arange(3))
  with pytest.raises(ValueError, match='level is 95'):
    statistics.paired_bootstrap(*flat, level=95)
  with pytest.raises(ValueError, match='resamples is 0'):
    statistics.paired_bootstrap(*flat, resamples=0)
  with pytest.raises(ValueError, match='paired_bootstrap'):
    statistics.two_level_bootstrap(*flat)


def test_mcnemar_by_hand():
  # 1 and 5 discordant: 2 * (C(6,0) + C(6,1)) / 2^6 = 0.21875.
  first = np.array([1, 0, 0, 0, 0, 0, 1, 1, 0, 0])
  second = np.array([0, 1, 1, 1, 1, 1, 1, 1, 0, 0])
  got = statistics.mcnemar(first, second)
  assert got[:2] == (1, 5)
  assert got.p_value == pytest.approx(0.21875)
  assert statistics.mcnemar(first, first) == (0, 0, 1.0)
  with pytest.raises(ValueError, match='second has values'):
    statistics.mcnemar(first, first * 0.5)
  with pytest.raises(ValueError, match='shapes differ'):
    statistics.mcnemar(first, first[:3])


def test_equivalence_equals_two_t_tests():
  first, second, clusters = paired(9, 300, shift=0.01)
  got = statistics.equivalence(first, second, clusters, margin=0.05)
  difference = first - second
  above = scipy.stats.ttest_1samp(difference, -0.05, alternative='greater')
  below = scipy.stats.ttest_1samp(difference, 0.05, alternative='less')
  assert got.p_value == pytest.approx(max(above.pvalue, below.pvalue))
  assert got.estimate == pytest.approx(difference.mean())


def test_equivalence_clusters_and_refuses_what_is_far():
  first, second, clusters = paired(10, 300, shift=0.01)
  once = statistics.equivalence(first, second, clusters, margin=0.05)
  many = statistics.equivalence(
    np.repeat(first, 5),
    np.repeat(second, 5),
    np.repeat(clusters, 5),
    margin=0.05,
  )
  assert many.p_value == pytest.approx(once.p_value)
  far = statistics.equivalence(first + 1, second, clusters, margin=0.05)
  assert far.p_value > 0.99
  same = statistics.equivalence(second, second, clusters, margin=0.05)
  assert same == (0.0, 0.0)


def test_equivalence_needs_a_margin_and_two_users():
  with pytest.raises(ValueError, match='margin is 0'):
    statistics.equivalence(np.ones(3), np.ones(3), np.arange(3), margin=0)
  with pytest.raises(ValueError, match='one cluster'):
    statistics.equivalence(np.ones(3), np.ones(3), np.zeros(3), margin=1)


def tost(difference, margin):
  above = scipy.stats.ttest_1samp(difference, -margin, alternative='greater')
  below = scipy.stats.ttest_1samp(difference, margin, alternative='less')
  return max(above.pvalue, below.pvalue)


@pytest.mark.parametrize('margin', [0.02, 0.03, 0.035, 0.045, 0.07])
def test_two_level_equivalence_of_one_level_is_two_t_tests(margin):
  first, second, clusters = paired(11, 1000, shift=0.02)
  got = statistics.two_level_equivalence(
    first[None], second, clusters, margin=margin, resamples=4000
  )
  wanted = tost(first - second, margin)
  assert got.p == pytest.approx(wanted, abs=0.02)
  assert got.equivalent == (wanted < 0.05)
  assert got.not_worse


def test_two_level_equivalence_is_the_interval_of_the_bootstrap():
  rng = np.random.default_rng(12)
  first, second, clusters = paired(12, 200, users=40)
  first = first + rng.normal(scale=0.05, size=(4, 1))
  given = (first, second, clusters)
  wanted = statistics.two_level_bootstrap(*given, level=0.9, seed=3)
  got = statistics.two_level_equivalence(*given, margin=0.1, seed=3)
  assert got[:3] == wanted
  # The p-value that a plain count over the same resamples gives.
  _, replicas = statistics._bootstrap(first - second, clusters, 2000, 0.9, 3)
  above = (1 + sum(replica >= 0.1 for replica in replicas)) / 2001
  below = (1 + sum(replica <= -0.1 for replica in replicas)) / 2001
  assert got.p == max(above, below)
  assert 1 / 2001 < got.p < 1


@pytest.mark.parametrize(
  ('shift', 'equivalent', 'not_worse'),
  [(0.0, True, True), (0.2, False, True), (-0.2, False, False)],
)
def test_better_is_not_worse_but_not_equivalent(shift, equivalent, not_worse):
  first, second, clusters = paired(13, 800, shift=shift)
  got = statistics.two_level_equivalence(
    np.stack([first, first]), second, clusters, margin=0.1
  )
  assert (got.equivalent, got.not_worse) == (equivalent, not_worse)
  assert (got.p < 0.05) == equivalent
  other = statistics.two_level_equivalence(
    np.stack([second, second]), first, clusters, margin=0.1
  )
  assert other.equivalent == equivalent
  assert other.p == pytest.approx(got.p)


def test_seeds_that_disagree_are_not_equivalent():
  first, second, clusters = paired(14, 800, shift=0.0)
  calm = np.stack([first] * 4)
  wild = calm + np.array([[-0.3], [-0.1], [0.1], [0.3]])
  one = statistics.two_level_equivalence(calm, second, clusters, margin=0.1)
  two = statistics.two_level_equivalence(wild, second, clusters, margin=0.1)
  assert one.equivalent
  assert two.estimate == pytest.approx(one.estimate)
  assert not two.equivalent
  assert two.p > 0.1


def test_two_level_equivalence_of_equal_values_and_of_bad_ones():
  ones = np.ones((2, 3))
  same = statistics.two_level_equivalence(ones, ones, np.arange(3), margin=0.1)
  assert same == (0.0, 0.0, 0.0, 1 / 2001, True, True)
  # A difference that is the margin is not below it.
  edge = statistics.two_level_equivalence(
    ones, 0 * ones, np.arange(3), margin=1
  )
  assert edge == (1.0, 1.0, 1.0, 1.0, False, True)
  for margin in (0, -1, np.nan):
    with pytest.raises(ValueError, match='margin is'):
      statistics.two_level_equivalence(ones, ones, np.arange(3), margin=margin)
  with pytest.raises(ValueError, match='paired_bootstrap'):
    statistics.two_level_equivalence(ones[0], ones[0], np.arange(3), margin=1)
  with pytest.raises(ValueError, match='level is 90'):
    statistics.two_level_equivalence(
      ones, ones, np.arange(3), margin=1, level=90
    )


def test_the_share_of_a_gain_and_its_interval():
  rng = np.random.default_rng(0)
  users = np.repeat(np.arange(60), 5)
  base = rng.normal(size=300)
  teacher = base + 1.0 + 0.3 * rng.normal(size=300)
  student = base + 0.8 + 0.3 * rng.normal(size=(3, 300))
  found = statistics.share_of_gain(student, teacher, base, users)
  wanted = (student - base).mean() / (teacher - base).mean()
  np.testing.assert_allclose(found.estimate, wanted)
  assert 0.7 < found.low < found.estimate < found.high < 0.9
  again = statistics.share_of_gain(teacher[None], teacher, base, users)
  assert again == (1.0, 1.0, 1.0)
  wide = student + np.array([[-0.5], [0.0], [0.5]])  # Seeds that disagree.
  spread = statistics.share_of_gain(wide, teacher, base, users)
  assert spread.high - spread.low > 3 * (found.high - found.low)
