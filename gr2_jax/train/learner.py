"""The learner of every language-model stage: state, losses, jitted update.

Prompts [P, Tp] and completions [P, G, Tc] are separate: a prompt is encoded
once and its G completions attend to it, exactly as in sampling. Logits exist
only at the positions that a loss reads, a chunk of time at a time.

Axes: P prompts, G group, T time, K candidates, V vocabulary, D model width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import optax
from flax import struct

from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.ops import kl, losses, masking
from gr2_jax.pipeline import options
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import sampling


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
  """The optimizer's fields of a config section."""

  steps: int
  learning_rate: float
  warmup: int  # steps
  weight_decay: float
  max_grad_norm: float

  @classmethod
  def from_config(cls, section: Any) -> 'OptimizerOptions':
    """Reads a config section."""
    return options.read(cls, section)


@struct.dataclass
class TrainState:
  """All that an update changes; randomness is a function of (seed, step)."""

  step: jax.Array  # int32 []
  params: Any  # unboxed
  opt_state: Any


@struct.dataclass
class Examples:
  """A supervised batch: several completions of each prompt.

  Where `rank_by_readout` is set, the update replaces the slots from `answer_at`
  on by the order of the model's own read-out. The loss there is the cross
  entropy to the read-out's softmax over the candidates that remain.
  """

  prompt: jax.Array  # int32 [P, Tp]
  prompt_length: jax.Array  # int32 [P]
  completion: jax.Array  # int32 [P, G, Tc]
  weights: jax.Array  # float32 [P, G, Tc], of each token in the loss
  answer_at: jax.Array  # int32 [P, G], position of the answer's first slot
  rank_by_readout: jax.Array  # bool [P, G]
  slots: jax.Array  # int32 [P, K], positions of the prompt's slot tokens
  grades: jax.Array  # float32 [P, K]
  count: jax.Array  # int32 [P], candidates; 0 without a slate
  segments: jax.Array | None = None  # int32 [P, G, Tc], of packed documents


@struct.dataclass
class TokenScores:
  """Results that need the vocabulary, at each completion token."""

  logp: jax.Array  # float32 [P, G, T], of the token
  entropy: jax.Array  # float32 [P, G, T], nats
  # float32 [P, G, T, K], of every slot token; None if the grammar has
  # `candidate_tokens`
  slot_logp: jax.Array | None
  divergence: jax.Array | None = None  # float32 [P, G, T], from a teacher


@struct.dataclass
class TeacherStates:
  """A teacher's hidden states of the same completions."""

  hidden: jax.Array  # float [P, G, T, D'], entry t predicts token t
  embedding: jax.Array  # float [V, D'], its output embedding, student's order
  known: jax.Array  # bool [V], tokens of the student that the teacher has
  # 'reverse', KL(student || teacher), or 'forward', the other way
  divergence: kl.Exact = struct.field(pytree_node=False, default='reverse')


def make_optimizer(
  config: OptimizerOptions, updates: int = 1
) -> optax.GradientTransformation:
  """AdamW, warm-up, then cosine decay to a tenth; gradients clipped by norm.

  A step makes `updates` updates of the parameters.
  """
  steps = config.steps * updates
  warmup = min(config.warmup * updates, max(1, steps // 2))
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    config.learning_rate,
    warmup,
    max(steps, warmup + 1),
    0.1 * config.learning_rate,
  )
  return optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm),
    optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay),
  )


def init_state(
  model: transformer.TransformerConfig,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  mesh: jax.sharding.Mesh,
) -> tuple[TrainState, Any]:
  """Initializes the state on the mesh; returns it and its shardings."""

  def init(key: jax.Array) -> TrainState:
    params = transformer.init_params(model, key)
    return TrainState(
      step=jnp.int32(0), params=params, opt_state=optimizer.init(params)
    )

  shardings = sharding.param_shardings(mesh, jax.eval_shape(init, key))
  state = jax.jit(lambda k: sharding.unbox(init(k)), out_shardings=shardings)(
    key
  )
  return state, shardings


