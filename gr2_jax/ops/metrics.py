"""Metrics of rankings: their quality, and how far they copy.

Takes numpy or jax arrays, returns jax arrays, one value per slate (the
histogram excepted). Axis letters: K candidates, G answers to one presentation
of a slate.

`order_sensitivity` and its kin compare answers to the same slate shown in
different orders. They take rankings as *incoming ranks in answer order*, see
`in_incoming_ranks`.
"""

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import Array, masking, parsing, rewards

RANKING_METRICS = ('r@1', 'r@3', 'r@5', 'n@3', 'n@5', 'n@10', 'auc')


def ranking_metrics(
  ranking: Array, grades: Array, count: Array
) -> dict[str, jax.Array]:
  """The quality of each ranking: the `RANKING_METRICS`, each float32 [...].

  r@k: positives in the top k over min(k, positives), so r@1 is whether the
  first candidate is a positive and the best order has 1 at every k. n@k: NDCG
  with gains 2^g - 1. auc: over (positive, negative) pairs. A slate without a
  positive has r@k = n@k = 0; without a pair, auc = 0.5.

  Example: four candidates with grades 0 2 0 1 in the order 1 0 3 2: r@1 1, r@3
  and r@5 1, n@3 = n@5 = n@10 = (3 + 1 / 2) / (3 + 1 / log2(3)) = 0.9639, auc
  3 / 4.
  """
  slate = (ranking, grades, count)
  values = {f'r@{k}': rewards.recall(*slate, k) for k in (1, 3, 5)}
  values |= {f'n@{k}': rewards.ndcg(*slate, k) for k in (3, 5, 10)}
  return values | {'auc': rewards.auc(*slate)}


def in_incoming_ranks(ranking: Array, incoming: Array) -> jax.Array:
  """A ranking written as the incoming ranks of its candidates, [..., K].

  This names candidates independently of how a prompt presented them: two
  answers to the same slate, shuffled differently, can be compared.

  Example: incoming 2 0 1, ranking 1 2 0: 0 1 2, the incoming order.
  """
  chex.assert_equal_shape([ranking, incoming])
  incoming = jnp.asarray(incoming, jnp.int32)
  return jnp.take_along_axis(incoming, jnp.asarray(ranking), axis=-1)


def order_sensitivity(first: Array, second: Array, count: Array) -> jax.Array:
  """Share of candidate pairs that two rankings of a slate order differently.

  0 for equal rankings, 1 for one and its reverse, about 0.5 for unrelated
  ones; 0 where fewer than two candidates are real. Both are int [..., K],
  incoming ranks in answer order.

  Example: 0 1 2 and 0 2 1 differ in one pair of three: 0.3333.
  """
  chex.assert_equal_shape([first, second])
  chex.assert_type([first, second], int)
  before = _before(first, count)
  after = jnp.swapaxes(_before(second, count), -2, -1)
  wrong = jnp.sum(before & after, axis=(-2, -1))
  return masking.divide(wrong, jnp.sum(before, axis=(-2, -1)))


def preferences(ranking: Array, count: Array, valid: Array) -> jax.Array:
  """Share of a group of answers that puts one candidate before another.

  Example: the answers 0 1 2 and 1 0 2 put 0 before 1 in 0.5 of the group, and
  0 and 1 before 2 in all of it.

  `ranking` int [..., G, K] has incoming ranks in answer order. Answers that are
  not `valid` [..., G], which fall back to the incoming order, are left out.
  Returns float32 [..., K, K]: at i, j the share that puts i before j; it and
  the share at j, i sum to 1. 0 on the diagonal, at padding, and where no answer
  of the group is valid.
  """
  valid = jnp.asarray(valid, bool)
  chex.assert_shape(valid, jnp.shape(ranking)[:-1])
  votes = _before(ranking, count) & valid[..., None, None]
  total = jnp.sum(votes, axis=-3)
  voters = jnp.sum(valid, axis=-1)[..., None, None]
  return masking.divide(total, jnp.broadcast_to(voters, total.shape))


