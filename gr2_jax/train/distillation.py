"""Teachers of rollouts: what they read, and what they say about each token.

On-policy distillation (Eq. 4) lets the student sample and asks the teacher for
log-probabilities alone. RL asks its own start the same way, where it is held to
it. A teacher may be any policy of this project made from the same slates and
semantic IDs, of any size; what sets it above the student is its view:

| view | the teacher |
|---|---|
| `same` | reads what the student reads: it is another, better policy |
| `privileged` | is told a positive (`sft.privileged` teaches it to use that) |
| `thinking` | reasons first, where the student answers at once |
| `readout` | ranks by the scores at its slot tokens; reasons as it does |
| `whole` | reads the whole context, where the student reads a form of it |

Axes: P prompts, G group, T completion time, K candidates, V the student's
vocabulary, D' the teacher's width.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.models import transformer
from gr2_jax.ops import kl, masking
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import policy, sampling
from gr2_jax.prompts import examples, vocabulary
from gr2_jax.train import learner, policy_gradient

VIEWS = ('same', 'privileged', 'thinking', 'readout', 'whole')


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen policy, and how it looks at a student's rollouts.

  Attributes:
    policy: shapes, tokens and parameters.
    view: of VIEWS.
    table: int32 [V], the teacher's id of each of the student's tokens; -1 where
      it has none. Such a token is not compared, and the teacher reads padding
      in its place.
    reads_its_own: whether its prompts are others than the student's.
    sharpness: factor on the scores of the view `readout`.
  """

  policy: policy.Policy
  view: str
  table: np.ndarray
  reads_its_own: bool
  sharpness: float = 1.0

  @functools.cached_property
  def rows(self) -> tuple[jax.Array, jax.Array]:
    """Its output embedding in the student's order, [V, D'], and who it knows.

    Returns:
      `rows` and `known` of `learner.TeacherStates`.
    """
    own = transformer.output_embedding(self.policy.params)
    known = jnp.asarray(self.table >= 0)
    if np.array_equal(self.table, np.arange(len(own))):
      return own, known  # No copy of what may be gigabytes.
    return own[np.maximum(self.table, 0)], known


def itself(
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  params: Any,
  view: str = 'same',
  sharpness: float = 1.0,
) -> Teacher:
  """A student's own start as its teacher."""
  table = np.arange(spec.model.vocab_size, dtype=np.int32)
  if view == 'whole':
    spec = spec.with_context('full')
  return Teacher(
    policy.Policy(spec, params, mesh), view, table, view != 'same', sharpness
  )


def restore(
  artifact: os.PathLike[str] | str,
  spec: policy.PolicySpec,
  inputs: dict[str, pathlib.Path],
  mesh,
  view: str,
  sharpness: float,
) -> Teacher:
  """A finished artifact's policy as the teacher.

  Args:
    artifact: of one of `policy.TRAINERS`.
    spec: the student's.
    inputs: the student's artifacts.
    mesh: section `mesh`.
    view: of VIEWS.
    sharpness: of the view `readout`.

  Raises:
    ArtifactError: it is not finished, or not made from the student's slates
      and semantic IDs.
  """
  found = policy.restore(artifact, mesh, same_as=inputs)
  table = vocabulary.translate(spec.vocabulary, found.spec.vocabulary)
  return Teacher(found, view, table, True, sharpness)


def beside(
  render: Callable[..., dict[str, np.ndarray]],
  teacher: Teacher,
  control: str,
  order: str,
) -> Callable[..., dict[str, np.ndarray]]:
  """Adds to a student's rows what its teacher reads.

  Both draw from generators of one seed, and the presentation first: they see
  the candidates in the same order, under the same slots.

  Args:
    render: the student's, of `examples.generation_rows`.
    teacher: whose prompts are added.
    control: what the student is asked for, '<think>' or '<answer>'.
    order: of `prompts.ORDERS`.

  Returns:
    `(slate, rng) -> dict` with teacher_prompt [Tq], teacher_prompt_length and
    teacher_slots [K] beside the student's fields.
  """
  thinks = teacher.view == 'thinking'
  its_render = examples.generation_rows(
    teacher.policy.spec.prompter,
    '<think>' if thinks else control,
    order,
    privileged=teacher.view == 'privileged',
  )

  def render_both(slate, rng):
    seed = rng.integers(2**63)
    own = render(slate, np.random.default_rng(seed))
    its = its_render(slate, np.random.default_rng(seed))
    return own | {
      'teacher_prompt': its['prompt'],
      'teacher_prompt_length': its['prompt_length'],
      'teacher_slots': its['slots'],
    }

  return render_both


