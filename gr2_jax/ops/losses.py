"""Losses on log-probabilities: policy gradient, tokens, and whole rankings.

Each returns a `Total(sum, count)` over all leading axes, to be divided once,
after accumulation and sharding. Axis letters: T time, K candidates (in
`[..., K, K]` the first is the rank, the second the presented index).
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import Array, masking

Average = Literal['token', 'sequence', 'fixed']
AVERAGES = ('token', 'sequence', 'fixed')
LOG_RATIO_LIMIT = 20.0  # exp(20) is finite in float32 and far beyond any clip.
EXCLUDED = -1e30  # Logit without mass; finite, so that rows of it have no NaN.


def clipped_surrogate(
  logp: Array,
  old_logp: Array,
  advantages: Array,
  mask: Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.28,
  importance: Array | None = None,
  average: Average = 'token',
) -> tuple[masking.Total, dict[str, masking.Total]]:
  """The clipped objective of DAPO, negated (Eq. 9), and its variations.

  - w_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A), averaged over
  tokens, with r_t = exp(logp_t - old_logp_t). The log-ratio is held within 20
  of 0, so a stray token is large but finite.

  `logp` [..., T] are log-probabilities of the sampled tokens now, `old_logp`
  when they were sampled, and `importance` (None: 1) weights w of the tokens
  from `importance_weights`; no gradient flows into the last two. `advantages`
  are [...], one per rollout, or [..., T], one per token.

  Returns (loss, diagnostics). The diagnostics are Totals over tokens:
  `clip_fraction`, tokens whose gradient the clip removed; `ratio`; and
  `approx_kl`, k3 of KL(old || now).
  """
  chex.assert_equal_shape([logp, old_logp, mask])
  gain = jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))
  if gain.ndim == jnp.ndim(logp) - 1:
    gain = gain[..., None]
  chex.assert_is_broadcastable(gain.shape, jnp.shape(logp))
  old = jax.lax.stop_gradient(masking.keep(old_logp, mask))
  gap = masking.keep(logp, mask) - old
  gap = jnp.clip(gap, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
  ratio = jnp.exp(gap)
  gain = jnp.where(mask, gain, 0.0)
  bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  objective = jnp.minimum(ratio * gain, bounded * gain)
  if importance is not None:
    chex.assert_equal_shape([logp, importance])
    objective *= jax.lax.stop_gradient(masking.keep(importance, mask))
  clipped = (gain > 0) & (ratio > 1.0 + clip_high)
  clipped |= (gain < 0) & (ratio < 1.0 - clip_low)
  diagnostics = {
    'clip_fraction': masking.masked_sum(clipped, mask),
    'ratio': masking.masked_sum(ratio, mask),
    'approx_kl': masking.masked_sum(ratio - 1.0 - gap, mask),
  }
  diagnostics = jax.lax.stop_gradient(diagnostics)
  return average_tokens(-objective, mask, average), diagnostics


def average_tokens(
  values: Array, mask: Array, kind: Average = 'token'
) -> masking.Total:
  """Averages [..., T] over the tokens of a batch in one of three ways.

  The sum is divided by:

  * `token` (DAPO): the batch's tokens, so that long rollouts weigh more;
  * `sequence` (GRPO, RLOO): each rollout's own tokens, then the rollouts;
  * `fixed` (Dr. GRPO): rollouts times their budget T, so that a token weighs
    the same however long its rollout is.

  Example: rollouts of tokens (3) and (0, 1, 2), T = 3. Token: 6 / 4;
  sequence: (3 + 1) / 2; fixed: 6 / (2 * 3).

  A rollout without a True in its mask counts nowhere. Raises ValueError if the
  kind is unknown.
  """
  if kind == 'token':
    return masking.masked_sum(values, mask)
  rollouts = jnp.any(mask, axis=-1)
  sums = masking.masked_sum(values, mask, axis=-1)
  match kind:
    case 'sequence':
      return masking.masked_sum(sums.mean(), rollouts)
    case 'fixed':
      return masking.masked_sum(sums.sum / jnp.shape(values)[-1], rollouts)
  raise ValueError(f'average is {kind!r}; it must be one of {AVERAGES}')


def importance_weights(
  logp: Array, sampler_logp: Array, mask: Array, *, cap: float
) -> jax.Array:
  """Truncated importance weights: min(p_learner / p_sampler, cap).

  They correct the bias of a sampler whose numerics (or weights) differ from the
  learner's. Example: log-probabilities -1 and -1.5, cap 2: exp(0.5) = 1.6487;
  -1 and -2: e = 2.7183, truncated to 2.

  `logp` [..., T] is the learner's, under the parameters that sampled. Returns
  float32 [..., T], 0 where masked; no gradient flows through it. Raises
  ValueError unless cap >= 1.
  """
  if cap < 1:
    raise ValueError(f'importance cap is {cap}: it must be 1 or more')
  gap = masking.keep(logp, mask) - masking.keep(sampler_logp, mask)
  ratio = jnp.exp(jnp.clip(gap, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
  return jax.lax.stop_gradient(masking.keep(jnp.minimum(ratio, cap), mask))


def token_cross_entropy(logp: Array, weights: Array) -> masking.Total:
  """Weighted negative log-likelihood (Eq. 3): - sum w logp, and sum w.

  The weight is both the mask and the share of a part of the answer: l_r on
  reasoning, l_o on the ranking, 0 on prompt and padding. `logp` [..., T] is not
  read where its weight is 0.
  """
  weights = jnp.asarray(weights, jnp.float32)
  kept = masking.keep(logp, weights > 0)
  return masking.Total(-jnp.sum(weights * kept), jnp.sum(weights))


def listwise_softmax(
  scores: Array, grades: Array, count: Array
) -> masking.Total:
  """Softmax cross-entropy of candidate scores with several positives.

  - sum_j (g_j / sum g) log softmax(scores)_j over the real candidates, per
  slate. Negative grades count as 0.

  Returns the sum over slates, and the number of slates with a positive; the
  others contribute to neither.
  """
  chex.assert_equal_shape([scores, grades])
  real = masking.length_mask(count, jnp.shape(scores)[-1])
  logits = masking.keep(scores, real, EXCLUDED)
  logp = jax.nn.log_softmax(logits, axis=-1)
  weights = jnp.maximum(masking.keep(grades, real), 0.0)
  mass = jnp.sum(weights, axis=-1)
  loss = -masking.divide(jnp.sum(weights * logp, axis=-1), mass)
  return masking.masked_sum(loss, mass > 0)


def plackett_luce(scores: Array, ranking: Array, count: Array) -> masking.Total:
  """Negative log-likelihood of a whole order under Plackett-Luce.

  sum_t [log sum_{j left at t} exp(s_j) - s_(t)], s_(t) the score of the
  candidate at rank t (ListMLE).
  Returns the sum over slates and ranks, and the number of real ranks.
  """
  chex.assert_equal_shape([scores, ranking])
  real = masking.length_mask(count, jnp.shape(scores)[-1])
  kept = masking.keep(scores, real)
  left = remaining(ranking, count)
  partition = jax.nn.logsumexp(_spread(kept, left), axis=-1)
  taken = jnp.take_along_axis(kept, jnp.asarray(ranking), axis=-1)
  return masking.masked_sum(partition - taken, real)


def remaining(ranking: Array, count: Array) -> jax.Array:
  """Candidates not yet placed when each rank is filled.

  Returns bool [..., K, K]: at rank t, candidate j is real and stands at t or
  later; all False at ranks beyond the count.
  """
  chex.assert_type(ranking, int)
  ranking = jnp.asarray(ranking)
  size = ranking.shape[-1]
  place = jnp.argsort(ranking, axis=-1)
  shape = ranking.shape + (size,)
  real = masking.length_mask(count, size)
  later = place[..., None, :] >= masking.index_like(shape, -2)
  return later & real[..., None, :] & real[..., :, None]


def teacher_targets(
  teacher_scores: Array,
  ranking: Array,
  count: Array,
  *,
  temperature: float = 1.0,
) -> jax.Array:
  """Soft targets: at each rank, softmax of the scores of those remaining.

  `ranking` is the order in which the answer places candidates. `temperature`
  divides the scores; a small one makes the targets hard. Returns float32
  [..., K, K]; rows sum to 1 at real ranks and to 0 beyond.
  """
  chex.assert_equal_shape([teacher_scores, ranking])
  left = remaining(ranking, count)
  real = masking.length_mask(count, jnp.shape(ranking)[-1])
  scores = masking.keep(teacher_scores, real) / temperature
  soft = jax.nn.softmax(_spread(scores, left), axis=-1)
  return jnp.where(left, soft, 0.0)


def positive_targets(grades: Array, ranking: Array, count: Array) -> jax.Array:
  """Multi-positive targets: at each rank, the positives remaining, by grade.

  `ranking` is the order in which the answer places candidates. Returns float32
  [..., K, K]: rows sum to 1 while a positive remains, and are zeros, which
  `answer_cross_entropy` does not count, once all are placed.
  """
  chex.assert_equal_shape([grades, ranking])
  left = remaining(ranking, count)
  grades = jnp.broadcast_to(jnp.asarray(grades)[..., None, :], left.shape)
  weights = jnp.maximum(masking.keep(grades, left), 0.0)
  mass = jnp.sum(weights, axis=-1, keepdims=True)
  return masking.divide(weights, jnp.broadcast_to(mass, weights.shape))


def answer_cross_entropy(logp: Array, targets: Array) -> masking.Total:
  """Distils soft targets into the positions of the answer.

  - sum_t sum_j target_tj logp_tj.

  `logp` [..., K, K] is the log-probability at rank t of the slot of candidate
  j. It is not read where the target is 0, so it may be -inf there. The targets
  come from `teacher_targets` or `positive_targets`.

  Returns:
    Total: the sum over slates and ranks, and the number of ranks that have a
    target.
  """
  chex.assert_equal_shape([logp, targets])
  targets = jax.lax.stop_gradient(jnp.asarray(targets, jnp.float32))
  kept = masking.keep(logp, targets > 0)
  loss = -jnp.sum(targets * kept, axis=-1)
  return masking.masked_sum(loss, jnp.any(targets > 0, axis=-1))


def overlong_penalty(
  lengths: Array, *, max_length: int, buffer: int
) -> jax.Array:
  """DAPO's soft punishment of long completions, in tokens.

  0 up to max_length - buffer, then falling by 1 / buffer a token to -1 at
  max_length, and -1 beyond. Returns float32 [...], to be added to the reward.
  Raises ValueError unless 0 < buffer <= max_length.
  """
  if not 0 < buffer <= max_length:
    raise ValueError(f'buffer={buffer} is not in 1..max_length={max_length}')
  over = jnp.asarray(lengths, jnp.float32) - (max_length - buffer)
  return -jnp.clip(over / buffer, 0.0, 1.0)


def _spread(scores: Array, left: Array) -> jax.Array:
  """Scores [..., K] at every rank, those not left excluded: [..., K, K]."""
  wide = jnp.broadcast_to(scores[..., None, :], left.shape)
  return jnp.where(left, wide, EXCLUDED)
