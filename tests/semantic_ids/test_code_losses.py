import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.semantic_ids import codebooks

pytestmark = pytest.mark.slow


def batch(seed=0, size=7, levels=3, codes=5, width=4):
  rng = np.random.default_rng(seed)
  residuals = rng.normal(size=(size, levels, width)).astype(np.float32)
  vectors = rng.normal(size=(levels, codes, width)).astype(np.float32)
  return residuals, vectors


def diversity(residuals, vectors, temperature):
  """The value by loops, and the shares [L, C]."""
  B, L, _ = residuals.shape
  share = np.zeros(vectors.shape[:2])
  for b in range(B):
    for k in range(L):
      squares = [((residuals[b, k] - e) ** 2).sum() for e in vectors[k]]
      share[k] += scipy.special.softmax(-np.array(squares) / temperature) / B
  return sum(len(p) * (p**2).sum() for p in share), share


@pytest.mark.parametrize('jitted', [False, True])
@pytest.mark.parametrize('temperature', [0.3, 1.0, 4.0])
def test_diversity_equals_numpy(jitted, temperature):
  residuals, vectors = batch()
  run = jax.jit(codebooks.diversity) if jitted else codebooks.diversity
  want, _ = diversity(*map(np.float64, batch()), temperature)
  np.testing.assert_allclose(
    run(residuals, vectors, temperature), want, rtol=1e-5
  )


@settings(max_examples=20)
@given(st.integers(0, 99), st.floats(0.05, 20))
def test_diversity_lies_between_even_and_one_code(seed, temperature):
  residuals, vectors = batch(seed)
  found = float(codebooks.diversity(residuals, vectors, temperature))
  assert 3 - 1e-4 <= found <= 3 * 5 + 1e-4


def test_diversity_is_levels_where_even_and_levels_x_codes_where_collapsed():
  corners = np.eye(4, dtype=np.float32)
  spread = np.repeat(corners[:, None], 2, axis=1)  # each code once, 2 levels
  vectors = np.stack([corners, corners])
  even = codebooks.diversity(spread, vectors, 1e-2)
  alone = codebooks.diversity(spread[[1, 1, 1]], vectors, 1e-2)
  np.testing.assert_allclose(even, 2, rtol=1e-5)
  np.testing.assert_allclose(alone, 2 * 4, rtol=1e-5)


def test_diversity_is_less_after_a_step_along_either_gradient():
  residuals, vectors = batch(size=4)
  value = codebooks.diversity(residuals, vectors, 1.0)
  gradients = jax.grad(codebooks.diversity, argnums=(0, 1))(
    residuals, vectors, 1.0
  )
  for place, gradient in enumerate(gradients):
    moved = [residuals, vectors]
    moved[place] = moved[place] - 1e-2 * gradient
    assert codebooks.diversity(*moved, 1.0) < value - 1e-5


# ------------------------------------------------------------------- InfoNCE


def pairs(seed=0, size=9, items=30, width=4):
  """Random pairs of few items, so that some items repeat."""
  rng = np.random.default_rng(seed)
  table = rng.normal(size=(items, width)).astype(np.float32)
  anchors, partners = rng.integers(items, size=(2, size))
  return table[anchors], table[partners], anchors, partners


def info_nce(anchors, partners, anchor_ids, partner_ids, temperature):
  """InfoNCE row by row and column by column."""

  def score(i, j):
    a, b = np.float64(anchors[i]), np.float64(partners[j])
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return cosine / temperature

  def strangers(i, j):
    """Whether anchor i and partner j are a negative pair."""
    alike = anchor_ids[i], anchor_ids[i], partner_ids[i]
    return not np.equal(
      alike, (partner_ids[j], anchor_ids[j], partner_ids[j])
    ).any()

  real = [i for i in range(len(anchors)) if anchor_ids[i] != partner_ids[i]]
  total = 0.0
  for i in real:
    others = [j for j in real if j != i]
    row = [score(i, i)] + [score(i, j) for j in others if strangers(i, j)]
    column = [score(i, i)] + [score(j, i) for j in others if strangers(j, i)]
    total += 0.5 * (
      scipy.special.logsumexp(row) + scipy.special.logsumexp(column)
    )
    total -= score(i, i)
  return total / max(len(real), 1)


