"""Losses on log-probabilities: policy gradient, tokens, and whole rankings.

Each returns a `Total(sum, count)` over all leading axes, to be divided once,
after accumulation and sharding. Axis letters: T time, K candidates (in
`[..., K, K]` the first is the rank, the second the presented index).
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from gr2_jax.ops import masking

Average = Literal['token', 'sequence', 'fixed']
AVERAGES = ('token', 'sequence', 'fixed')
LOG_RATIO_LIMIT = 20.0  # exp(20) is finite in float32 and far beyond any clip.
EXCLUDED = (
  -1e30
)  # A logit without mass; finite, so that rows of it have no NaN.


def clipped_surrogate(
  logp: chex.Array,
  old_logp: chex.Array,
  advantages: chex.Array,
  mask: chex.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.28,
  importance: chex.Array | None = None,
  average: Average = 'token',
) -> tuple[masking.Total, dict[str, masking.Total]]:
  """The clipped objective of DAPO, negated (Eq. 9), and its variations.

  - w_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A), averaged over
  tokens, with r_t = exp(logp_t - old_logp_t). The log-ratio is held within 20
  of 0, so a stray token is large but finite.

  Args:
    logp: [..., T], log-probability of the sampled tokens now.
    old_logp: [..., T], when they were sampled; no gradient flows into it.
    advantages: [...], one per rollout, or [..., T], one per token.
    mask: bool [..., T], the tokens that count.
    clip_low: how far a ratio may fall.
    clip_high: how far a ratio may rise.
    importance: [..., T], weights w of the tokens, of `importance_weights`;
      None is 1 everywhere. No gradient flows into it.
    average: of the tokens' losses, see `average_tokens`.

  Returns:
    (loss, diagnostics). The diagnostics are Totals over tokens:
    `clip_fraction`, tokens at which the clip took the gradient away; `ratio`;
    and `approx_kl`, k3 of KL(old || now).
  """
  chex.assert_equal_shape([logp, old_logp, mask])
  gain = jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))
  if gain.ndim == jnp.ndim(logp) - 1:
    gain = gain[..., None]
  chex.assert_is_broadcastable(gain.shape, jnp.shape(logp))
  gap = masking.keep(logp, mask) - jax.lax.stop_gradient(
    masking.keep(old_logp, mask)
  )
  gap = jnp.clip(gap, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
  ratio = jnp.exp(gap)
  gain = jnp.where(mask, gain, 0.0)
  bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  objective = jnp.minimum(ratio * gain, bounded * gain)
  if importance is not None:
    chex.assert_equal_shape([logp, importance])
    objective *= jax.lax.stop_gradient(masking.keep(importance, mask))
  clipped = ((gain > 0) & (ratio > 1.0 + clip_high)) | (
    (gain < 0) & (ratio < 1.0 - clip_low)
  )
  diagnostics = {
    'clip_fraction': masking.masked_sum(clipped, mask),
    'ratio': masking.masked_sum(ratio, mask),
    'approx_kl': masking.masked_sum(ratio - 1.0 - gap, mask),
  }
  diagnostics = jax.lax.stop_gradient(diagnostics)
  return average_tokens(-objective, mask, average), diagnostics


def average_tokens(
  values: chex.Array, mask: chex.Array, kind: Average = 'token'
) -> masking.Total:
  """What the sum over a batch's tokens is divided by.

  * `token` (DAPO): the batch's tokens, so that long rollouts weigh more;
  * `sequence` (GRPO, RLOO): each rollout's own tokens, then the rollouts;
  * `fixed` (Dr. GRPO): rollouts times their budget T, so that a token weighs
    the same however long its rollout is.

  Example: rollouts of tokens (3) and (0, 1, 2), T = 3. Token: 6 / 4;
  sequence: (3 + 1) / 2; fixed: 6 / (2 * 3).

  Args:
    values: [..., T].
    mask: bool [..., T]; a rollout without a True counts nowhere.
    kind: one of `AVERAGES`.

  Returns:
    Total over all axes.

  Raises:
    ValueError: if the kind has no such name.
  """
  if kind == 'token':
    return masking.masked_sum(values, mask)
  rollouts = jnp.any(mask, axis=-1)
  own = masking.masked_sum(values, mask, axis=-1)
  match kind:
    case 'sequence':
      return masking.masked_sum(own.mean(), rollouts)
    case 'fixed':
      return masking.masked_sum(own.sum / jnp.shape(values)[-1], rollouts)
  raise ValueError(f'average is {kind!r}; it must be one of {AVERAGES}')


def importance_weights(
  logp: chex.Array, sampler_logp: chex.Array, mask: chex.Array, *, cap: float
) -> jax.Array:
  """Truncated importance weights: min(p_learner / p_sampler, cap).

  They mend the bias of a sampler whose numerics (or weights) differ from the
  learner's. Example: log-probabilities -1 and -1.5, cap 2: exp(0.5) = 1.6487;
  -1 and -2: e = 2.7183, truncated to 2.

  Args:
    logp: [..., T], the learner's, with the parameters that sampled.
    sampler_logp: [..., T], the sampler's.
    mask: bool [..., T].
    cap: the largest weight.

  Returns:
    float32 [..., T], 0 where masked; no gradient flows through it.

  Raises:
    ValueError: unless cap >= 1.
  """
  if cap < 1:
    raise ValueError(f'importance cap is {cap}: it must be 1 or more')
  gap = masking.keep(logp, mask) - masking.keep(sampler_logp, mask)
  ratio = jnp.exp(jnp.clip(gap, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
  return jax.lax.stop_gradient(masking.keep(jnp.minimum(ratio, cap), mask))


def token_cross_entropy(logp: chex.Array, weights: chex.Array) -> masking.Total:
  """Weighted negative log-likelihood (Eq. 3).

  The weight carries both the mask and the share of a part of the answer:
  l_r on reasoning, l_o on the ranking, 0 on prompt and padding.

  Args:
    logp: [..., T], log-probability of each target token.
    weights: [..., T], >= 0; `logp` is not read where it is 0.

  Returns:
    Total: - sum w logp, and sum w.
  """
  weights = jnp.asarray(weights, jnp.float32)
  kept = masking.keep(logp, weights > 0)
  return masking.Total(-jnp.sum(weights * kept), jnp.sum(weights))


def listwise_softmax(
  scores: chex.Array, grades: chex.Array, count: chex.Array
) -> masking.Total:
  """Softmax cross-entropy of candidate scores with several positives.

  - sum_j (g_j / sum g) log softmax(scores)_j over the real candidates, per
  slate.

  Args:
    scores: [..., K]; padding may hold anything.
    grades: [..., K], used as weights, negative ones as 0.
    count: int [...].

  Returns:
    Total: the sum over slates, and the number of slates with a positive; the
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


