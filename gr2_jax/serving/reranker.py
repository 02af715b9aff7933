"""A finished policy, ready to answer: nothing compiles after it is loaded.

Every mode has one program for each of a few batch sizes. A batch is padded to
the smallest that holds it, so that an answer does not depend on who else is in
it, but for rounding: programs of two sizes may add in another order.

Where prompts have memory tokens, those programs read the rest behind them, and
others (one for each size, for all modes) make the memories of histories that
are not known yet, see `memories.py`.

A candidate that the catalog lacks is ranked where the slate describes it, see
`cold_items.py`. One of which nothing is known the policy does not see: it keeps
its place, the others are ranked around it. The answer names both kinds.

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
from gr2_jax.serving import cold_items, partial
from gr2_jax.serving import knowledge as knowledge_lib
from gr2_jax.serving import memories as memories_lib
from gr2_jax.serving import request as requests_lib

Program = Callable[[Any, Any], dict[str, jax.Array]]
Encoder = Callable[[Any, Any], jax.Array]
MEMORY_CACHE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Answers:
  """Of one batch, and what it cost.

  Attributes:
    lines: one JSON object a slate, see `rank`.
    prompts: that were encoded.
    decoded: tokens that were written.
    remembered: prompts whose history was known, or was another's of the batch.
    memorized: histories that were encoded, where prompts have memory tokens.
  """

  lines: list[dict[str, Any]]
  prompts: int
  decoded: int
  remembered: int = 0
  memorized: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Reranker:
  """See the module; made by `Reranker.load`."""

  artifact: pathlib.Path
  policy: policy.Policy
  knowledge: knowledge_lib.Knowledge
  programs: Mapping[str, Mapping[int, Program]]  # mode -> batch size -> program
  order: str  # in which candidates are shown, of `prompts.ORDERS`
  history: int  # last items of a history that are kept
  encoders: Mapping[int, Encoder]  # of memories, by batch size; else empty
  memories: memories_lib.Memories  # of this policy alone
  reader: cold_items.Reader | None = None  # None: descriptions are not read
  unreadable: str = ''  # why so

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
      path: a finished artifact of `policy.TRAINERS`; what it was made
        from lies beside it, its data where its config says.
      modes: of `ranking.MODES`.
      largest_batch: slates at a time; programs are made for it and for smaller
        powers of two.
      tensor: devices that split heads and feed-forward; the rest split batches.
      memory_cache_bytes: of memories that are kept, where prompts have memory
        tokens; 0 for none.
      beside: another one, whose data and programs are shared where they are
        the same.

    Raises:
      ArtifactError: there is no such policy.
      DataError: the data is no longer what the policy was trained on.
      ValueError: a mode or a size that means nothing.
    """
    path = pathlib.Path(path).resolve()
    for mode in modes:
      if mode not in ranking.MODES:
        raise ValueError(f'mode {mode!r}: known: {", ".join(ranking.MODES)}')
    policy.form_of(path, own=False)
    run = artifacts.read_run(path)
    mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=tensor))
    restored = policy.restore(path, mesh)
    config = ml_collections.ConfigDict(run['config'])
    slates = path.parent / run['inputs']['slates']
    if beside and beside.knowledge.source == slates:
      knowledge = beside.knowledge
    else:
      knowledge = knowledge_lib.load(
        slates, restored.setup.catalog, config.data
      )
    sizes = _sizes(restored.setup, largest_batch)
    made, encoders = (beside.programs, beside.encoders) if beside else ({}, {})
    if beside and not _same_programs(beside.policy.setup, restored.setup):
      made, encoders = {}, {}
    programs = {
      mode: {
        size: made.get(mode, {}).get(size)
        or ranking.compiled(restored.setup, mode, size)
        for size in sizes
      }
      for mode in modes
    }
    if restored.setup.prompter.context.memory:
      encoders = {
        size: encoders.get(size)
        or ranking.compiled_memory(restored.setup, size)
        for size in sizes
      }
    reader, unreadable = cold_items.load(
      restored.setup,
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
    return self.policy.setup.prompter.num_candidates

  @property
  def largest_batch(self) -> int:
    """Slates that are answered at a time, at most."""
    return max(next(iter(self.programs.values())))

  def parse(self, row: object, where: str, place: int) -> requests_lib.Request:
    """Checks one slate, as `data/requests.py` describes it.

    Args:
      row: what JSON holds.
      where: it stands, for messages.
      place: its own in the list it came in, from 0.

    Raises:
      DataError: what is wrong, with place, field and cure.
    """
    return requests_lib.parse(
      row,
      where,
      place + 1,
      self.knowledge.index,
      self.candidates,
      strict=False,
      unreadable=self.unreadable,
    )

  def rank(
    self, slates: Sequence[Mapping[str, Any]], mode: str = 'reason'
  ) -> list[dict[str, Any]]:
    """Answers slates, each as stage `rerank` does at the same place.

    Args:
      slates: objects with the fields of `data/requests.py`.
      mode: of `ranking.MODES`.

    Returns:
      For each the fields that stage `rerank` writes, and:

        mode: that answered it
        unknown_candidates: ids of which nothing is known; they keep their
          places, their score is None

      The verdict is None where no candidate is known.

    Raises:
      DataError: what is wrong with a slate; none is answered.
      ValueError: a mode that was not loaded.
    """
    if mode not in self.programs:
      raise ValueError(f'mode {mode!r}: loaded: {", ".join(self.programs)}')
    asked = [
      (self.parse(row, f'slate {place}', place), place)
      for place, row in enumerate(slates)
    ]
    lines = []
    for low in range(0, len(asked), self.largest_batch):
      part = asked[low : low + self.largest_batch]
      lines += self.answer(part, mode).lines
    return lines

  def answer(
    self, asked: Sequence[tuple[requests_lib.Request, int]], mode: str
  ) -> Answers:
    """Answers at most `largest_batch` requests, in one batch.

    Args:
      asked: checked requests, each with its place in the list it came in: the
        presentation of a slate is a function of that place.
      mode: that was loaded.
    """
    known = [(partial.known_part(request), place) for request, place in asked]
    rows = [row for row, (part, _) in enumerate(known) if part.names]
    memorized = decoded = 0
    if rows:
      ranked, memorized = self._run([known[row] for row in rows], mode)
      decoded = int(ranked.length.sum())
    lines = [incoming_order(request, mode) for request, _ in asked]
    for i, row in enumerate(rows):
      request, part = asked[row][0], known[row][0]
      kept = np.array(partial.known_ranks(request))
      shown = ranked.presented[i : i + 1, : len(kept)]
      own = answer_lib.answer(
        self.policy.setup,
        part,
        # Reasoning names candidates by their rank in the whole slate.
        ranking.Ranked(
          **{
            field.name: getattr(ranked, field.name)[i : i + 1]
            for field in dataclasses.fields(ranked)
          }
          | {'presented': kept[shown]}
        ),
        0,
      )
      lines[row] |= partial.around_unknown(request, own)
    return Answers(
      lines,
      prompts=len(rows),
      decoded=decoded,
      remembered=len(rows) - memorized if self.encoders else 0,
      memorized=memorized,
    )

  def _run(
    self, asked: Sequence[tuple[requests_lib.Request, int]], mode: str
  ) -> tuple[ranking.Ranked, int]:
    """Ranks requests whose candidates are all known or described.

    Returns:
      The answers, and how many memories were made for them.
    """
    setup, knowledge = self.policy.setup, self.knowledge
    requests = [request for request, _ in asked]
    slates = requests_lib.to_slates(
      requests,
      knowledge.log,
      knowledge.facts,
      self.candidates,
      self.history,
    )
    prompter, items = setup.prompter, requests_lib.described(requests)
    if len(items):
      prompter = self.reader.prompts_of(items)
    render = examples.requests(
      prompter, '<think>' if mode == 'reason' else '<answer>', self.order
    )
    rows = [
      render(record, np.random.default_rng((0, place)))
      for record, (_, place) in zip(
        answer_lib.records(slates), asked, strict=True
      )
    ]
    for row in rows:
      del row['grades']  # What the policy must not see.
    memorized = 0
    if self.encoders:
      rows, memorized = self._behind_memory(rows)
    return ranking.Ranked(**self._call(self.programs[mode], rows)), memorized

  def _behind_memory(
    self, rows: Sequence[dict[str, np.ndarray]]
  ) -> tuple[list[dict[str, np.ndarray]], int]:
    """The rests of prompts with their memories; how many of these are new."""
    prompter = self.policy.setup.prompter
    pairs = [examples.behind_memory(prompter, row) for row in rows]
    histories = [history for history, _ in pairs]
    found, memorized = self.memories.recall(
      [h['prompt'][: h['prompt_length']].tobytes() for h in histories],
      lambda places: self._call(self.encoders, [histories[i] for i in places]),
    )
    return [
      rest | {'memory': memory}
      for (_, rest), memory in zip(pairs, found, strict=True)
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
    found = programs[size](
      self.policy.params,
      sharding.shard_batch(batch, self.policy.setup.mesh),
    )
    return jax.tree.map(lambda x: np.asarray(x)[: len(rows)], found)


def incoming_order(request: requests_lib.Request, mode: str) -> dict[str, Any]:
  """The answer to who gets none: the order that came in."""
  return {
    'id': request.id,
    'ranking': list(request.names),
    'order': list(range(len(request.names))),
    'reasoning': '',
    'verdict': None,
    'scores': [None] * len(request.names),
    'unknown_history': request.unknown,
    'described_candidates': request.described_candidates,
    'mode': mode,
    'unknown_candidates': [
      name
      for name, item in zip(request.names, request.candidates, strict=True)
      if item < 0
    ],
  }


def _sizes(setup: policy.Setup, largest: int) -> list[int]:
  """Batch sizes: powers of two times the devices that split a batch."""
  size = setup.mesh.shape['data'] * setup.mesh.shape['fsdp']
  if largest < size:
    raise ValueError(
      f'largest_batch={largest}: a batch splits over {size} devices; give at '
      'least as many'
    )
  sizes = [size]
  while 2 * sizes[-1] <= largest:
    sizes.append(2 * sizes[-1])
  return sizes


def _same_programs(a: policy.Setup, b: policy.Setup) -> bool:
  """Whether programs compiled for the one serve the other."""

  def key(setup: policy.Setup):
    p = setup.prompter
    shape = p.prompt_tokens, p.num_candidates, p.thinking_tokens
    if p.context.memory:
      shape += p.context.memory, p.memory_prompt_tokens, p.rest_tokens
    return setup.model, setup.grammar, setup.mesh, shape

  return key(a) == key(b)
