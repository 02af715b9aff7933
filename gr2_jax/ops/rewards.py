"""Rewards of a ranking (GR2, Eq. 5-7).

Every function maps arrays to one float32 per slate, [...]. A total is

  gate(R_rank + extras above 0) + a R_fmt + extras below 0

where the gates (`gates`) differ in the part that they withhold from an answer
that repeats the incoming order. Axis letters: K candidates. The worked examples
share one slate of four candidates A B C D, presented in incoming order, with
grades 0 2 0 1.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import Array, gates, masking, parsing

Kind = Literal['auc', 'ndcg', 'auc+ndcg', 'promotion', 'rr', 'recall']
KINDS = ('auc', 'ndcg', 'auc+ndcg', 'promotion', 'rr', 'recall')


class Reward(NamedTuple):
  """A reward and its parts, each float32 [...].

  The ranking reward of an invalid answer is that of the incoming order.
  """

  total: jax.Array  # The policy is trained on it; after the gate.
  rank: jax.Array  # The ranking reward before the gate.
  format: jax.Array  # 1 where the answer permutes the candidates, else 0.
  copied: (
    jax.Array
  )  # 1 where a valid answer repeats the incoming order, else 0.
  extra: jax.Array  # The extras in the total, after the gate.


def _by_rank(
  ranking: Array, values: Array, count: Array
) -> tuple[jax.Array, jax.Array]:
  """Values in ranked order, 0 at padding: [..., K]; and where they are real."""
  chex.assert_equal_shape([ranking, values])
  chex.assert_type(ranking, int)
  chex.assert_shape(count, jnp.shape(ranking)[:-1])
  ranking, values = jnp.asarray(ranking), jnp.asarray(values)
  real = masking.length_mask(count, ranking.shape[-1])
  taken = jnp.take_along_axis(values, ranking, axis=-1)
  return jnp.where(real, taken, jnp.zeros_like(taken)), real


def positives_by_rank(ranking: Array, grades: Array, count: Array) -> jax.Array:
  """1 where the candidate at a rank has a positive grade: float32 [..., K].

  Example: the order D B A C: 1 1 0 0.
  """
  ranked, _ = _by_rank(ranking, grades, count)
  return (ranked > 0).astype(jnp.float32)


def misordered_pairs(
  ranking: Array, grades: Array, count: Array
) -> masking.Total:
  """Pairs of a positive and a negative in the wrong order, of all such pairs.

  Example: the order B A C D has 2 wrong pairs, (D, A) and (D, C), of 4.
  """
  ranked, real = _by_rank(ranking, grades, count)
  positive = (real & (ranked > 0)).astype(jnp.float32)
  negative = (real & (ranked <= 0)).astype(jnp.float32)
  above = jnp.cumsum(negative, axis=-1)
  wrong = jnp.sum(positive * above, axis=-1)
  return masking.Total(wrong, positive.sum(axis=-1) * negative.sum(axis=-1))


def auc(ranking: Array, grades: Array, count: Array) -> jax.Array:
  """Share of (positive, negative) pairs in the right order (Eq. 5).

  A slate without a positive or without a negative has no pair to order: its
  AUC is 0.5, that of a random order.

  Example: the order B A C D has positives B, D over negatives A, C. Right are
  (B, A) and (B, C), wrong (D, A) and (D, C): 0.5. The order B D A C: 1.
  """
  wrong, pairs = misordered_pairs(ranking, grades, count)
  share = 1.0 - masking.divide(wrong, pairs)
  return jnp.where(pairs > 0, share, 0.5)


def ndcg(ranking: Array, grades: Array, count: Array, k: int) -> jax.Array:
  """Normalized discounted cumulative gain of the top k (Eq. 6).

  DCG@k = sum over ranks i = 1..k of (2^g_i - 1) / log2(i + 1), divided by that
  of the best order. 0 where no grade is positive; a k above K acts as K. Raises
  ValueError if k < 1.

  Example: the order D B A C has gains 1 3 0 0, DCG 1 + 3 / log2(3) = 2.8928;
  the best order has 3 + 1 / log2(3) = 3.6309; NDCG@4 is 0.7967.
  """
  _check_k(k)
  ranked, real = _by_rank(ranking, grades, count)
  gains = jnp.exp2(ranked.astype(jnp.float32)) - 1.0
  gains = jnp.where(real & (ranked > 0), gains, 0.0)
  rank = masking.index_like(gains.shape)
  discount = jnp.where(rank < k, 1.0 / jnp.log2(rank + 2.0), 0.0)
  best = jnp.flip(jnp.sort(gains, axis=-1), axis=-1)
  dcg, best_dcg = (jnp.sum(g * discount, axis=-1) for g in (gains, best))
  return masking.divide(dcg, best_dcg)


def target_rank(
  ranking: Array, grades: Array, count: Array, incoming: Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Incoming rank and new rank of the target, and whether it is a positive.

  The target is the candidate of the highest grade; among several, the one
  that the incoming order puts first. Returns int32, int32 and bool, each [...].

  Example: the order D A B C moves the target, B, from rank 1 to rank 2.
  """
  ranked, real = _by_rank(ranking, grades, count)
  came, _ = _by_rank(ranking, incoming, count)
  ranked = jnp.where(real, ranked, -1)
  top = jnp.max(ranked, axis=-1)
  best = real & (ranked == top[..., None])
  far = jnp.iinfo(jnp.int32).max
  key = jnp.where(best, came.astype(jnp.int32), far)
  new = jnp.argmin(key, axis=-1).astype(jnp.int32)
  return jnp.min(key, axis=-1), new, top > 0


