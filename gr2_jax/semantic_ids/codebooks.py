"""How codebooks learn: gradient estimators, moving averages, dead codes.

Axis letters: B batch, D latent width, L levels, C codebook size.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def straight_through(
  latents_BxD: jax.Array, quantised_BxD: jax.Array
) -> jax.Array:
  """The quantised value with the gradient of the latent."""
  return latents_BxD + jax.lax.stop_gradient(quantised_BxD - latents_BxD)


def rotate(latents_BxD: jax.Array, quantised_BxD: jax.Array) -> jax.Array:
  """The quantised value, reached by turning and scaling the latent.

  q = (|q| / |h|) R h with R the rotation that takes h to q; scale and R are
  constants to the gradient, so the angle between a gradient and the quantised
  value is kept where straight-through drops it (Fifty et al. 2024, "the
  rotation trick"): R = I - 2 r r^T + 2 q^ h^^T, r = (h^ + q^) / |h^ + q^|.

  Args:
    latents_BxD: float32 [B, D], h.
    quantised_BxD: float32 [B, D], q.

  Returns:
    float32 [B, D], equal to q; where h and q point exactly apart, or either is
    zero, the gradient is straight-through's.
  """

  def unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)

  h, q = map(jax.lax.stop_gradient, (latents_BxD, quantised_BxD))
  length_h, length_q = (
    jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (h, q)
  )
  half = unit(h) + unit(q)
  r = unit(half)
  turned = (
    latents_BxD
    - 2 * r * (r * latents_BxD).sum(-1, keepdims=True)
    + 2 * unit(q) * (unit(h) * latents_BxD).sum(-1, keepdims=True)
  )
  turned = turned * length_q / jnp.maximum(length_h, 1e-6)
  turned = turned + jax.lax.stop_gradient(quantised_BxD - turned)  # rounding
  usable = jnp.minimum(length_h, length_q) > 1e-6
  usable &= jnp.linalg.norm(half, axis=-1, keepdims=True) > 1e-3
  return jnp.where(usable, turned, straight_through(latents_BxD, q))


ESTIMATORS = {'straight_through': straight_through, 'rotation': rotate}


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
    vectors, sums and counts after one batch.
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


def count_idle(idle_LxC: jax.Array, codes_BxL: jax.Array) -> jax.Array:
  """Batches since each code was last used, int32 [L, C]."""
  levels = jnp.arange(idle_LxC.shape[0])
  return (idle_LxC + 1).at[levels, codes_BxL].set(0)


def revive(
  vectors_LxCxD: jax.Array,
  dead_LxC: jax.Array,
  residuals_BxLxD: jax.Array,
  words_BxLxD: jax.Array,
) -> jax.Array:
  """Puts dead codes where the quantiser is worst.

  On each level the dead codes, in order, get the residuals of the items with
  the largest quantisation error |r - e|^2 there, one each.

  Args:
    vectors_LxCxD: float32 [L, C, D].
    dead_LxC: bool [L, C].
    residuals_BxLxD: float32 [B, L, D], what each level was given.
    words_BxLxD: float32 [B, L, D], the codewords it chose.

  Returns:
    float32 [L, C, D]; where more codes are dead than the batch has items, the
    items are dealt out again.
  """
  error_LxB = ((residuals_BxLxD - words_BxLxD) ** 2).sum(-1).T
  worst_LxB = jnp.argsort(-error_LxB, axis=-1)
  turn_LxC = jnp.maximum(jnp.cumsum(dead_LxC, axis=-1) - 1, 0)
  item_LxC = jnp.take_along_axis(
    worst_LxB, turn_LxC % error_LxB.shape[-1], axis=-1
  )
  fresh_LxCxD = jnp.take_along_axis(
    residuals_BxLxD.swapaxes(0, 1), item_LxC[..., None], axis=1
  )
  return jnp.where(dead_LxC[..., None], fresh_LxCxD, vectors_LxCxD)