def order_disagreement(
  ranking: Array, other: Array, count: Array, valid: Array
) -> jax.Array:
  """Distance of each answer to those to another presentation of the slate.

  The mean over pairs of candidates of the share of the other group that orders
  the pair the other way. This is the expected normalized Kendall distance to an
  answer of that group, and `order_sensitivity` for a group of one. Answers that
  scatter under one presentation already have a distance to each other; a
  group's mean distance to its own `preferences` measures this scatter.

  Example: the other group answers 0 1 2 and 1 0 2. The answer 2 0 1 has the
  pairs (2, 0) and (2, 1) against all of it, (0, 1) against half of it: 2.5 / 3
  = 0.8333. The answer 0 1 2: 0.5 / 3 = 0.1667.

  `ranking` int [..., G, K] has incoming ranks in answer order, `other` [..., K,
  K] are `preferences` of the other group (for twins on an axis of two, those of
  both flipped along it), and `valid` [..., G] marks answers that are not a
  fallback. Returns float32 [..., G] in [0, 1]; 0 where the answer is not valid,
  no answer of the other group is, or fewer than two candidates are real.
  """
  before = _before(ranking, count)
  chex.assert_shape(valid, before.shape[:-2])
  against = jnp.swapaxes(other, -2, -1)[..., None, :, :]
  against = jnp.sum(jnp.where(before, against, 0.0), axis=(-2, -1))
  share = masking.divide(against, jnp.sum(before, axis=(-2, -1)))
  return jnp.where(valid, share, 0.0)


def kendall_tau(ranking: Array, incoming: Array, count: Array) -> jax.Array:
  """Kendall's tau of a ranking to the incoming order, in [-1, 1].

  1 for a copy (and where fewer than two candidates are real), -1 for the
  reverse.

  Example: incoming 0 1 2, ranking 0 2 1: one pair of three is turned, 1 - 2 / 3
  = 0.3333.
  """
  answer = in_incoming_ranks(ranking, incoming)
  same = masking.index_like(answer.shape)
  return 1.0 - 2.0 * order_sensitivity(answer, same, count)


def top_unchanged(
  ranking: Array, incoming: Array, count: Array, k: int = 3
) -> jax.Array:
  """Whether the top k is the incoming top k, in the same order: 0 or 1.

  A slate of fewer than k candidates is compared whole.

  Example: incoming 0 1 2 3, ranking 0 1 3 2: 1 at k = 2, 0 at k = 3.
  """
  chex.assert_equal_shape([ranking, incoming])
  same = ranking == parsing.incoming_ranking(incoming, count)
  top = masking.length_mask(jnp.minimum(count, k), same.shape[-1])
  return jnp.all(same | ~top, axis=-1).astype(jnp.float32)


def first_pick_histogram(
  ranking: Array, incoming: Array, mask: Array
) -> jax.Array:
  """How often the first pick came from each incoming position: float32 [K].

  These are counts over all leading axes of the answers where `mask` [...] is
  True, for instance the valid ones: add before dividing.

  Example: incoming 1 0 2 in both rows, rankings 0 1 2 and 2 1 0, both counted:
  their first picks have incoming ranks 1 and 2: 0 1 1.
  """
  first = in_incoming_ranks(ranking, incoming)[..., 0]
  chex.assert_equal_shape([first, mask])
  size = jnp.shape(ranking)[-1]
  hit = jax.nn.one_hot(first, size, dtype=jnp.float32)
  hit = jnp.where(jnp.asarray(mask)[..., None], hit, 0.0)
  return jnp.sum(hit.reshape(-1, size), axis=0)


def verdict_shares(verdict: Array) -> dict[str, jax.Array]:
  """Share of answers with each of `parsing.VERDICTS`, float32 scalars.

  Example: the verdicts 0 0 4 0: valid 0.75, missing 0.25, the others 0.
  """
  verdict = jnp.asarray(verdict)
  return {
    name: jnp.mean((verdict == code).astype(jnp.float32))
    for code, name in enumerate(parsing.VERDICTS)
  }


def _before(order: Array, count: Array) -> jax.Array:
  """Pairs of real candidates, i placed before j: bool [..., K, K].

  A count without a group axis holds for the whole group.
  """
  order, count = jnp.asarray(order), jnp.asarray(count)
  chex.assert_equal_shape_prefix([order, count], count.ndim)
  count = jnp.expand_dims(count, range(count.ndim, order.ndim - 1))
  real = masking.length_mask(count, order.shape[-1])
  filled = jnp.where(real, order, masking.index_like(order.shape))
  place = jnp.argsort(filled, axis=-1)
  pair = real[..., :, None] & real[..., None, :]
  return pair & (place[..., :, None] < place[..., None, :])