def plackett_luce(
  scores: chex.Array, ranking: chex.Array, count: chex.Array
) -> masking.Total:
  """Negative log-likelihood of a whole order under Plackett-Luce.

  sum_t [log sum_{j left at t} exp(s_j) - s_(t)], s_(t) the score of the
  candidate put at rank t (ListMLE).

  Args:
    scores: [..., K].
    ranking: int [..., K], the order to be likely.
    count: int [...].

  Returns:
    Total: the sum over slates and ranks, and the number of real ranks.
  """
  chex.assert_equal_shape([scores, ranking])
  real = masking.length_mask(count, jnp.shape(scores)[-1])
  kept = masking.keep(scores, real)
  left = remaining(ranking, count)
  partition = jax.nn.logsumexp(_spread(kept, left), axis=-1)
  taken = jnp.take_along_axis(kept, jnp.asarray(ranking), axis=-1)
  return masking.masked_sum(partition - taken, real)


def remaining(ranking: chex.Array, count: chex.Array) -> jax.Array:
  """Candidates not yet placed when each rank is filled.

  Args:
    ranking: int [..., K].
    count: int [...].

  Returns:
    bool [..., K, K]: at rank t, candidate j is real and stands at t or later.
    All False at ranks beyond the count.
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
  teacher_scores: chex.Array,
  ranking: chex.Array,
  count: chex.Array,
  *,
  temperature: float = 1.0,
) -> jax.Array:
  """Soft targets: at each rank, softmax of the scores of those remaining.

  Args:
    teacher_scores: [..., K].
    ranking: int [..., K], the order in which the answer places candidates.
    count: int [...].
    temperature: divides the scores; small makes the targets hard.

  Returns:
    float32 [..., K, K], rows sum to 1 at real ranks and to 0 beyond.
  """
  chex.assert_equal_shape([teacher_scores, ranking])
  left = remaining(ranking, count)
  real = masking.length_mask(count, jnp.shape(ranking)[-1])
  scores = masking.keep(teacher_scores, real) / temperature
  soft = jax.nn.softmax(_spread(scores, left), axis=-1)
  return jnp.where(left, soft, 0.0)


def positive_targets(
  grades: chex.Array, ranking: chex.Array, count: chex.Array
) -> jax.Array:
  """Multi-positive targets: at each rank, the positives remaining.

  Args:
    grades: [..., K], used as weights.
    ranking: int [..., K], the order in which the answer places candidates.
    count: int [...].

  Returns:
    float32 [..., K, K]: rows sum to 1 while a positive remains; rows of zeros,
    which `answer_cross_entropy` does not count, once all are placed.
  """
  chex.assert_equal_shape([grades, ranking])
  left = remaining(ranking, count)
  grades = jnp.broadcast_to(jnp.asarray(grades)[..., None, :], left.shape)
  weights = jnp.maximum(masking.keep(grades, left), 0.0)
  mass = jnp.sum(weights, axis=-1, keepdims=True)
  return masking.divide(weights, jnp.broadcast_to(mass, weights.shape))


def answer_cross_entropy(
  logp: chex.Array, targets: chex.Array
) -> masking.Total:
  """Distils soft targets into the positions of the answer.

  - sum_t sum_j target_tj logp_tj.

  Args:
    logp: [..., K, K], log-probability at rank t of the slot of candidate j.
      Not read where the target is 0, so it may be -inf there.
    targets: [..., K, K], from `teacher_targets` or `positive_targets`.

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
  lengths: chex.Array, *, max_length: int, buffer: int
) -> jax.Array:
  """DAPO's soft punishment of long completions, in tokens.

  0 up to max_length - buffer, then falling by 1 / buffer a token to -1 at
  max_length, and -1 beyond.

  Args:
    lengths: int [...], tokens of each completion.
    max_length: tokens at which the penalty is full.
    buffer: tokens over which it grows.

  Returns:
    float32 [...] in [-1, 0], to be added to the reward.

  Raises:
    ValueError: unless 0 < buffer <= max_length.
  """
  if not 0 < buffer <= max_length:
    raise ValueError(
      f'buffer={buffer} must lie within 1..max_length={max_length}'
    )
  over = jnp.asarray(lengths, jnp.float32) - (max_length - buffer)
  return -jnp.clip(over / buffer, 0.0, 1.0)


def _spread(scores, left):
  """Scores [..., K] at every rank, those not left excluded: [..., K, K]."""
  wide = jnp.broadcast_to(scores[..., None, :], left.shape)
  return jnp.where(left, wide, EXCLUDED)
