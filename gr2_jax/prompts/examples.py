"""Grain pipelines from slates and traces to host batches of static shape.

Every example is a function of (record, per-record seed), so the iterator's
state is a position and a resumed run draws what the uninterrupted one would.

Axes: P batch of slates, G completions of a slate, T tokens, K candidates.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from gr2_jax.prompts import prompt as prompt_lib

# One reader keeps ahead of the device; more fight for the interpreter.
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def dataset(
  source: Any,
  render: Callable[[Any, np.random.Generator], dict[str, np.ndarray]],
  batch_size: int,
  seed: int,
  rows: np.ndarray | None = None,
) -> grain.MapDataset:
  """Endless shuffled batches; each epoch has its own order and randomness.

  Args:
    source: random access to records.
    render: a record and a generator to a dict of arrays of static shape.
    batch_size: examples a batch over all hosts.
    seed: of order and randomness.
    rows: which examples of every batch to make, of `sharding.own_rows`; None
      for all.

  Returns:
    Dicts of stacked arrays. What a batch holds, and an iterator's state, do
    not depend on `rows`: another number of hosts goes on with the same.

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
  """Batches of an endless data set, or some rows of each."""
  if rows is None or len(rows) == batch_size:
    return data.batch(batch_size, drop_remainder=True)
  return grain.MapDataset.source(_Share(data, batch_size, rows))


class _Share:
  """Random access to batches of which only some rows are made."""

  def __init__(self, data: grain.MapDataset, batch_size: int, rows: np.ndarray):
    self._data, self._batch_size, self._rows = data, batch_size, rows

  def __len__(self) -> int:
    return len(self._data) // self._batch_size

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    first = int(index) * self._batch_size
    made = [self._data[first + int(row)] for row in self._rows]
    return {k: np.stack([example[k] for example in made]) for k in made[0]}


def iterate(data: grain.MapDataset) -> grain.DatasetIterator:
  """An iterator whose state Grain can save: a position."""
  return iter(data.to_iter_dataset(_READ))


def first_batches(
  source: Any,
  render: Callable[[Any, np.random.Generator], dict[str, np.ndarray]],
  batch_size: int,
  most: int,
  seed: int,
) -> list[dict[str, np.ndarray]]:
  """The first batches of a split in random order: the same at every call."""
  batch_size = min(batch_size, len(source))
  data = dataset(source, render, batch_size, seed)
  return [data[i] for i in range(min(most, len(source) // batch_size))]


@dataclasses.dataclass(frozen=True)
class Completion:
  """A completion to train on, before padding."""

  ids: list[int]
  weights: list[float]  # of each token in the loss
  answer_at: int = -1  # where its slots begin, where the read-out ranks them


def examples(
  prompt: dict[str, np.ndarray],
  completions: list[Completion],
  prompt_tokens: int,
  completion_tokens: int,
) -> dict[str, np.ndarray]:
  """One row of `learner.Examples`."""
  ids = [
    prompt_lib.pad(c.ids, completion_tokens, 'completion') for c in completions
  ]
  weights = np.zeros((len(completions), completion_tokens), np.float32)
  for row, completion in zip(weights, completions, strict=True):
    row[: len(completion.weights)] = completion.weights
  at = np.array([c.answer_at for c in completions], np.int32)
  return {
    'prompt': prompt_lib.pad(prompt['prompt'], prompt_tokens, 'prompt'),
    'prompt_length': np.int32(len(prompt['prompt'])),
    'completion': np.stack(ids),
    'weights': weights,
    'answer_at': np.maximum(at, 0),
    'rank_by_readout': at >= 0,
    'slots': prompt['slots'],
    'grades': prompt['grades'],
    'count': prompt['count'],
  }


def generation_rows(
  prompter: prompt_lib.Prompter,
  control: str,
  order: str,
  privileged: bool = False,
) -> Callable[..., dict[str, np.ndarray]]:
  """Rendering for sampling: the prompt ends in the control token.

  Args:
    prompter: of the data set.
    control: '<think>' or '<answer>'.
    order: in which candidates are shown, of `prompt.ORDERS`.
    privileged: the prompt names a positive, drawn at random.

  Returns:
    `(slate, rng) -> dict` with prompt [T], prompt_length, slots, grades,
    incoming [K], count.
  """
  tokens = prompter.prompt_tokens + privileged * prompt_lib.TARGET_TOKENS

  def render(slate, rng):
    shown = prompt_lib.presentation(int(slate['count']), order, rng)
    row = prompter.prompt(slate, shown, rng)
    target = draw_target(row['grades'], rng) if privileged else None
    ids = [*row['prompt'], *prompter.ask(control, target)]
    return row | {
      'prompt': prompt_lib.pad(ids, tokens, 'prompt'),
      'prompt_length': np.int32(len(ids)),
    }

  return render


def behind_memory(
  prompter: prompt_lib.Prompter, row: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Splits an example of `generation_rows` whose prompt has memory tokens.

  Args:
    prompter: of the data set.
    row: of `generation_rows`.

  Returns:
    What `transformer.encode_memory` reads, with prompt and prompt_length, and
    the row with the rest as its prompt, where its slots stand, and the
    memory_length that it stands behind.
  """
  ids = row['prompt'][: row['prompt_length']]
  before, rest = prompter.split_memory(ids)

  def padded(ids: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
    return {
      'prompt': prompt_lib.pad(ids, tokens, 'prompt'),
      'prompt_length': np.int32(len(ids)),
    }

  own = padded(rest, prompter.rest_tokens)
  own['slots'] = np.maximum(row['slots'] - len(before), 0)  # Padding is at 0.
  own['memory_length'] = np.int32(len(before))
  return padded(before, prompter.memory_prompt_tokens), row | own


def draw_target(grades: np.ndarray, rng: np.random.Generator) -> int:
  """The slot of one of a slate's positives."""
  return int(rng.choice(np.flatnonzero(grades > 0)))


def several(
  render: Callable[..., dict[str, np.ndarray]], views: int
) -> Callable[..., dict[str, np.ndarray]]:
  """Renders a record `views` times, each with randomness of its own.

  Returns:
    `(record, rng) -> dict` of arrays with a leading axis of `views`.
  """

  def render_views(record, rng):
    rows = [render(record, rng) for _ in range(views)]
    return {k: np.stack([row[k] for row in rows]) for k in rows[0]}

  return render_views


def in_order(
  slates: Any,
  render: Callable[..., dict[str, np.ndarray]],
  batch_size: int,
  seed: int,
  first: int = 0,
):
  """Yields `(rows, batch)` over a whole split once, the last batch padded.

  Args:
    slates: random access to records.
    render: of `generation_rows`; its randomness is a function of (seed, index).
    batch_size: rows of every batch; the last repeats its last row.
    seed: of the presentation.
    first: index of the first slate in a longer run that these are a part of.

  Yields:
    The number of real rows and a dict of stacked arrays.
  """
  for begin in range(0, len(slates), batch_size):
    index = range(begin, min(begin + batch_size, len(slates)))
    rows = [
      render(slates[i], np.random.default_rng((seed, first + i))) for i in index
    ]
    rows += [rows[-1]] * (batch_size - len(rows))
    yield len(index), {k: np.stack([r[k] for r in rows]) for k in rows[0]}
