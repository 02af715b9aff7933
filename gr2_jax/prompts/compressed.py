"""Contexts that the compressor wrote, stored beside their slates.

One ArrayRecord file a split, a record a slate, in the order of the slates:

  history     int32 [h], ids of the history's block
  candidates  int32 [c], ids of the candidates' lines, one after another in the
              incoming order, without their slots
  lengths     int32 [count], tokens of each line
  whole       int32, tokens of the full context, without its marks
  fault       int32, index in FAULTS: why this is the full context; 0 if it is
              not

A compression is made once, in one presentation of the candidates, and is read
in any: lines go where their candidates go.
"""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from gr2_jax.ops import compression
from gr2_jax.prompts import context as context_lib
from gr2_jax.prompts import prompt

# Verdicts on what was written, or a context that is shorter than its marks.
FAULTS = (*compression.VERDICTS, 'too_short')


def file(directory: os.PathLike[str] | str, split: str) -> pathlib.Path:
  """The file of a split in an artifact."""
  return pathlib.Path(directory) / f'{split}.array_record'


def split_up(
  tokens: np.ndarray, prompter: prompt.Prompter, order: np.ndarray
) -> context_lib.Ids:
  """Splits a verified compression into its blocks, lines by incoming rank.

  Its tokens are `history <candidates> line <slot0> line <slot1> .. <eos>`, and
  `order`, int [count], is the incoming rank of each slot.
  """
  words = prompter.vocabulary
  ids = [int(i) for i in tokens]
  begin = ids.index(words.control['<candidates>'])
  history = ids[:begin]
  lines: list[list[int]] = [[] for _ in order]
  for place, rank in enumerate(order):
    end = ids.index(words.slot_base + place, begin + 1)
    lines[rank] = ids[begin + 1 : end]
    begin = end
  return context_lib.Ids(history, lines)


def record(
  written: context_lib.Ids, whole: context_lib.Ids, fault: int
) -> dict[str, np.ndarray]:
  """A record of what was written or, with a fault, of the full context."""
  kept = whole if fault else written
  flat = [i for line in kept.candidates for i in line]
  return {
    'history': np.array(kept.history, np.int32),
    'candidates': np.array(flat, np.int32),
    'lengths': np.array([len(line) for line in kept.candidates], np.int32),
    'whole': np.array(len(whole), np.int32),
    'fault': np.array(fault, np.int32),
  }


def context(stored: dict[str, np.ndarray]) -> context_lib.Ids:
  """The context in a record."""
  lines = np.split(stored['candidates'], np.cumsum(stored['lengths'])[:-1])
  return context_lib.Ids(
    stored['history'].tolist(), [line.tolist() for line in lines]
  )


def report(stored: Iterable[dict[str, np.ndarray]]) -> dict[str, Any]:
  """Counts: `slates`, `unchanged` in all and by fault, `longest`, `kept`.

  `longest` counts tokens without the marks; `kept` is the share of all tokens,
  with the marks.
  """
  faults = dict.fromkeys(FAULTS[1:], 0)
  slates = longest = kept = whole = 0
  for one in stored:
    tokens = len(one['history']) + len(one['candidates'])
    marks = 2 + len(one['lengths'])
    slates, longest = slates + 1, max(longest, tokens)
    kept, whole = kept + tokens + marks, whole + int(one['whole']) + marks
    if fault := int(one['fault']):
      faults[FAULTS[fault]] += 1
  return {
    'slates': slates,
    'unchanged': sum(faults.values()),
    'faults': {name: number for name, number in faults.items() if number},
    'longest': longest,
    'kept': kept / max(whole, 1),
  }


class Joined:
  """Random access to slates with their compressed contexts.

  Args:
    slates: random access to slate records.
    written: random access to the records of the first of them.

  Raises:
    ValueError: there are more contexts than slates.
  """

  def __init__(self, slates: Any, written: Any):
    self._slates, self._written = slates, written
    if len(slates) < len(written):
      raise ValueError(
        f'{len(written)} contexts were written for {len(slates)} slates: they '
        'belong to other slates; delete the folder of `compress` to write them '
        'again'
      )

  def __len__(self) -> int:
    return len(self._written)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._slates[index] | {'written': context(self._written[index])}
