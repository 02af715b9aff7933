"""Contexts that the compressor wrote, stored beside the slates they are of.

One ArrayRecord file a split, a record a slate, in the order of the slates:

  history     int32 [h], ids of the history's block
  candidates  int32 [c], ids of the candidates' lines, one after another in the
              incoming order, without their slots
  lengths     int32 [count], tokens of each line
  unchanged   bool, whether this is the whole context: it could not be
              compressed, or what was written of it does not hold

A compression is made once, in one presentation of the candidates, and is read
in any: lines go where their candidates go.

Axes: K candidates, T tokens.
"""

import os
import pathlib
from typing import Any

import numpy as np

from gr2_jax.data import contexts, prompts, records


def file(directory: os.PathLike[str] | str, split: str) -> pathlib.Path:
  """Where an artifact keeps those of a split."""
  return pathlib.Path(directory) / f'{split}.array_record'


def split_up(
  tokens: np.ndarray, prompter: prompts.Prompter, order: np.ndarray
) -> contexts.Ids:
  """The blocks of a compression that was verified.

  Args:
    tokens: int [T], `history <candidates> line <slot0> line <slot1> .. <eos>`.
    prompter: token ids.
    order: int [count], the incoming rank of each slot.

  Returns:
    Its ids, candidates by incoming rank.
  """
  words = prompter.vocabulary
  ids = [int(i) for i in tokens]
  opened = ids.index(words.control['<candidates>'])
  lines: list[list[int]] = [[] for _ in order]
  begin = opened + 1
  for place, rank in enumerate(order):
    end = ids.index(words.slot_base + place, begin)
    lines[rank] = ids[begin:end]
    begin = end + 1
  return contexts.Ids(ids[:opened], lines)


def record(written: contexts.Ids, unchanged: bool) -> dict[str, np.ndarray]:
  """As it is stored."""
  flat = [i for line in written.candidates for i in line]
  return {
    'history': np.array(written.history, np.int32),
    'candidates': np.array(flat, np.int32),
    'lengths': np.array([len(line) for line in written.candidates], np.int32),
    'unchanged': np.array(unchanged),
  }


def tokens(stored: dict[str, np.ndarray]) -> int:
  """Length of a stored context, without its marks."""
  return len(stored['history']) + len(stored['candidates'])


class Joined:
  """Random access to slates with what was written of them.

  Args:
    slates: random access to records of a split.
    path: of `file`.

  Raises:
    ValueError: it is not of these slates.
  """

  def __init__(self, slates: Any, path: pathlib.Path):
    self._slates, self._written = slates, records.Records(path)
    if len(slates) != len(self._written):
      raise ValueError(
        f'{path}: {len(self._written)} contexts for {len(slates)} slates; '
        'delete the folder to have them written again'
      )

  def __len__(self) -> int:
    return len(self._slates)

  def __getitem__(self, index: int) -> dict[str, Any]:
    stored = self._written[int(index)]
    ends = np.cumsum(stored['lengths'])[:-1]
    lines = np.split(stored['candidates'], ends)
    written = contexts.Ids(
      stored['history'].tolist(), [line.tolist() for line in lines]
    )
    return self._slates[index] | {'written': written}
