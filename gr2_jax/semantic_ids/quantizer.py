"""Residual quantization: codes, their search, and codebooks by k-means.

A latent is approximated by the sum of L codewords, one per codebook. `quantize`
takes the nearest codeword level by level and serves training; `search` and
`assign` find the codes under trained codebooks, greedily or with a beam.

Axis letters: B batch, I items, D latent width, L levels, C codebook size,
K beams, N candidates.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

# Rows at a time on a CPU, so that their K C scores stay in a core's cache.
_TILE = 128
# Candidates per group minimum in the search for the best of a beam.
_GROUP = 16
# Share of |p|^2 + |c|^2 below which |p - c|^2 is computed by subtraction.
_CANCELLED = 1e-3


def quantize(
  latents_BxD: jax.Array, vectors_LxCxD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Residual quantization: z_k = argmin_j |r_k - e_kj|, r_k+1 = r_k - e_kz.

  Ties go to the lower code. The quantized latent is the codewords' sum over L.

  Returns:
    codes int32 [B, L], residuals r_k and codewords float32 [B, L, D].
  """
  chex.assert_rank([latents_BxD, vectors_LxCxD], [2, 3])

  def level(
    residual_BxD: jax.Array, vectors_CxD: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # |r|^2 is the same for every code and is left out.
    distance_BxC = (vectors_CxD**2).sum(-1)[None, :] - 2 * jnp.einsum(
      'bd,cd->bc', residual_BxD, vectors_CxD, precision='highest'
    )
    codes_B, _ = _smallest(distance_BxC, 1)
    words_BxD = vectors_CxD[codes_B[:, 0]]
    return residual_BxD - words_BxD, (codes_B[:, 0], residual_BxD, words_BxD)

  _, (codes, residuals, words) = jax.lax.scan(level, latents_BxD, vectors_LxCxD)
  return codes.T, residuals.swapaxes(0, 1), words.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames='beam')
def search(
  latents_BxD: jax.Array, vectors_LxCxD: jax.Array, *, beam: int = 1
) -> jax.Array:
  """Codes int32 [B, L] of the best sum of codewords that a beam search finds.

  Level by level, each of the K best partial sums is extended by every codeword
  and the K best extensions are kept (Babenko and Lempitsky 2014, "Additive
  quantization", section 3.2; Liu et al. 2015). A beam of 1 is greedy, like
  `quantize`; one of C^(L-1) is exhaustive. Scores come from inner products with
  the latent and between codewords, r_k = x - sum e:

    |r_k - e|^2 - |r_k|^2 = |e|^2 - 2 x.e + sum_m<k 2 e_mz.e

  so that no residual is formed. Ties go to the lower code. A row's codes do
  not depend on the other rows. Latents must be finite.

  Raises:
    ValueError: beam is below 1.
  """
  chex.assert_rank([latents_BxD, vectors_LxCxD], [2, 3])
  levels, size, width = vectors_LxCxD.shape
  if beam < 1:
    raise ValueError(f'beam is {beam}; it must be at least 1')
  rows = len(latents_BxD)
  tile = _TILE if jax.default_backend() == 'cpu' else max(rows, 1)
  dot = functools.partial(jnp.einsum, precision='highest')
  norms_LxC = (vectors_LxCxD**2).sum(-1)
  crosses_CxC = {
    (m, k): 2 * dot('cd,ed->ce', vectors_LxCxD[m], vectors_LxCxD[k])
    for k in range(levels)
    for m in range(k)
  }

  def search_tile(latents_TxD: jax.Array) -> jax.Array:
    scores_TxK = jnp.zeros((tile, 1))
    codes_TxKxL = jnp.zeros((tile, 1, 0), jnp.int32)
    for k in range(levels):
      unary_TxC = norms_LxC[None, k] - 2 * dot(
        'td,cd->tc', latents_TxD, vectors_LxCxD[k]
      )
      scores_TxKxC = scores_TxK[:, :, None] + unary_TxC[:, None]
      for m in range(k):
        scores_TxKxC += crosses_CxC[m, k][codes_TxKxL[:, :, m]]
      scores_TxN = scores_TxKxC.reshape(tile, -1)
      kept = min(beam, scores_TxN.shape[1]) if k < levels - 1 else 1
      picks_TxK, scores_TxK = _smallest(scores_TxN, kept)
      # Relative to the best, so that a common offset costs no precision.
      scores_TxK -= scores_TxK[:, :1]
      parents_TxK, last_TxK = jnp.divmod(picks_TxK, size)
      codes_TxKxL = jnp.concatenate(
        [
          jnp.take_along_axis(codes_TxKxL, parents_TxK[:, :, None], axis=1),
          last_TxK[:, :, None],
        ],
        axis=-1,
      )
    return codes_TxKxL[:, 0]

  padded = jnp.pad(latents_BxD, ((0, -rows % tile), (0, 0)))
  codes = jax.lax.map(search_tile, padded.reshape(-1, tile, width))
  return codes.reshape(-1, levels)[:rows]


