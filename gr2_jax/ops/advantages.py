"""Advantages of a group of rollouts of one slate (GR2, Eq. 8).

Axis letters: G group.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from gr2_jax.ops import Array

Kind = Literal['grpo', 'dapo', 'dr_grpo', 'rloo']
KINDS = ('grpo', 'dapo', 'dr_grpo', 'rloo')


def group_advantage(
  rewards: Array, *, kind: Kind = 'dapo', std_floor: float = 1e-3
) -> jax.Array:
  """Advantage of each rollout over its group.

  * `grpo`, `dapo`: (R - mean) / max(std, floor), std over G (not G - 1);
  * `dr_grpo`: R - mean;
  * `rloo`: R - mean of the others = G / (G - 1) (R - mean).

  The mean is subtracted before squaring (two passes, float32), and the floor
  keeps rounding residue of equal rewards from becoming advantages in the
  thousands.

  `rewards` are [..., G]; `std_floor` is in their unit. Returns float32
  [..., G], which sums to 0 over G. Raises ValueError if the kind is unknown, or
  G < 2.
  """
  rewards = jnp.asarray(rewards, jnp.float32)
  group = rewards.shape[-1]
  if group < 2:
    raise ValueError(
      f'a group of {group} has nothing to compare with: use >= 2'
    )
  centered = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
  centered = centered - jnp.mean(centered, axis=-1, keepdims=True)
  match kind:
    case 'grpo' | 'dapo':
      variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
      return centered / jnp.maximum(jnp.sqrt(variance), std_floor)
    case 'dr_grpo':
      return centered
    case 'rloo':
      return centered * (group / (group - 1))
  raise ValueError(f'advantage kind is {kind!r}; it must be one of {KINDS}')


def zero_variance(rewards: Array, tolerance: float = 1e-5) -> jax.Array:
  """Groups whose rewards are all equal, which therefore teach nothing.

  The tolerance is above the rounding of float32 and below the smallest step of
  NDCG over slates of tens of candidates.

  `rewards` are [..., G]; `tolerance` is the largest spread, in their unit, that
  counts as none. Returns bool [...].
  """
  rewards = jnp.asarray(rewards, jnp.float32)
  spread = jnp.max(rewards, axis=-1) - jnp.min(rewards, axis=-1)
  return spread <= tolerance