def rank_promotion(
  ranking: Array, grades: Array, count: Array, incoming: Array
) -> jax.Array:
  """How far the target rose: (incoming rank - new rank) / count (v1).

  0 where the slate has no positive.

  Example: the target is B (grade 2), at incoming rank 1. The order B A C D
  promotes it by (1 - 0) / 4 = 0.25; the order A C D B by (1 - 3) / 4 = -0.5.
  """
  old, new, has = target_rank(ranking, grades, count, incoming)
  rise = jnp.where(has, old - new, 0).astype(jnp.float32)
  return masking.divide(rise, count)


def reciprocal_rank(ranking: Array, grades: Array, count: Array) -> jax.Array:
  """One over the rank, from 1, of the first positive; 0 without one.

  Example: the order A C D B has its first positive, D, at rank 3: 0.3333.
  """
  positive = positives_by_rank(ranking, grades, count)
  rank = masking.index_like(positive.shape).astype(jnp.float32)
  return jnp.max(positive / (rank + 1.0), axis=-1)


def recall(ranking: Array, grades: Array, count: Array, k: int) -> jax.Array:
  """Positives in the top k over min(k, positives); 0 without a positive.

  So recall@1 is whether the first candidate is a positive, and the best order
  has recall 1 at every k. Raises ValueError if k < 1.

  Example: the order B A D C has one positive in its top 2, of two that fit:
  recall@2 is 0.5; recall@1 and recall@3 are 1.
  """
  _check_k(k)
  positive = positives_by_rank(ranking, grades, count)
  hits = jnp.sum(positive[..., :k], axis=-1)
  return masking.divide(hits, jnp.minimum(jnp.sum(positive, axis=-1), k))


def copied(ranking: Array, incoming: Array, count: Array) -> jax.Array:
  """Whether the ranking repeats the incoming order: bool [...].

  Example: the order A B C D does, the order B A C D does not.
  """
  chex.assert_equal_shape([ranking, incoming])
  real = masking.length_mask(count, jnp.shape(ranking)[-1])
  same = ranking == parsing.incoming_ranking(incoming, count)
  return jnp.all(same | ~real, axis=-1)


def rank_reward(
  ranking: Array,
  grades: Array,
  count: Array,
  incoming: Array,
  *,
  kind: Kind,
  k: int,
) -> jax.Array:
  """The ranking reward of a kind; 'auc+ndcg' is the mean of the two.

  Example: the order D B A C: auc 1, ndcg@4 0.7967, auc+ndcg 0.8984,
  promotion 0, rr 1, recall@1 1.

  `k` is the cut-off of ndcg and recall; the others do not read it. Raises
  ValueError if the kind is none of `KINDS`, or k < 1 where it is read.
  """
  slate = (ranking, grades, count)
  match kind:
    case 'auc':
      return auc(*slate)
    case 'ndcg':
      return ndcg(*slate, k)
    case 'auc+ndcg':
      return 0.5 * (auc(*slate) + ndcg(*slate, k))
    case 'promotion':
      return rank_promotion(*slate, incoming)
    case 'rr':
      return reciprocal_rank(*slate)
    case 'recall':
      return recall(*slate, k)
  raise ValueError(f'reward kind is {kind!r}; it must be one of {KINDS}')


def reward(
  ranking: Array,
  verdict: Array,
  grades: Array,
  count: Array,
  incoming: Array,
  *,
  kind: Kind,
  k: int,
  gate: gates.Gate = 'v2',
  format_weight: float = 0.2,
  extras: Sequence[Array] = (),
) -> Reward:
  """The whole reward of parsed answers.

  Under 'v2' no invalid answer and no copy of a suboptimal incoming order earns
  more than a = `format_weight`, whatever the extras; an invalid one earns 0 at
  most. Extras are, for instance, `w * judge.judge(...).total`,
  `losses.overlong_penalty(...)`, and `-c * metrics.order_disagreement(...)`.
  The last charges valid answers alone: with c <= a, and a ranking reward that
  is never negative, a valid answer still earns at least as much as an invalid
  one; with a larger c, giving no answer becomes cheaper.

  Example: the order D B A C, valid, kind 'ndcg', k 4, gate 'v2': rank 0.7967,
  format 1, copied 0, total 0.9967. The copy A B C D has rank 0.6399 and total
  0.2; an invalid answer, which falls back to A B C D, has total 0. With a
  judge's 0.1 and an order cost of 0.05 as extras they are 1.0467, 0.15, -0.05.

  `ranking` and `verdict` [...] come from `parsing.parse_answer`, kind and k are
  those of `rank_reward`, and extras are weighted terms float32 [...], see
  `gates.gated_extras`. Raises ValueError if kind or gate is unknown, or k < 1
  where it is read.
  """
  earned = rank_reward(ranking, grades, count, incoming, kind=kind, k=k)
  valid = jnp.asarray(verdict) == parsing.VALID
  copy = valid & copied(ranking, incoming, count)
  wrong, _ = misordered_pairs(
    parsing.incoming_ranking(incoming, count), grades, count
  )
  old, new, _ = target_rank(ranking, grades, count, incoming)
  opened = gates.gate_open(
    valid,
    copied_suboptimal=copy & (wrong > 0),
    improved=(new < old) | (old == 0),
    kind=gate,
  )
  total = gates.apply_gate(
    earned, valid, opened, kind=gate, format_weight=format_weight
  )
  extra = gates.gated_extras(extras, opened)
  return Reward(
    total=total + extra,
    rank=earned,
    format=valid.astype(jnp.float32),
    copied=copy.astype(jnp.float32),
    extra=extra,
  )


def _check_k(k: int) -> None:
  if k < 1:
    raise ValueError(f'k is {k}; a cut-off counts ranks from 1')
