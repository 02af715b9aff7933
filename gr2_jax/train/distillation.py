"""Teachers of rollouts: what they read, and how they score each token.

In on-policy distillation (Eq. 4) the student samples and the teacher only
scores. RL scores the same way where the policy is held to its own start. A
teacher may be any policy made from the same slates and semantic IDs, of any
size. Its view sets it above the student:

| view | the teacher |
|---|---|
| `same` | reads what the student reads: it is another, better policy |
| `privileged` | is given a positive, as `sft.privileged` trains it |
| `thinking` | reasons first, where the student answers at once |
| `readout` | ranks by the scores at its slot tokens; reasons as it does |
| `whole` | reads the whole context, where the student reads a form of it |

Three classes implement `policy_gradient.Teacher`: `SampledTokens` compares the
sampled tokens, `ExactVocabulary` whole distributions, and `ReadOut` answers
with the teacher's read-out.

Axes: P prompts, G group, T completion time, K candidates, V the student's
vocabulary, D' the teacher's width.
"""

import abc
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.models import transformer
from gr2_jax.ops import kl, masking, parsing
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import policy, sampling
from gr2_jax.prompts import examples, vocabulary
from gr2_jax.train import learner, policy_gradient
from gr2_jax.train.policy_gradient import PolicyBatch

VIEWS = ('same', 'privileged', 'thinking', 'readout', 'whole')


@dataclasses.dataclass(frozen=True)
class TeacherPolicy:
  """A frozen policy and its view of a student's rollouts."""

  policy: policy.Policy
  view: str  # one of VIEWS
  # int32 [V], its id of each of the student's tokens; -1 where it has none.
  # Such a token is not compared, and the teacher reads padding in its place.
  table: np.ndarray
  own_prompts: bool  # whether its prompts differ from the student's
  sharpness: float = 1.0  # factor on the scores of the view `readout`

  @functools.cached_property
  def vocabulary(self) -> tuple[jax.Array, jax.Array]:
    """`embedding` and `known` of `learner.TeacherStates`: [V, D'] and [V]."""
    embedding = transformer.output_embedding(self.policy.params)
    known = jnp.asarray(self.table >= 0)
    if np.array_equal(self.table, np.arange(len(embedding))):
      return embedding, known  # No copy of what may be gigabytes.
    return embedding[np.maximum(self.table, 0)], known


def self_teacher(
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  params: Any,
  view: str = 'same',
  sharpness: float = 1.0,
) -> TeacherPolicy:
  """A student's own start as its teacher."""
  table = np.arange(spec.model.vocab_size, dtype=np.int32)
  if view == 'whole':
    spec = spec.with_context('full')
  teacher = policy.Policy(spec, params, mesh)
  return TeacherPolicy(teacher, view, table, view != 'same', sharpness)


def restore(
  artifact: os.PathLike[str] | str,
  spec: policy.PolicySpec,
  inputs: dict[str, pathlib.Path],
  mesh_config: Any,
  view: str,
  sharpness: float,
) -> TeacherPolicy:
  """A finished artifact's policy as the teacher.

  `spec` and `inputs` are the student's. Raises ArtifactError if the artifact is
  not finished, or not made from the student's slates and semantic IDs.
  """
  teacher = policy.restore(artifact, mesh_config, same_as=inputs)
  table = vocabulary.translate(spec.vocabulary, teacher.spec.vocabulary)
  return TeacherPolicy(teacher, view, table, True, sharpness)


def render_for_both(
  render: Callable[..., dict[str, np.ndarray]],
  teacher: TeacherPolicy,
  control: str,
  order: str,
) -> Callable[..., dict[str, np.ndarray]]:
  """Adds the teacher's prompts to a student's rows.

  Both renderings draw from generators of one seed, and the presentation first:
  they show the candidates in the same order, under the same slots.

  Args:
    render: the student's, of `examples.generation_rows`.
    teacher: the reader of the added prompts.
    control: the student's last prompt token, '<think>' or '<answer>'.
    order: how candidates are presented, one of `prompt.ORDERS`.

  Returns:
    `(slate, rng) -> dict` with teacher_prompt [Tq], teacher_prompt_length and
    teacher_slots [K] beside the student's fields.
  """
  teacher_render = examples.generation_rows(
    teacher.policy.spec.prompter,
    '<think>' if teacher.view == 'thinking' else control,
    order,
    privileged=teacher.view == 'privileged',
  )

  def render_both(slate: Any, rng: np.random.Generator):
    seed = rng.integers(2**63)
    row = render(slate, np.random.default_rng(seed))
    teacher_row = teacher_render(slate, np.random.default_rng(seed))
    names = 'prompt', 'prompt_length', 'slots'
    return row | {f'teacher_{name}': teacher_row[name] for name in names}

  return render_both