def make_look(
  teacher: Teacher,
  grammar: grammar_lib.Grammar,
  sampler: sampling.SamplingOptions,
  divergence: str,
  readout: bool = False,
) -> Callable[
  [policy_gradient.PolicyBatch],
  tuple[policy_gradient.PolicyBatch, dict[str, Any]],
]:
  """Compiles how a batch gets what the divergence asks the teacher for.

  Args:
    teacher: whom to ask.
    grammar: the student's.
    sampler: the student's: the same temperature and the same masks.
    divergence: of `policy_gradient.DIVERGENCES`.
    readout: whether it is asked for the scores at its slot tokens, too.

  Returns:
    `batch -> (batch, watches)`; the watch is `teacher_knows`, the share of the
    written tokens that the teacher has.
  """
  spec, sampled = teacher.policy.spec, divergence in kl.KINDS
  table, (rows, known) = jnp.asarray(teacher.table), teacher.rows

  @jax.jit
  def look(params, rows, known, batch: policy_gradient.PolicyBatch):
    prompt, length = batch.teacher_prompt, batch.teacher_prompt_length
    if prompt is None:
      prompt, length = batch.prompt, batch.prompt_length
    if teacher.view == 'thinking':
      prompt, length = _think(spec, params, prompt, length, batch.facts)
    hidden, prefix = transformer.encode_prompt(
      spec.model, params, prompt, length
    )
    if readout or teacher.view == 'readout':
      slots = batch.teacher_slots
      slots = batch.slots if slots is None else slots
      scores = transformer.slot_scores(params, hidden, slots)
      if readout:
        batch = batch.replace(teacher_readout=scores)
    if teacher.view == 'readout':
      batch = batch.replace(teacher_scores=teacher.sharpness * scores)
      if not sampler.thinking:
        return batch, {}
    tokens = jnp.where(known, table, spec.grammar.pad)[batch.tokens]
    hidden = transformer.completion_hidden(
      spec.model, params, hidden, prefix, tokens
    )
    knows = known[batch.tokens]
    written = masking.length_mask(batch.length, tokens.shape[-1])
    watches = {'teacher_knows': masking.masked_mean(knows, written)}
    if not sampled:
      return batch.replace(teacher_hidden=hidden), watches
    scores = learner.score_tokens(
      {'embedding': rows},
      hidden,
      batch.tokens,
      grammar,
      temperature=sampler.temperature,
      constraint=policy_gradient.constraint(batch, grammar, sampler),
      known=known,
    )
    return batch.replace(teacher_logp=scores.logp, teacher_knows=knows), watches

  return lambda batch: look(teacher.policy.params, rows, known, batch)


def _think(
  spec: policy.PolicySpec,
  params: Any,
  prompt_PxT: jax.Array,
  length_P: jax.Array,
  count_P: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Prompts with the teacher's own reasoning, </think> included, behind them.

  Returns:
    int32 [P, T + what a span may take] and the lengths.
  """
  config = spec.sampling(1, True, 0.0, True)
  thought = sampling.sample(
    spec.model,
    params,
    prompt_PxT,
    length_P,
    count_P,
    jax.random.key(0),
    spec.grammar,
    config,
  ).tokens[:, 0, : config.max_tokens - 2]
  size = prompt_PxT.shape[1] + thought.shape[1]
  # Constrained: every span leaves room for a slot and <eos>.
  spans = 1 + jnp.argmax(thought == spec.grammar.think_end, axis=-1)
  time = jnp.arange(size)
  after = jnp.clip(time - length_P[:, None], 0, thought.shape[1] - 1)
  joined = jnp.where(
    time < length_P[:, None],
    jnp.pad(prompt_PxT, [(0, 0), (0, thought.shape[1])]),
    jnp.take_along_axis(thought, after, axis=1),
  )
  return joined, length_P + spans
