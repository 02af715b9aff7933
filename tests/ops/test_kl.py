import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from gr2_jax.ops import kl


def pair(seed=0, shape=(5, 12)):
  rng = np.random.default_rng(seed)
  student = rng.normal(size=shape).astype(np.float32)
  return student, (student + rng.normal(size=shape)).astype(np.float32)


def softmax(logits):
  return scipy.special.softmax(logits.astype(np.float64), axis=-1)


@pytest.mark.parametrize('jitted', [False, True])
def test_exact_kl_equals_scipy(jitted):
  student, teacher = pair()
  p, q = softmax(student), softmax(teacher)
  wrap = jax.jit if jitted else (lambda f: f)
  np.testing.assert_allclose(
    wrap(kl.exact_kl)(student, teacher),
    scipy.special.rel_entr(p, q).sum(-1),
    rtol=1e-4,
  )
  np.testing.assert_allclose(
    wrap(kl.exact_kl)(teacher, student),
    scipy.special.rel_entr(q, p).sum(-1),
    rtol=1e-4,
  )


def expectation(kind, student, teacher):
  """Expectation of an estimator under the student, over all tokens."""
  logp = jax.nn.log_softmax(student)
  other = jax.nn.log_softmax(teacher)
  each = kl.sampled_kl(logp, other, kind=kind)
  return jnp.sum(jnp.exp(logp) * each, axis=-1)


@pytest.mark.parametrize('kind', ['k1', 'k3'])
def test_k1_and_k3_are_unbiased(kind):
  student, teacher = pair(1)
  np.testing.assert_allclose(
    expectation(kind, student, teacher),
    kl.exact_kl(student, teacher),
    rtol=1e-4,
  )


def test_k3_of_samples_meets_the_exact_kl_with_less_variance_than_k1():
  student, teacher = pair(2, (12,))
  logp = np.log(softmax(student))
  other = np.log(softmax(teacher))
  drawn = np.random.default_rng(0).choice(12, 40_000, p=softmax(student))
  k1, k2, k3 = (
    np.asarray(kl.sampled_kl(logp[drawn], other[drawn], kind=kind))
    for kind in kl.KINDS
  )
  exact = float(kl.exact_kl(student, teacher))
  error = k3.std() / np.sqrt(len(drawn))
  assert abs(k3.mean() - exact) < 4 * error
  assert k3.std() < k1.std()
  assert k3.min() >= 0
  assert k1.min() < 0
  np.testing.assert_allclose(k2, k1**2 / 2, rtol=1e-5)


def test_support_renormalises_and_hides_what_lies_outside():
  student, teacher = pair(3)
  support = np.zeros((5, 12), bool)
  support[:, :7] = True
  teacher[:, 7:] = np.nan
  got = kl.exact_kl(student, teacher, support)
  expected = kl.exact_kl(student[:, :7], teacher[:, :7])
  np.testing.assert_allclose(got, expected, rtol=1e-4)
  gradient = jax.grad(lambda x: kl.exact_kl(x, teacher, support).sum())(student)
  assert np.isfinite(gradient).all()
  assert (np.asarray(gradient)[:, 7:] == 0).all()


def test_zero_mass_counts_nothing_and_missing_mass_is_infinite():
  p = np.log(np.array([0.5, 0.5, 1e-30]), dtype=np.float32)
  p[2] = -np.inf
  q = np.log(np.array([0.25, 0.25, 0.5], np.float32))
  np.testing.assert_allclose(kl.exact_kl(p, q), np.log(2), rtol=1e-5)
  assert kl.exact_kl(q, p) == np.inf


def test_equal_distributions_have_none():
  student, _ = pair(4)
  np.testing.assert_allclose(kl.exact_kl(student, student + 3), 0, atol=1e-6)
  for kind in kl.KINDS:
    assert kl.sampled_kl(jnp.float32(-2), jnp.float32(-2), kind=kind) == 0


def test_an_impossible_token_stays_finite_and_an_unknown_kind_is_an_error():
  value = kl.sampled_kl(jnp.float32(-300.0), jnp.float32(0.0))
  assert np.isfinite(value)
  with pytest.raises(ValueError, match="'k4'"):
    kl.sampled_kl(jnp.zeros(1), jnp.zeros(1), kind='k4')


@pytest.mark.parametrize(
  ('kind', 'whose'), [('k1', None), ('k2', 'reverse'), ('k3', 'forward')]
)
def test_what_an_estimator_s_gradient_is_the_gradient_of(kind, whose):
  student, teacher = pair(4)
  drawn = jax.nn.softmax(student)  # Of the tokens; no gradient flows into it.

  def sampled(logits):
    each = kl.sampled_kl(
      jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher), kind=kind
    )
    return jnp.sum(drawn * each)

  def exact(logits):
    if whose is None:
      return 0.0 * jnp.sum(logits)
    everything = jnp.ones(logits.shape, bool)
    return jnp.sum(kl.divergence(whose, logits, teacher, everything))

  np.testing.assert_allclose(
    jax.grad(sampled)(student), jax.grad(exact)(student), atol=1e-5
  )


@pytest.mark.parametrize('kind', kl.EXACT)
def test_an_empty_support_has_no_divergence_and_no_gradient(kind):
  student, teacher = pair(5)
  support = np.zeros((5, 12), bool)
  support[:3, :4] = True

  def total(logits):
    found = kl.divergence(kind, logits, teacher, support)
    return jnp.sum(found), found

  (_, found), gradient = jax.value_and_grad(total, has_aux=True)(student)
  assert (np.asarray(found[:3]) > 0).all()
  np.testing.assert_array_equal(found[3:], 0)
  assert np.asarray(gradient[:3, :4]).any()
  np.testing.assert_array_equal(gradient[3:], 0)
  np.testing.assert_array_equal(gradient[:, 4:], 0)


def test_a_divergence_of_another_name_is_an_error():
  with pytest.raises(ValueError, match="'sideways'.*reverse"):
    kl.divergence('sideways', *pair(), np.ones((5, 12), bool))
