"""Grain pipelines from slates and traces to host batches of static shape.

Every example is a function of (record, per-record seed), so the iterator's
state is a position, and a resumed run draws the same examples as an
uninterrupted one.

Axes: P batch of slates, G completions of a slate, T tokens, K candidates.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from gr2_jax.prompts import prompt as prompt_lib

# One thread keeps ahead of the device; more compete for the interpreter.
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)

Example = dict[str, np.ndarray]
Render = Callable[[Any, np.random.Generator], Example]


def stack(rows: list[Example]) -> Example:
  """Stacks examples along a new first axis."""
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def dataset(
  source: Any,
  render: Render,
  batch_size: int,
  seed: int,
  rows: np.ndarray | None = None,
) -> grain.MapDataset:
  """Endless shuffled batches; each epoch has its own order and randomness.

  Args:
    source: random access to records.
    render: makes arrays of static shape of a record.
    batch_size: examples a batch over all hosts.
    seed: of order and randomness.
    rows: the examples of every batch to make, see `sharding.local_rows`; None
      for all. Batches and iterator states do not depend on it, so that a run
      can continue on another number of hosts.

  Raises:
    ValueError: there are fewer records than a batch has.
  """
  if len(source) < batch_size:
    raise ValueError(
      f'{len(source)} examples are fewer than batch_size={batch_size}: lower '
      'it, or bring more data'
    )
  data = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
  return share(data.random_map(render), batch_size, rows)


def share(
  data: grain.MapDataset, batch_size: int, rows: np.ndarray | None
) -> grain.MapDataset:
  """Batches of an endless data set, or only some rows of each."""
  if rows is None or len(rows) == batch_size:
    return data.batch(batch_size, drop_remainder=True)
  return grain.MapDataset.source(_Share(data, batch_size, rows))


class _Share:
  """Random access to batches of which only some rows are made."""

  def __init__(self, data: grain.MapDataset, batch_size: int, rows: np.ndarray):
    self._data, self._batch_size, self._rows = data, batch_size, rows

  def __len__(self) -> int:
    return len(self._data) // self._batch_size

  def __getitem__(self, index: int) -> Example:
    first = int(index) * self._batch_size
    return stack([self._data[first + int(row)] for row in self._rows])


def iterate(data: grain.MapDataset) -> grain.DatasetIterator:
  """An iterator whose state, a position, Grain can save."""
  return iter(data.to_iter_dataset(_READ))


def first_batches(
  source: Any, render: Render, batch_size: int, most: int, seed: int
) -> list[Example]:
  """The first batches of a split in random order, equal at every call."""
  batch_size = min(batch_size, len(source))
  data = dataset(source, render, batch_size, seed)
  return [data[i] for i in range(min(most, len(source) // batch_size))]


@dataclasses.dataclass(frozen=True)
class Completion:
  """A completion to train on, before padding."""

  ids: list[int]
  weights: list[float]  # of each token in the loss
  answer_at: int = -1  # place of the answer that the read-out ranks, or -1


def examples(
  prompt: Example,
  completions: list[Completion],
  prompt_tokens: int,
  completion_tokens: int,
) -> Example:
  """One row of `learner.Examples`."""
  ids = [
    prompt_lib.pad(c.ids, completion_tokens, 'completion') for c in completions
  ]
  weights = np.zeros((len(completions), completion_tokens), np.float32)
  for row, completion in zip(weights, completions, strict=True):
    row[: len(completion.weights)] = completion.weights
  at = np.array([c.answer_at for c in completions], np.int32)
  return _padded(prompt['prompt'], prompt_tokens) | {
    'completion': np.stack(ids),
    'weights': weights,
    'answer_at': np.maximum(at, 0),
    'rank_by_readout': at >= 0,
    'slots': prompt['slots'],
    'grades': prompt['grades'],
    'count': prompt['count'],
  }


def _padded(ids: np.ndarray | list[int], tokens: int) -> Example:
  return {
    'prompt': prompt_lib.pad(ids, tokens, 'prompt'),
    'prompt_length': np.int32(len(ids)),
  }


def generation_rows(
  prompter: prompt_lib.Prompter,
  control: str,
  order: str,
  privileged: bool = False,
) -> Render:
  """Rendering for sampling: the prompt ends in the control token.

  Args:
    prompter: of the data set.
    control: '<think>' or '<answer>'.
    order: of the candidates, one of `prompt.ORDERS`.
    privileged: whether the prompt names a positive, drawn at random.

  Returns:
    `(slate, rng) -> dict` with prompt [T], prompt_length, slots, grades,
    incoming [K], count.
  """
  tokens = prompter.prompt_tokens + privileged * prompt_lib.TARGET_TOKENS

  def render(slate: Example, rng: np.random.Generator) -> Example:
    shown = prompt_lib.presentation(int(slate['count']), order, rng)
    row = prompter.prompt(slate, shown, rng)
    target = draw_target(row['grades'], rng) if privileged else None
    ids = [*row['prompt'], *prompter.ask(control, target)]
    return row | _padded(ids, tokens)

  return render


def behind_memory(
  prompter: prompt_lib.Prompter, row: Example
) -> tuple[Example, Example]:
  """Splits a row of `generation_rows` behind its memory tokens.

  Returns:
    The prompt and prompt_length that `transformer.encode_memory` reads; and the
    row with the rest as its prompt, the slots' places in it, and the
    memory_length before it.
  """
  ids = row['prompt'][: row['prompt_length']]
  before, rest = prompter.split_memory(ids)
  slots = np.maximum(row['slots'] - len(before), 0)  # Padding is at 0.
  behind = row | _padded(rest, prompter.rest_tokens)
  behind |= {'slots': slots, 'memory_length': np.int32(len(before))}
  return _padded(before, prompter.memory_prompt_tokens), behind


def draw_target(grades: np.ndarray, rng: np.random.Generator) -> int:
  """Draws the slot of one of a slate's positives."""
  return int(rng.choice(np.flatnonzero(grades > 0)))


def several(render: Render, views: int) -> Render:
  """Renders a record `views` times, along a new first axis."""
  return lambda record, rng: stack([render(record, rng) for _ in range(views)])


def in_order(
  slates: Any, render: Render, batch_size: int, seed: int, first: int = 0
) -> Iterator[tuple[int, Example]]:
  """Yields (number of real rows, batch) over a split once.

  Args:
    slates: random access to records.
    render: of `generation_rows`; its randomness is a function of (seed, index).
    batch_size: rows of every batch; the last batch repeats its last row.
    seed: of the presentation.
    first: index of the first slate in a longer run that these are a part of.
  """
  for begin in range(0, len(slates), batch_size):
    index = range(begin, min(begin + batch_size, len(slates)))
    rows = [
      render(slates[i], np.random.default_rng((seed, first + i))) for i in index
    ]
    yield len(index), stack(rows + [rows[-1]] * (batch_size - len(rows)))
