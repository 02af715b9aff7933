"""Masks from lengths, and sums in which padding cannot leak.

Axis letters: T time, K candidates.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Total(NamedTuple):
  """A sum and what it is to be divided by, kept apart until the end.

  Dividing per micro-batch and averaging afterwards weighs tokens unequally;
  adding totals with `+` and dividing once does not.

  Attributes:
    sum: float32, the masked sum.
    count: float32, the number (or the weight) of the terms in it.
  """

  sum: jax.Array
  count: jax.Array

  def __add__(self, other: 'Total') -> 'Total':
    return Total(self.sum + other.sum, self.count + other.count)

  def mean(self) -> jax.Array:
    """The sum divided by the count; 0 where nothing was counted."""
    return divide(self.sum, self.count)


def index_like(shape: tuple[int, ...], axis: int = -1) -> jax.Array:
  """int32 array of `shape` whose entries are their index along `axis`."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis % len(shape))


def length_mask(lengths: chex.Array, size: int) -> jax.Array:
  """True at the first `lengths` of `size` places.

  Args:
    lengths: int [...].
    size: length of the new last axis.

  Returns:
    bool [..., size].
  """
  lengths = jnp.asarray(lengths)
  return index_like(lengths.shape + (size,)) < lengths[..., None]


def divide(numerator: chex.Array, denominator: chex.Array) -> jax.Array:
  """`numerator / denominator`, 0 where the denominator is 0.

  The gradient is 0 there as well, never NaN.

  Args:
    numerator: float32 [...].
    denominator: [...], same shape.

  Returns:
    float32 [...].
  """
  denominator = jnp.asarray(denominator, jnp.float32)
  empty = denominator == 0
  safe = jnp.where(empty, 1.0, denominator)
  return jnp.where(empty, 0.0, numerator / safe)


def keep(values: chex.Array, mask: chex.Array, fill: float = 0.0) -> jax.Array:
  """`values` as float32 where `mask`, `fill` elsewhere, NaN or not.

  Apply it before a non-linear function as well as after: the gradient of
  `where(mask, log(x), 0)` is NaN at `x = 0`, that of `log(keep(x, mask, 1))`
  is not.

  Args:
    values: [...].
    mask: bool [...], same shape.
    fill: value of the places left out.

  Returns:
    float32 [...].
  """
  chex.assert_equal_shape([values, mask])
  return jnp.where(mask, jnp.asarray(values, jnp.float32), fill)


def masked_sum(
  values: chex.Array, mask: chex.Array, axis: int | None = None
) -> Total:
  """Sum and count of the values where `mask`.

  Args:
    values: [...].
    mask: bool [...], same shape.
    axis: the axis to reduce; all of them by default.

  Returns:
    Total of float32, with `axis` removed.
  """
  kept = keep(values, mask)
  counted = jnp.asarray(mask, jnp.float32)
  return Total(jnp.sum(kept, axis), jnp.sum(counted, axis))


def masked_mean(
  values: chex.Array, mask: chex.Array, axis: int | None = None
) -> jax.Array:
  """Mean of the values where `mask`; 0 where the mask is empty.

  For numbers that are reported. A loss that is to be accumulated or sharded
  wants `masked_sum`.

  Args:
    values: [...].
    mask: bool [...], same shape.
    axis: the axis to reduce; all of them by default.

  Returns:
    float32, with `axis` removed.
  """
  return masked_sum(values, mask, axis).mean()


def first(hits: chex.Array) -> jax.Array:
  """Index of the first hit: int32 [...].

  Args:
    hits: bool [..., T].

  Returns:
    T where there is none.
  """
  size = hits.shape[-1]
  return jnp.min(jnp.where(hits, index_like(hits.shape), size), axis=-1)
