import jax
import numpy as np
import pytest

from gr2_jax.ops import advantages


def rewards(seed=0, groups=50, size=8):
  return np.random.default_rng(seed).random((groups, size)).astype(np.float32)


def expected(kind, values):
  values = values.astype(np.float64)
  mean = values.mean(-1, keepdims=True)
  match kind:
    case 'dr_grpo':
      return values - mean
    case 'rloo':
      others = values.sum(-1, keepdims=True) - values
      return values - others / (values.shape[-1] - 1)
  return (values - mean) / np.maximum(values.std(-1, keepdims=True), 1e-3)


@pytest.mark.parametrize('jitted', [False, True])
@pytest.mark.parametrize('kind', advantages.KINDS)
def test_equals_numpy(kind, jitted):
  def run(values):
    return advantages.group_advantage(values, kind=kind)

  run = jax.jit(run) if jitted else run
  values = rewards()
  np.testing.assert_allclose(run(values), expected(kind, values), atol=2e-6)
  np.testing.assert_allclose(np.sum(run(values), -1), 0, atol=1e-5)
  np.testing.assert_allclose(jax.vmap(run)(values), run(values), atol=1e-6)


@pytest.mark.parametrize('kind', advantages.KINDS)
def test_rounding_residue_stays_small(kind):
  values = np.full((3, 8), 0.7315, np.float32)
  values[:, ::2] += np.float32(6e-8)
  assert np.ptp(values) > 0
  got = advantages.group_advantage(values, kind=kind)
  assert np.abs(got).max() < 1e-3


def test_large_offset_does_not_cost_precision():
  values = rewards() + np.float32(1000)
  got = advantages.group_advantage(values)
  np.testing.assert_allclose(got, expected('dapo', values), atol=1e-5)


def test_zero_variance_marks_equal_groups_only():
  values = rewards(groups=3)
  values[1] = 0.4
  values[1, 0] += np.float32(1e-7)
  values[2] = 0.4
  values[2, 0] += np.float32(8.8e-4)  # A swap at the end of ten candidates.
  np.testing.assert_array_equal(
    advantages.zero_variance(values), [False, True, False]
  )


def test_bad_arguments_are_errors():
  with pytest.raises(ValueError, match='group of 1'):
    advantages.group_advantage(np.ones((3, 1)))
  with pytest.raises(ValueError, match="'ppo'"):
    advantages.group_advantage(np.ones((3, 2)), kind='ppo')
