"""A finished policy, loaded and compiled: no answer compiles anything.

Each mode has one program per batch size. A batch is padded to the smallest size
that holds it, so an answer does not depend on the other slates of its batch,
except for rounding: programs of two sizes may add in another order.

Where prompts have memory tokens, further programs (one per size, for all modes)
encode histories that are not known yet (`memories.py`), and the programs of the
modes read the rest of the prompt behind those memories.

Candidates that the catalog lacks are ranked if the slate describes them
(`described_items.py`). The policy is not shown the unknown ones: they keep
their places, and the others are ranked around them. Answers name both kinds.

Axes: B batch, K candidates.
"""

import bisect
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from gr2_jax.distributed import sharding
from gr2_jax.pipeline import artifacts
from gr2_jax.policy import policy, ranking
from gr2_jax.prompts import examples
from gr2_jax.serving import answer as answer_lib
from gr2_jax.serving import described_items
from gr2_jax.serving import knowledge as knowledge_lib
from gr2_jax.serving import memories as memories_lib
from gr2_jax.serving import request as requests_lib

Program = Callable[[Any, Any], dict[str, jax.Array]]
Encoder = Callable[[Any, Any], jax.Array]
# A request and its place in the list it came in. The presentation of a slate is
# a function of that place.
Placed = tuple[requests_lib.Request, int]
MEMORY_CACHE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Answers:
  """The answers to one batch, and their cost.

  Attributes:
    lines: one JSON object per slate, see `Reranker.rank`.
    prompts: number of prompts encoded.
    decoded: tokens decoded.
    remembered: prompts whose history was known, or shared within the batch.
    memorized: histories encoded, where prompts have memory tokens.
  """

  lines: list[dict[str, Any]]
  prompts: int
  decoded: int
  remembered: int = 0
  memorized: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Reranker:
  """Answers slates with one policy; made by `Reranker.load`."""

  artifact: pathlib.Path
  policy: policy.Policy
  knowledge: knowledge_lib.Knowledge
  programs: Mapping[str, Mapping[int, Program]]  # mode -> batch size -> program
  order: str  # presentation of the candidates, one of `prompt.ORDERS`
  history: int  # last items of a history that are kept
  encoders: Mapping[int, Encoder]  # of memories, by batch size; may be empty
  memories: memories_lib.Memories  # of this policy only
  reader: described_items.Reader | None = None
  unreadable: str = ''  # reason why there is no reader

  @classmethod
  def load(
    cls,
    path: str | pathlib.Path,
    *,
    modes: Sequence[str] = ranking.MODES,
    largest_batch: int = 64,
    tensor: int = 1,
    memory_cache_bytes: int = MEMORY_CACHE_BYTES,
    beside: 'Reranker | None' = None,
  ) -> 'Reranker':
    """Loads a policy, fits the evidence, compiles every program.

    Args:
      path: a finished artifact of `policy.TRAINERS`, beside the artifacts it
        was made from.
      modes: subset of `ranking.MODES`.
      largest_batch: slates; there are programs for smaller powers of two too.
      tensor: devices that split heads and feed-forward; the rest split batches.
      memory_cache_bytes: for memories, where prompts have memory tokens.
      beside: a loaded policy; equal data and programs are shared with it.

    Raises:
      ArtifactError: there is no such policy.
      DataError: the data has changed since the policy was trained.
      ValueError: a mode or a size is invalid.
    """
    path = pathlib.Path(path).resolve()
    for mode in modes:
      if mode not in ranking.MODES:
        raise ValueError(f'mode {mode!r}: known: {", ".join(ranking.MODES)}')
    policy.form_of(path, own_slates=False)
    run = artifacts.read_run(path)
    config = ml_collections.ConfigDict(run['config'])
    restored = policy.restore(
      path, ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=tensor))
    )
    spec, mesh = restored.spec, restored.mesh
    slates = path.parent / run['inputs']['slates']
    if beside and beside.knowledge.source == slates:
      knowledge = beside.knowledge
    else:
      knowledge = knowledge_lib.load(slates, spec.catalog, config.data)
    sizes = _sizes(mesh, largest_batch)
    programs, encoders = {}, {}
    if beside and _same_programs(beside.policy, restored):
      programs, encoders = beside.programs, beside.encoders
    programs = {
      mode: {
        size: programs.get(mode, {}).get(size)
        or ranking.compiled(spec, mesh, mode, size)
        for size in sizes
      }
      for mode in modes
    }
    if spec.prompter.context.memory:
      encoders = {
        size: encoders.get(size) or ranking.compiled_memory(spec, mesh, size)
        for size in sizes
      }
    reader, unreadable = described_items.load(
      spec,
      mesh,
      path.parent / run['inputs']['tokenizer'],
      config.prompt.title_tokens,
    )
    if reader:
      reader.compile()
    else:
      logging.warning('described items stay unknown: %s', unreadable)
    return cls(
      path,
      restored,
      knowledge,
      programs,
      config.prompt.order,
      config.data.history,
      encoders,
      memories_lib.Memories(memory_cache_bytes),
      reader,
      unreadable,
    )

  @property
  def candidates(self) -> int:
    """K, candidates that a slate may have."""
    return self.policy.spec.prompter.num_candidates

  @property
  def largest_batch(self) -> int:
    """Slates of the largest batch."""
    return max(next(iter(self.programs.values())))

  def request(
    self, fields: Mapping[str, Any], place: int
  ) -> requests_lib.Request:
    """The request of a slate's checked fields; `place` counts from 0."""
    return requests_lib.resolve(
      fields, place + 1, self.knowledge.index, self.unreadable
    )

  def parse(self, row: Any, where: str, place: int) -> requests_lib.Request:
    """Checks one slate, at a `place` in its list; errors begin with `where`."""
    fields = requests_lib.slate(self.candidates).check(row, where)
    return self.request(fields, place)

  def rank(
    self, slates: Sequence[Mapping[str, Any]], mode: str = 'reason'
  ) -> list[dict[str, Any]]:
    """Answers slates, each as stage `rerank` does at the same place.

    Args:
      slates: objects with the fields of `request.slate`.
      mode: one of `ranking.MODES`.

    Returns:
      The fields of the OpenAPI document without `timed_out`. Scores of unknown
      candidates are None, and so is the verdict where none is known.

    Raises:
      DataError: a slate is wrong; none is answered.
      ValueError: the mode was not loaded.
    """
    if mode not in self.programs:
      raise ValueError(f'mode {mode!r}: loaded: {", ".join(self.programs)}')
    requests = [
      (self.parse(row, f'slate {place}', place), place)
      for place, row in enumerate(slates)
    ]
    lines = []
    for begin in range(0, len(requests), self.largest_batch):
      batch = requests[begin : begin + self.largest_batch]
      lines += self.answer(batch, mode).lines
    return lines

  def answer(self, requests: Sequence[Placed], mode: str) -> Answers:
    """Answers one batch of at most `largest_batch` requests."""
    lines = [
      answer_lib.incoming_order(request, mode) for request, _ in requests
    ]
    rows = [row for row, (r, _) in enumerate(requests) if r.known_ranks]
    if not rows:
      return Answers(lines, prompts=0, decoded=0)
    known = [(r.known_part(), place) for r, place in requests if r.known_ranks]
    ranked, memorized = self._run(known, mode)
    for i, row in enumerate(rows):
      lines[row] |= answer_lib.answer(
        self.policy.spec, requests[row][0], ranked, i
      )
    return Answers(
      lines,
      prompts=len(rows),
      decoded=int(ranked.length.sum()),
      remembered=len(rows) - memorized if self.encoders else 0,
      memorized=memorized,
    )

  def _run(
    self, placed: Sequence[Placed], mode: str
  ) -> tuple[ranking.Ranked, int]:
    """Ranks known parts; also returns the number of histories encoded."""
    knowledge, prompter = self.knowledge, self.policy.spec.prompter
    requests = [request for request, _ in placed]
    slates = requests_lib.to_slates(
      requests, knowledge.log, knowledge.facts, self.candidates, self.history
    )
    if len(items := requests_lib.described(requests)):
      prompter = self.reader.prompts_of(items)
    render = examples.generation_rows(
      prompter, '<think>' if mode == 'reason' else '<answer>', self.order
    )
    rows = [
      render(record, np.random.default_rng((0, place)))
      for record, (_, place) in zip(
        answer_lib.records(slates), placed, strict=True
      )
    ]
    for row in rows:
      del row['grades']  # The policy must not see the labels.
    memorized = 0
    if self.encoders:
      rows, memorized = self._behind_memory(rows)
    return ranking.Ranked(**self._call(self.programs[mode], rows)), memorized

  def _behind_memory(
    self, rows: Sequence[dict[str, np.ndarray]]
  ) -> tuple[list[dict[str, np.ndarray]], int]:
    """Rests of prompts with their memories; how many memories are new."""
    prompter = self.policy.spec.prompter
    pairs = [examples.behind_memory(prompter, row) for row in rows]
    histories = [history for history, _ in pairs]
    memories, memorized = self.memories.recall(
      [h['prompt'][: h['prompt_length']].tobytes() for h in histories],
      lambda places: self._call(self.encoders, [histories[i] for i in places]),
    )
    return [
      rest | {'memory': memory}
      for (_, rest), memory in zip(pairs, memories, strict=True)
    ], memorized

  def _call(
    self,
    programs: Mapping[int, Program | Encoder],
    rows: Sequence[dict[str, np.ndarray]],
  ) -> Any:
    """Runs the smallest program that holds the rows; on the host, unpadded."""
    sizes = sorted(programs)
    size = sizes[bisect.bisect_left(sizes, len(rows))]
    padded = [*rows, *[rows[-1]] * (size - len(rows))]
    batch = {name: np.stack([row[name] for row in padded]) for name in rows[0]}
    outputs = programs[size](
      self.policy.params, sharding.shard_batch(batch, self.policy.mesh)
    )
    return jax.tree.map(lambda x: np.asarray(x)[: len(rows)], outputs)


def _sizes(mesh: jax.sharding.Mesh, largest: int) -> list[int]:
  """Batch sizes: powers of two times the devices that split a batch."""
  size = mesh.shape['data'] * mesh.shape['fsdp']
  if largest < size:
    raise ValueError(
      f'largest_batch={largest}: a batch splits over {size} devices; give at '
      'least as many'
    )
  sizes = [size]
  while 2 * sizes[-1] <= largest:
    sizes.append(2 * sizes[-1])
  return sizes


def _same_programs(a: policy.Policy, b: policy.Policy) -> bool:
  """Whether the two policies run the same compiled programs."""

  def key(policy: policy.Policy) -> tuple[Any, ...]:
    spec, p = policy.spec, policy.spec.prompter
    shape = p.prompt_tokens, p.num_candidates, p.thinking_tokens
    if p.context.memory:
      shape += p.context.memory, p.memory_prompt_tokens, p.rest_tokens
    return spec.model, spec.grammar, policy.mesh, shape

  return key(a) == key(b)