def make_update(
  loss_fn: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Compiles `(state, *batch) -> (state, metrics)`, donating the old state."""

  def update(state: TrainState, *batch: Any):
    (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, *batch
    )
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    metrics = metrics | {
      'loss': loss,
      'gradient_norm': optax.tree.norm(gradients),
      'update_norm': optax.tree.norm(updates),
      'param_norm': optax.tree.norm(params),
    }
    return TrainState(state.step + 1, params, opt_state), metrics

  return jax.jit(update, donate_argnums=0)


def score_tokens(
  params: Any,
  hidden_PxGxTxD: jax.Array,
  tokens_PxGxT: jax.Array,
  grammar: grammar_lib.Grammar,
  *,
  temperature: float = 1.0,
  chunk: int = 32,
  constraint: tuple[Any, Any] | None = None,
  known: jax.Array | None = None,
  teacher: TeacherStates | None = None,
) -> TokenScores:
  """Log-probabilities, entropies and slot log-probabilities of completions.

  Logits are computed for `chunk` time steps at a time, and again in the
  backward pass, so that [P, G, T, V] never exists for long completions.

  Args:
    params: unboxed parameters.
    hidden_PxGxTxD: entry t predicts token t.
    tokens_PxGxT: the tokens.
    grammar: the slots' ids, and the mask where there is a constraint.
    temperature: the sampler's, above 0.
    chunk: time steps at a time, at most.
    constraint: the grammar's progress before each token [P, G, T] and its
      `constraint_inputs`; None where the sampler was unconstrained.
    known: bool [V], tokens to which the distributions are confined; None: all.
    teacher: distributions to compare with, at the same temperature, over the
      tokens that the teacher knows and the constraint allows.

  Returns:
    TokenScores in float32. `divergence` is 0 where the teacher knows none of
    the allowed tokens.
  """
  P, G, T, _ = hidden_PxGxTxD.shape
  n = -(-T // chunk)  # chunks of equal length, so that there is little padding
  chunk = -(-T // n)
  K, base = grammar.num_candidates, grammar.slot_base
  remaining = jnp.broadcast_to(T - jnp.arange(T), (P, G, T))
  progress, inputs = constraint or (None, None)
  candidates = grammar.candidate_tokens(inputs) if constraint else None
  rows = transformer.output_embedding(params)
  if candidates is not None:  # Each prompt needs some rows of the embedding.
    rows = rows[candidates]
    if known is not None:
      known = known[candidates][:, None, None]
    if teacher is not None:
      teacher = dataclasses.replace(
        teacher,
        embedding=teacher.embedding[candidates],
        known=teacher.known[candidates][:, None, None],
      )
  teacher_hidden = None if teacher is None else teacher.hidden
  parts = hidden_PxGxTxD, tokens_PxGxT, remaining, progress, teacher_hidden

  def split(x: jax.Array) -> jax.Array:
    padding = [(0, 0)] * x.ndim
    padding[2] = (0, n * chunk - T)
    return einops.rearrange(
      jnp.pad(x, padding), 'p g (n c) ... -> n p g c ...', n=n
    )

  @jax.checkpoint
  def score(part: Any) -> TokenScores:
    hidden, tokens, left, progress, teacher_hidden = part
    logits = sampling.logits_of(hidden, rows)
    allowed = known
    if progress is not None:
      allowed = grammar.allowed(inputs, progress, left, logits.shape[-1])
      allowed = allowed if known is None else allowed & known
    logps = sampling.distribution(logits, temperature, allowed)
    divergence = None
    if teacher is not None:
      teacher_logits = sampling.logits_of(teacher_hidden, teacher.embedding)
      support = jnp.broadcast_to(teacher.known, logits.shape)
      if allowed is not None:
        support &= allowed
      divergence = kl.divergence(
        teacher.divergence,
        logits.astype(jnp.float32) / temperature,
        teacher_logits.astype(jnp.float32) / temperature,
        support,
      )
    places, slot_logp = tokens, logps[..., base : base + K]
    if candidates is not None:
      same = candidates[:, None, None] == tokens[..., None]
      places, slot_logp = jnp.argmax(allowed & same, axis=-1), None
    return TokenScores(
      divergence=divergence,
      logp=jnp.take_along_axis(logps, places[..., None], -1)[..., 0],
      entropy=sampling.entropy(logps),
      slot_logp=slot_logp,
    )

  def join(x: jax.Array) -> jax.Array:
    return einops.rearrange(x, 'n p g c ... -> p g (n c) ...')[:, :, :T]

  return jax.tree.map(join, jax.lax.map(score, jax.tree.map(split, parts)))


def supervised_loss(
  model: transformer.TransformerConfig,
  grammar: grammar_lib.Grammar,
  *,
  listwise_weight: float,
  ranking_weight: float = 0.0,
  sharpness: float = 1.0,
) -> Callable[[Any, Examples], tuple[jax.Array, dict[str, jax.Array]]]:
  """Loss of mid-training and SFT.

  `L = sum w (-log p) / sum w` over completion tokens (Eq. 3: the weights carry
  l_r and l_o), plus `listwise_weight` times the softmax cross entropy of the
  read-out at the slot tokens, plus `ranking_weight` times the distillation of
  the read-out into the answers that are ranked by it.

  Args:
    model: the decoder.
    grammar: ids of the slots.
    listwise_weight: of the listwise loss.
    ranking_weight: of the distillation.
    sharpness: factor on the read-out's scores where they are the teacher.

  Returns:
    `(params, examples) -> (loss, metrics)`.
  """

  def loss_fn(params: Any, batch: Examples):
    hidden, prefix = transformer.encode_prompt(
      model, params, batch.prompt, batch.prompt_length
    )
    scores = transformer.slot_scores(params, hidden, batch.slots)
    listwise = losses.listwise_softmax(
      scores, 2.0**batch.grades - 1.0, batch.count
    )
    completion, targets = batch.completion, None
    if ranking_weight:
      teacher = jax.lax.stop_gradient(scores) * sharpness
      real = masking.length_mask(batch.count, scores.shape[-1])
      ranking = jnp.argsort(jnp.where(real, -teacher, jnp.inf), axis=-1)
      targets = losses.teacher_targets(teacher, ranking, batch.count)
      completion = jnp.where(
        batch.rank_by_readout[..., None],
        write_answer(
          completion, batch.answer_at, ranking, batch.count, grammar
        ),
        completion,
      )
    hidden = transformer.completion_hidden(
      model, params, hidden, prefix, completion, batch.segments
    )
    token_scores = score_tokens(params, hidden, completion, grammar)
    tokens = losses.token_cross_entropy(token_scores.logp, batch.weights)
    loss = tokens.mean() + listwise_weight * listwise.mean()
    metrics = {'token_loss': tokens.mean(), 'listwise_loss': listwise.mean()}
    if targets is not None:
      slot_logp = token_scores.slot_logp
      assert slot_logp is not None  # No mask leaves out slots here.
      at_answer = _at_answer(slot_logp, batch.answer_at)
      wanted = targets[:, None] * batch.rank_by_readout[..., None, None]
      ranking_loss = losses.answer_cross_entropy(at_answer, wanted).mean()
      loss += ranking_weight * ranking_loss
      metrics['ranking_loss'] = ranking_loss
    return loss, metrics

  return loss_fn


def write_answer(
  completion_PxGxT: jax.Array,
  answer_at_PxG: jax.Array,
  ranking_PxK: jax.Array,
  count_P: jax.Array,
  grammar: grammar_lib.Grammar,
) -> jax.Array:
  """Completions [P, G, T] with the slots of a ranking as their answer."""
  T, K = completion_PxGxT.shape[-1], ranking_PxK.shape[-1]
  rank = jnp.arange(T) - answer_at_PxG[..., None]
  inside = (rank >= 0) & (rank < count_P[:, None, None])
  slot = jnp.take_along_axis(
    jnp.broadcast_to(ranking_PxK[:, None], (*answer_at_PxG.shape, K)),
    jnp.clip(rank, 0, K - 1),
    axis=-1,
  )
  return jnp.where(inside, grammar.slot_base + slot, completion_PxGxT)


def _at_answer(
  slot_logp_PxGxTxK: jax.Array, answer_at_PxG: jax.Array
) -> jax.Array:
  """Slot log-probabilities at the K answer positions: [P, G, K, K]."""
  K, T = slot_logp_PxGxTxK.shape[-1], slot_logp_PxGxTxK.shape[-2]
  time = jnp.clip(answer_at_PxG[..., None] + jnp.arange(K), 0, T - 1)
  return jnp.take_along_axis(slot_logp_PxGxTxK, time[..., None], axis=2)
