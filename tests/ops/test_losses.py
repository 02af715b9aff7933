import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.ops import losses

from . import oracles


def tokens(seed=0, batch=6, time=9):
  rng = np.random.default_rng(seed)
  logp = np.log(rng.random((batch, time))).astype(np.float32)
  old = logp + rng.normal(scale=0.4, size=logp.shape).astype(np.float32)
  advantages = rng.normal(size=batch).astype(np.float32)
  lengths = rng.integers(1, time + 1, batch)
  mask = np.arange(time) < lengths[:, None]
  logp[~mask] = np.nan
  old[~mask] = np.nan
  return logp, old, advantages, mask


@pytest.mark.parametrize('jitted', [False, True])
def test_surrogate_equals_numpy(jitted):
  logp, old, advantages, mask = tokens()
  run = losses.clipped_surrogate
  loss, parts = (jax.jit(run) if jitted else run)(logp, old, advantages, mask)
  objective = clipped = 0.0
  for b, t in np.argwhere(mask):
    ratio = np.exp(np.float64(logp[b, t]) - old[b, t])
    gain = advantages[b]
    bounded = min(max(ratio, 0.8), 1.28)
    objective += min(ratio * gain, bounded * gain)
    clipped += min(ratio * gain, bounded * gain) != ratio * gain
  assert loss.count == mask.sum()
  np.testing.assert_allclose(loss.sum, -objective, rtol=1e-5)
  assert 0 < clipped < mask.sum()
  assert parts['clip_fraction'].sum == clipped
  gap = (logp - old)[mask].astype(np.float64)
  np.testing.assert_allclose(
    parts['ratio'].mean(), np.exp(gap).mean(), rtol=1e-5
  )
  np.testing.assert_allclose(
    parts['approx_kl'].mean(), (np.exp(gap) - 1 - gap).mean(), rtol=1e-4
  )


def test_surrogate_gradient_is_advantage_where_free_and_zero_where_clipped():
  old = jnp.log(jnp.full((4, 1), 0.5))
  logp = old + jnp.log(jnp.array([[1.0], [1.5], [1.5], [0.5]]))
  advantages = jnp.array([2.0, 2.0, -2.0, -2.0])
  mask = jnp.ones((4, 1), bool)
  gradient = jax.grad(
    lambda x: losses.clipped_surrogate(x, old, advantages, mask)[0].sum
  )(logp)
  np.testing.assert_allclose(gradient[:, 0], [-2, 0, 3, 0], atol=1e-6)


def test_surrogate_gradient_ignores_padding_and_old_policy():
  logp, old, advantages, mask = tokens(1)
  by_logp, by_old = jax.grad(
    lambda *x: losses.clipped_surrogate(*x, advantages, mask)[0].sum, (0, 1)
  )(logp, old)
  assert np.isfinite(by_logp).all()
  assert (np.asarray(by_logp)[~mask] == 0).all()
  assert (np.asarray(by_old) == 0).all()


def test_surrogate_survives_a_stray_token():
  loss, _ = losses.clipped_surrogate(
    jnp.zeros((1, 1)),
    jnp.full((1, 1), -200.0),
    -jnp.ones(1),
    jnp.ones((1, 1), bool),
  )
  assert np.isfinite(loss.sum)


def averaged(values, mask, kind):
  """The sum and the divisor of `average_tokens`, rollout by rollout."""
  rows = [v[m].astype(np.float64) for v, m in zip(values, mask, strict=True)]
  rows = [row for row in rows if len(row)]
  match kind:
    case 'token':
      return sum(row.sum() for row in rows), sum(map(len, rows))
    case 'sequence':
      return sum(row.mean() for row in rows), len(rows)
    case 'fixed':
      return sum(row.sum() for row in rows) / mask.shape[1], len(rows)


@pytest.mark.parametrize('kind', losses.AVERAGES)
def test_averages_equal_numpy(kind):
  values, _, _, mask = tokens()
  mask[2] = False  # A rollout of a group that does not count.
  values[2] = np.nan
  run = jax.jit(losses.average_tokens, static_argnums=2)
  wanted = averaged(values, mask, kind)
  np.testing.assert_allclose(run(values, mask, kind), wanted, rtol=1e-5)
  shaped = (x.reshape(2, 3, 9) for x in (values, mask))
  np.testing.assert_allclose(run(*shaped, kind), wanted, rtol=1e-5)
  none = losses.average_tokens(values, np.zeros_like(mask), kind)
  assert float(none.mean()) == 0.0


def test_averages_differ_as_the_example_says():
  values = np.float32([[3, 9, 9], [0, 1, 2]])
  mask = np.array([[True, False, False], [True, True, True]])
  found = {
    kind: float(losses.average_tokens(values, mask, kind).mean())
    for kind in losses.AVERAGES
  }
  assert found == {'token': 1.5, 'sequence': 2.0, 'fixed': 1.0}
  with pytest.raises(ValueError, match="average is 'mean'"):
    losses.average_tokens(values, mask, 'mean')