def make_teacher(
  source: TeacherPolicy,
  grammar: grammar_lib.Grammar,
  sampler: sampling.SamplingOptions,
  options: policy_gradient.PolicyGradientOptions,
) -> policy_gradient.Teacher:
  """The teacher of the class that the view and `kl_kind` require.

  `grammar` and `sampler` are the student's: teacher and student share the
  masks and the temperature.
  """
  if source.view == 'readout':
    cls = ReadOut
  else:
    cls = SampledTokens if options.kl_kind in kl.KINDS else ExactVocabulary
  readout = options.readout_weight > 0
  return cls(source, grammar, sampler, options.kl_kind, readout)


@dataclasses.dataclass(frozen=True)
class _Teacher(abc.ABC):
  """The fields that all teachers share."""

  source: TeacherPolicy
  grammar: grammar_lib.Grammar  # the student's
  sampler: sampling.SamplingOptions  # the student's
  kind: Any  # of divergence, one of `kl.KINDS` or `kl.EXACT`
  readout: bool = False  # whether `score` adds the `teacher_readout` too

  @property
  def vocabulary(self) -> tuple[jax.Array, ...]:
    """The teacher's embedding and which of its rows are known."""
    return self.source.vocabulary

  def score(self, batch: PolicyBatch) -> tuple[PolicyBatch, dict[str, Any]]:
    """The batch with `teacher_scores`, and metrics.

    The metric `teacher_knows` is the share of written tokens that the teacher
    has.
    """
    params = self.source.policy.params
    return self._compiled_score(params, *self.source.vocabulary, batch)

  @functools.cached_property
  def _compiled_score(
    self,
  ) -> Callable[..., tuple[PolicyBatch, dict[str, Any]]]:
    """`score` as a function of the teacher's parameters and vocabulary too."""
    spec, source = self.source.policy.spec, self.source

    @jax.jit
    def score_with_teacher(
      params: Any, embedding: jax.Array, known: jax.Array, batch: PolicyBatch
    ):
      prompt, length = batch.teacher_prompt, batch.teacher_prompt_length
      if prompt is None or length is None:
        prompt, length = batch.prompt, batch.prompt_length
      if source.view == 'thinking':
        prompt, length = _think(
          spec, params, prompt, length, batch.constraint_inputs
        )
      encoded = transformer.encode_prompt(spec.model, params, prompt, length)
      prompts = _Prompt(source, params, embedding, known, *encoded)
      if self.readout:
        batch = dataclasses.replace(
          batch, teacher_readout=prompts.slot_scores(batch)
        )
      scores, metrics = self._score(batch, prompts)
      return dataclasses.replace(batch, teacher_scores=scores), metrics

    return score_with_teacher

  @abc.abstractmethod
  def _score(
    self, batch: PolicyBatch, prompt: '_Prompt'
  ) -> tuple[Any, dict[str, Any]]:
    """The scores of each class, and metrics; traced."""


class SampledScores(NamedTuple):
  """Scores of `SampledTokens`."""

  logp: jax.Array  # float32 [P, G, T], of the tokens
  known: jax.Array  # bool [P, G, T], tokens that the teacher has


