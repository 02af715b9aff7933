import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from gr2_jax.distributed import sharding
from gr2_jax.semantic_ids import co_engagement, codebooks, quantizer, rqvae

pytestmark = pytest.mark.slow

LEARNED = ('gradient', 'ema_gradient')
RING = co_engagement.Neighbors(
  np.arange(0, 401, 2),
  np.stack([(np.arange(200) + 1) % 200, (np.arange(200) - 1) % 200], 1)
  .ravel()
  .astype(np.int32),
)


@pytest.fixture(autouse=True)
def no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield


def tiny(**kwargs) -> ConfigDict:
  return ConfigDict(
    dict(
      seed=0, codebook_size=8, hidden=(16,), latent=6, codebook='ema',
      estimator='straight_through', decay=0.9, commitment=0.25,
      reset_after=0, diversity_weight=0.0, diversity_temperature=1.0,
      contrastive_weight=0.0, contrastive_temperature=0.2,
      init_items=200, init_iterations=5, pretrain_steps=0, steps=60,
      batch_size=32, learning_rate=3e-3, warmup_steps=5,
    )
    | kwargs
  )  # fmt: skip


def clusters(items=200, width=10, seed=0):
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(12, width))
  noise = 0.1 * rng.normal(size=(items, width))
  return (centres[rng.integers(12, size=items)] + noise).astype(np.float32)


def begin(config, levels=2):
  """A model, its initial state, and the first batch, with partners."""
  features = clusters()
  model = rqvae.make_model(config, features.shape[1])
  batch = rqvae.draw_batch(config, features, RING, 0)
  return model, rqvae.init(config, features, levels), batch


def train(config, features, levels=2):
  model = rqvae.make_model(config, features.shape[1])
  update = rqvae.make_update(config, model)
  state = rqvae.init(config, features, levels)
  history = []
  for step in range(config.steps):
    batch = rqvae.draw_batch(config, features, None, step)
    state, metrics = update(state, batch)
    history.append(float(metrics['reconstruction']))
  return model, state, history


def half(model, state, x, method):
  return model.apply(
    {'params': state.moved['networks']}, jnp.asarray(x), method=method
  )


# ---------------------------------------------------------------------- Loss


@pytest.mark.parametrize('estimator', codebooks.ESTIMATORS)
@pytest.mark.parametrize('kind', ['ema', *LEARNED])
def test_the_loss_is_the_sum_of_its_terms_in_numpy(kind, estimator):
  config = tiny(
    codebook=kind,
    estimator=estimator,
    diversity_weight=0.3,
    contrastive_weight=0.7,
  )
  model, state, batch = begin(config)
  # Codebooks that quantise and those that are learned, apart.
  vectors = state.codebooks['vectors'] + 0.1
  loss, aux = rqvae.loss_fn(config, model, state.moved, vectors, batch)
  latents = np.asarray(half(model, state, batch['items'], 'encode'))
  learned = np.asarray(state.moved.get('vectors', vectors))
  residual, want = latents, {'commitment': 0.0}
  residuals, codebook = [], 0.0
  for level, words in enumerate(np.asarray(vectors)):
    distance = ((residual[:, None] - words) ** 2).sum(-1)
    codes = distance.argmin(1)
    np.testing.assert_array_equal(aux['codes'][:, level], codes)
    residuals.append(residual)
    want['commitment'] += ((residual - words[codes]) ** 2).sum(1).mean()
    codebook += ((residual - learned[level][codes]) ** 2).sum(1).mean()
    residual = residual - words[codes]
  residuals = np.stack(residuals, 1)
  np.testing.assert_allclose(aux['residuals'], residuals, atol=1e-5)
  out = half(model, state, latents - residual, 'decode')
  want['reconstruction'] = ((batch['items'] - out) ** 2).sum(1).mean()
  want['diversity'] = codebooks.diversity(residuals, jnp.asarray(learned), 1.0)
  want['contrastive'] = codebooks.info_nce(
    latents,
    half(model, state, batch['partners'], 'encode'),
    batch['rows'],
    batch['partner_rows'],
    0.2,
  )
  for name, value in want.items():
    np.testing.assert_allclose(aux[name], value, rtol=1e-4, err_msg=name)
  total = (
    want['reconstruction']
    + 0.25 * want['commitment']
    + 0.3 * want['diversity']
    + 0.7 * want['contrastive']
    + (codebook if kind in LEARNED else 0.0)
  )
  np.testing.assert_allclose(loss, total, rtol=1e-5)


