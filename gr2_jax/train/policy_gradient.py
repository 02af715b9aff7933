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

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from gr2_jax.models import transformer
from gr2_jax.ops import kl, losses, masking, parsing
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import policy, sampling
from gr2_jax.train import learner

DIVERGENCES = (*kl.KINDS, *kl.EXACT)


@flax.struct.dataclass
class PolicyBatch:
  """Rollouts with their advantages; what an option needs is None without it."""

  prompt: jax.Array  # int32 [P, Tp]
  prompt_length: jax.Array  # int32 [P]
  facts: Any  # of the grammar; of a ranking: int32 [P], candidates
  tokens: jax.Array  # int32 [P, G, Tc]
  length: jax.Array  # int32 [P, G]
  logp: jax.Array  # float32 [P, G, Tc], of the policy that sampled
  advantage: jax.Array  # float32 [P, G], or [P, G, Tc]
  use: jax.Array  # bool [P], groups that count
  slots: jax.Array | None = None  # int32 [P, K], slot tokens in the prompt
  importance: jax.Array | None = None  # float32 [P, G, Tc]
  # What the teacher reads, where it is not what the policy reads:
  teacher_prompt: jax.Array | None = None  # int32 [P, Tq]
  teacher_prompt_length: jax.Array | None = None  # int32 [P]
  teacher_slots: jax.Array | None = None  # int32 [P, K], in that prompt
  # What it says, in the form that the divergence asks for (`distillation`):
  teacher_logp: jax.Array | None = None  # float32 [P, G, Tc], of the tokens
  teacher_knows: jax.Array | None = None  # bool [P, G, Tc], which it has
  teacher_hidden: jax.Array | None = None  # float [P, G, Tc, D']
  teacher_scores: jax.Array | None = None  # float32 [P, K], of the slots
  teacher_readout: jax.Array | None = None  # likewise, not sharpened


def score(
  model: transformer.TransformerConfig,
  params: Any,
  batch: PolicyBatch,
  grammar: grammar_lib.Grammar,
  config: sampling.SamplingOptions,
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
  _, hidden = _encode(model, params, batch)
  return _score(params, hidden, batch, grammar, config)


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
  config: sampling.SamplingOptions,
  teacher: learner.TeacherStates | None = None,
  divergence: str = 'reverse',
) -> learner.TokenScores:
  """`score` from the completions' hidden states, beside a teacher's."""
  return learner.score_tokens(
    params,
    hidden_PxGxTxD,
    batch.tokens,
    grammar,
    temperature=config.temperature,
    constraint=constraint(batch, grammar, config),
    teacher=teacher,
    divergence=divergence,
  )


def constraint(
  batch: PolicyBatch,
  grammar: grammar_lib.Grammar,
  config: sampling.SamplingOptions,
) -> tuple[Any, Any] | None:
  """What the sampler's mask followed from; None where it had none."""
  if not config.constrained:
    return None
  progress = grammar_lib.replay(
    grammar, batch.facts, batch.tokens, config.thinking
  )
  return progress, batch.facts


