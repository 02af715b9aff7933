"""Codebook learning: gradient estimators, losses, averages, dead codes.

Axis letters: B batch, D latent width, L levels, C codebook size.
"""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp


def straight_through(
  latents_BxD: jax.Array, quantized_BxD: jax.Array
) -> jax.Array:
  """The quantized value with the gradient of the latent."""
  return latents_BxD + jax.lax.stop_gradient(quantized_BxD - latents_BxD)


def rotate(latents_BxD: jax.Array, quantized_BxD: jax.Array) -> jax.Array:
  """The quantized value q as a rotation and scaling of the latent h.

  q = (|q| / |h|) R h, where the rotation R takes the direction of h to that of
  q. Scale and R are constants to the gradient, so the angle between a gradient
  and the quantized value is kept, which straight-through drops (Fifty et al.
  2024, "the rotation trick"):
  R = I - 2 r r^T + 2 q^ h^^T, r = (h^ + q^) / |h^ + q^|.
  The gradient is straight-through's where h and q point in opposite directions
  or either is zero.
  """

  def unit(x_BxD: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(x_BxD, axis=-1, keepdims=True)
    return x_BxD / jnp.maximum(norm, 1e-6)

  h, q = map(jax.lax.stop_gradient, (latents_BxD, quantized_BxD))
  length_h, length_q = (
    jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (h, q)
  )
  half = unit(h) + unit(q)
  r = unit(half)
  rotated = (
    latents_BxD
    - 2 * r * (r * latents_BxD).sum(-1, keepdims=True)
    + 2 * unit(q) * (unit(h) * latents_BxD).sum(-1, keepdims=True)
  )
  rotated = rotated * length_q / jnp.maximum(length_h, 1e-6)
  # Removes the rounding error from the value, not from the gradient.
  rotated = rotated + jax.lax.stop_gradient(quantized_BxD - rotated)
  usable = jnp.minimum(length_h, length_q) > 1e-6
  usable &= jnp.linalg.norm(half, axis=-1, keepdims=True) > 1e-3
  return jnp.where(usable, rotated, straight_through(latents_BxD, q))


ESTIMATORS = {'straight_through': straight_through, 'rotation': rotate}


def diversity(
  residuals_BxLxD: jax.Array, vectors_LxCxD: jax.Array, temperature: float
) -> jax.Array:
  """How unevenly a batch spreads over the codes of each level, float32 [].

  sum_k C * sum_j p_kj^2, where p_kj is the batch mean of
  softmax_j(-|r_k - e_kj|^2 / temperature). It is L where every level is spread
  evenly and L * C where each level puts all items on one code.
  """
  chex.assert_rank([residuals_BxLxD, vectors_LxCxD], [3, 3])
  # |r|^2 is the same for every code and cancels in the softmax.
  distance_BxLxC = (vectors_LxCxD**2).sum(-1)[None] - 2 * jnp.einsum(
    'bld,lcd->blc', residuals_BxLxD, vectors_LxCxD
  )
  share_LxC = jax.nn.softmax(-distance_BxLxC / temperature, axis=-1).mean(0)
  return share_LxC.shape[-1] * (share_LxC**2).sum()


def info_nce(
  anchors_BxD: jax.Array,
  partners_BxD: jax.Array,
  anchor_ids_B: jax.Array,
  partner_ids_B: jax.Array,
  temperature: float,
) -> jax.Array:
  """Symmetric InfoNCE over the pairs of a batch (van den Oord et al. 2018).

  -log exp(s_ii / t) / sum_j exp(s_ij / t) with s the cosine, averaged over
  rows and columns. A row whose partner is the anchor itself is not a pair: it
  enters no mean and is no negative. The negatives of a pair also exclude pairs
  that share its anchor or partner, and pairs whose partner is its anchor.

  Returns:
    float32 [], 0 where the batch has no pair.
  """
  chex.assert_equal_shape([anchors_BxD, partners_BxD])
  logits_BxB = (_unit(anchors_BxD) @ _unit(partners_BxD).T) / temperature
  pair_B = anchor_ids_B != partner_ids_B
  excluded_BxB = (
    (partner_ids_B[:, None] == partner_ids_B[None])
    | (anchor_ids_B[:, None] == partner_ids_B[None])
    | (anchor_ids_B[:, None] == anchor_ids_B[None])
    | ~(pair_B[:, None] & pair_B[None])
  )
  positive_BxB = jnp.eye(len(pair_B), dtype=bool)
  logits_BxB = jnp.where(excluded_BxB & ~positive_BxB, -jnp.inf, logits_BxB)
  loss_B = 0.5 * (
    jax.nn.logsumexp(logits_BxB, axis=0) + jax.nn.logsumexp(logits_BxB, axis=1)
  )
  loss_B = jnp.where(pair_B, loss_B - jnp.diagonal(logits_BxB), 0.0)
  return loss_B.sum() / jnp.maximum(pair_B.sum(), 1)


def _unit(x_BxD: jax.Array) -> jax.Array:
  """Rows of unit length; a zero row stays zero, with a finite gradient."""
  return x_BxD * jax.lax.rsqrt((x_BxD**2).sum(-1, keepdims=True) + 1e-12)


def ema_update(
  codebooks: Mapping[str, jax.Array],
  codes_BxL: jax.Array,
  residuals_BxLxD: jax.Array,
  *,
  decay: float,
  epsilon: float = 1e-5,
) -> dict[str, jax.Array]:
  """Moves each codeword to the running mean of the residuals assigned to it.

  N <- d N + (1 - d) n,  S <- d S + (1 - d) sum of residuals,
  e = S / ((N + eps) / (sum N + C eps) * sum N)   (van den Oord et al. 2017,
  appendix A.1, with Laplace smoothing).

  `codebooks` has sums float32 [L, C, D], S, and counts float32 [L, C], N; d is
  the decay. Returns vectors [L, C, D], e, sums and counts after the batch.
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
  vectors = sums / smoothed[..., None]
  return {'vectors': vectors, 'counts': counts, 'sums': sums}


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
  """Moves dead codes to where the quantization error is largest.

  On each level the dead codes, in order, become the residuals with the largest
  error |r - e|^2, one each, where e is the codeword `words_BxLxD` chosen for r.
  With more dead codes than items, items repeat.
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