class SampledTokens(_Teacher):
  """Compares log-probabilities of the sampled tokens, by `kl.sampled_kl`."""

  @property
  def vocabulary(self) -> tuple[()]:
    """Empty: nothing is compared over the vocabulary."""
    return ()

  def _score(self, batch: PolicyBatch, prompt: '_Prompt'):
    hidden, known, metrics = prompt.completions(batch)
    scores = learner.score_tokens(
      {'embedding': prompt.embedding},
      hidden,
      batch.tokens,
      self.grammar,
      temperature=self.sampler.temperature,
      constraint=policy_gradient.constraint(batch, self.grammar, self.sampler),
      known=prompt.known,
    )
    return SampledScores(scores.logp, known), metrics

  def states(self, batch: PolicyBatch, *vocabulary: jax.Array) -> None:
    """None: the sampled tokens are all that is compared."""

  def divergence(
    self, scores: learner.TokenScores, batch: PolicyBatch, written: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """An estimate at each token, which counts where the teacher has it."""
    written &= batch.teacher_scores.known
    divergence = kl.sampled_kl(
      masking.keep(scores.logp, written),
      masking.keep(batch.teacher_scores.logp, written),
      kind=self.kind,
    )
    return divergence, written


class ExactVocabulary(_Teacher):
  """Compares whole distributions of each token over the vocabulary.

  Its scores are hidden states, float [P, G, T, D']: the student's update turns
  them into logits a chunk at a time.
  """

  def _score(self, batch: PolicyBatch, prompt: '_Prompt'):
    hidden, _, metrics = prompt.completions(batch)
    return hidden, metrics

  def states(
    self, batch: PolicyBatch, *vocabulary: jax.Array
  ) -> learner.TeacherStates | None:
    """The hidden states, and what turns them into distributions."""
    embedding, known = vocabulary
    return learner.TeacherStates(
      batch.teacher_scores, embedding, known, self.kind
    )

  def divergence(
    self, scores: learner.TokenScores, batch: PolicyBatch, written: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The exact divergence at each written token."""
    del batch
    assert scores.divergence is not None  # `states` were given.
    return scores.divergence, written


class ReadOutScores(NamedTuple):
  """Scores of `ReadOut`."""

  slots: jax.Array  # float32 [P, K]
  hidden: jax.Array | None  # float [P, G, T, D'], where there is reasoning


class ReadOut(ExactVocabulary):
  """Compares answers with the teacher's read-out, and reasoning exactly.

  In an answer both distributions are over the candidates that remain; the
  teacher's is a softmax of its scores at the slot tokens.
  """

  def _score(self, batch: PolicyBatch, prompt: '_Prompt'):
    slots = self.source.sharpness * prompt.slot_scores(batch)
    hidden, metrics = None, {}
    if self.sampler.thinking:
      hidden, _, metrics = prompt.completions(batch)
    return ReadOutScores(slots, hidden), metrics

  def states(
    self, batch: PolicyBatch, *vocabulary: jax.Array
  ) -> learner.TeacherStates | None:
    """The hidden states of the reasoning, if there is any."""
    hidden = batch.teacher_scores.hidden
    if hidden is None:
      return None
    embedding, known = vocabulary
    return learner.TeacherStates(hidden, embedding, known, self.kind)

  def divergence(
    self, scores: learner.TokenScores, batch: PolicyBatch, written: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Over the remaining candidates in the answer, else exact."""
    count = batch.constraint_inputs
    progress = grammar_lib.replay(
      self.grammar, count, batch.tokens, self.sampler.thinking
    )
    remaining = parsing.answer_mask(progress.emitted, count[:, None, None])
    remaining = remaining[..., :-1] & progress.answering[..., None]
    counts = jnp.any(remaining, axis=-1)
    slots, slot_logp = batch.teacher_scores.slots, scores.slot_logp
    assert slot_logp is not None  # The grammar is that of a ranking.
    divergence = kl.divergence(
      self.kind,
      slot_logp,
      jnp.broadcast_to(slots[:, None, None], slot_logp.shape),
      remaining,
    )
    if scores.divergence is not None:  # There is reasoning.
      divergence = jnp.where(progress.answering, divergence, scores.divergence)
      counts |= ~progress.answering
    return divergence, written & counts


class _Prompt(NamedTuple):
  """A teacher's prompts, encoded."""

  source: TeacherPolicy
  params: Any
  embedding: jax.Array
  known: jax.Array
  hidden: jax.Array  # [P, Tq, D']
  prefix: transformer.Prefix

  def slot_scores(self, batch: PolicyBatch) -> jax.Array:
    """The read-out of the slot tokens: float32 [P, K]."""
    slots = batch.teacher_slots
    slots = batch.slots if slots is None else slots
    assert slots is not None  # Rows of rankings have them.
    return transformer.slot_scores(self.params, self.hidden, slots)

  def completions(
    self, batch: PolicyBatch
  ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Hidden states [P, G, T, D'], known tokens [P, G, T], and metrics."""
    spec, table = self.source.policy.spec, jnp.asarray(self.source.table)
    tokens = jnp.where(self.known, table, spec.grammar.pad)[batch.tokens]
    hidden = transformer.completion_hidden(
      spec.model, self.params, self.hidden, self.prefix, tokens
    )
    known = self.known[batch.tokens]
    written = masking.length_mask(batch.length, tokens.shape[-1])
    return hidden, known, {'teacher_knows': masking.masked_mean(known, written)}


def _think(
  spec: policy.PolicySpec,
  params: Any,
  prompt_PxT: jax.Array,
  length_P: jax.Array,
  count_P: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Prompts followed by the teacher's own reasoning, </think> included.

  Returns:
    int32 [P, T + the longest reasoning] and the lengths.
  """
  grammar, options = spec.grammar, spec.sampling(1, True, 0.0, True)
  thought = sampling.sample(
    spec.model,
    params,
    prompt_PxT,
    length_P,
    count_P,
    jax.random.key(0),
    grammar,
    options,
  ).tokens[:, 0, : options.max_tokens - 2]
  size = prompt_PxT.shape[1] + thought.shape[1]
  # Constrained: all reasoning leaves room for a slot and <eos>.
  spans = 1 + jnp.argmax(thought == grammar.think_end, axis=-1)
  time = jnp.arange(size)
  after = jnp.clip(time - length_P[:, None], 0, thought.shape[1] - 1)
  joined = jnp.where(
    time < length_P[:, None],
    jnp.pad(prompt_PxT, [(0, 0), (0, thought.shape[1])]),
    jnp.take_along_axis(thought, after, axis=1),
  )
  return joined, length_P + spans