def _smallest(scores_BxN: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Indices and scores [B, K] of each row's `count` = K smallest, ascending.

  Takes the minimum and the first index that has it, `count` times: a CPU
  vectorizes both, but not argmin or top_k. Long rows are first reduced to the
  groups with the `count` smallest minima, which hold all results. Of equal
  scores, the lower index comes first.
  """
  length = scores_BxN.shape[1]
  if count == 1 or length <= 2 * count * _GROUP:
    return _pick(scores_BxN, count)
  padded = jnp.pad(
    scores_BxN, ((0, 0), (0, -length % _GROUP)), constant_values=jnp.inf
  )
  groups_BxGxN = padded.reshape(len(padded), -1, _GROUP)
  groups_BxK = jnp.sort(_pick(groups_BxGxN.min(-1), count)[0], axis=-1)
  near_BxN = jnp.take_along_axis(
    groups_BxGxN, groups_BxK[:, :, None], axis=1
  ).reshape(len(padded), -1)
  picks_BxK, least_BxK = _pick(near_BxN, count)
  group_BxK, within_BxK = jnp.divmod(picks_BxK, _GROUP)
  groups_BxK = jnp.take_along_axis(groups_BxK, group_BxK, axis=1)
  return groups_BxK * _GROUP + within_BxK, least_BxK


def _pick(scores_BxN: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  length = scores_BxN.shape[1]
  index_BxN = jax.lax.broadcasted_iota(jnp.int32, scores_BxN.shape, 1)
  picks, least = [], []
  for _ in range(count):
    least_Bx1 = scores_BxN.min(-1, keepdims=True)
    pick_Bx1 = jnp.where(scores_BxN == least_Bx1, index_BxN, length).min(
      -1, keepdims=True
    )
    scores_BxN = jnp.where(index_BxN == pick_Bx1, jnp.inf, scores_BxN)
    picks.append(pick_Bx1)
    least.append(least_Bx1)
  return jnp.concatenate(picks, -1), jnp.concatenate(least, -1)


def assign(
  latents_IxD: np.ndarray,
  vectors_LxCxD: np.ndarray,
  *,
  beam: int = 1,
  batch_size: int = 16384,
) -> np.ndarray:
  """`search` over a catalog of any length, int32 [I, L].

  Latents may be memory-mapped; they are read once, in batches of a static size.

  Raises:
    ValueError: a latent is not finite (the message names the first item), or
      beam or batch_size is below 1.
  """
  if batch_size < 1:
    raise ValueError(f'batch_size is {batch_size}; it must be at least 1')
  items = len(latents_IxD)
  vectors = jnp.asarray(vectors_LxCxD, jnp.float32)
  codes_IxL = np.empty((items, len(vectors)), np.int32)
  batch_size = max(min(batch_size, items), 1)
  for start in range(0, items, batch_size):
    block = np.asarray(latents_IxD[start : start + batch_size], np.float32)
    bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
    if len(bad):
      raise ValueError(
        f'the latent of item {start + bad[0]} holds NaN or infinity: check the '
        'text vectors and their encoder'
      )
    count = len(block)
    if count < batch_size:
      block = np.pad(block, ((0, batch_size - count), (0, 0)))
    codes = np.asarray(search(block, vectors, beam=beam))
    codes_IxL[start : start + count] = codes[:count]
  return codes_IxL


def kmeans(
  points_IxD: np.ndarray,
  size: int,
  *,
  iterations: int,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """k-means++ seeding (Arthur and Vassilvitskii 2007) and Lloyd iterations.

  Returns:
    float32 centers [C, D] and int64 counts [C] of the points nearest to each.
    Where the points have fewer than C distinct values, the surplus centers
    repeat a point and have count zero.
  """
  points = np.ascontiguousarray(points_IxD, np.float32)
  centers = points[_seeds(points, size, rng)]
  codes = nearest_codes(points, centers)
  for _ in range(iterations):
    counts = np.bincount(codes, minlength=size)
    hot_IxC = sparse.csr_matrix(
      (np.ones(len(points), np.float32), codes, np.arange(len(points) + 1)),
      shape=(len(points), size),
    )
    sums = hot_IxC.T @ points
    filled = counts > 0
    centers[filled] = sums[filled] / counts[filled, None]
    codes = nearest_codes(points, centers)
  return centers, np.bincount(codes, minlength=size)


def _seeds(
  points: np.ndarray, size: int, rng: np.random.Generator
) -> list[int]:
  """Rows drawn in proportion to their distance^2 to the rows drawn before."""
  norms = (points**2).sum(-1)
  chosen = [int(rng.integers(len(points)))]
  nearest = np.full(len(points), np.inf)
  while len(chosen) < size:
    newest = chosen[-1]
    distance = norms + norms[newest] - 2 * (points @ points[newest])
    close = distance < _CANCELLED * (norms + norms[newest])
    # Subtraction gives exactly 0 for a point that repeats a seed.
    distance[close] = ((points[close] - points[newest]) ** 2).sum(-1)
    nearest = np.minimum(nearest, distance)
    cumulative = np.cumsum(nearest)
    draw = rng.random() * cumulative[-1]
    pick = np.searchsorted(cumulative, draw, side='right')
    chosen.append(min(int(pick), len(points) - 1))
  return chosen


def nearest_codes(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
  """Index of the nearest center [C, D] of each point [I, D], int32 [I]."""
  return np.asarray(search(points, centers[None]))[:, 0]


def residual_codebooks(
  latents_IxD: np.ndarray,
  *,
  levels: int,
  size: int,
  batch_size: int,
  iterations: int,
  seed: int,
) -> dict[str, np.ndarray]:
  """Codebooks by k-means on the residuals of many items, level by level.

  Returns:
    vectors and sums float32 [L, C, D], and counts float32 [L, C], scaled to
    those of one batch of `batch_size`.
  """
  residuals = np.asarray(latents_IxD, np.float32)
  vectors, counts = [], []
  for level in range(levels):
    rng = np.random.default_rng([seed, level])
    centers, assigned = kmeans(residuals, size, iterations=iterations, rng=rng)
    residuals = residuals - centers[nearest_codes(residuals, centers)]
    vectors.append(centers)
    counts.append(assigned * (batch_size / len(residuals)))
  vectors = np.stack(vectors)
  counts = np.stack(counts).astype(np.float32)
  sums = vectors * counts[..., None]
  return {'vectors': vectors, 'counts': counts, 'sums': sums}
