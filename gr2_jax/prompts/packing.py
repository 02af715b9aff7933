"""Packing of documents into rows of a fixed number of tokens, ahead of time.

A row is several documents end to end. Each is scored as if it stood alone after
<bos>: it attends to no other, and its positions begin anew. The rows are a
function of the seed and of each task's records, share and rendering.

Axes: T tokens of a row.
"""

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import numpy as np

from gr2_jax.data import files, records
from gr2_jax.distributed import processes
from gr2_jax.prompts import examples as examples_lib
from gr2_jax.prompts import prompt

TASKS = ('sequence', 'persona', 'caption', 'text')
ROWS = 'packed.array_record'
FACTS = 'packed.json'

_OPEN_ROWS = 64  # rows that wait for a fitting document

# (record, rng) -> documents, each a list of token ids.
Render = Callable[[Any, np.random.Generator], list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Document:
  """A document of at most T tokens."""

  task: str
  ids: list[int]


def documents(
  task: str, source: Any, render: Render, seed: int
) -> Iterator[Document]:
  """Yields a task's documents, epoch after epoch, without end.

  Every epoch has its own order, and every record its own randomness, both
  functions of (seed, task, epoch).

  Raises:
    ValueError: the records render no document.
  """
  number = TASKS.index(task)
  for epoch in itertools.count():
    empty = True
    order = np.random.default_rng((seed, number, epoch))
    for index in order.permutation(len(source)).tolist():
      rng = np.random.default_rng((seed, number, epoch, index))
      for ids in render(source[index], rng):
        empty = False
        yield Document(task, ids)
    if empty:
      raise ValueError(f'midtrain.mixture.{task}: the data has no document')


def mixture(
  streams: dict[str, Iterator[Document]], shares: dict[str, float]
) -> Iterator[Document]:
  """Mixes streams so that their tokens have these shares.

  The next document is of the task that is furthest behind.
  """
  written = dict.fromkeys(shares, 0)
  while True:
    task = min(shares, key=lambda task: written[task] / shares[task])
    document = next(streams[task])
    written[task] += len(document.ids)
    yield document


def pack(stream: Iterable[Document], tokens: int) -> Iterator[list[Document]]:
  """Yields rows of documents, as many as fit into T tokens.

  A document goes into the row where it leaves the least room. When it fits
  nowhere and enough rows wait, the oldest row is complete; no row waits long,
  so that the rows keep the shares of the stream.
  """
  waiting: list[list[Document]] = []
  left: list[int] = []
  for document in stream:
    size = len(document.ids)
    fits = [place for place, room in enumerate(left) if room >= size]
    if fits:
      place = min(fits, key=left.__getitem__)
      waiting[place].append(document)
      left[place] -= size
      continue
    if len(waiting) == _OPEN_ROWS:
      del left[0]
      yield waiting.pop(0)
    waiting.append([document])
    left.append(tokens - size)


def rows(
  shares: dict[str, float],
  source: dict[str, Any],
  renders: dict[str, Render],
  tokens: int,
  seed: int,
) -> Iterator[list[Document]]:
  """Yields packed rows of several tasks, without end.

  Each argument maps tasks: to their share of the tokens, to random access to
  their records, to their rendering.
  """
  streams = {
    task: documents(task, source[task], renders[task], seed) for task in shares
  }
  return pack(mixture(streams, shares), tokens)


def encode(row: list[Document], tokens: int) -> dict[str, np.ndarray]:
  """A packed row on disk: tokens and segments, both int32 [T].

  Segments number the documents of the row from 1; padding has segment 0.
  """
  ids = [id for document in row for id in document.ids]
  sizes = [len(document.ids) for document in row]
  return {
    'tokens': prompt.pad(ids, tokens, 'row'),
    'segments': prompt.pad(
      np.repeat(np.arange(1, len(row) + 1), sizes), tokens, 'row'
    ),
  }


def write(
  workdir: pathlib.Path, rows: Iterator[list[Document]], tokens: int, most: int
) -> dict[str, Any]:
  """Writes the first `most` rows of `pack` as ROWS, then their facts as FACTS.

  Without FACTS, everything is written again. The main process writes; the
  others wait.

  Returns:
    The facts: `rows`, `documents`, `fill`, the share of tokens that are not
    padding, and `tokens` by task.
  """
  path = workdir / FACTS
  if not processes.is_main_process():
    processes.wait_for(path)
  if path.exists():
    return json.loads(path.read_text())
  counts: collections.Counter[str] = collections.Counter()
  number = 0

  def examples() -> Iterator[dict[str, np.ndarray]]:
    nonlocal number
    for row in itertools.islice(rows, most):
      number += len(row)
      for document in row:
        counts[document.task] += len(document.ids)
      yield encode(row, tokens)

  written = records.write(workdir / ROWS, examples())
  facts = {
    'rows': written,
    'documents': number,
    'fill': counts.total() / (written * tokens),
    'tokens': dict(counts),
  }
  with files.atomic_write(path) as file:
    json.dump(facts, file)
  return facts


def dataset(
  source: Any,
  prompter: prompt.Prompter,
  batch_size: int,
  rows: np.ndarray | None = None,
) -> grain.MapDataset:
  """Endless batches of `learner.Examples`, in the order of packing.

  `source` is random access to rows of `encode`; the rest is as in
  `examples.dataset`.
  """
  data = grain.MapDataset.source(source).repeat()
  data = data.map(lambda row: example(row, prompter))
  return examples_lib.share(data, batch_size, rows)


def example(
  row: dict[str, np.ndarray], prompter: prompt.Prompter
) -> dict[str, np.ndarray]:
  """A row for the learner: <bos> is the prompt, all documents its completion.

  A document's first token, its kind, has weight 0: the mixture decides how
  often each kind occurs.
  """
  segments = row['segments']
  inside = segments[1:] == segments[:-1]
  weights = np.pad(inside, (1, 0)) & (segments > 0)
  K = prompter.num_candidates
  return {
    'prompt': np.array([prompter.vocabulary.bos], np.int32),
    'prompt_length': np.int32(1),
    'completion': row['tokens'][None],
    'weights': weights[None].astype(np.float32),
    'answer_at': np.zeros(1, np.int32),
    'rank_by_readout': np.zeros(1, bool),
    'slots': np.zeros(K, np.int32),
    'grades': np.zeros(K, np.float32),
    'count': np.int32(0),
    'segments': segments[None],
  }