def gradients(config):
  model, state, batch = begin(config)

  def loss(moved, vectors):
    return rqvae.loss_fn(config, model, moved, vectors, batch)[0]

  found = jax.grad(loss, argnums=(0, 1))(
    state.moved, state.codebooks['vectors']
  )
  return model, state, batch, found


@pytest.mark.parametrize('kind', ['ema', *LEARNED])
def test_gradients_flow_to_what_they_should_move(kind):
  model, state, batch, (moved, vectors) = gradients(tiny(codebook=kind))
  for name in ('encoder', 'decoder'):
    for leaf in jax.tree.leaves(moved['networks'][name]):
      assert np.abs(leaf).max() > 0
  np.testing.assert_array_equal(vectors, 0.0)  # constants to the loss
  assert ('vectors' in moved) == (kind in LEARNED)
  if kind not in LEARNED:
    return
  # d/de of the codebook term alone: -2 (r - e) / B for each assigned item.
  latents = half(model, state, batch['items'], 'encode')
  codes, residuals, words = quantizer.quantize(
    latents, state.codebooks['vectors']
  )
  want = np.zeros(state.moved['vectors'].shape)
  for level in range(2):
    np.add.at(
      want[level],
      np.asarray(codes[:, level]),
      -2 * np.asarray(residuals - words)[:, level] / len(batch['items']),
    )
  np.testing.assert_allclose(moved['vectors'], want, atol=1e-5)


@pytest.mark.parametrize('kind', LEARNED)
def test_the_codebook_term_moves_no_network(kind):
  with_it, without = (
    gradients(tiny(codebook=name))[3][0]['networks'] for name in (kind, 'ema')
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    with_it,
    without,
  )


def test_commitment_pulls_the_encoder_alone():
  """Its share of the gradient is 2 beta sum_k (r_k - e_k) / B, by hand."""
  found = []
  for weight in (0.0, 0.5):
    config = tiny(commitment=weight)
    model, state, batch, (moved, _) = gradients(config)
    found.append(moved['networks'])
  np.testing.assert_array_equal(
    *(jax.tree.leaves(g['decoder'])[0] for g in found)
  )
  latents, back = jax.vjp(
    lambda networks: model.apply(
      {'params': networks}, batch['items'], method='encode'
    ),
    state.moved['networks'],
  )
  _, residuals, words = quantizer.quantize(latents, state.codebooks['vectors'])
  pull = 2 * 0.5 * (residuals - words).sum(1) / len(batch['items'])
  want = back(pull)[0]['encoder']
  got = jax.tree.map(lambda a, b: b - a, *(g['encoder'] for g in found))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
               got, want)  # fmt: skip


def test_diversity_and_contrast_move_no_decoder():
  plain, shaped = (
    gradients(tiny(codebook='gradient', **weights))[3][0]
    for weights in ({}, {'diversity_weight': 1.0, 'contrastive_weight': 1.0})
  )
  same = jax.tree.map(
    lambda a, b: bool((a == b).all()), plain['networks'], shaped['networks']
  )
  assert all(jax.tree.leaves(same['decoder']))
  assert not any(jax.tree.leaves(same['encoder']))
  # The codewords are spread by diversity.
  assert (plain['vectors'] != shaped['vectors']).all()


# -------------------------------------------------------------------- Update


def test_ema_books_move_by_the_average_of_their_residuals():
  config = tiny()
  model, state, batch = begin(config)
  new, metrics = rqvae.make_update(config, model)(state, batch)
  _, aux = rqvae.loss_fn(
    config, model, state.moved, state.codebooks['vectors'], batch
  )
  want = codebooks.ema_update(
    state.codebooks, aux['codes'], aux['residuals'], decay=0.9
  )
  for name, value in want.items():
    np.testing.assert_allclose(new.codebooks[name], value, rtol=1e-4, atol=1e-6)
  used = np.zeros((2, 8), bool)
  for level in range(2):
    used[level, aux['codes'][:, level]] = True
  np.testing.assert_array_equal(new.codebooks['idle'], ~used)
  assert int(new.step) == 1
  share = want['counts'] / want['counts'].sum(-1, keepdims=True)
  entropy = -np.where(share > 0, share * np.log(share + 1e-9), 0).sum(-1)
  np.testing.assert_allclose(
    metrics['perplexity'], np.exp(entropy).mean(), rtol=1e-4
  )
  assert set(metrics) == {
    'loss', 'reconstruction', 'commitment', 'grad_norm', 'update_norm',
    'perplexity',
  }  # fmt: skip


