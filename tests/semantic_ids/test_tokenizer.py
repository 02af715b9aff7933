import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from gr2_jax.distributed import sharding
from gr2_jax.semantic_ids import quantizer, rqvae
from gr2_jax.semantic_ids import tokenizer as tokenizer_lib

from .. import tiny


def section(**changes) -> ConfigDict:
  return ConfigDict(
    dict(
      seed=0, levels=3, codebook_size=8, hidden=(16,), latent=6, beam=1,
      codebook='ema', last_level='unused',
    )
    | changes
  )  # fmt: skip


def rows(items=37, width=10, seed=0):
  return np.random.default_rng(seed).normal(size=(items, width)).astype('f')


def make(config=None, fitted=2, mesh=None):
  """An untrained tokenizer with codewords among the latents."""
  config = config or section()
  model = rqvae.make_model(config, 10)
  x = rows(8 * fitted, seed=1)
  networks = model.init(jax.random.key(0), x).get('params', {})
  latents = model.apply({'params': networks}, x, method='encode')
  vectors = np.asarray(latents).reshape(fitted, 8, -1)
  params = {'networks': networks, 'vectors': vectors}
  return tokenizer_lib.SidTokenizer(
    config, model, params, mesh or tiny.one_device()
  )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  """Batches of eight, so that a few dozen items fill several."""
  monkeypatch.setattr(tokenizer_lib, 'CHUNK', 8)


# ------------------------------------------------------------- distinct_rows


@settings(max_examples=50)
@given(
  st.lists(
    st.tuples(*3 * [st.sampled_from([-0.0, 0.0, 1.0, -1.0, 2.5, 1e-40])]),
    min_size=1,
    max_size=30,
  )
)
def test_distinct_rows_are_the_first_of_each_value(values):
  features = np.array(values, np.float32)
  found, of_item = tokenizer_lib.distinct_rows(features)
  first, want = {}, []
  for index, row in enumerate(values):
    key = tuple(float(np.float32(x)) + 0.0 for x in row)
    want.append(first.setdefault(key, index))
  np.testing.assert_array_equal(found[of_item], want)
  assert sorted(found) == sorted(first.values())


def test_distinct_rows_tell_near_rows_and_permuted_rows_apart():
  base = rows(1)[0]
  shifted = np.stack([np.roll(base, k) for k in range(10)])
  near = np.stack([base] * 10)
  near[np.arange(10), np.arange(10)] = np.nextafter(base, np.float32(9))
  flipped = -base[None]
  features = np.concatenate([shifted, near, flipped])
  found, of_item = tokenizer_lib.distinct_rows(features)
  assert len(found) == len(features)
  np.testing.assert_array_equal(found[of_item], np.arange(21))


def test_distinct_rows_reads_from_disk(tmp_path):
  features = np.repeat(rows(13), 3, axis=0)
  np.save(tmp_path / 'x.npy', features)
  mapped = np.load(tmp_path / 'x.npy', mmap_mode='r')
  found, of_item = tokenizer_lib.distinct_rows(mapped)
  np.testing.assert_array_equal(np.sort(found), np.arange(0, 39, 3))
  np.testing.assert_array_equal(features[found][of_item], features)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_named(value):
  features = rows(30)
  features[[25, 19], [3, 4]] = value  # the third batch, and the fourth
  tokenizer = make()
  message = r'embedding of item 19 holds NaN or infinity.*text_encoder'
  for call in (
    tokenizer_lib.distinct_rows,
    tokenizer.fitted_codes,
    tokenizer.latents,
  ):
    with pytest.raises(ValueError, match=message):
      call(features)


# ---------------------------------------------------------------- Tokenizer


@pytest.mark.parametrize('beam', [1, 4])
def test_codes_are_those_of_a_search_over_the_latents(beam):
  tokenizer = make(section(beam=beam))
  features = rows()
  latents = tokenizer.model.apply(
    {'params': tokenizer.params['networks']}, features, method='encode'
  )
  got = tokenizer.fitted_codes(features)
  assert got.dtype == np.int32
  np.testing.assert_array_equal(
    got,
    quantizer.search(latents, tokenizer.params['vectors'], beam=beam),
  )
  np.testing.assert_allclose(
    tokenizer.latents(features), latents, rtol=1e-5, atol=1e-5
  )


