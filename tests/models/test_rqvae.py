import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from gr2_jax.models import codebooks, residual_quantizer, rqvae


@pytest.fixture(autouse=True)
def no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield


def tiny(**kwargs) -> ConfigDict:
  return ConfigDict(
    dict(
      seed=0, codebook_size=8, hidden=(16,), latent=6, codebook='ema',
      decay=0.9, commitment=0.25, init_items=200, init_iterations=5,
      pretrain_steps=20, steps=60, batch_size=32, learning_rate=3e-3,
      warmup_steps=5,
    )
    | kwargs
  )  # fmt: skip


def clusters(items=200, width=10, seed=0):
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(12, width))
  noise = 0.1 * rng.normal(size=(items, width))
  return (centres[rng.integers(12, size=items)] + noise).astype(np.float32)


def train(config, features, levels=2):
  model = rqvae.make_model(config, features.shape[1])
  update = rqvae.make_update(config, model, rqvae.make_optimizer(config))
  state = rqvae.init(config, features, levels)
  history = []
  for step in range(config.steps):
    batch = rqvae.draw_batch(
      jnp.asarray(features), config.batch_size, jax.random.key(1), step
    )
    state, metrics = update(state, batch)
    history.append(float(metrics['reconstruction']))
  return model, state, history


def random_codebooks(levels=3, size=5, width=4, seed=0):
  rng = np.random.default_rng(seed)
  counts = rng.uniform(0.1, 3.0, (levels, size)).astype(np.float32)
  vectors = rng.normal(size=(levels, size, width)).astype(np.float32)
  return {
    'vectors': vectors,
    'counts': counts,
    'sums': vectors * counts[..., None],
  }


def test_straight_through_passes_value_and_gradient():
  latents = jnp.array([[1.0, -2.0]])
  words = jnp.array([[5.0, 7.0]])

  def value(latents):
    return (codebooks.straight_through(latents, words) ** 2).sum()

  assert value(latents) == 74.0
  np.testing.assert_allclose(jax.grad(value)(latents), 2 * words)


def test_ema_update_equals_loops():
  books = random_codebooks()
  rng = np.random.default_rng(2)
  codes = rng.integers(4, size=(20, 3))  # code 4 gets nothing
  residuals = rng.normal(size=(20, 3, 4)).astype(np.float32)
  got = codebooks.ema_update(books, codes, residuals, decay=0.8, epsilon=1e-2)
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


@pytest.mark.parametrize('kind', rqvae.CODEBOOK_KINDS)
def test_training_improves_reconstruction(kind):
  features = clusters()
  config = tiny(codebook=kind, pretrain_steps=0, steps=150, learning_rate=1e-2)
  model, state, history = train(config, features)
  fresh = rqvae.init(config, features, 2)

  def r2(state):
    return rqvae.reconstruction_r2(
      model, state.params, state.codebooks['vectors'], features
    )

  assert r2(state) > max(0.6, r2(fresh) + 0.2)
  assert history[-1] < 0.5 * history[0]
  assert int(state.step) == config.steps


@pytest.mark.parametrize('kind', rqvae.CODEBOOK_KINDS)
def test_loss_gradients(kind):
  """Decoder, encoder and codebooks each get the gradients they should."""
  features = clusters(40)
  config = tiny(codebook=kind, pretrain_steps=0)
  model = rqvae.make_model(config, 10)
  state = rqvae.init(config, features, 2)
  moved = rqvae.trainable(state.params, state.codebooks, kind)
  vectors = state.codebooks['vectors']

  def loss(moved, vectors):
    return rqvae.loss_fn(model, moved, vectors, features, 0.25)[0]

  in_moved, in_vectors = jax.grad(loss, argnums=(0, 1))(moved, vectors)
  for half in ('encoder', 'decoder'):
    for leaf in jax.tree.leaves(in_moved['networks'][half]):
      assert np.abs(leaf).max() > 0
  np.testing.assert_array_equal(in_vectors, 0.0)  # constants to the loss
  if kind == 'gradient':
    # d/de of the codebook term alone: -2 (r - e) / B for each assigned item.
    latents = model.apply({'params': state.params}, features, method='encode')
    codes, residuals, words = residual_quantizer.quantise(latents, vectors)
    want = np.zeros(vectors.shape)
    for level in range(2):
      np.add.at(
        want[level],
        np.asarray(codes[:, level]),
        -2 * np.asarray(residuals - words)[:, level] / 40,
      )
    np.testing.assert_allclose(in_moved['vectors'], want, atol=1e-5)


def test_update_on_a_mesh_equals_one_device():
  features = clusters()
  config = tiny()
  model = rqvae.make_model(config, 10)
  optimizer = rqvae.make_optimizer(config)
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  state = rqvae.init(config, features, 2)
  batch = jnp.asarray(features[:32])
  split = jax.device_put(
    batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  )
  whole = jax.device_put(
    state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  )
  one, _ = rqvae.make_update(config, model, optimizer)(state, batch)
  many, _ = rqvae.make_update(config, model, optimizer, mesh)(whole, split)
  assert len(many.codebooks['vectors'].sharding.device_set) == 8
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    one.codebooks,
    many.codebooks,
  )


def test_shapes_are_those_of_a_fresh_state():
  config = tiny(pretrain_steps=1, codebook='gradient')
  abstract = jax.eval_shape(lambda: rqvae.init_shapes(config, 10, 2))
  state = rqvae.init(config, clusters(), 2)
  assert jax.tree.structure(abstract) == jax.tree.structure(state)
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(
      (a.shape, a.dtype), (b.shape, b.dtype)
    ),
    abstract,
    state,
  )


def test_equal_rows_have_bit_equal_latents():
  features = clusters(30)
  features = np.concatenate([features, features[::-1]])
  model = rqvae.make_model(tiny(), 10)
  params = model.init(jax.random.key(0), features[:1])['params']
  latents = rqvae.encode(model, params, features)
  np.testing.assert_array_equal(latents, latents[::-1])
  np.testing.assert_allclose(
    latents,
    model.apply({'params': params}, features, method='encode'),
    atol=1e-5,
  )


def test_a_nan_embedding_is_named():
  features = clusters(20)
  features[7, 3] = np.nan
  model = rqvae.make_model(tiny(), 10)
  params = model.init(jax.random.key(0), features[:1])['params']
  with pytest.raises(ValueError, match='embedding of item 7 holds NaN'):
    rqvae.encode(model, params, features)


def test_an_unknown_codebook_kind_is_named():
  with pytest.raises(ValueError, match=r"tokenizer.codebook is 'emma'.*'ema'"):
    rqvae.init(tiny(codebook='emma', pretrain_steps=1), clusters(), 2)
