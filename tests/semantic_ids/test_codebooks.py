import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.semantic_ids import codebooks

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield


def random_books(levels=3, size=5, width=4, seed=0):
  rng = np.random.default_rng(seed)
  counts = rng.uniform(0.1, 3.0, (levels, size)).astype(np.float32)
  vectors = rng.normal(size=(levels, size, width)).astype(np.float32)
  return {
    'vectors': vectors,
    'counts': counts,
    'sums': vectors * counts[..., None],
  }


def pull(estimate, latents, quantized, gradient):
  """The estimate, and the gradient of the latents for its gradient."""
  value, back = jax.vjp(
    lambda h: estimate(h, jnp.asarray(quantized)), jnp.asarray(latents)
  )
  return value, back(jnp.asarray(gradient))[0]


def rotation(h, q):
  """The matrix [D, D] that rotates h to q in their plane."""
  u, v = (np.float64(x) / np.linalg.norm(np.float64(x)) for x in (h, q))
  w = v - (u @ v) * u
  w /= np.linalg.norm(w)
  cos, sin = u @ v, v @ w
  plane = np.stack([u, w])
  turn = np.array([[cos, -sin], [sin, cos]])
  return np.eye(len(u)) + plane.T @ (turn - np.eye(2)) @ plane


# ---------------------------------------------------------------- Estimators


@pytest.mark.parametrize('name', codebooks.ESTIMATORS)
def test_an_estimate_is_the_quantized_value(name):
  rng = np.random.default_rng(0)
  latents, quantized = rng.normal(size=(2, 20, 6)).astype(np.float32)
  latents[0], quantized[1] = 0, 0
  quantized[2] = -latents[2]
  estimate = codebooks.ESTIMATORS[name]
  np.testing.assert_allclose(estimate(latents, quantized), quantized, atol=1e-6)


@pytest.mark.parametrize('name', codebooks.ESTIMATORS)
def test_the_quantized_value_is_a_constant(name):
  rng = np.random.default_rng(0)
  latents, quantized = rng.normal(size=(2, 5, 6)).astype(np.float32)
  gradient = jax.grad(
    lambda q: (codebooks.ESTIMATORS[name](latents, q) ** 2).sum()
  )(quantized)
  # Straight-through and rotation alike: only the latent is moved.
  np.testing.assert_array_equal(gradient, 0.0)


def test_straight_through_hands_the_gradient_on():
  rng = np.random.default_rng(1)
  latents, quantized, gradient = rng.normal(size=(3, 5, 6)).astype(np.float32)
  _, got = pull(codebooks.straight_through, latents, quantized, gradient)
  np.testing.assert_array_equal(got, gradient)


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(2, 8))
def test_rotation_hands_on_the_transposed_turn_scaled(seed, width):
  rng = np.random.default_rng(seed)
  latents, quantized, gradient = rng.normal(size=(3, 4, width)).astype(
    np.float32
  )
  _, got = pull(codebooks.rotate, latents, quantized, gradient)
  for b in range(4):
    turn = rotation(latents[b], quantized[b])
    scale = np.linalg.norm(quantized[b]) / np.linalg.norm(latents[b])
    np.testing.assert_allclose(
      scale * turn @ latents[b], quantized[b], atol=1e-4
    )
    # Half the turn's sine divides: the closer to apart, the less is known.
    np.testing.assert_allclose(
      got[b],
      scale * turn.T @ gradient[b],
      rtol=1e-3,
      atol=1e-3 * scale * np.linalg.norm(gradient[b]),
    )


def test_rotation_keeps_the_angle_between_gradient_and_value():
  rng = np.random.default_rng(2)
  latents, quantized, gradient = rng.normal(size=(3, 20, 6)).astype(np.float32)
  _, got = pull(codebooks.rotate, latents, quantized, gradient)

  def cosine(x, y):
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return (x * y).sum(-1) / lengths

  np.testing.assert_allclose(
    cosine(got, latents), cosine(gradient, quantized), atol=1e-4
  )
  _, straight = pull(codebooks.straight_through, latents, quantized, gradient)
  assert np.abs(cosine(straight, latents) - cosine(gradient, quantized)).max(
  ) > 0.1  # fmt: skip


