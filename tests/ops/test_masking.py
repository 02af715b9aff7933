import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr2_jax.ops import masking


def test_length_mask_keeps_the_first():
  mask = masking.length_mask(np.array([[0, 2], [3, 5]]), 3)
  expected = [[[0, 0, 0], [1, 1, 0]], [[1, 1, 1], [1, 1, 1]]]
  np.testing.assert_array_equal(mask, np.array(expected, bool))


@pytest.mark.parametrize('jitted', [False, True])
def test_padding_cannot_leak(jitted):
  def loss(values, mask):
    return masking.masked_sum(jnp.log(masking.keep(values, mask, 1.0)), mask)

  def total(values, mask):
    return loss(values, mask).sum

  run = (
    jax.jit(jax.value_and_grad(total))
    if jitted
    else (jax.value_and_grad(total))
  )
  values = jnp.array([2.0, np.nan, 4.0, 0.0, np.inf])
  mask = jnp.array([True, False, True, False, False])
  value, gradient = run(values, mask)
  np.testing.assert_allclose(value, np.log(8.0), rtol=1e-6)
  np.testing.assert_allclose(gradient, [0.5, 0, 0.25, 0, 0], rtol=1e-6)
  assert loss(values, mask).count == 2


def test_totals_added_equal_the_whole():
  rng = np.random.default_rng(0)
  values = rng.normal(size=(6, 5)).astype(np.float32)
  mask = rng.random((6, 5)) < 0.4
  whole = masking.masked_sum(values, mask)
  parts = masking.masked_sum(values[:1], mask[:1]) + masking.masked_sum(
    values[1:], mask[1:]
  )
  np.testing.assert_allclose(parts.mean(), whole.mean(), rtol=1e-6)
  np.testing.assert_allclose(whole.mean(), values[mask].mean(), rtol=1e-5)


def test_masked_mean_reduces_one_axis_and_is_zero_when_empty():
  values = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]])
  mask = np.array([[True, False, True], [False, False, False]])
  np.testing.assert_array_equal(masking.masked_mean(values, mask, 1), [2, 0])


def test_divide_by_zero_is_zero_with_zero_gradient():
  gradient = jax.grad(lambda x: masking.divide(x, 0 * x))(3.0)
  assert masking.divide(3.0, 0.0) == 0
  assert gradient == 0


def test_total_is_a_pytree():
  total = jax.jit(lambda x: masking.Total(x, 2 * x))(jnp.array(3.0))
  assert total.mean() == 0.5
