"""What is reported of rankings: quality, and watches against copying.

Takes numpy or jax arrays, returns jax arrays, one value per slate (the
histogram excepted). Axis letters: K candidates.
"""

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import masking, parsing, rewards

RANKING_METRICS = ('r@1', 'r@3', 'r@5', 'n@3', 'n@5', 'n@10', 'auc')


def ranking_metrics(
  ranking: chex.Array, grades: chex.Array, count: chex.Array
) -> dict[str, jax.Array]:
  """The quality of each ranking.

  r@k: positives in the top k over min(k, positives), so r@1 is whether the
  first candidate is a positive and the best order has 1 at every k. n@k: NDCG
  with gains 2^g - 1. auc: over (positive, negative) pairs. A slate without a
  positive has r@k = n@k = 0; without a pair, auc = 0.5.

  Example: four candidates with grades 0 2 0 1 in the order 1 0 3 2: r@1 1, r@3
  and r@5 1, n@3 = n@5 = n@10 = (3 + 1 / 2) / (3 + 1 / log2(3)) = 0.9639, auc
  3 / 4.

  Args:
    ranking: int [..., K].
    grades: [..., K].
    count: int [...].

  Returns:
    A dict with the keys `RANKING_METRICS`, each float32 [...].
  """
  slate = (ranking, grades, count)
  values = {f'r@{k}': rewards.recall(*slate, k) for k in (1, 3, 5)}
  values |= {f'n@{k}': rewards.ndcg(*slate, k) for k in (3, 5, 10)}
  return values | {'auc': rewards.auc(*slate)}


def in_incoming_ranks(ranking: chex.Array, incoming: chex.Array) -> jax.Array:
  """A ranking written as the incoming ranks of what it lists.

  This names candidates independently of how a prompt presented them: two
  answers to the same slate, shuffled differently, can be compared.

  Example: incoming 2 0 1, ranking 1 2 0: 0 1 2, the incoming order.

  Args:
    ranking: int [..., K].
    incoming: int [..., K].

  Returns:
    int32 [..., K].
  """
  chex.assert_equal_shape([ranking, incoming])
  incoming = jnp.asarray(incoming, jnp.int32)
  return jnp.take_along_axis(incoming, jnp.asarray(ranking), axis=-1)


def order_sensitivity(
  first: chex.Array, second: chex.Array, count: chex.Array
) -> jax.Array:
  """Share of candidate pairs that two rankings of a slate order differently.

  0 for equal rankings, 1 for one and its reverse, about 0.5 for unrelated
  ones; 0 where fewer than two candidates are real.

  Example: 0 1 2 and 0 2 1 differ in one pair of three: 0.3333.

  Args:
    first: int [..., K], incoming ranks in answer order, see
      `in_incoming_ranks`; the first `count` are a permutation of 0..count-1.
    second: int [..., K], likewise, of the same slate shown otherwise.
    count: int [...].

  Returns:
    float32 [...] in [0, 1].
  """
  chex.assert_equal_shape([first, second])
  chex.assert_type([first, second], int)
  before = _before(first, count)
  after = jnp.swapaxes(_before(second, count), -2, -1)
  wrong = jnp.sum(before & after, axis=(-2, -1))
  return masking.divide(wrong, jnp.sum(before, axis=(-2, -1)))


def preferences(
  ranking: chex.Array, count: chex.Array, valid: chex.Array
) -> jax.Array:
  """Share of a group of answers that puts one candidate before another.

  Axis letters here: G group, the answers to one presentation of a slate.

  Example: the answers 0 1 2 and 1 0 2 put 0 before 1 in 0.5 of the group, and
  0 and 1 before 2 in all of it.

  Args:
    ranking: int [..., G, K], incoming ranks in answer order, see
      `in_incoming_ranks`.
    count: int [...].
    valid: bool [..., G]; the other answers, which fall back to the incoming
      order, are left out.

  Returns:
    float32 [..., K, K]: at i, j the share that puts i before j; that and the
    share at j, i add up to 1. 0 on the diagonal, at padding, and where no
    answer of the group is valid.
  """
  valid = jnp.asarray(valid, bool)
  chex.assert_shape(valid, jnp.shape(ranking)[:-1])
  votes = _before_in_group(ranking, count) & valid[..., None, None]
  total = jnp.sum(votes, axis=-3)
  voters = jnp.sum(valid, axis=-1)[..., None, None]
  return masking.divide(total, jnp.broadcast_to(voters, total.shape))


