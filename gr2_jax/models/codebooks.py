"""Codebooks: residual quantisation, their moving averages, their start.

Axis letters: B batch, I items, D latent width, L levels, C codebook size.
"""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np


def quantise(
  latents_BxD: jax.Array, vectors_LxCxD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Residual quantisation: z_k = argmin_j |r_k - e_kj|, r_k+1 = r_k - e_kz.

  Ties go to the lower code.

  Args:
    latents_BxD: float32 [B, D], r_1.
    vectors_LxCxD: float32 [L, C, D].

  Returns:
    codes int32 [B, L], residuals r_k float32 [B, L, D], and codewords float32
    [B, L, D]; the quantised latent is the codewords' sum over L.
  """
  chex.assert_rank([latents_BxD, vectors_LxCxD], [2, 3])

  def level(residual_BxD, vectors_CxD):
    # |r|^2 is the same for every code and is left out.
    distance_BxC = (vectors_CxD**2).sum(-1)[None, :] - 2 * jnp.einsum(
      'bd,cd->bc', residual_BxD, vectors_CxD, precision='highest'
    )
    codes_B = distance_BxC.argmin(-1).astype(jnp.int32)
    words_BxD = vectors_CxD[codes_B]
    return residual_BxD - words_BxD, (codes_B, residual_BxD, words_BxD)

  _, (codes, residuals, words) = jax.lax.scan(level, latents_BxD, vectors_LxCxD)
  return codes.T, residuals.swapaxes(0, 1), words.swapaxes(0, 1)


def straight_through(
  latents_BxD: jax.Array, quantised_BxD: jax.Array
) -> jax.Array:
  """The quantised value with the gradient of the latent."""
  return latents_BxD + jax.lax.stop_gradient(quantised_BxD - latents_BxD)


def ema_update(
  codebooks: Mapping[str, jax.Array],
  codes_BxL: jax.Array,
  residuals_BxLxD: jax.Array,
  *,
  decay: float,
  epsilon: float = 1e-5,
) -> dict[str, jax.Array]:
  """Moves each codeword to the running mean of the residuals it was given.

  N <- d N + (1 - d) n,  S <- d S + (1 - d) sum of residuals,
  e = S / ((N + eps) / (sum N + C eps) * sum N)   (van den Oord et al. 2017,
  appendix A.1, with Laplace smoothing).

  Args:
    codebooks: vectors, sums float32 [L, C, D], counts float32 [L, C].
    codes_BxL: int32 [B, L].
    residuals_BxLxD: float32 [B, L, D].
    decay: d.
    epsilon: pseudo-count of the smoothing.

  Returns:
    The codebooks after one batch.
  """
  size = codebooks['counts'].shape[-1]
  hot_BxLxC = jax.nn.one_hot(codes_BxL, size, dtype=residuals_BxLxD.dtype)
  sums = jnp.einsum(
    'blc,bld->lcd', hot_BxLxC, residuals_BxLxD, precision='highest'
  )
  counts = decay * codebooks['counts'] + (1 - decay) * hot_BxLxC.sum(0)
  sums = decay * codebooks['sums'] + (1 - decay) * sums
  total = counts.sum(-1, keepdims=True)
  smoothed = (counts + epsilon) / (total + size * epsilon) * total
  return {
    'vectors': sums / smoothed[..., None],
    'counts': counts,
    'sums': sums,
  }


def kmeans(
  points_IxD: np.ndarray,
  size: int,
  *,
  iterations: int,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """k-means with k-means++ seeding (Arthur and Vassilvitskii 2007).

  Args:
    points_IxD: [I, D].
    size: number of centres, C.
    iterations: Lloyd iterations after the seeding.
    rng: draws the seeds.

  Returns:
    float32 centres [C, D] and int64 counts [C] of the points nearest to each.
    Where the points have fewer than C distinct values, the surplus centres
    repeat a point and have count zero.
  """
  points = np.asarray(points_IxD, np.float32)
  chosen = [int(rng.integers(len(points)))]
  nearest = ((points - points[chosen[0]]) ** 2).sum(-1, dtype=np.float64)
  for _ in range(size - 1):
    cumulative = np.cumsum(nearest)
    draw = rng.random() * cumulative[-1]
    pick = min(
      int(np.searchsorted(cumulative, draw, side='right')), len(points) - 1
    )
    chosen.append(pick)
    distance = ((points - points[pick]) ** 2).sum(-1, dtype=np.float64)
    nearest = np.minimum(nearest, distance)
  centres = points[chosen]
  codes = nearest_codes(points, centres)
  for _ in range(iterations):
    counts = np.bincount(codes, minlength=size)
    sums = np.zeros_like(centres)
    np.add.at(sums, codes, points)
    filled = counts > 0
    centres[filled] = sums[filled] / counts[filled, None]
    codes = nearest_codes(points, centres)
  return centres, np.bincount(codes, minlength=size)


def nearest_codes(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
  """Index of the nearest centre [C, D] of each point [I, D], int64 [I]."""
  distance = (centres**2).sum(-1)[None] - 2 * points @ centres.T
  return distance.argmin(-1)


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

  Args:
    latents_IxD: float32 [I, D] encoder outputs.
    levels: L.
    size: C.
    batch_size: B; the counts start at what a batch of this size would give.
    iterations: Lloyd iterations per level.
    seed: of the draws.

  Returns:
    vectors and sums float32 [L, C, D], counts float32 [L, C].
  """
  residuals = np.asarray(latents_IxD, np.float32)
  vectors, counts = [], []
  for level in range(levels):
    rng = np.random.default_rng([seed, level])
    centres, assigned = kmeans(residuals, size, iterations=iterations, rng=rng)
    residuals = residuals - centres[nearest_codes(residuals, centres)]
    vectors.append(centres)
    counts.append(assigned * (batch_size / len(residuals)))
  vectors = np.stack(vectors)
  counts = np.stack(counts).astype(np.float32)
  return {
    'vectors': vectors,
    'counts': counts,
    'sums': vectors * counts[..., None],
  }
