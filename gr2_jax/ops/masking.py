"""Masks from lengths, and sums in which padding cannot leak.

Axis letters: T time, K candidates.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import Array


class Total(NamedTuple):
  """A sum and its divisor, kept apart until the end.

  Dividing per micro-batch and averaging afterwards weighs tokens unequally;
  adding totals with `+` and dividing once does not. `sum` and `count` are
  float32; the count is the number (or the weight) of the terms.
  """

  sum: jax.Array
  count: jax.Array  # pyright: ignore

  def __add__(self, other: 'Total') -> 'Total':  # pyright: ignore
    return Total(self.sum + other.sum, self.count + other.count)

  def mean(self) -> jax.Array:
    """The sum divided by the count; 0 where nothing was counted."""
    return divide(self.sum, self.count)


def index_like(shape: tuple[int, ...], axis: int = -1) -> jax.Array:
  """int32 array of `shape` whose entries are their index along `axis`."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis % len(shape))


def length_mask(lengths: Array, size: int) -> jax.Array:
  """True at the first `lengths` [...] of `size` places: bool [..., size]."""
  lengths = jnp.asarray(lengths)
  return index_like(lengths.shape + (size,)) < lengths[..., None]


def divide(numerator: Array, denominator: Array) -> jax.Array:
  """`numerator / denominator`, 0 where the denominator is 0.

  The gradient is 0 there as well, never NaN. Both have the shape [...].
  """
  denominator = jnp.asarray(denominator, jnp.float32)
  empty = denominator == 0
  safe = jnp.where(empty, 1.0, denominator)
  return jnp.where(empty, 0.0, numerator / safe)


def keep(values: Array, mask: Array, fill: float = 0.0) -> jax.Array:
  """`values` [...] as float32 where `mask`, `fill` elsewhere, NaN or not.

  Apply it before a non-linear function as well as after: the gradient of
  `where(mask, log(x), 0)` is NaN at `x = 0`, that of `log(keep(x, mask, 1))`
  is not.
  """
  chex.assert_equal_shape([values, mask])
  return jnp.where(mask, jnp.asarray(values, jnp.float32), fill)


def masked_sum(values: Array, mask: Array, axis: int | None = None) -> Total:
  """Sum and count of the values where `mask`, over one axis or (None) all."""
  kept = keep(values, mask)
  counted = jnp.asarray(mask, jnp.float32)
  return Total(jnp.sum(kept, axis), jnp.sum(counted, axis))


def masked_mean(
  values: Array, mask: Array, axis: int | None = None
) -> jax.Array:
  """Mean of the values where `mask`, as `masked_sum`; 0 where it is empty.

  Use it for metrics. A loss that is accumulated or sharded needs `masked_sum`.
  """
  return masked_sum(values, mask, axis).mean()


def first_fault(*faults: jax.Array) -> jax.Array:
  """1 + the number of the first fault [...] that is True; 0 where none is."""
  hits = jnp.stack(faults, axis=-1)
  number = 1 + jnp.argmax(hits, axis=-1).astype(jnp.int32)
  return jnp.where(jnp.any(hits, axis=-1), number, 0)


def first(hits: Array) -> jax.Array:
  """Index of the first hit of bool [..., T]: int32 [...]; T without a hit."""
  size = hits.shape[-1]
  return jnp.min(jnp.where(hits, index_like(hits.shape), size), axis=-1)
