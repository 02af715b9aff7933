"""Packing of documents into rows of a fixed number of tokens, ahead of time.

A row is several documents end to end, a number a document beside each token.
Each is scored as if it stood alone after <bos>: it reads no other, and its
positions begin anew. What the rows are is a function of the seed and of each
task's records, shares and rendering.

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

_OPEN_ROWS = 64  # rows that wait for a document that fits

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

  Every epoch has an order of its own, and every record randomness of its own,
  both functions of (seed, task, epoch).

  Raises:
    ValueError: there are none.
  """
  number = TASKS.index(task)
  for epoch in itertools.count():
    some = False
    order = np.random.default_rng((seed, number, epoch))
    for index in order.permutation(len(source)).tolist():
      rng = np.random.default_rng((seed, number, epoch, index))
      for ids in render(source[index], rng):
        some = True
        yield Document(task, ids)
    if not some:
      raise ValueError(f'midtrain.mixture.{task}: the data has no document')


def mixture(
  streams: dict[str, Iterator[Document]], shares: dict[str, float]
) -> Iterator[Document]:
  """Yields documents of every stream so that the tokens are in these shares.

  The next one is of the task that is furthest behind.
  """
  written = dict.fromkeys(shares, 0)
  while True:
    task = min(shares, key=lambda task: written[task] / shares[task])
    document = next(streams[task])
    written[task] += len(document.ids)
    yield document


def pack(stream: Iterable[Document], tokens: int) -> Iterator[list[Document]]:
  """Yields rows of documents, as many as fit into T tokens.

  A document goes where it leaves the least room. When it fits nowhere and
  enough rows wait, the first of them leaves: none waits long, so that the rows
  written are in the shares of the stream. What the first rows are does not
  depend on how many are drawn.
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

  Args:
    shares: task -> share of the tokens.
    source: task -> random access to records.
    renders: task -> rendering.
    tokens: T.
    seed: of order and directions.
  """
  streams = {
    task: documents(task, source[task], renders[task], seed) for task in shares
  }
  return pack(mixture(streams, shares), tokens)


def encode(row: list[Document], tokens: int) -> dict[str, np.ndarray]:
  """A packed row on disk: tokens int32 [T] and segments int32 [T].

  A document's segment is its place in the row, from 1; padding's is 0.
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
  """Writes the first rows as ROWS, and what is in them as FACTS, last.

  Args:
    workdir: where to. What a killed run left is made again, all of it; of
      several processes the first one writes, the others wait.
    rows: of `pack`.
    tokens: T.
    most: number of rows.

  Returns:
    `rows`, `documents`, `fill`, the share of tokens that are not padding, and
    `tokens`, of each task.
  """
  path = workdir / FACTS
  if not processes.is_main_process():
    processes.wait_for(path)
  if path.exists():
    return json.loads(path.read_text())
  counts: collections.Counter[str] = collections.Counter()
  number = 0

  def examples():
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
  """Endless batches of packed rows, in the order in which they were packed.

  Args:
    source: random access to rows of `encode`.
    prompter: token ids and K.
    batch_size: rows a batch over all hosts.
    rows: which of every batch to make; None for all.

  Returns:
    Dicts with the fields of `learner.Examples`.
  """
  data = grain.MapDataset.source(source).repeat()
  data = data.map(lambda row: example(row, prompter))
  return examples_lib.share(data, batch_size, rows)


def example(
  row: dict[str, np.ndarray], prompter: prompt.Prompter
) -> dict[str, np.ndarray]:
  """A row for the learner: the prompt is <bos>, all documents complete it.

  A document's first token, which says of what kind it is, is not learned: how
  often each comes is the mixture's business.
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
