import itertools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from gr2_jax.semantic_ids import quantizer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield


def draw(items=50, levels=3, size=5, width=4, seed=0):
  """Latents and codebooks, each level half as wide as the one before."""
  rng = np.random.default_rng(seed)
  latents = rng.normal(size=(items, width))
  vectors = rng.normal(size=(levels, size, width))
  vectors *= 0.5 ** np.arange(levels)[:, None, None]
  return latents.astype(np.float32), vectors.astype(np.float32)


def clusters(items=200, width=6, seed=0):
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(12, width))
  noise = 0.1 * rng.normal(size=(items, width))
  return (centres[rng.integers(12, size=items)] + noise).astype(np.float32)


def distances(latents, vectors, codes):
  """|x - sum e|^2 in float64."""
  codes = np.asarray(codes)
  words = [vectors[level][codes[:, level]] for level in range(len(vectors))]
  error = latents.astype(np.float64) - np.sum(words, axis=0, dtype=np.float64)
  return (error**2).sum(-1)


def beam_oracle(latent, vectors, beam):
  """Codes of one latent, in float64 and by residuals."""
  partial = [((), latent.astype(np.float64))]
  for level in vectors:
    extended = [
      ((*codes, code), residual - word)
      for codes, residual in partial
      for code, word in enumerate(level)
    ]
    extended.sort(key=lambda x: (x[1] ** 2).sum())  # Stable.
    partial = extended[:beam]
  return partial[0][0]


def test_quantise_equals_brute_force():
  latents, vectors = draw()
  codes, residuals, words = quantizer.quantize(latents, vectors)
  for b in range(len(latents)):
    residual = latents[b].astype(np.float64)
    for level in range(3):
      np.testing.assert_allclose(residuals[b, level], residual, atol=1e-5)
      code = min(
        range(5), key=lambda j: ((residual - vectors[level, j]) ** 2).sum()
      )
      assert codes[b, level] == code
      np.testing.assert_array_equal(words[b, level], vectors[level, code])
      residual = residual - vectors[level, code]


@hypothesis.given(
  seed=st.integers(0, 2**16),
  items=st.sampled_from([1, 130]),
  levels=st.sampled_from([1, 4]),
  size=st.sampled_from([2, 40]),
  beam=st.sampled_from([1, 2, 5]),
)
@hypothesis.settings(max_examples=25)
def test_search_equals_a_beam_of_residuals(seed, items, levels, size, beam):
  latents, vectors = draw(items, levels, size, 5, seed)
  codes = quantizer.search(latents, vectors, beam=beam)
  assert codes.dtype == np.int32
  for latent, found in zip(latents, codes, strict=True):
    assert tuple(found.tolist()) == beam_oracle(latent, vectors, beam)


def test_a_beam_of_one_is_greedy():
  latents, vectors = draw(300, 4, 32, 8)
  np.testing.assert_array_equal(
    quantizer.search(latents, vectors),
    quantizer.quantize(latents, vectors)[0],
  )


def test_a_beam_of_everything_is_exhaustive():
  latents, vectors = draw(40, 3, 4, 6)
  codes = quantizer.search(latents, vectors, beam=4**3)
  tuples = np.array(list(itertools.product(range(4), repeat=3)))
  every = np.stack(
    [distances(latents, vectors, np.tile(x, (40, 1))) for x in tuples]
  )
  np.testing.assert_array_equal(codes, tuples[every.argmin(0)])
  greedy = distances(latents, vectors, quantizer.search(latents, vectors))
  assert (every.min(0) < greedy - 1e-3).any()  # Else the test shows nothing.


def test_wider_beams_are_better_on_the_whole():
  latents, vectors = draw(400, 3, 32, 8)
  errors = [
    distances(
      latents, vectors, quantizer.search(latents, vectors, beam=beam)
    ).mean()
    for beam in (1, 2, 5)
  ]
  assert errors == sorted(errors, reverse=True)
  assert errors[-1] < 0.97 * errors[0]


def test_a_large_first_codeword_costs_later_levels_no_precision():
  latents, vectors = draw(200, 3, 16, 8)
  vectors[0] = np.arange(16, dtype=np.float32)[:, None] * 256.0
  near = quantizer.search(latents, vectors[1:], beam=4)
  far = quantizer.search(latents + np.float32(15 * 256), vectors, beam=4)
  np.testing.assert_array_equal(far[:, 0], 15)
  np.testing.assert_allclose(
    distances(latents, vectors[1:], far[:, 1:]),
    distances(latents, vectors[1:], near),
    atol=0.05,
  )


@pytest.mark.parametrize('beam', [1, 3])
def test_ties_go_to_the_lower_code(beam):
  vectors = np.ones((2, 300, 2), np.float32)
  latents = np.zeros((4, 2), np.float32)
  codes = quantizer.search(latents, vectors, beam=beam)
  np.testing.assert_array_equal(codes, 0)
  codes = quantizer.quantize(latents, vectors)[0]
  np.testing.assert_array_equal(codes, 0)


@hypothesis.given(
  data=st.data(),
  length=st.sampled_from([1, 31, 64, 161, 300]),
  count=st.sampled_from([1, 2, 5]),
  values=st.integers(1, 50),
)
@hypothesis.settings(max_examples=40)
def test_smallest_is_a_stable_sort(data, length, count, values):
  seed = data.draw(st.integers(0, 2**16))
  count = min(count, length)
  scores = np.random.default_rng(seed).integers(values, size=(9, length))
  scores = scores.astype(np.float32)
  index, least = quantizer._smallest(scores, count)
  wanted = np.argsort(scores, axis=1, kind='stable')[:, :count]
  np.testing.assert_array_equal(index, wanted)
  np.testing.assert_array_equal(least, np.sort(scores, axis=1)[:, :count])