def test_gradient_books_are_what_the_optimizer_moved():
  model, state, batch = begin(tiny(codebook='gradient', warmup_steps=0))
  update = rqvae.make_update(tiny(codebook='gradient', warmup_steps=0), model)
  new, _ = update(state, batch)
  np.testing.assert_array_equal(new.codebooks['vectors'], new.moved['vectors'])
  moved = np.abs(new.moved['vectors'] - state.moved['vectors']).max(-1) > 0
  used = np.asarray(new.codebooks['idle']) == 0
  np.testing.assert_array_equal(moved, used)


def test_ema_gradient_books_trail_what_the_optimizer_moved():
  config = tiny(codebook='ema_gradient', decay=0.75, warmup_steps=0)
  model, state, batch = begin(config)
  update = rqvae.make_update(config, model)
  trail = np.asarray(state.codebooks['vectors'])
  for _ in range(3):
    state, _ = update(state, batch)
    trail = 0.75 * trail + 0.25 * np.asarray(state.moved['vectors'])
  np.testing.assert_allclose(state.codebooks['vectors'], trail, rtol=1e-5)
  assert (state.codebooks['vectors'] != state.moved['vectors']).any()


@pytest.mark.parametrize('kind', ['ema', *LEARNED])
def test_a_dead_code_is_revived_everywhere_it_stands(kind):
  config = tiny(codebook=kind, reset_after=2)
  model, state, batch = begin(config)
  far = state.codebooks['vectors'].at[:, 3].set(1e3)
  state = state.replace(
    codebooks=state.codebooks | {'vectors': far, 'sums': far},
    moved=state.moved | ({'vectors': far} if kind in LEARNED else {}),
  )
  update = rqvae.make_update(config, model)
  state, metrics = update(state, batch)
  assert metrics['revived'] == 0
  assert (state.codebooks['idle'][:, 3] == 1).all()
  before = state
  state, metrics = update(state, batch)
  dead = np.asarray(before.codebooks['idle']) == 1
  _, aux = rqvae.loss_fn(
    config, model, before.moved, before.codebooks['vectors'], batch
  )
  for level in range(2):
    dead[level, aux['codes'][:, level]] = False
  assert metrics['revived'] == dead.sum() >= 2
  assert (np.asarray(state.codebooks['idle'])[dead] == 0).all()
  assert (np.asarray(state.codebooks['counts'])[dead] == 1).all()
  books = state.codebooks['vectors']
  error = np.asarray(((aux['residuals'] - aux['words']) ** 2).sum(-1))
  for level in range(2):
    first = int(np.flatnonzero(dead[level])[0])
    worst = aux['residuals'][error[:, level].argmax(), level]
    np.testing.assert_allclose(books[level, first], worst, atol=1e-5)
  np.testing.assert_array_equal(
    np.asarray(state.codebooks['sums'])[dead], np.asarray(books)[dead]
  )
  if kind in LEARNED:
    np.testing.assert_array_equal(
      np.asarray(state.moved['vectors'])[dead], np.asarray(books)[dead]
    )


@pytest.mark.parametrize('kind', ['ema', *LEARNED])
@pytest.mark.parametrize('estimator', codebooks.ESTIMATORS)
def test_training_improves_reconstruction(kind, estimator):
  config = tiny(codebook=kind, estimator=estimator, learning_rate=1e-2)
  features = clusters()
  model, state, history = train(config, features)

  def error(state):
    latents = half(model, state, features, 'encode')
    _, _, words = quantizer.quantize(latents, state.codebooks['vectors'])
    return ((half(model, state, words.sum(1), 'decode') - features) ** 2).sum()

  variance = ((features - features.mean(0)) ** 2).sum()
  assert error(state) < 0.5 * variance
  assert error(state) < 0.5 * error(rqvae.init(config, features, 2))
  assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize('kind', ['ema', *LEARNED])
def test_update_on_a_mesh_equals_one_device(kind):
  config = tiny(
    codebook=kind, reset_after=1, diversity_weight=0.1, contrastive_weight=0.1
  )
  model, state, batch = begin(config)
  mesh = sharding.make_mesh(8)
  update = rqvae.make_update(config, model)
  one, ones = update(state, batch)
  many, manys = update(
    jax.device_put(state, sharding.replicated(mesh)),
    sharding.shard_batch(batch, mesh),
  )
  assert len(many.codebooks['vectors'].sharding.device_set) == 8
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    (one.codebooks, one.moved, ones),
    (many.codebooks, many.moved, manys),
  )


