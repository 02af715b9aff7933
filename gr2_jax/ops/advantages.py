"""Advantages of a group of rollouts of one slate (GR2, Eq. 8).

Axis letters: G group.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

Kind = Literal['grpo', 'dapo', 'dr_grpo', 'rloo']
KINDS = ('grpo', 'dapo', 'dr_grpo', 'rloo')


def group_advantage(
  rewards: chex.Array, *, kind: Kind = 'dapo', std_floor: float = 1e-3
) -> jax.Array:
  """How much better a rollout did than its group.

  * `grpo`, `dapo`: (R - mean) / max(std, floor), std over G (not G - 1);
  * `dr_grpo`: R - mean;
  * `rloo`: R - mean of the others = G / (G - 1) (R - mean).

  The mean is taken out before squares are taken (two passes, float32), and the
  floor keeps rounding residue of equal rewards from becoming advantages in the
  thousands.

  Args:
    rewards: [..., G].
    kind: one of `KINDS`.
    std_floor: smallest divisor, in units of the reward.

  Returns:
    float32 [..., G]; sums to 0 over G.

  Raises:
    ValueError: if the kind has no such name, or G < 2.
  """
  rewards = jnp.asarray(rewards, jnp.float32)
  group = rewards.shape[-1]
  if group < 2:
    raise ValueError(f'a group of {group} has no one to compare with: use >= 2')
  centred = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
  centred = centred - jnp.mean(centred, axis=-1, keepdims=True)
  match kind:
    case 'grpo' | 'dapo':
      variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
      return centred / jnp.maximum(jnp.sqrt(variance), std_floor)
    case 'dr_grpo':
      return centred
    case 'rloo':
      return centred * (group / (group - 1))
  raise ValueError(f'advantage kind is {kind!r}; it must be one of {KINDS}')


def zero_variance(rewards: chex.Array, tolerance: float = 1e-5) -> jax.Array:
  """Groups whose rewards are all the same: nothing to learn from.

  The tolerance is above the rounding of float32 and below the smallest step of
  NDCG over slates of tens of candidates.

  Args:
    rewards: [..., G].
    tolerance: largest spread, in units of the reward, that counts as none.

  Returns:
    bool [...].
  """
  rewards = jnp.asarray(rewards, jnp.float32)
  spread = jnp.max(rewards, axis=-1) - jnp.min(rewards, axis=-1)
  return spread <= tolerance
