"""A teacher that is a policy of this codebase, of any size.

It samples under the permutation mask, so that every answer is a ranking, and
it may be wrong only in what it puts first: then it is asked again, another
presentation and other draws. Both are functions of (seed, slate, try), so what
it says about a slate does not depend on who else is in the batch.

Axes: B batch, T completion tokens, K candidates.
"""

import collections
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator
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
  """Completions [B, T] and rankings [B, K] in slots, each row from its key."""

  def alone(row):
    own = jax.random.fold_in(key, row['index'])
    found = sampling.sample(
      model,
      params,
      row['prompt'][None],
      row['prompt_length'][None],
      row['count'][None],
      jax.random.fold_in(own, row['attempt']),
      grammar,
      config,
    )
    return found.tokens[0, 0], found.length[0, 0]

  tokens, length = jax.vmap(alone)(batch)
  slots = np.broadcast_to(
    np.arange(grammar.num_candidates), (len(tokens), grammar.num_candidates)
  )
  answer = sampling.parse(
    grammar, config, tokens, length, batch['count'], slots
  )
  return tokens, answer.ranking


@dataclasses.dataclass(frozen=True)
class PolicyTeacher:
  """Asks a policy, in batches of one shape.

  Attributes:
    policy: the teacher.
    student: whose tokens the traces are written in.
    tokens: int32 [V of the teacher], the student's token for each of the
      teacher's, see `vocabulary.translate`.
    order: in which the teacher sees the candidates, of `prompt.ORDERS`.
    temperature: of its answers.
    batch_size: slates asked about at a time, B.
  """

  policy: policy.Policy
  student: prompt.Prompter
  tokens: np.ndarray
  order: str
  temperature: float
  batch_size: int

  def traces(
    self, slates: Any, indices: Iterable[int], kind: str, tries: int, seed: int
  ) -> Iterator[tuple[int, heuristic.Trace]]:
    """See `heuristic.Teacher`. In the order in which slates are settled.

    With `targeted` the prompt names a positive, and an answer that puts
    another candidate first, even another positive, is no answer to it.
    """
    prompter = self.policy.spec.prompter
    render = examples.generation_rows(
      prompter, '<think>', self.order, privileged=kind == 'targeted'
    )
    # First in, first out: only the last batches have fewer than they hold.
    waiting = collections.deque((index, 1) for index in indices)
    while waiting:
      size = min(self.batch_size, len(waiting))
      asked = [waiting.popleft() for _ in range(size)]
      rows = [
        render(slates[index], np.random.default_rng((seed, index, attempt)))
        for index, attempt in asked
      ]
      tokens, rankings = self._ask(rows, asked, seed)
      for (index, attempt), row, completion, ranking in zip(
        asked, rows, tokens, rankings, strict=True
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
        yield (
          index,
          heuristic.Trace(
            reasoning=ids[: self.student.reasoning],
            ranking=row['incoming'][ranking[: row['count']]],
            tries=attempt,
            verdict=verdict if right else 'rejected',
            unknown=unknown,
            clipped=max(0, len(ids) - self.student.reasoning),
          ),
        )

  def _ask(
    self, rows: list[dict], asked: list[tuple[int, int]], seed: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """One answer to every row, on the host; the last row fills up the batch."""
    spec = self.policy.spec
    missing = self.batch_size - len(rows)
    batch = {
      name: np.stack([row[name] for row in rows + rows[-1:] * missing])
      for name in ('prompt', 'prompt_length', 'count')
    }
    labels = np.array(asked + asked[-1:] * missing, np.int32)
    batch |= {'index': labels[:, 0], 'attempt': labels[:, 1]}
    # Rows are sampled one by one, so the rules for batches do not apply; the
    # mesh splits the rows.
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
    """The reasoning in the student's tokens, slots as incoming ranks.

    Left out and counted: what the student has no token for, what would end its
    reasoning or its answer, and slots that name no candidate.
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
  mesh,
  student: prompt.Prompter,
  inputs: dict[str, pathlib.Path],
  *,
  kind: str,
  temperature: float,
  batch_size: int,
) -> PolicyTeacher:
  """A finished policy as a teacher; it sees slates as it was trained to.

  Args:
    artifact: of one of `policy.TRAINERS`.
    mesh: section `mesh`.
    student: whose tokens the traces are to be written in.
    inputs: of the student's stage: slates, tokenizer, backbone.
    kind: targeted or rejection.
    temperature: of its answers.
    batch_size: slates asked about at a time.

  Raises:
    ArtifactError: there is no such artifact, it is of other slates or another
      tokenizer, or it is to be told targets and was not trained with any.
  """
  path = pathlib.Path(artifact)
  teacher = policy.restore(path, mesh, same_as=inputs)
  found = artifacts.read_run(path)
  if kind == 'targeted' and not _knows_targets(path, found):
    raise artifacts.ArtifactError(
      f'traces.policy={path} was never told a target: train it with '
      "sft.privileged, or ask it with traces.kind='rejection'"
    )
  return PolicyTeacher(
    policy=teacher,
    student=student,
    tokens=vocabulary.translate(teacher.spec.vocabulary, student.vocabulary),
    order=found['config']['prompt']['order'],
    temperature=temperature,
    batch_size=batch_size,
  )


def _knows_targets(path: pathlib.Path, run: dict[str, Any]) -> bool:
  """Whether the SFT that a policy comes from named targets in prompts."""
  while 'sft' not in run['config']:
    upstream = [run['inputs'].get(name) for name in ('sft', 'opd')]
    if not any(upstream):
      return False
    path = path.parent / next(filter(None, upstream))
    run = artifacts.read_run(path)
  return bool(run['config']['sft'].get('privileged'))


def _target(prompter: prompt.Prompter, row: dict[str, np.ndarray]) -> int:
  """The slot that a privileged prompt names, before what asks for an answer."""
  at = int(row['prompt_length']) - len(prompter.asks['<think>']) - 1
  return int(row['prompt'][at]) - prompter.vocabulary.slot_base