def make_loss(
  model: transformer.TransformerConfig,
  grammar: grammar_lib.Grammar,
  config: sampling.SamplingOptions,
  *,
  clip_low: float,
  clip_high: float,
  average: losses.Average = 'token',
  kl_weight: float = 0.0,
  divergence: str = 'k3',
  readout_weight: float = 0.0,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """The clipped surrogate, plus `kl_weight` times a divergence of a teacher.

  Groups with `use == False` have no say in the surrogate: they compare nothing.
  The divergence counts on every token that was written and that the teacher
  can speak about.

  Args:
    model: the decoder.
    grammar: token ids.
    config: the sampler's.
    clip_low: how far a ratio may fall.
    clip_high: how far a ratio may rise.
    average: what sums over tokens are divided by.
    kl_weight: above 0, the batch must hold what the divergence asks for.
    divergence: of `DIVERGENCES`: on the sampled tokens, where the batch has
      `teacher_logp`; over the vocabulary, where it has `teacher_hidden`; in
      answers over the candidates still left, where it has `teacher_scores`.
    readout_weight: of KL(teacher || policy) between the softmax of their scores
      at the slots; above 0, the batch must hold `slots` and `teacher_readout`.

  Returns:
    `(params, batch, rows, known) -> (loss, metrics)`, the last two of
    `learner.TeacherStates`, read with `teacher_hidden` alone. `sampler_gap` is
    the largest difference between the batch's log-probability of a token and
    the one now: on the first update of a batch, what parts sampler and learner.
  """

  def loss_fn(params, batch: PolicyBatch, rows=None, known=None):
    teacher = None
    if kl_weight and batch.teacher_hidden is not None:
      teacher = learner.TeacherStates(batch.teacher_hidden, rows, known)
    prompt, hidden = _encode(model, params, batch)
    scores = _score(params, hidden, batch, grammar, config, teacher, divergence)
    written = masking.length_mask(batch.length, batch.tokens.shape[-1])
    total, watches = losses.clipped_surrogate(
      scores.logp,
      batch.logp,
      batch.advantage,
      written & batch.use[:, None, None],
      clip_low=clip_low,
      clip_high=clip_high,
      importance=batch.importance,
      average=average,
    )
    loss = total.mean()
    metrics = {name: found.mean() for name, found in watches.items()}
    if kl_weight:
      apart, counts = _apart(
        scores, batch, written, grammar, config, divergence
      )
      teacher_kl = losses.average_tokens(apart, counts, average).mean()
      loss += kl_weight * teacher_kl
      metrics['teacher_kl'] = teacher_kl
    if readout_weight:
      readout_kl = _readout_apart(params, prompt, batch).mean()
      loss += readout_weight * readout_kl
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
  stage,
  optimizer: optax.GradientTransformation,
  kl_weight: float = 0.0,
) -> Callable[..., tuple[learner.TrainState, dict[str, jax.Array]]]:
  """Compiles the update of a stage whose policy learns from its own rollouts.

  Args:
    spec: tokens, shapes, and what of the parameters is trained.
    sampler: how batches are sampled.
    stage: section `rl` or `opd`: clip_low, clip_high, average, kl_kind, and
      readout_weight where there is a teacher.
    optimizer: of `learner.make_optimizer`.
    kl_weight: of the teacher; 0 without one.

  Returns:
    `(state, frozen, batch, *said) -> (state, metrics)`, `said` what the
    teacher says of its vocabulary; the old state is donated.
  """
  loss_fn = make_loss(
    spec.model,
    grammar,
    sampler,
    clip_low=stage.clip_low,
    clip_high=stage.clip_high,
    average=stage.average,
    kl_weight=kl_weight,
    divergence=stage.kl_kind,
    readout_weight=stage.get('readout_weight', 0.0),
  )
  return learner.make_update(spec.adapters.wrap(loss_fn), optimizer)


def _apart(
  scores: learner.TokenScores,
  batch: PolicyBatch,
  written: jax.Array,
  grammar: grammar_lib.Grammar,
  config: sampling.SamplingOptions,
  divergence: str,
) -> tuple[jax.Array, jax.Array]:
  """Divergence of each token [P, G, Tc], and where it counts."""
  if batch.teacher_scores is not None:
    progress = grammar_lib.replay(
      grammar, batch.facts, batch.tokens, config.thinking
    )
    left = parsing.answer_mask(progress.emitted, batch.facts[:, None, None])
    left = left[..., :-1] & progress.answering[..., None]
    counts = jnp.any(left, axis=-1)
    apart = kl.divergence(
      divergence,
      scores.slot_logp,
      jnp.broadcast_to(
        batch.teacher_scores[:, None, None], scores.slot_logp.shape
      ),
      left,
    )
    if batch.teacher_hidden is not None:
      apart = jnp.where(progress.answering, apart, scores.divergence)
      counts |= ~progress.answering
    return apart, written & counts
  if batch.teacher_hidden is not None:
    return scores.divergence, written
  if batch.teacher_knows is not None:
    written &= batch.teacher_knows
  apart = kl.sampled_kl(
    masking.keep(scores.logp, written),
    masking.keep(batch.teacher_logp, written),
    kind=divergence,
  )
  return apart, written


def _readout_apart(
  params: Any, prompt_PxTxD: jax.Array, batch: PolicyBatch
) -> jax.Array:
  """KL(teacher || policy) of the read-outs' softmax over candidates: [P]."""
  scores = transformer.slot_scores(params, prompt_PxTxD, batch.slots)
  real = masking.length_mask(batch.facts, scores.shape[-1])
  return kl.divergence('forward', scores, batch.teacher_readout, real)


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
