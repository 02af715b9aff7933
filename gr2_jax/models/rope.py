"""Rotary positions (Su et al., arXiv 2104.09864), stretched or not.

Axes: T time, H head width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

SCALINGS = ('', 'linear', 'llama3', 'yarn')


def frequencies(config: Any) -> jax.Array:
  """How far each pair of a head turns from one position to the next.

  Unscaled, pair i turns by `base ** (-i / (H/2))`. A stretched context divides
  that by `rope_factor`: for all pairs ('linear', arXiv 2306.15595), or for slow
  pairs only, blended by the number of turns within `rope_length` ('llama3',
  arXiv 2407.21783) or by pair index between the pairs of `rope_fast` and
  `rope_slow` turns ('yarn', arXiv 2309.00071, NTK by parts).

  Args:
    config: `head_dim` and the `rope_*` fields of `transformer`'s.

  Returns:
    float32 [H/2], radians.
  """
  c, half = config, config.head_dim // 2
  frequency = c.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if not c.rope_scaling:
    return frequency
  stretched = frequency / c.rope_factor
  if c.rope_scaling == 'linear':
    return stretched
  if c.rope_scaling == 'llama3':
    turns = frequency * (c.rope_length / (2 * math.pi))
    keep = (turns - c.rope_slow) / (c.rope_fast - c.rope_slow)
  else:

    def pair(turns):
      wavelength = c.rope_length / (turns * 2 * math.pi)
      return half * math.log(wavelength) / math.log(c.rope_base)

    low = max(math.floor(pair(c.rope_fast)), 0)
    high = min(math.ceil(pair(c.rope_slow)), c.head_dim - 1)
    keep = (high - jnp.arange(half, dtype=jnp.float32)) / max(high - low, 1e-3)
  keep = jnp.clip(keep, 0.0, 1.0)
  return keep * frequency + (1.0 - keep) * stretched


def turns(
  positions: jax.Array, frequency: jax.Array, magnitude: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Sine and cosine of how far each pair has turned at each position.

  Args:
    positions: int [..., T].
    frequency: float32 [H/2], of `frequencies`.
    magnitude: factor on both.

  Returns:
    Two float32 [..., T, 1, H/2], the same for every head and layer.
  """
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  return jnp.sin(angle) * magnitude, jnp.cos(angle) * magnitude


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Rotary position embedding, half-split pairs.

  Args:
    x: float [..., T, heads, H].
    sin: float32 [..., T, 1, H/2], of `turns`.
    cos: likewise.

  Returns:
    float [..., T, heads, H], computed in float32, in the dtype of `x`.
  """
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(
    x.dtype
  )
