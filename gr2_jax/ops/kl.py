"""Kullback-Leibler divergences, sampled and exact.

Axis letters: T time, V vocabulary.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

Kind = Literal['k1', 'k2', 'k3']
KINDS = ('k1', 'k2', 'k3')
Exact = Literal['reverse', 'forward']
EXACT = ('reverse', 'forward')
LOG_RATIO_LIMIT = 20.0  # exp(20) is finite in float32.


def sampled_kl(
  logp: chex.Array, other_logp: chex.Array, *, kind: Kind = 'k3'
) -> jax.Array:
  """KL(policy || other) from tokens that the policy sampled.

  With d = other_logp - logp (Schulman, "Approximating KL divergence", 2020):
  k1 = -d, unbiased, of any sign; k2 = d^2 / 2, biased, low variance; k3 =
  exp(d) - 1 - d, unbiased and never negative. In exp, d is held within 20 of 0.

  As a loss on tokens that the policy itself has just sampled, what counts is
  the gradient, not the value: that of k1 has mean 0, that of k2 has the mean
  of the gradient of KL(policy || other), that of k3 of KL(other || policy).

  Args:
    logp: [...], log-probability of the sampled tokens under the policy.
    other_logp: [...], under the teacher or the reference.
    kind: 'k1', 'k2' or 'k3'.

  Returns:
    float32 [...], one per token; nothing is reduced.

  Raises:
    ValueError: if the kind has no such name.
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
  logits: chex.Array,
  other_logits: chex.Array,
  support: chex.Array | None = None,
) -> jax.Array:
  """KL(p || q) = sum_v p_v (log p_v - log q_v) over the whole vocabulary.

  With p the student and q the teacher this is the reverse KL of distillation;
  with p the teacher and q the student, the forward KL.

  Args:
    logits: [..., V], logits or log-probabilities of p.
    other_logits: [..., V], of q.
    support: bool [..., V] or None, tokens that both vocabularies have; p and q
      are renormalised over it.

  Returns:
    float32 [...], >= 0; infinite where p has mass and q has none.
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
  kind: Exact,
  student_logits: chex.Array,
  teacher_logits: chex.Array,
  support: chex.Array,
) -> jax.Array:
  """`reverse_kl` or `forward_kl`, 0 where the support is empty.

  Args:
    kind: 'reverse' or 'forward'.
    student_logits: [..., V].
    teacher_logits: [..., V].
    support: bool [..., V].

  Returns:
    float32 [...]; the gradient is 0 as well where the support is empty.

  Raises:
    ValueError: if the kind has no such name.
  """
  if kind not in EXACT:
    raise ValueError(f'divergence is {kind!r}; it must be one of {EXACT}')
  some = jnp.any(support, axis=-1)
  support = support | ~some[..., None]
  of = reverse_kl if kind == 'reverse' else forward_kl
  return jnp.where(some, of(student_logits, teacher_logits, support), 0.0)


def reverse_kl(
  student_logits: chex.Array,
  teacher_logits: chex.Array,
  support: chex.Array | None = None,
) -> jax.Array:
  """KL(student || teacher), as `exact_kl`: seeks one mode of the teacher."""
  return exact_kl(student_logits, teacher_logits, support)


def forward_kl(
  student_logits: chex.Array,
  teacher_logits: chex.Array,
  support: chex.Array | None = None,
) -> jax.Array:
  """KL(teacher || student), as `exact_kl`: covers all modes of the teacher."""
  return exact_kl(teacher_logits, student_logits, support)
