"""The policy gradient: DAPO (Eq. 8-9), its relatives, and distillation (Eq. 4).

The loss is a clipped surrogate of group advantages plus a divergence of the
policy from a teacher: in RL its own start, if any; in on-policy distillation a
better policy.

| algorithm | advantage | average |
|---|---|---|
| DAPO | `dapo` | `token` |
| GRPO | `grpo` | `sequence` |
| Dr. GRPO | `dr_grpo` | `fixed` |
| RLOO | `rloo` | `sequence` |

Axes: P prompts, G group, T completion time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

from gr2_jax.models import transformer
from gr2_jax.ops import advantages, kl, losses, masking
from gr2_jax.pipeline import options as options_lib
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import policy, sampling
from gr2_jax.train import learner

CHOICES = {
  'advantage': advantages.KINDS,
  'average': losses.AVERAGES,
  'kl_kind': (*kl.KINDS, *kl.EXACT),
}


@dataclasses.dataclass(frozen=True)
class PolicyGradientOptions:
  """Fields of a section whose policy learns from its own rollouts."""

  batch_size: int  # P, prompts of a step
  refill_size: int  # prompts that replace groups without variance, at a time
  refills: int  # replacements in a step, at most
  advantage: advantages.Kind
  clip_low: float  # how far a probability ratio may fall
  clip_high: float  # how far it may rise
  average: losses.Average  # the divisor of sums over tokens
  epochs: int  # uses of each group
  minibatches: int  # updates in an epoch
  importance_cap: float  # of learner over sampler, truncated; 0: no weights
  kl_weight: float  # of the divergence from the teacher
  kl_kind: str  # on sampled tokens: k1 k2 k3; exact: reverse forward
  readout_weight: float = 0.0  # of KL(teacher || policy) of their read-outs

  @classmethod
  def from_config(cls, section: Any, name: str) -> 'PolicyGradientOptions':
    """Reads and checks a config section.

    Raises:
      ValueError: a field has no meaning; the message names it.
    """
    options = options_lib.read(cls, section)
    size, fresh = options.batch_size, options.refill_size
    if fresh < 1 or size % fresh:
      raise ValueError(
        f'{name}.refill_size={fresh} does not divide {name}.batch_size={size}'
      )
    if size % options.minibatches:
      raise ValueError(
        f'{name}.minibatches={options.minibatches} does not divide '
        f'{name}.batch_size={size}'
      )
    for field in ('kl_weight', 'readout_weight'):
      if getattr(options, field) < 0:
        raise ValueError(
          f'{name}.{field}={getattr(options, field)}: must not be below 0'
        )
    options_lib.check_choices(options, name, CHOICES)
    return options


@struct.dataclass
class PolicyBatch:
  """Rollouts with their advantages; fields of unused options are None."""

  prompt: jax.Array  # int32 [P, Tp]
  prompt_length: jax.Array  # int32 [P]
  constraint_inputs: Any  # of the grammar; of a ranking: int32 [P], candidates
  tokens: jax.Array  # int32 [P, G, Tc]
  length: jax.Array  # int32 [P, G]
  logp: jax.Array  # float32 [P, G, Tc], of the policy that sampled
  advantage: jax.Array  # float32 [P, G], or [P, G, Tc]
  use: jax.Array  # bool [P], groups that count
  slots: jax.Array | None = None  # int32 [P, K], slot tokens in the prompt
  importance: jax.Array | None = None  # float32 [P, G, Tc]
  # The teacher's prompt, where it differs from the policy's:
  teacher_prompt: jax.Array | None = None  # int32 [P, Tq]
  teacher_prompt_length: jax.Array | None = None  # int32 [P]
  teacher_slots: jax.Array | None = None  # int32 [P, K], in that prompt
  # Results of `Teacher.score`:
  teacher_scores: Any = None  # in the teacher's own form
  teacher_readout: jax.Array | None = None  # float32 [P, K]


class Teacher(Protocol):
  """A frozen policy that the trained one is held to; see `distillation`."""

  def score(self, batch: PolicyBatch) -> tuple[PolicyBatch, dict[str, Any]]:
    """The batch with the teacher's scores of its rollouts, and metrics."""
    ...

  @property
  def vocabulary(self) -> tuple[jax.Array, ...]:
    """(teacher_embedding, teacher_known), or nothing where it is not needed.

    The embedding may take gigabytes, so it is an argument of the update.
    """
    ...

  def states(
    self, batch: PolicyBatch, *vocabulary: jax.Array
  ) -> learner.TeacherStates | None:
    """States to compare over the vocabulary while the policy is scored."""
    ...

  def divergence(
    self, scores: learner.TokenScores, batch: PolicyBatch, written: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Divergence of each token, float32 [P, G, Tc], and where it counts."""
    ...


def score(
  model: transformer.TransformerConfig,
  params: Any,
  batch: PolicyBatch,
  grammar: grammar_lib.Grammar,
  sampler: sampling.SamplingOptions,
) -> learner.TokenScores:
  """Scores rollouts under any parameters, as their sampler would.

  Entries beyond a rollout's length mean nothing.
  """
  _, hidden = _encode(model, params, batch)
  return _score(params, hidden, batch, grammar, sampler)


def _encode(
  model: transformer.TransformerConfig, params: Any, batch: PolicyBatch
) -> tuple[jax.Array, jax.Array]:
  """Hidden states of prompts [P, Tp, D], and of completions [P, G, Tc, D]."""
  hidden, prefix = transformer.encode_prompt(
    model, params, batch.prompt, batch.prompt_length
  )
  return hidden, transformer.completion_hidden(
    model, params, hidden, prefix, batch.tokens
  )


def _score(
  params: Any,
  hidden_PxGxTxD: jax.Array,
  batch: PolicyBatch,
  grammar: grammar_lib.Grammar,
  sampler: sampling.SamplingOptions,
  teacher: learner.TeacherStates | None = None,
) -> learner.TokenScores:
  """`score` from the completions' hidden states, beside a teacher's."""
  return learner.score_tokens(
    params,
    hidden_PxGxTxD,
    batch.tokens,
    grammar,
    temperature=sampler.temperature,
    constraint=constraint(batch, grammar, sampler),
    teacher=teacher,
  )


def constraint(
  batch: PolicyBatch,
  grammar: grammar_lib.Grammar,
  sampler: sampling.SamplingOptions,
) -> tuple[Any, Any] | None:
  """The grammar's progress and inputs; None if the sampler had no mask."""
  if not sampler.constrained:
    return None
  progress = grammar_lib.replay(
    grammar, batch.constraint_inputs, batch.tokens, sampler.thinking
  )
  return progress, batch.constraint_inputs


def make_loss(
  model: transformer.TransformerConfig,
  grammar: grammar_lib.Grammar,
  sampler: sampling.SamplingOptions,
  options: PolicyGradientOptions,
  teacher: Teacher | None = None,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """The clipped surrogate, plus `kl_weight` times a divergence from a teacher.

  Groups with `use == False` do not count in the surrogate: all their rewards
  are equal. The divergence counts on every written token that the teacher can
  score. With a `readout_weight` the batch must hold `slots` and
  `teacher_readout`.

  Returns:
    `(params, batch, *teacher.vocabulary) -> (loss, metrics)`. The metric
    `sampler_gap` is the largest difference of the batch's log-probability of a
    token from the present one: on the first update of a batch, sampler against
    learner.
  """

  def loss_fn(params: Any, batch: PolicyBatch, *vocabulary: jax.Array):
    states = None
    if teacher is not None:
      states = teacher.states(batch, *vocabulary)
    prompt, hidden = _encode(model, params, batch)
    scores = _score(params, hidden, batch, grammar, sampler, states)
    written = masking.length_mask(batch.length, batch.tokens.shape[-1])
    total, totals = losses.clipped_surrogate(
      scores.logp,
      batch.logp,
      batch.advantage,
      written & batch.use[:, None, None],
      clip_low=options.clip_low,
      clip_high=options.clip_high,
      importance=batch.importance,
      average=options.average,
    )
    loss = total.mean()
    metrics = {name: metric.mean() for name, metric in totals.items()}
    if teacher is not None:
      divergence, counts = teacher.divergence(scores, batch, written)
      teacher_kl = losses.average_tokens(
        divergence, counts, options.average
      ).mean()
      loss += options.kl_weight * teacher_kl
      metrics['teacher_kl'] = teacher_kl
    if options.readout_weight:
      readout_kl = _readout_divergence(params, prompt, batch).mean()
      loss += options.readout_weight * readout_kl
      metrics['readout_kl'] = readout_kl
    gap = jnp.abs(masking.keep(scores.logp - batch.logp, written))
    metrics |= {
      'entropy': masking.masked_mean(scores.entropy, written),
      'sampler_gap': gap.max(),
    }
    return loss, metrics

  return loss_fn


def make_update(
  spec: policy.PolicySpec,
  grammar: grammar_lib.Grammar,
  sampler: sampling.SamplingOptions,
  options: PolicyGradientOptions,
  optimizer: optax.GradientTransformation,
  teacher: Teacher | None = None,
) -> Callable[..., tuple[learner.TrainState, dict[str, jax.Array]]]:
  """Compiles one update by `make_loss`; the old state is donated.

  Returns:
    `(state, frozen, batch, *teacher.vocabulary) -> (state, metrics)`.
  """
  loss_fn = make_loss(spec.model, grammar, sampler, options, teacher)
  return learner.make_update(spec.adapters.wrap(loss_fn), optimizer)


def make_importance_weights(
  model: transformer.TransformerConfig,
  grammar: grammar_lib.Grammar,
  sampler: sampling.SamplingOptions,
  cap: float,
) -> Callable[[Any, PolicyBatch], tuple[PolicyBatch, dict[str, Any]]]:
  """Compiles the importance weights of the learner against the sampler.

  Weights are at most `cap`; 0 leaves batches as they are.

  Returns:
    `(params, batch) -> (batch, metrics)`; the batch gets the learner's own
    log-probabilities beside the weights.
  """
  if not cap:
    return lambda params, batch: (batch, {})

  @jax.jit
  def importance_weights(params: Any, batch: PolicyBatch):
    logp = score(model, params, batch, grammar, sampler).logp
    written = masking.length_mask(batch.length, batch.tokens.shape[-1])
    importance = losses.importance_weights(logp, batch.logp, written, cap=cap)
    gap = jnp.abs(masking.keep(logp - batch.logp, written)).max()
    metrics = {
      'sampler_gap': gap,
      'importance': masking.masked_mean(importance, written),
    }
    batch = dataclasses.replace(batch, logp=logp, importance=importance)
    return batch, metrics

  return importance_weights


def _readout_divergence(
  params: Any, prompt_PxTxD: jax.Array, batch: PolicyBatch
) -> jax.Array:
  """KL(teacher || policy) of the read-outs' softmax over candidates: [P]."""
  slots, teacher_scores = batch.slots, batch.teacher_readout
  assert slots is not None  # `make_loss` requires both.
  assert teacher_scores is not None
  scores = transformer.slot_scores(params, prompt_PxTxD, slots)
  real = masking.length_mask(batch.constraint_inputs, scores.shape[-1])
  return kl.divergence('forward', scores, teacher_scores, real)


def replace_flat_groups(pool: PolicyBatch, fresh: PolicyBatch) -> PolicyBatch:
  """Replaces groups that do not count by fresh ones that do.

  Returns P groups, as many as the pool has: those of the pool that count, then
  fresh ones that count, then, if these are too few, some that do not. The order
  within each is kept.
  """
  P = pool.use.shape[0]
  joined = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), pool, fresh)
  order = jnp.argsort(~joined.use, stable=True)[:P]
  return jax.tree.map(lambda x: x[order], joined)


def minibatches(
  batch: PolicyBatch, epochs: int, parts: int, key: jax.Array
) -> list[PolicyBatch]:
  """Splits a batch anew in each epoch: `epochs * parts` batches.

  `parts` divides P. A single update on the whole batch keeps its order.
  """
  if epochs * parts == 1:
    return [batch]
  P = batch.use.shape[0]
  batches = []
  for epoch in range(epochs):
    order = jax.random.permutation(jax.random.fold_in(key, epoch), P)
    for part in order.reshape(parts, P // parts):
      batches.append(jax.tree.map(lambda x: x[part], batch))  # noqa: B023
  return batches
