"""A teacher that is a policy of this codebase, of any size.

It samples under the permutation mask, so that each answer is a ranking. If its
first candidate is wrong, it samples again from another presentation. All draws
are functions of (seed, slate, try), so that a trace does not depend on the
other rows of a batch.

Axes: B batch, T completion tokens, K candidates.
"""

import collections
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.pipeline import artifacts
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import policy, sampling
from gr2_jax.prompts import examples, prompt, vocabulary
from gr2_jax.teachers import heuristic


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answer(
  model: transformer.TransformerConfig,
  grammar: grammar_lib.Ranking,
  config: sampling.SamplingOptions,
  params: Any,
  key: jax.Array,
  batch: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Samples completions [B, T] and rankings [B, K] in slots."""

  def sample_row(row: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    row_key = jax.random.fold_in(key, row['index'])
    rollouts = sampling.sample(
      model,
      params,
      row['prompt'][None],
      row['prompt_length'][None],
      row['count'][None],
      jax.random.fold_in(row_key, row['attempt']),
      grammar,
      config,
    )
    return rollouts.tokens[0, 0], rollouts.length[0, 0]

  tokens, length = jax.vmap(sample_row)(batch)
  slots = np.broadcast_to(
    np.arange(grammar.num_candidates), (len(tokens), grammar.num_candidates)
  )
  answer = sampling.parse(
    grammar, config, tokens, length, batch['count'], slots
  )
  return tokens, answer.ranking


@dataclasses.dataclass(frozen=True)
class PolicyTeacher:
  """Samples traces in batches of one shape."""

  policy: policy.Policy
  student: prompt.Prompter  # the traces are in its tokens
  # int32 [V], the student's token for each of the teacher's; see
  # `vocabulary.translate`.
  tokens: np.ndarray
  order: str  # presentation of the candidates, one of `prompt.ORDERS`
  temperature: float
  batch_size: int  # B

  def traces(
    self, slates: Any, indices: Iterable[int], kind: str, tries: int, seed: int
  ) -> heuristic.Traces:
    """See `heuristic.Teacher`; yields traces in the order of completion.

    With `targeted` the prompt names one positive; no other may come first.
    """
    prompter = self.policy.spec.prompter
    render = examples.generation_rows(
      prompter, '<think>', self.order, privileged=kind == 'targeted'
    )
    # First in, first out, so that only the last batches are not full.
    waiting = collections.deque((index, 1) for index in indices)
    while waiting:
      size = min(self.batch_size, len(waiting))
      labels = [waiting.popleft() for _ in range(size)]
      rows = [
        render(slates[index], np.random.default_rng((seed, index, attempt)))
        for index, attempt in labels
      ]
      for (index, attempt), row, completion, ranking in zip(
        labels, rows, *self._answer_rows(rows, labels, seed), strict=True
      ):
        first = ranking[0]
        if kind == 'targeted':
          right, verdict = first == _target(prompter, row), 'targeted'
        else:
          right, verdict = row['grades'][first] > 0, 'accepted'
        if not right and attempt < tries:
          waiting.append((index, attempt + 1))
          continue
        ids, unknown = self._span(completion, row)
        room = self.student.reasoning
        trace = heuristic.Trace(
          reasoning=ids[:room],
          ranking=row['incoming'][ranking[: row['count']]],
          tries=attempt,
          verdict=verdict if right else 'rejected',
          unknown=unknown,
          clipped=max(0, len(ids) - room),
        )
        yield index, trace

  def _answer_rows(
    self, rows: list[dict], labels: list[tuple[int, int]], seed: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Answers rows on the host; copies of the last row fill the batch."""
    spec = self.policy.spec
    missing = self.batch_size - len(rows)
    batch = {
      name: np.stack([row[name] for row in rows + rows[-1:] * missing])
      for name in ('prompt', 'prompt_length', 'count')
    }
    numbers = np.array(labels + labels[-1:] * missing, np.int32)
    batch |= {'index': numbers[:, 0], 'attempt': numbers[:, 1]}
    # Each row is a batch of its own, and the mesh splits the rows.
    mesh = self.policy.mesh
    with jax.set_mesh(mesh):
      tokens, rankings = _answer(
        spec.model,
        spec.grammar,
        spec.sampling(1, True, self.temperature, True),
        self.policy.params,
        jax.random.key(seed),
        sharding.shard_batch(batch, mesh),
      )
    size = len(rows)
    return np.asarray(tokens)[:size], np.asarray(rankings)[:size]

  def _span(
    self, completion: np.ndarray, row: dict[str, np.ndarray]
  ) -> tuple[list[int], int]:
    """Translates reasoning to the student's tokens, slots as incoming ranks.

    Drops and counts tokens that the student lacks, tokens that would end its
    reasoning or its answer, and slots without a candidate.
    """
    words, count = self.student.vocabulary, int(row['count'])
    end = self.policy.spec.grammar.think_end
    ids = self.tokens[completion[: int(np.argmax(completion == end))]]
    slot = words.is_slot(ids)
    place = ids - words.slot_base
    ends = (words.eos, words.pad, words.control['</think>'])
    fits = (ids >= 0) & ~np.isin(ids, ends) & ~(slot & (place >= count))
    ranks = row['incoming'][np.clip(place, 0, count - 1)]
    ids = np.where(slot, words.slot_base + ranks, ids)[fits]
    return ids.tolist(), int(np.sum(~fits))


def restore(
  artifact: os.PathLike[str] | str,
  mesh: Any,
  student: prompt.Prompter,
  inputs: dict[str, pathlib.Path],
  *,
  kind: str,
  temperature: float,
  batch_size: int,
) -> PolicyTeacher:
  """Restores a finished policy as a teacher, with its own settings of prompts.

  Args:
    artifact: of one of `policy.TRAINERS`.
    mesh: section `mesh`.
    student: see `PolicyTeacher`.
    inputs: slates, tokenizer and backbone of the student's stage.
    kind: targeted or rejection.
    temperature: see `PolicyTeacher`.
    batch_size: see `PolicyTeacher`.

  Raises:
    ArtifactError: no such artifact, other slates or another tokenizer, or
      targeted traces from a policy that was trained without targets.
  """
  path = pathlib.Path(artifact)
  teacher = policy.restore(path, mesh, same_as=inputs)
  run = artifacts.read_run(path)
  if kind == 'targeted' and not _saw_targets(path, run):
    raise artifacts.ArtifactError(
      f'traces.policy={path} was trained without targets in its prompts: train '
      "it with sft.privileged, or set traces.kind='rejection'"
    )
  return PolicyTeacher(
    policy=teacher,
    student=student,
    tokens=vocabulary.translate(teacher.spec.vocabulary, student.vocabulary),
    order=run['config']['prompt']['order'],
    temperature=temperature,
    batch_size=batch_size,
  )


def _saw_targets(path: pathlib.Path, run: dict[str, Any]) -> bool:
  """Whether prompts in the SFT of a policy or its ancestor named targets."""
  while 'sft' not in run['config']:
    upstream = [run['inputs'].get(name) for name in ('sft', 'opd')]
    if not any(upstream):
      return False
    path = path.parent / next(filter(None, upstream))
    run = artifacts.read_run(path)
  return bool(run['config']['sft'].get('privileged'))


def _target(prompter: prompt.Prompter, row: dict[str, np.ndarray]) -> int:
  """The slot that a privileged prompt names, before its last control tokens."""
  at = int(row['prompt_length']) - len(prompter.asks['<think>']) - 1
  return int(row['prompt'][at]) - prompter.vocabulary.slot_base