def order_disagreement(
  ranking: chex.Array, other: chex.Array, count: chex.Array, valid: chex.Array
) -> jax.Array:
  """How far each answer is from those to another presentation of the slate.

  The mean over pairs of candidates of the share of the other group that orders
  the pair the other way: the expected normalised Kendall distance to an answer
  of that group, and `order_sensitivity` where it has one. Answers that scatter
  under one presentation already have a distance to each other; a group's mean
  distance to its own `preferences` says how much of this is scatter.

  Example: the other group answers 0 1 2 and 1 0 2. The answer 2 0 1 has the
  pairs (2, 0) and (2, 1) against all of it, (0, 1) against half of it: 2.5 / 3
  = 0.8333. The answer 0 1 2: 0.5 / 3 = 0.1667.

  Args:
    ranking: int [..., G, K], incoming ranks in answer order.
    other: float32 [..., K, K], `preferences` of the other group. For twins on
      an axis of two, those of both flipped along it.
    count: int [...].
    valid: bool [..., G], the answers that are an order of their own.

  Returns:
    float32 [..., G] in [0, 1]; 0 where the answer is not valid, no answer of
    the other group is, or fewer than two candidates are real.
  """
  before = _before_in_group(ranking, count)
  chex.assert_shape(valid, before.shape[:-2])
  against = jnp.swapaxes(other, -2, -1)[..., None, :, :]
  against = jnp.sum(jnp.where(before, against, 0.0), axis=(-2, -1))
  share = masking.divide(against, jnp.sum(before, axis=(-2, -1)))
  return jnp.where(valid, share, 0.0)


def kendall_tau(
  ranking: chex.Array, incoming: chex.Array, count: chex.Array
) -> jax.Array:
  """Kendall's tau of a ranking to the incoming order.

  1 for a copy (and where fewer than two candidates are real), -1 for the
  reverse.

  Example: incoming 0 1 2, ranking 0 2 1: one pair of three is turned, 1 - 2 / 3
  = 0.3333.

  Args:
    ranking: int [..., K].
    incoming: int [..., K], 0..count-1 over the real candidates.
    count: int [...].

  Returns:
    float32 [...] in [-1, 1].
  """
  answer = in_incoming_ranks(ranking, incoming)
  same = masking.index_like(answer.shape)
  return 1.0 - 2.0 * order_sensitivity(answer, same, count)


def top_unchanged(
  ranking: chex.Array, incoming: chex.Array, count: chex.Array, k: int = 3
) -> jax.Array:
  """Whether the top k is the incoming top k, in the same order.

  Example: incoming 0 1 2 3, ranking 0 1 3 2: 1 at k = 2, 0 at k = 3.

  Args:
    ranking: int [..., K].
    incoming: int [..., K].
    count: int [...].
    k: how many ranks; a shorter slate is compared whole.

  Returns:
    float32 [...], 0 or 1.
  """
  chex.assert_equal_shape([ranking, incoming])
  same = ranking == parsing.incoming_ranking(incoming, count)
  top = masking.length_mask(jnp.minimum(count, k), same.shape[-1])
  return jnp.all(same | ~top, axis=-1).astype(jnp.float32)


def first_pick_histogram(
  ranking: chex.Array, incoming: chex.Array, mask: chex.Array
) -> jax.Array:
  """How often the first pick came from each incoming position.

  Example: incoming 1 0 2 in both rows, rankings 0 1 2 and 2 1 0, both counted:
  their first picks have incoming ranks 1 and 2: 0 1 1.

  Args:
    ranking: int [..., K].
    incoming: int [..., K].
    mask: bool [...], the answers that count, for instance the valid ones.

  Returns:
    float32 [K], counts over all leading axes: add before dividing.
  """
  first = in_incoming_ranks(ranking, incoming)[..., 0]
  chex.assert_equal_shape([first, mask])
  size = jnp.shape(ranking)[-1]
  hit = jax.nn.one_hot(first, size, dtype=jnp.float32)
  hit = jnp.where(jnp.asarray(mask)[..., None], hit, 0.0)
  return jnp.sum(hit.reshape(-1, size), axis=0)


def verdict_shares(verdict: chex.Array) -> dict[str, jax.Array]:
  """Share of answers with each verdict.

  Example: the verdicts 0 0 4 0: valid 0.75, missing 0.25, the others 0.

  Args:
    verdict: int [...], from `parsing.parse_answer`.

  Returns:
    A dict with the keys `parsing.VERDICTS`, each a float32 scalar.
  """
  verdict = jnp.asarray(verdict)
  return {
    name: jnp.mean((verdict == code).astype(jnp.float32))
    for code, name in enumerate(parsing.VERDICTS)
  }


def _before(order, count):
  """Pairs of real candidates, i placed before j: bool [..., K, K]."""
  order = jnp.asarray(order)
  real = masking.length_mask(count, order.shape[-1])
  filled = jnp.where(real, order, masking.index_like(order.shape))
  place = jnp.argsort(filled, axis=-1)
  pair = real[..., :, None] & real[..., None, :]
  return pair & (place[..., :, None] < place[..., None, :])


def _before_in_group(ranking, count):
  """`_before` of a group whose answers share a count: bool [..., G, K, K]."""
  shape = jnp.shape(ranking)
  chex.assert_shape(count, shape[:-2])
  count = jnp.broadcast_to(jnp.asarray(count)[..., None], shape[:-1])
  return _before(ranking, count)
