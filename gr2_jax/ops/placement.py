"""Credit for placements: a rank is credited only for what follows it.

The reward of a whole answer gives each of its K placements the same advantage,
so that nine of ten are judged by the luck of the first. Subtracting a function
of the placements before a rank changes no expected gradient (it is a baseline
that depends on the state alone) and removes that luck. The function here is
the expected reward if the candidates left were shuffled.

Axes: G group, K candidates.
"""

import jax
import jax.numpy as jnp

from gr2_jax.ops import Array, masking, parsing, rewards

KINDS = ('auc', 'ndcg', 'auc+ndcg')


def expected_if_shuffled(
  ranking: Array, grades: Array, count: Array, *, kind: rewards.Kind, k: int
) -> jax.Array:
  """Expected reward with the first t placements kept and the rest shuffled.

  Example: the order D B A C of grades 0 2 0 1, kind 'auc'. Nothing placed: 1/2.
  D placed: its two pairs are right, those of B even: 3/4. D B placed: 1, and
  from there on nothing changes.

  `kind` is one of `KINDS` (otherwise ValueError), `k` the cut-off of ndcg.
  Returns float32 [..., K]; entry t for t placements made, the whole reward at
  and beyond `count`.
  """
  if kind not in KINDS:
    raise ValueError(
      f'credit by placement supports the rewards {", ".join(KINDS)}; with '
      f'{kind!r} use rl.credit=answer'
    )
  grade, left = _left(ranking, grades, count)
  number = left.sum(-1).astype(jnp.float32)
  real = masking.length_mask(count, grade.shape[-1])
  expected = []
  if 'auc' in kind:
    positive = (grade > 0).astype(jnp.float32)
    negative = real * (1.0 - positive)
    positives_left = _rest(positive)
    made = negative * positives_left  # Pairs that a negative put wrong.
    wrong = jnp.cumsum(made, axis=-1) - made
    wrong += 0.5 * positives_left * _rest(negative)
    pairs = positive.sum(-1, keepdims=True) * negative.sum(-1, keepdims=True)
    pairs = jnp.broadcast_to(pairs, wrong.shape)
    expected.append(
      jnp.where(pairs > 0, 1.0 - masking.divide(wrong, pairs), 0.5)
    )
  if 'ndcg' in kind:
    gain = jnp.where(grade > 0, jnp.exp2(grade) - 1.0, 0.0)
    rank = masking.index_like(gain.shape)
    discount = jnp.where(rank < k, 1.0 / jnp.log2(rank + 2.0), 0.0)
    made = gain * discount
    mean = masking.divide(_rest(gain), number)
    left_discount = _rest(jnp.where(real, discount, 0.0))
    dcg = jnp.cumsum(made, axis=-1) - made + mean * left_discount
    top = jnp.flip(jnp.sort(gain, axis=-1), axis=-1)
    best = jnp.sum(top * discount, axis=-1, keepdims=True)
    expected.append(masking.divide(dcg, jnp.broadcast_to(best, dcg.shape)))
  return sum(expected, jnp.zeros(())) / len(expected)


def settled(ranking: Array, grades: Array, count: Array) -> jax.Array:
  """Ranks at which all candidates left have the same grade: bool [..., K].

  The ranking reward no longer depends on placements from there on. A gate or a
  cost may still do; the caller must consider it, see `repeats`. True at ranks
  beyond the count.
  """
  grade, left = _left(ranking, grades, count)
  spread = jnp.broadcast_to(grade[..., None, :], left.shape)
  high = jnp.max(jnp.where(left, spread, -jnp.inf), axis=-1)
  low = jnp.min(jnp.where(left, spread, jnp.inf), axis=-1)
  return high <= low


def repeats(ranking: Array, incoming: Array, count: Array) -> jax.Array:
  """Ranks before which an answer repeats the incoming order: bool [..., K].

  A gate against copies is still undecided there. Entry t is for the first t
  placements.

  Example: incoming A B C D, the answer A B D C: True at ranks 0, 1 and 2.
  """
  same = ranking == parsing.incoming_ranking(incoming, count)
  before = jnp.cumprod(same.astype(jnp.int32), axis=-1)
  return jnp.roll(before, 1, axis=-1).at[..., 0].set(1) > 0


def placement_advantage(
  total: Array,
  expected: Array,
  is_settled: Array,
  *,
  normalize: bool,
  std_floor: float = 1e-3,
) -> jax.Array:
  """Advantage of each placement over its group's at the same rank.

  A_t = (R - expected_t) - mean over the group's rollouts not settled at t, 0
  where settled; at t = 0 this is the group's own advantage.

  `total` [..., G] are whole rewards, `expected` [..., G, K] comes from
  `expected_if_shuffled`, and `is_settled` marks where nothing can change the
  reward. `normalize` divides by the standard deviation over the unsettled
  entries of the group, but at least `std_floor`, as DAPO does. Returns float32
  [..., G, K].
  """
  open_ = ~is_settled
  value = jnp.asarray(total, jnp.float32)[..., None] - expected
  mean = masking.masked_mean(value, open_, axis=-2)
  centered = masking.keep(value - mean[..., None, :], open_)
  if not normalize:
    return centered
  flat = (*centered.shape[:-2], -1)
  variance = masking.masked_mean(
    jnp.square(centered).reshape(flat), open_.reshape(flat), axis=-1
  )
  scale = jnp.maximum(jnp.sqrt(variance), std_floor)
  return centered / scale[..., None, None]


def spread_over_tokens(
  advantage: Array,
  by_placement: Array,
  length: Array,
  count: Array,
  valid: Array,
  size: int,
) -> jax.Array:
  """Gives each token of an answer the advantage of its placement.

  A valid completion ends in `count` slots and <eos>. The tokens before them,
  the <eos>, and every token of an invalid completion get the rollout's
  `advantage`.

  `by_placement` is float32 [..., K], `length` int [...] in tokens, `size` T.
  Returns float32 [..., T].
  """
  time = masking.index_like((*jnp.shape(length), size))
  rank = time - (length - 1 - count)[..., None]
  inside = (rank >= 0) & (rank < count[..., None]) & valid[..., None]
  K = by_placement.shape[-1]
  placed = jnp.take_along_axis(by_placement, jnp.clip(rank, 0, K - 1), axis=-1)
  return jnp.where(inside, placed, advantage[..., None])


def _left(
  ranking: Array, grades: Array, count: Array
) -> tuple[jax.Array, jax.Array]:
  """Grades by rank [..., K], and the candidates left at each rank [..., K, K].

  Left are the real candidates that stand at a rank or later; grades at padding
  are 0.
  """
  grades, ranking = jnp.asarray(grades, jnp.float32), jnp.asarray(ranking)
  real = masking.length_mask(count, ranking.shape[-1])
  grade = masking.keep(jnp.take_along_axis(grades, ranking, -1), real)
  shape = (*grade.shape, grade.shape[-1])
  later = masking.index_like(shape) >= masking.index_like(shape, -2)
  return grade, later & real[..., None, :]


def _rest(values: Array) -> jax.Array:
  """Sum over this rank and the later ones."""
  return jnp.flip(jnp.cumsum(jnp.flip(values, -1), axis=-1), -1)
