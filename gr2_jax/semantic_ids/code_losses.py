"""Losses that shape a residual quantiser: usage of its codes, and likeness.

Axis letters: B batch, D latent width, L levels, C codebook size.
"""

import chex
import jax
import jax.numpy as jnp


def diversity(
  residuals_BxLxD: jax.Array, vectors_LxCxD: jax.Array, temperature: float
) -> jax.Array:
  """How unevenly a batch spreads over the codes of each level.

  sum_k C * sum_j p_kj^2, with p_kj the mean over the batch of
  softmax_j(-|r_k - e_kj|^2 / temperature). L where every level is spread
  evenly, L * C where each level puts everything on one code.

  Args:
    residuals_BxLxD: float32 [B, L, D], what each level quantises.
    vectors_LxCxD: float32 [L, C, D].
    temperature: of the soft assignment, in squared distance.

  Returns:
    float32 [].
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
  """InfoNCE over the pairs of a batch, both ways (van den Oord et al. 2018).

  -log exp(s_ii / t) / sum_j exp(s_ij / t) with s the cosine, averaged over
  rows and columns. A row whose partner is the anchor itself is no pair: it
  counts in no mean and is nobody's negative. Nor is, for a pair, another pair
  with the same anchor or the same partner, or whose partner is the anchor.

  Args:
    anchors_BxD: float32 [B, D].
    partners_BxD: float32 [B, D].
    anchor_ids_B: int32 [B], which item an anchor is.
    partner_ids_B: int32 [B].
    temperature: t.

  Returns:
    float32 [], 0 where the batch has no pair.
  """
  chex.assert_equal_shape([anchors_BxD, partners_BxD])
  logits_BxB = (_unit(anchors_BxD) @ _unit(partners_BxD).T) / temperature
  pair_B = anchor_ids_B != partner_ids_B
  same_BxB = (
    (partner_ids_B[:, None] == partner_ids_B[None])
    | (anchor_ids_B[:, None] == partner_ids_B[None])
    | (anchor_ids_B[:, None] == anchor_ids_B[None])
    | ~(pair_B[:, None] & pair_B[None])
  )
  own_BxB = jnp.eye(len(pair_B), dtype=bool)
  logits_BxB = jnp.where(same_BxB & ~own_BxB, -jnp.inf, logits_BxB)
  hit_B = jnp.diagonal(logits_BxB)
  loss_B = 0.5 * (
    jax.nn.logsumexp(logits_BxB, axis=0) + jax.nn.logsumexp(logits_BxB, axis=1)
  )
  loss_B = jnp.where(pair_B, loss_B - hit_B, 0.0)
  return loss_B.sum() / jnp.maximum(pair_B.sum(), 1)


def _unit(x_BxD: jax.Array) -> jax.Array:
  """Rows of unit length; a zero row stays zero, with a finite gradient."""
  return x_BxD * jax.lax.rsqrt((x_BxD**2).sum(-1, keepdims=True) + 1e-12)