@pytest.mark.parametrize('width', [3, 33, 64])
@pytest.mark.parametrize('beam', [1, 5])
def test_equal_rows_get_equal_codes_in_any_batch(width, beam):
  """Latents halfway between two codewords: the last bit decides."""
  rng = np.random.default_rng(width)
  size = 61
  vectors = rng.normal(size=(2, size, width)).astype(np.float32)
  pairs = rng.integers(size, size=(40, 2))
  distinct = vectors[0][pairs].mean(1)
  assert len(np.unique(distinct, axis=0)) > 30
  of_row = rng.integers(40, size=1000)
  latents = distinct[of_row]
  for batch_size in (1000, 300):
    codes = quantizer.assign(latents, vectors, beam=beam, batch_size=batch_size)
    for row in range(40):
      mine = codes[of_row == row]
      np.testing.assert_array_equal(mine, np.tile(mine[:1], (len(mine), 1)))


@pytest.mark.parametrize('items', [0, 1, 64, 100, 128])
def test_assign_streams_a_file_in_batches(tmp_path, items):
  latents, vectors = draw(items, 3, 9, 4)
  np.save(tmp_path / 'latents.npy', latents)
  mapped = np.load(tmp_path / 'latents.npy', mmap_mode='r')
  codes = quantizer.assign(mapped, vectors, beam=2, batch_size=64)
  assert codes.shape == (items, 3)
  assert codes.dtype == np.int32
  wanted = [beam_oracle(x, vectors, 2) for x in latents]
  np.testing.assert_array_equal(codes, np.reshape(wanted, (items, 3)))


def test_a_latent_that_is_not_finite_is_named():
  latents, vectors = draw(100)
  latents[70, 1] = np.inf
  with pytest.raises(ValueError, match='latent of item 70 holds NaN'):
    quantizer.assign(latents, vectors, batch_size=32)


def test_a_beam_or_a_batch_of_nothing_is_refused():
  latents, vectors = draw()
  with pytest.raises(ValueError, match='beam is 0'):
    quantizer.assign(latents, vectors, beam=0)
  with pytest.raises(ValueError, match='batch_size is 0'):
    quantizer.assign(latents, vectors, batch_size=0)


def test_kmeans_is_seeded_and_hits_every_far_cluster():
  rng = np.random.default_rng(0)
  far = 100.0 * np.eye(8)
  sizes = [500, 3, 3, 3, 3, 3, 3, 3]  # a uniform draw would miss the small
  points = np.repeat(far, sizes, axis=0)
  points = points + 0.01 * rng.normal(size=points.shape)
  for seed in range(5):
    runs = [
      quantizer.kmeans(points, 8, iterations=2, rng=np.random.default_rng(seed))
      for _ in range(2)
    ]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    centres, counts = runs[0]
    assert sorted(counts) == sorted(sizes)
    np.testing.assert_allclose(
      far[centres.argmax(1)], centres, atol=0.1, rtol=0
    )


@pytest.mark.parametrize('offset', [0.0, 1000.0])
def test_seeds_are_distinct_while_distinct_points_are_left(offset):
  rng = np.random.default_rng(1)
  distinct = (rng.normal(size=(30, 7)) + offset).astype(np.float32)
  points = np.repeat(distinct, rng.integers(1, 200, size=30), axis=0)
  centres, counts = quantizer.kmeans(
    points, 30, iterations=0, rng=np.random.default_rng(0)
  )
  assert len(np.unique(centres, axis=0)) == 30
  assert counts.sum() == len(points)


def test_lloyd_iterations_equal_loops():
  points = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
  size = 12
  start, _ = quantizer.kmeans(
    points, size, iterations=0, rng=np.random.default_rng(3)
  )
  centres = start.astype(np.float64)
  for _ in range(3):
    codes = ((points[:, None] - centres) ** 2).sum(-1).argmin(1)
    for code in range(size):
      if (codes == code).any():
        centres[code] = points[codes == code].mean(0)
  codes = ((points[:, None] - centres) ** 2).sum(-1).argmin(1)
  found, counts = quantizer.kmeans(
    points, size, iterations=3, rng=np.random.default_rng(3)
  )
  np.testing.assert_allclose(found, centres, atol=1e-5)
  np.testing.assert_array_equal(counts, np.bincount(codes, minlength=size))
  assert np.abs(found - start).max() > 0.01


def test_kmeans_with_fewer_distinct_points_than_centres():
  points = np.repeat(np.eye(3), 4, axis=0)
  centres, counts = quantizer.kmeans(
    points, 6, iterations=3, rng=np.random.default_rng(0)
  )
  assert {tuple(x) for x in centres} == {tuple(x) for x in np.eye(3)}
  assert (counts > 0).sum() == 3
  assert counts.sum() == 12


def test_codebooks_start_at_the_means_of_their_residuals():
  latents = clusters()
  books = quantizer.residual_codebooks(
    latents, levels=2, size=8, batch_size=100, iterations=20, seed=0
  )
  codes, residuals, _ = quantizer.quantize(latents, books['vectors'])
  np.testing.assert_allclose(books['counts'].sum(1), 100.0, rtol=1e-5)
  for code in np.unique(codes[:, 0]):
    mine = np.asarray(codes[:, 0]) == code
    np.testing.assert_allclose(
      books['vectors'][0, code], residuals[mine, 0].mean(0), atol=1e-4
    )
