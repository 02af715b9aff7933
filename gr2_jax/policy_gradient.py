"""The policy gradient of RL: DAPO (Eq. 8-9), and its relatives as options.

| algorithm | advantage | average |
|---|---|---|
| DAPO | `dapo` | `token` |
| GRPO | `grpo` | `sequence` |
| Dr. GRPO | `dr_grpo` | `fixed` |
| RLOO | `rloo` | `sequence` |

Axes: P prompts, G group, T completion time.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from gr2_jax import learner, sampling
from gr2_jax.models import transformer
from gr2_jax.ops import kl, losses, masking


@flax.struct.dataclass
class PolicyBatch:
  """Rollouts with their advantages; what an option needs is None without it."""

  prompt: jax.Array  # int32 [P, Tp]
  prompt_length: jax.Array  # int32 [P]
  count: jax.Array  # int32 [P]
  tokens: jax.Array  # int32 [P, G, Tc]
  length: jax.Array  # int32 [P, G]
  logp: jax.Array  # float32 [P, G, Tc], of the policy that sampled
  advantage: jax.Array  # float32 [P, G], or [P, G, Tc]
  use: jax.Array  # bool [P], groups that count
  importance: jax.Array | None = None  # float32 [P, G, Tc]
  reference_logp: jax.Array | None = None  # float32 [P, G, Tc]


def score(
  model: transformer.TransformerConfig,
  params: Any,
  batch: PolicyBatch,
  grammar: sampling.Grammar,
  config: sampling.SamplingConfig,
) -> learner.TokenScores:
  """Scores rollouts under any parameters, as the sampler would.

  Args:
    model: the decoder.
    params: unboxed parameters.
    batch: rollouts.
    grammar: token ids.
    config: the sampler's: the same temperature and the same masks.

  Returns:
    TokenScores; entries beyond a rollout's length mean nothing.
  """
  hidden, prefix = transformer.encode_prompt(
    model, params, batch.prompt, batch.prompt_length
  )
  hidden = transformer.completion_hidden(
    model, params, hidden, prefix, batch.tokens
  )
  constraint = None
  if config.constrained:
    progress = sampling.replay(grammar, batch.tokens, config.thinking)
    constraint = (progress, batch.count)
  return learner.score_tokens(
    params,
    hidden,
    batch.tokens,
    grammar,
    temperature=config.temperature,
    constraint=constraint,
  )


def make_loss(
  model: transformer.TransformerConfig,
  grammar: sampling.Grammar,
  config: sampling.SamplingConfig,
  *,
  clip_low: float,
  clip_high: float,
  average: losses.Average = 'token',
  kl_weight: float = 0.0,
) -> Callable[[Any, PolicyBatch], tuple[jax.Array, dict[str, jax.Array]]]:
  """The clipped surrogate, plus `kl_weight` times KL(policy || reference).

  Groups with `use == False` count nowhere. The KL is k3 on the sampled tokens.

  Args:
    model: the decoder.
    grammar: token ids.
    config: the sampler's.
    clip_low: how far a ratio may fall.
    clip_high: how far a ratio may rise.
    average: what the sum over tokens is divided by.
    kl_weight: above 0, the batch must hold `reference_logp`.

  Returns:
    `(params, batch) -> (loss, metrics)`; `sampler_gap` is the largest
    difference between the batch's log-probability of a token and the one now:
    on the first update of a batch, what parts sampler and learner.
  """

  def loss_fn(params, batch: PolicyBatch):
    scores = score(model, params, batch, grammar, config)
    written = masking.length_mask(batch.length, batch.tokens.shape[-1])
    mask = written & batch.use[:, None, None]
    total, watches = losses.clipped_surrogate(
      scores.logp,
      batch.logp,
      batch.advantage,
      mask,
      clip_low=clip_low,
      clip_high=clip_high,
      importance=batch.importance,
      average=average,
    )
    loss = total.mean()
    metrics = {name: found.mean() for name, found in watches.items()}
    if kl_weight:
      apart = kl.sampled_kl(
        masking.keep(scores.logp, mask),
        masking.keep(batch.reference_logp, mask),
      )
      reference_kl = losses.average_tokens(apart, mask, average).mean()
      loss += kl_weight * reference_kl
      metrics['reference_kl'] = reference_kl
    gap = jnp.abs(masking.keep(scores.logp - batch.logp, written))
    metrics |= {
      'entropy': masking.masked_mean(scores.entropy, written),
      'sampler_gap': gap.max(),
    }
    return loss, metrics

  return loss_fn


def top_up(pool: PolicyBatch, fresh: PolicyBatch) -> PolicyBatch:
  """Replaces groups that do not count by fresh ones that do.

  Args:
    pool: P groups.
    fresh: any number of groups.

  Returns:
    P groups: those of the pool that count, then fresh ones that count, then,
    where both are too few, some that do not. The order within each is kept.
  """
  P = pool.use.shape[0]
  joined = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), pool, fresh)
  order = jnp.argsort(~joined.use, stable=True)[:P]
  return jax.tree.map(lambda x: x[order], joined)


def minibatches(
  batch: PolicyBatch, epochs: int, parts: int, key: jax.Array
) -> list[PolicyBatch]:
  """Splits a batch anew in each epoch: `epochs * parts` batches.

  Args:
    batch: P groups; `parts` divides P.
    epochs: how often each group is seen.
    parts: updates an epoch.
    key: of the order; one update on the whole batch keeps the batch's.
  """
  if epochs * parts == 1:
    return [batch]
  P = batch.use.shape[0]
  found = []
  for epoch in range(epochs):
    order = jax.random.permutation(jax.random.fold_in(key, epoch), P)
    for part in order.reshape(parts, P // parts):
      found.append(jax.tree.map(lambda x: x[part], batch))  # noqa: B023
  return found
