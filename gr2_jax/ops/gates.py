"""Gates: what an answer earns that is invalid, or a copy (GR2, Eq. 7).

Axis letters: none; every function works on one number per answer.
"""

from collections.abc import Sequence
from typing import Literal

import chex
import jax
import jax.numpy as jnp

Gate = Literal['none', 'v1', 'v2']
GATES = ('none', 'v1', 'v2')


def gate_open(
  valid: chex.Array,
  *,
  copied_suboptimal: chex.Array,
  improved: chex.Array,
  kind: Gate = 'v2',
) -> jax.Array:
  """Where a gate pays an answer everything it can earn.

  * `none`: the answer is valid;
  * `v1`: it is valid, and the target rose or stood first already;
  * `v2`: it is valid, and no copy of an incoming order that could be better.

  Example: a valid answer that repeats a suboptimal incoming order, the target
  neither raised nor first: none open, v1 and v2 closed.

  Args:
    valid: bool [...].
    copied_suboptimal: bool [...], the answer repeats the incoming order and
      that order has a misordered pair, AUC(incoming) < 1; read by v2.
    improved: bool [...], the target rose or stood first; read by v1.
    kind: 'none', 'v1' or 'v2'.

  Returns:
    bool [...].

  Raises:
    ValueError: if the kind is none of these.
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
  rank_reward: chex.Array,
  valid: chex.Array,
  opened: chex.Array,
  *,
  kind: Gate = 'v2',
  format_weight: float = 0.2,
) -> jax.Array:
  """Joins the ranking reward and the format reward.

  With a = `format_weight` and R_fmt = 1 where valid:

  * `none`: R_rank + a R_fmt, which repeating the incoming order can farm;
  * `v1`: R_rank + a R_fmt only where open;
  * `v2` (Eq. 7): R_rank only where open, + a R_fmt.

  Example: R_rank 0.5, the answer of the example of `gate_open`: none 0.7, v1
  0.5, v2 0.2. Where all three are open, each is 0.7.

  Args:
    rank_reward: float32 [...].
    valid: bool [...].
    opened: bool [...], from `gate_open` of the same kind.
    kind: 'none', 'v1' or 'v2'.
    format_weight: a.

  Returns:
    float32 [...].

  Raises:
    ValueError: if the kind is none of these.
  """
  chex.assert_equal_shape([rank_reward, valid, opened])
  form = format_weight * jnp.asarray(valid, jnp.float32)
  match kind:
    case 'none':
      return rank_reward + form
    case 'v1':
      return rank_reward + jnp.where(opened, form, 0.0)
    case 'v2':
      return jnp.where(opened, rank_reward, 0.0) + form
  raise ValueError(f'gate is {kind!r}; it must be one of {GATES}')


def gated_extras(extras: Sequence[chex.Array], opened: chex.Array) -> jax.Array:
  """The sum of what is paid or charged beside ranking and format.

  A term above 0, a bonus, is paid only where the gate is open: it cannot buy
  back what a copy or a fault lost. A term below 0, a cost, is always charged.
  The rule is applied to each term by itself, so that a bonus which is held
  back takes no cost with it.

  Example: a judge pays 0.1 and the order costs 0.05. Open: 0.1 - 0.05 = 0.05;
  closed: -0.05.

  Args:
    extras: terms float32 [...], already weighted.
    opened: bool [...], from `gate_open`.

  Returns:
    float32 [...]; 0 without terms, never above 0 where the gate is closed.
  """
  total = jnp.zeros(jnp.shape(opened), jnp.float32)
  for term in extras:
    chex.assert_equal_shape([term, opened])
    total += jnp.where(opened, term, jnp.minimum(term, 0.0))
  return total