# ----------------------------------------------------------- Batches and init


@settings(max_examples=20)
@given(st.integers(0, 9), st.integers(0, 10**6))
def test_a_batch_is_a_function_of_seed_and_step(seed, step):
  config, features = tiny(seed=seed), clusters()
  one, two = (rqvae.draw_batch(config, features, RING, step) for _ in range(2))
  for name, value in one.items():
    np.testing.assert_array_equal(value, two[name])
  np.testing.assert_array_equal(one['items'], features[one['rows']])
  np.testing.assert_array_equal(one['partners'], features[one['partner_rows']])
  apart = (one['rows'] - one['partner_rows']) % 200
  assert set(apart) <= {1, 199}
  assert one['items'].shape == (32, 10)
  for other in (tiny(seed=seed + 1), step + 1):
    where = (config, other) if isinstance(other, int) else (other, step)
    another = rqvae.draw_batch(where[0], features, RING, where[1])
    assert (another['rows'] != one['rows']).any()
  # Partners are drawn after the items and do not change them.
  np.testing.assert_array_equal(
    rqvae.draw_batch(config, features, None, step)['items'], one['items']
  )


def test_features_may_lie_on_disk(tmp_path):
  config, features = tiny(), clusters()
  np.save(tmp_path / 'features.npy', features)
  mapped = np.load(tmp_path / 'features.npy', mmap_mode='r')
  want = rqvae.draw_batch(config, features, RING, 5)
  got = rqvae.draw_batch(config, mapped, RING, 5)
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value)
  jax.tree.map(
    np.testing.assert_array_equal,
    rqvae.init(config, features, 2),
    rqvae.init(config, mapped, 2),
  )


@pytest.mark.parametrize(
  ('kind', 'init_items'),
  [('ema', 200), ('gradient', 0), ('ema_gradient', 50), ('kmeans', 200)],
)
def test_shapes_are_those_of_a_fresh_state(kind, init_items):
  config = tiny(pretrain_steps=1, codebook=kind, init_items=init_items)
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


def test_random_codebooks_are_small_and_seeded():
  books = [
    rqvae.start_codebooks(tiny(seed=seed, codebook_size=64), None, 3)
    for seed in (0, 0, 1)
  ]
  first, again, other = (np.asarray(b['vectors']) for b in books)
  np.testing.assert_array_equal(first, again)
  assert (first != other).all()
  np.testing.assert_allclose(first.std(), 1 / 64, rtol=0.1)
  np.testing.assert_allclose(books[0]['counts'], 32 / 64)
  np.testing.assert_allclose(books[0]['sums'], first / 2, rtol=1e-6)


def test_kmeans_takes_the_vectors_as_they_are():
  features = clusters()
  config = tiny(codebook='kmeans')
  model = rqvae.make_model(config, 10)
  state = rqvae.init(config, features, 2)
  assert state.moved == {'networks': {}}
  np.testing.assert_array_equal(
    half(model, state, features, 'encode'), features
  )
  want = quantizer.residual_codebooks(
    features[np.arange(200)], levels=2, size=8, batch_size=32, iterations=5,
    seed=0,
  )  # fmt: skip
  for name, value in want.items():
    np.testing.assert_array_equal(state.codebooks[name], value)


def test_pretraining_improves_the_autoencoder():
  features = clusters()

  def error(steps):
    config = tiny(pretrain_steps=steps, learning_rate=1e-2)
    model = rqvae.make_model(config, 10)
    state = rqvae.init(config, features, 2)
    out = model.apply({'params': state.moved['networks']}, features)
    return ((out - features) ** 2).sum()

  assert error(100) < 0.3 * error(0)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'codebook': 'emma'}, r"tokenizer\.codebook is 'emma'.*'ema'"),
    ({'estimator': 'gumbel'}, r"tokenizer\.estimator is 'gumbel'.*'rotation'"),
    ({'codebook': 'kmeans', 'init_items': 0}, r'raise tokenizer\.init_items'),
  ],
)
def test_a_field_without_meaning_is_named(change, message):
  rqvae.check(tiny())
  with pytest.raises(ValueError, match=message):
    rqvae.check(tiny(**change))
