"""Gates: the rewards that invalid answers and copies keep (GR2, Eq. 7).

Every argument and result has one entry per answer, [...].
"""

from collections.abc import Sequence
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import Array

Gate = Literal['none', 'v1', 'v2']
GATES = ('none', 'v1', 'v2')


def gate_open(
  valid: Array, *, copied_suboptimal: Array, improved: Array, kind: Gate = 'v2'
) -> jax.Array:
  """Where a gate pays an answer everything it can earn.

  * `none`: the answer is valid;
  * `v1`: it is valid, and the target rose or already stood first;
  * `v2`: it is valid, and not a copy of an incoming order that can be improved.

  Example: a valid answer that repeats a suboptimal incoming order, the target
  neither raised nor first: gate `none` is open; `v1` and `v2` are closed.

  `copied_suboptimal` (read by v2): the answer repeats the incoming order and
  that order has a misordered pair, AUC(incoming) < 1. `improved` (read by v1):
  the target rose or stood first. Raises ValueError if the kind is unknown.
  """
  chex.assert_equal_shape([valid, copied_suboptimal, improved])
  valid = jnp.asarray(valid, bool)
  match kind:
    case 'none':
      return valid
    case 'v1':
      return valid & improved
    case 'v2':
      return valid & jnp.logical_not(copied_suboptimal)
  raise ValueError(f'gate is {kind!r}; it must be one of {GATES}')


def apply_gate(
  rank_reward: Array,
  valid: Array,
  opened: Array,
  *,
  kind: Gate = 'v2',
  format_weight: float = 0.2,
) -> jax.Array:
  """Joins the ranking reward and the format reward.

  With a = `format_weight` and R_fmt = 1 where valid:

  * `none`: R_rank + a R_fmt, which a policy can farm by repeating the incoming
    order;
  * `v1`: R_rank + a R_fmt only where open;
  * `v2` (Eq. 7): R_rank only where open, + a R_fmt.

  Example: R_rank 0.5, the answer of the example of `gate_open`: none 0.7, v1
  0.5, v2 0.2. Where all three are open, each is 0.7.

  `opened` comes from `gate_open` of the same kind. Returns float32. Raises
  ValueError if the kind is unknown.
  """
  chex.assert_equal_shape([rank_reward, valid, opened])
  rank_reward = jnp.asarray(rank_reward)
  form = format_weight * jnp.asarray(valid, jnp.float32)
  match kind:
    case 'none':
      return rank_reward + form
    case 'v1':
      return rank_reward + jnp.where(opened, form, 0.0)
    case 'v2':
      return jnp.where(opened, rank_reward, 0.0) + form
  raise ValueError(f'gate is {kind!r}; it must be one of {GATES}')


def gated_extras(extras: Sequence[Array], opened: Array) -> jax.Array:
  """The sum of the weighted terms beside ranking and format.

  A term above 0, a bonus, is paid only where the gate is open: it cannot make
  up for the loss of a copy or a fault. A term below 0, a cost, is always
  charged. The rule applies to each term separately, so that withholding a bonus
  cancels no cost.

  Example: a judge pays 0.1 and the order costs 0.05. Open: 0.1 - 0.05 = 0.05;
  closed: -0.05.

  Returns float32; 0 without terms, never above 0 where the gate is closed.
  """
  total = jnp.zeros(jnp.shape(opened), jnp.float32)
  for term in extras:
    chex.assert_equal_shape([term, opened])
    total += jnp.where(opened, term, jnp.minimum(term, 0.0))
  return total
