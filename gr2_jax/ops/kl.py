"""Kullback-Leibler divergences, sampled and exact.

Axis letters: T time, V vocabulary.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import Array

Kind = Literal['k1', 'k2', 'k3']
KINDS = ('k1', 'k2', 'k3')
Exact = Literal['reverse', 'forward']
EXACT = ('reverse', 'forward')
LOG_RATIO_LIMIT = 20.0  # exp(20) is finite in float32.


def sampled_kl(
  logp: Array, other_logp: Array, *, kind: Kind = 'k3'
) -> jax.Array:
  """KL(policy || other) from tokens that the policy sampled.

  With d = other_logp - logp (Schulman, "Approximating KL divergence", 2020):
  k1 = -d, unbiased, of any sign; k2 = d^2 / 2, biased, low variance; k3 =
  exp(d) - 1 - d, unbiased and never negative. In exp, d is held within 20 of 0.

  As a loss on tokens that the policy itself has just sampled, the gradient
  counts, not the value: that of k1 has mean 0, that of k2 has the mean of the
  gradient of KL(policy || other), that of k3 of KL(other || policy).

  `logp` and `other_logp` [...] are log-probabilities of the sampled tokens
  under the policy and under the teacher or reference. Returns float32 [...],
  one per token. Raises ValueError if the kind is unknown.
  """
  chex.assert_equal_shape([logp, other_logp])
  gap = jnp.asarray(other_logp, jnp.float32) - jnp.asarray(logp, jnp.float32)
  match kind:
    case 'k1':
      return -gap
    case 'k2':
      return 0.5 * jnp.square(gap)
    case 'k3':
      gap = jnp.clip(gap, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
      return jnp.expm1(gap) - gap
  raise ValueError(f'kl kind is {kind!r}; it must be one of {KINDS}')


def exact_kl(
  logits: Array, other_logits: Array, support: Array | None = None
) -> jax.Array:
  """KL(p || q) = sum_v p_v (log p_v - log q_v) over the whole vocabulary.

  With p the student and q the teacher this is the reverse KL of distillation;
  with p the teacher and q the student, the forward KL.

  `logits` and `other_logits` [..., V] are logits or log-probabilities of p and
  q, which are renormalized over `support` bool [..., V], the tokens of both
  vocabularies. Returns float32 [...], >= 0; infinite where p has mass and q has
  none.
  """
  chex.assert_equal_shape([logits, other_logits])
  p = jnp.asarray(logits, jnp.float32)
  q = jnp.asarray(other_logits, jnp.float32)
  if support is not None:
    chex.assert_equal_shape([logits, support])
    p = jnp.where(support, p, -jnp.inf)
    q = jnp.where(support, q, -jnp.inf)
  p = jax.nn.log_softmax(p, axis=-1)
  q = jax.nn.log_softmax(q, axis=-1)
  has_mass = p > -jnp.inf
  gap = jnp.where(has_mass, p, 0.0) - jnp.where(has_mass, q, 0.0)
  return jnp.sum(jnp.where(has_mass, jnp.exp(p) * gap, 0.0), axis=-1)


def divergence(
  kind: Exact, student_logits: Array, teacher_logits: Array, support: Array
) -> jax.Array:
  """Divergence of distillation; value and gradient are 0 without support.

  `reverse` is KL(student || teacher), which seeks one mode of the teacher;
  `forward` is KL(teacher || student), which covers all of them. Arguments are
  those of `exact_kl`. Raises ValueError if the kind is unknown.
  """
  if kind not in EXACT:
    raise ValueError(f'divergence is {kind!r}; it must be one of {EXACT}')
  pair = (student_logits, teacher_logits)
  p, q = pair if kind == 'reverse' else pair[::-1]
  supported = jnp.any(support, axis=-1)
  kl = exact_kl(p, q, support | ~supported[..., None])
  return jnp.where(supported, kl, 0.0)
