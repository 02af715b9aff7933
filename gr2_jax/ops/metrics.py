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
  a, b = _places(first, count), _places(second, count)
  real = masking.length_mask(count, a.shape[-1])
  pair = real[..., :, None] & real[..., None, :]
  above_a = a[..., :, None] < a[..., None, :]
  below_b = b[..., :, None] > b[..., None, :]
  wrong = jnp.sum(pair & above_a & below_b, axis=(-2, -1))
  return masking.divide(wrong, jnp.sum(pair & above_a, axis=(-2, -1)))


def kendall_tau(
  ranking: chex.Array, incoming: chex.Array, count: chex.Array
) -> jax.Array:
  """Kendall's tau of a ranking to the incoming order.

  1 for a copy (and where fewer than two candidates are real), -1 for the
  reverse.

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


def _places(order, count):
  """The place of each candidate, padding after the real: int [..., K]."""
  order = jnp.asarray(order)
  real = masking.length_mask(count, order.shape[-1])
  filled = jnp.where(real, order, masking.index_like(order.shape))
  return jnp.argsort(filled, axis=-1)