def test_equal_vectors_get_equal_codes_across_batches():
  rng = np.random.default_rng(0)
  of_item = rng.integers(11, size=60)
  features = rows(11)[of_item]
  features[7:9] = 0.0
  features[40] = -0.0
  tokenizer = make()
  codes, latents = tokenizer.fitted_codes(features), tokenizer.latents(features)
  for found in (codes, latents):
    for item in range(60):
      same = (features == features[item]).all(1)
      np.testing.assert_array_equal(found[same], found[[item]].repeat(
        same.sum(), 0))  # fmt: skip
  assert len(np.unique(codes, axis=0)) > 3
  # Bits do not hang on what else is in the batch.
  np.testing.assert_array_equal(tokenizer.latents(features[33:]), latents[33:])


def test_codes_on_a_mesh_equal_those_of_one_device():
  features = rows()
  many, one = make(mesh=sharding.make_mesh(8)), make()
  np.testing.assert_array_equal(
    many.fitted_codes(features), one.fitted_codes(features)
  )
  np.testing.assert_allclose(
    many.latents(features), one.latents(features), rtol=1e-5, atol=1e-6
  )
  codes = one.fitted_codes(features)
  np.testing.assert_allclose(
    many.reconstruction_r2(features, codes),
    one.reconstruction_r2(features, codes),
    rtol=1e-5,
  )


@pytest.mark.parametrize('codebook', ['ema', 'kmeans'])
def test_r2_equals_numpy(codebook):
  features = rows() + 3.0  # a mean that is not zero
  tokenizer = make(section(codebook=codebook))
  codes = tokenizer.fitted_codes(features)
  vectors = np.asarray(tokenizer.params['vectors'])
  words = vectors[0, codes[:, 0]] + vectors[1, codes[:, 1]]
  out = tokenizer.model.apply(
    {'params': tokenizer.params['networks']}, words, method='decode'
  )
  error = ((features - np.float64(out)) ** 2).sum()
  variance = ((features - np.float64(features).mean(0)) ** 2).sum()
  np.testing.assert_allclose(
    tokenizer.reconstruction_r2(features, codes), 1 - error / variance,
    rtol=1e-4,
  )  # fmt: skip


def test_r2_is_one_where_codewords_are_the_vectors():
  tokenizer = make(section(codebook='kmeans', levels=2), fitted=1)
  features = np.asarray(tokenizer.params['vectors'])[0][
    np.random.default_rng(0).integers(8, size=21)
  ]
  codes = tokenizer.fitted_codes(features)
  assert tokenizer.reconstruction_r2(features, codes) == pytest.approx(1.0)


def test_complete_makes_tuples_unique_and_leaves_taken_ones_alone():
  features = np.repeat(rows(9), 4, axis=0)
  tokenizer = make()
  fitted = tokenizer.fitted_codes(features)
  sids, spilled = tokenizer.complete(features, fitted)
  assert spilled == 0
  assert sids.unique().all()
  np.testing.assert_array_equal(sids.codes[:, :2], fitted)
  more, _ = tokenizer.complete(features, fitted, sids.codes)
  assert (sids.find(more.codes) < 0).all()
  assert more.unique().all()
  np.testing.assert_array_equal(more.codes[:, :2], fitted)


def test_complete_moves_what_a_full_prefix_cannot_hold():
  features = np.repeat(rows(2), [12, 3], axis=0)
  tokenizer = make()
  sids, spilled = tokenizer.complete(features, tokenizer.fitted_codes(features))
  assert spilled == 12 - 8
  assert sids.unique().all()
  assert len(np.unique(sids.codes[:8, :2], axis=0)) == 1


def test_params_of_a_state_are_networks_and_quantizing_codewords():
  config = section(
    codebook='ema_gradient', init_items=0, pretrain_steps=0, batch_size=8,
    learning_rate=1e-3, warmup_steps=1, steps=2,
  )  # fmt: skip
  state = rqvae.init(config, rows(), 2)
  moved = state.moved | {'vectors': state.moved['vectors'] + 1}
  params = tokenizer_lib.params_of(state.replace(moved=moved))
  assert set(params) == {'networks', 'vectors'}
  np.testing.assert_array_equal(params['vectors'], state.codebooks['vectors'])