@pytest.mark.parametrize('average', losses.AVERAGES)
def test_surrogate_with_all_options_equals_numpy(average):
  logp, old, _, mask = tokens(2)
  rng = np.random.default_rng(5)
  advantages = rng.normal(size=logp.shape).astype(np.float32)
  importance = rng.uniform(0.2, 2.0, logp.shape).astype(np.float32)
  advantages[~mask] = importance[~mask] = np.nan
  ratio = np.exp(np.float64(logp) - old)
  bound = np.clip(ratio, 0.9, 1.5)
  values = -importance * np.minimum(ratio * advantages, bound * advantages)
  found, parts = losses.clipped_surrogate(
    logp, old, advantages, mask, clip_low=0.1, clip_high=0.5,
    importance=importance, average=average,
  )  # fmt: skip
  np.testing.assert_allclose(found, averaged(values, mask, average), rtol=1e-5)
  clipped = (ratio * advantages > bound * advantages)[mask]
  assert 0 < clipped.sum() == parts['clip_fraction'].sum
  assert parts['ratio'].count == mask.sum()


def test_weights_of_importance_are_no_path_for_gradients():
  logp, old, advantages, mask = tokens(3)
  weights = np.where(mask, 0.5, np.nan).astype(np.float32)

  def loss(logp, weights):
    return losses.clipped_surrogate(
      logp, old, advantages, mask, importance=weights
    )[0].sum

  by_logp, by_weights = jax.grad(loss, (0, 1))(logp, weights)
  plain = jax.grad(lambda x: loss(x, np.ones_like(weights)))(logp)
  np.testing.assert_allclose(by_logp, 0.5 * plain, rtol=1e-5)
  assert np.abs(by_logp).max() > 0.1
  assert not np.asarray(by_weights).any()


def test_importance_weights_equal_numpy():
  logp, sampler, _, mask = tokens(4)
  logp[0, 0], sampler[0, 0] = 0.0, -200.0  # A stray token.
  cap = 1.3
  run = jax.jit(functools.partial(losses.importance_weights, cap=cap))
  found = np.asarray(run(logp, sampler, mask))
  gap = np.clip(np.float64(logp) - sampler, -20, 20)
  wanted = np.where(mask, np.minimum(np.exp(gap), cap), 0)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  assert (found == np.float32(cap)).any()
  assert (found[mask] < 1).any()
  gradient = jax.grad(lambda x: run(x, sampler, mask).sum())(logp)
  assert not np.asarray(gradient).any()


def test_importance_weights_as_the_example_says():
  found = losses.importance_weights(
    np.float32([-1, -1]), np.float32([-1.5, -2]), np.array([True, True]), cap=2
  )
  np.testing.assert_allclose(found, [1.6487, 2.0], atol=1e-4)
  with pytest.raises(ValueError, match='importance cap is 0.5'):
    losses.importance_weights(
      np.zeros(2), np.zeros(2), np.array([True, True]), cap=0.5
    )


def test_token_cross_entropy_weighs_and_ignores_padding():
  logp = np.array([[-1.0, -2.0, np.nan], [-4.0, -np.inf, np.nan]])
  weights = np.array([[0.1, 1.0, 0.0], [1.0, 0.0, 0.0]])
  total = jax.jit(losses.token_cross_entropy)(logp, weights)
  np.testing.assert_allclose(total, [0.1 + 2.0 + 4.0, 2.1], rtol=1e-6)
  gradient = jax.grad(lambda x: losses.token_cross_entropy(x, weights).sum)(
    jnp.asarray(logp)
  )
  np.testing.assert_allclose(gradient, -weights, rtol=1e-6)


def slates(seed=0, batch=40, size=6):
  ranking, grades, count, _ = oracles.random_slates(seed, batch, size)
  scores = np.random.default_rng(seed).normal(size=(batch, size))
  scores = scores.astype(np.float32)
  scores[np.arange(size) >= count[:, None]] = np.nan
  return scores, ranking, grades, count


@pytest.mark.parametrize('jitted', [False, True])
def test_listwise_softmax_equals_numpy(jitted):
  scores, _, grades, count = slates()
  total, slates_with_positives = 0.0, 0
  for s, g, n in zip(scores, grades, count, strict=True):
    if g[:n].sum() > 0:
      logp = scipy.special.log_softmax(s[:n].astype(np.float64))
      total -= (g[:n] / g[:n].sum() * logp).sum()
      slates_with_positives += 1
  run = losses.listwise_softmax
  got = (jax.jit(run) if jitted else run)(scores, grades, count)
  assert 0 < slates_with_positives < len(count)
  np.testing.assert_allclose(got, [total, slates_with_positives], rtol=1e-5)