def test_rotation_is_straight_through_where_there_is_no_turn_to_take():
  rng = np.random.default_rng(3)
  latents, quantized, gradient = rng.normal(size=(3, 5, 6)).astype(np.float32)
  latents[0] = 0
  quantized[1] = 0
  quantized[2] = -latents[2]
  quantized[3] = -0.3 * latents[3]
  quantized[4] = 0.5 * latents[4]  # no turn, but a scale
  _, got = pull(codebooks.rotate, latents, quantized, gradient)
  np.testing.assert_array_equal(got[:4], gradient[:4])
  np.testing.assert_allclose(got[4], 0.5 * gradient[4], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ Moving averages


@pytest.mark.parametrize('jitted', [False, True])
def test_ema_update_equals_loops(jitted):
  books = random_books()
  rng = np.random.default_rng(2)
  codes = rng.integers(4, size=(20, 3))  # code 4 gets nothing
  residuals = rng.normal(size=(20, 3, 4)).astype(np.float32)

  def update(*given_):
    return codebooks.ema_update(*given_, decay=0.8, epsilon=1e-2)

  got = (jax.jit(update) if jitted else update)(books, codes, residuals)
  for level in range(3):
    n = np.zeros(5)
    s = np.zeros((5, 4))
    for b in range(20):
      n[codes[b, level]] += 1
      s[codes[b, level]] += residuals[b, level]
    n = 0.8 * books['counts'][level] + 0.2 * n
    s = 0.8 * books['sums'][level] + 0.2 * s
    smoothed = (n + 1e-2) / (n.sum() + 5e-2) * n.sum()
    np.testing.assert_allclose(got['counts'][level], n, rtol=1e-5)
    np.testing.assert_allclose(got['sums'][level], s, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      got['vectors'][level], s / smoothed[:, None], rtol=1e-4, atol=1e-5
    )


def test_without_memory_a_codeword_is_the_mean_of_its_residuals():
  rng = np.random.default_rng(4)
  codes = np.arange(20)[:, None] % 5 * np.ones(3, np.int32)[None]
  residuals = rng.normal(size=(20, 3, 4)).astype(np.float32)
  got = codebooks.ema_update(
    random_books(), codes.astype(np.int32), residuals, decay=0.0
  )
  want = residuals.reshape(4, 5, 3, 4).mean(0).swapaxes(0, 1)
  np.testing.assert_allclose(got['vectors'], want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got['counts'], 4)


def test_an_unused_codeword_stays_where_it_is():
  books = random_books()
  codes = np.zeros((20, 3), np.int32)
  residuals = np.ones((20, 3, 4), np.float32)
  got = codebooks.ema_update(books, codes, residuals, decay=0.9, epsilon=1e-7)
  np.testing.assert_allclose(
    got['vectors'][:, 1:], books['vectors'][:, 1:], rtol=1e-4
  )
  np.testing.assert_allclose(
    got['counts'][:, 1:], 0.9 * books['counts'][:, 1:], rtol=1e-5
  )


@pytest.mark.parametrize('jitted', [False, True])
def test_idle_counts_batches_since_a_code_was_used(jitted):
  rng = np.random.default_rng(5)
  idle = np.zeros((3, 6), np.int32)
  run = jax.jit(codebooks.count_idle) if jitted else codebooks.count_idle
  seen = []
  for _ in range(12):
    codes = rng.integers(6, size=(2, 3)).astype(np.int32)
    seen.append(codes)
    idle = np.asarray(run(jnp.asarray(idle), codes))
  assert idle.dtype == np.int32
  for level in range(3):
    for code in range(6):
      uses = [t for t, codes in enumerate(seen) if code in codes[:, level]]
      assert idle[level, code] == (11 - uses[-1] if uses else 12)


# --------------------------------------------------------------------- Revive


def revive(vectors, dead, residuals, words):
  """Each level's dead codes, in order, take the worst items in turn."""
  out = vectors.copy()
  for level in range(len(vectors)):
    error = ((residuals[:, level] - words[:, level]) ** 2).sum(-1)
    worst = np.argsort(-error, kind='stable')
    for turn, code in enumerate(np.flatnonzero(dead[level])):
      out[level, code] = residuals[worst[turn % len(worst)], level]
  return out


@settings(max_examples=20)
@given(st.integers(0, 999), st.integers(1, 8))
def test_revive_equals_loops(seed, size):
  rng = np.random.default_rng(seed)
  vectors = random_books(seed=seed)['vectors']
  dead = rng.random((3, 5)) < rng.random()
  residuals, words = rng.normal(size=(2, size, 3, 4)).astype(np.float32)
  got = codebooks.revive(*map(jnp.asarray, (vectors, dead, residuals, words)))
  np.testing.assert_array_equal(got, revive(vectors, dead, residuals, words))


def test_nothing_dead_leaves_everything():
  vectors = random_books()['vectors']
  rng = np.random.default_rng(0)
  residuals, words = rng.normal(size=(2, 6, 3, 4)).astype(np.float32)
  got = codebooks.revive(
    jnp.asarray(vectors), jnp.zeros((3, 5), bool), residuals, words
  )
  np.testing.assert_array_equal(got, vectors)