def sharing(ids_left, ids_right):
  """Four pairs, of which pairs 0 and 1 have the given relation."""
  anchors, partners, _, _ = pairs(size=4)
  a = np.array([0, ids_left, 20, 22])
  p = np.array([1, ids_right, 21, 23])
  return anchors, partners, a, p


@pytest.mark.parametrize('jitted', [False, True])
@pytest.mark.parametrize('items', [3, 8, 1000])
def test_info_nce_equals_numpy(jitted, items):
  run = jax.jit(codebooks.info_nce) if jitted else codebooks.info_nce
  for seed in range(4):
    given_ = pairs(seed, items=items)
    want = info_nce(*given_, 0.3)
    np.testing.assert_allclose(run(*given_, 0.3), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ('anchor', 'partner', 'gone'),
  [
    (5, 1, [(0, 1), (1, 0)]),  # the same partner
    (0, 5, [(0, 1), (1, 0)]),  # the same anchor
    (1, 5, [(1, 0)]),  # the first's partner is the second's anchor
    (5, 0, [(0, 1)]),  # the first's anchor is the second's partner
    (1, 0, [(0, 1), (1, 0)]),  # the pair the other way round
    (0, 1, [(0, 1), (1, 0)]),  # the same pair
  ],
)
def test_a_partner_that_is_one_of_a_pair_is_no_negative_of_it(
  anchor, partner, gone
):
  anchors, partners, a, p = sharing(anchor, partner)

  def loss(anchors, partners):
    return codebooks.info_nce(anchors, partners, a, p, 0.3)

  np.testing.assert_allclose(
    loss(anchors, partners), info_nce(anchors, partners, a, p, 0.3), rtol=1e-4
  )
  # Along axes, each coordinate of the gradient is of one score alone.
  eye = jnp.eye(4)
  pulled = jax.grad(loss)(eye, eye[::-1])[:, ::-1]
  for i, j in ((0, 1), (1, 0)):
    assert (pulled[i, j] == 0) == ((i, j) in gone)


def test_an_item_without_a_partner_counts_nowhere():
  anchors, partners, a, p = pairs(items=1000)
  lonely = p.copy()
  lonely[[2, 5]] = a[[2, 5]]
  rest = np.delete(np.arange(9), [2, 5])
  got, gradient = jax.value_and_grad(codebooks.info_nce)(
    jnp.asarray(anchors), partners, a, lonely, 0.1
  )
  want = codebooks.info_nce(
    anchors[rest], partners[rest], a[rest], p[rest], 0.1
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_array_equal(gradient[np.array([2, 5])], 0)
  assert np.abs(gradient[rest]).min(axis=1).max() > 0


def test_a_batch_without_any_pair_is_zero_with_gradient_zero():
  anchors, partners, a, _ = pairs()
  value, gradient = jax.value_and_grad(codebooks.info_nce)(
    anchors, partners, a, a, 0.1
  )
  assert value == 0.0
  np.testing.assert_array_equal(gradient, 0.0)


def test_a_zero_latent_has_a_finite_gradient():
  anchors, partners, a, p = pairs(items=1000)
  anchors[3] = 0
  gradients = jax.grad(codebooks.info_nce, argnums=(0, 1))(
    anchors, partners, a, p, 0.1
  )
  for gradient in gradients:
    assert np.isfinite(gradient).all()


def test_info_nce_draws_partners_together():
  anchors, partners, a, p = pairs(items=1000)
  value, gradients = jax.value_and_grad(codebooks.info_nce, argnums=(0, 1))(
    anchors, partners, a, p, 0.2
  )
  for place, gradient in enumerate(gradients):
    moved = [anchors, partners]
    moved[place] = moved[place] - 1e-2 * gradient
    assert codebooks.info_nce(*moved, a, p, 0.2) < value - 1e-4


@settings(max_examples=20)
@given(st.integers(0, 999), st.randoms(use_true_random=False))
def test_info_nce_knows_neither_order_nor_length(seed, random):
  anchors, partners, a, p = pairs(seed)
  order = list(range(len(a)))
  random.shuffle(order)
  scale = np.float32(random.uniform(0.5, 3))
  np.testing.assert_allclose(
    codebooks.info_nce(
      scale * anchors[order], partners[order], a[order], p[order], 0.3
    ),
    codebooks.info_nce(anchors, partners, a, p, 0.3),
    rtol=1e-4,
    atol=1e-6,
  )