def test_plackett_luce_equals_numpy():
  scores, ranking, _, count = slates()
  total = 0.0
  for s, r, n in zip(scores, ranking, count, strict=True):
    ordered = s[r[:n]].astype(np.float64)
    for t in range(n):
      total += scipy.special.logsumexp(ordered[t:]) - ordered[t]
  got = jax.jit(losses.plackett_luce)(scores, ranking, count)
  np.testing.assert_allclose(got, [total, count.sum()], rtol=1e-5)


def test_plackett_luce_sums_to_one_over_all_orders():
  scores = np.array([0.3, -1.0, 2.0, 0.0], np.float32)
  orders = np.array(list(itertools.permutations(range(4))), np.int32)
  nll = jax.vmap(
    lambda order: losses.plackett_luce(scores, order, np.int32(4)).sum
  )(orders)
  np.testing.assert_allclose(np.exp(-nll).sum(), 1, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_targets_cover_the_remaining_and_nothing_else(seed):
  scores, ranking, grades, count = slates(seed, 8)
  soft = np.asarray(jax.jit(losses.teacher_targets)(scores, ranking, count))
  hard = np.asarray(jax.jit(losses.positive_targets)(grades, ranking, count))
  for b in range(8):
    for t in range(6):
      left = ranking[b, t : count[b]]
      expected_soft, expected_hard = np.zeros(6), np.zeros(6)
      if len(left):
        expected_soft[left] = scipy.special.softmax(scores[b, left])
        if grades[b, left].sum():
          expected_hard[left] = grades[b, left] / grades[b, left].sum()
      np.testing.assert_allclose(soft[b, t], expected_soft, atol=1e-6)
      np.testing.assert_allclose(hard[b, t], expected_hard, atol=1e-6)


def test_a_low_temperature_gives_the_best_remaining():
  targets = losses.teacher_targets(
    np.array([0.1, 0.3, 0.2]),
    np.array([1, 0, 2]),
    np.int32(3),
    temperature=1e-3,
  )
  np.testing.assert_allclose(
    targets, [[0, 1, 0], [0, 0, 1], [0, 0, 1]], atol=1e-6
  )


def test_distilling_a_plackett_luce_policy_into_itself_is_its_entropy():
  scores, ranking, _, count = slates(2)
  targets = losses.teacher_targets(scores, ranking, count)
  logp = jnp.log(targets)  # -inf where a candidate was placed already.
  got = losses.answer_cross_entropy(logp, targets)
  entropy = scipy.special.entr(np.asarray(targets, np.float64)).sum()
  np.testing.assert_allclose(got, [entropy, count.sum()], rtol=1e-5)
  gradient = jax.grad(lambda x: losses.answer_cross_entropy(x, targets).sum)(
    logp
  )
  np.testing.assert_allclose(gradient, -targets, atol=1e-6)


def test_ranks_after_the_last_positive_are_not_counted():
  targets = losses.positive_targets(
    np.array([0, 2, 0, 1]), np.array([3, 1, 0, 2]), np.int32(4)
  )
  logp = jnp.log(jnp.full((4, 4), 0.25))
  got = losses.answer_cross_entropy(logp, targets)
  np.testing.assert_allclose(got, [2 * np.log(4), 2], rtol=1e-6)


@pytest.mark.parametrize(
  'loss',
  [
    lambda s, r, g, n: losses.listwise_softmax(s, g, n),
    lambda s, r, g, n: losses.plackett_luce(s, r, n),
  ],
)
def test_gradients_of_list_losses_do_not_see_padding(loss):
  scores, ranking, grades, count = slates(3)
  count[0] = 0
  gradient = np.asarray(
    jax.grad(lambda s: loss(s, ranking, grades, count).sum)(scores)
  )
  padding = np.arange(6) >= count[:, None]
  assert np.isfinite(gradient).all()
  assert (gradient[padding] == 0).all()
  assert np.abs(gradient).max() > 0.1


def test_losses_add_over_micro_batches():
  scores, ranking, grades, count = slates(4)
  whole = losses.listwise_softmax(scores, grades, count)
  parts = losses.listwise_softmax(
    scores[:7], grades[:7], count[:7]
  ) + losses.listwise_softmax(scores[7:], grades[7:], count[7:])
  np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_overlong_penalty_ramps_over_the_buffer():
  lengths = np.array([0, 60, 70, 80, 100, 130])
  penalty = losses.overlong_penalty(lengths, max_length=100, buffer=40)
  np.testing.assert_allclose(penalty, [0, 0, -0.25, -0.5, -1, -1])
  with pytest.raises(ValueError, match='buffer=0'):
    losses.overlong_penalty(lengths, max_length=100, buffer=0)
