"""Contexts that the compressor wrote, stored beside the slates they are of.

One ArrayRecord file a split, a record a slate, in the order of the slates:

  history     int32 [h], ids of the history's block
  candidates  int32 [c], ids of the candidates' lines, one after another in the
              incoming order, without their slots
  lengths     int32 [count], tokens of each line
  whole       int32, tokens of the whole context, without its marks
  fault       int32, why this is the whole context: of FAULTS; 0 where it is not

A compression is made once, in one presentation of the candidates, and is read
in any: lines go where their candidates go.

Axes: K candidates, T tokens.
"""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from gr2_jax.ops import compression
from gr2_jax.prompts import context as context_lib
from gr2_jax.prompts import prompt

# Why a context stays whole: what is wrong with what was written of it, or that
# not even its marks would fit.
FAULTS = (*compression.VERDICTS, 'too_short')


def file(directory: os.PathLike[str] | str, split: str) -> pathlib.Path:
  """Where an artifact keeps those of a split."""
  return pathlib.Path(directory) / f'{split}.array_record'


def split_up(
  tokens: np.ndarray, prompter: prompt.Prompter, order: np.ndarray
) -> context_lib.Ids:
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
  return context_lib.Ids(ids[:opened], lines)


def record(
  written: context_lib.Ids, whole: context_lib.Ids, fault: int
) -> dict[str, np.ndarray]:
  """As it is stored: what was written or, with a fault, the whole."""
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
  """What `record` was given."""
  ends = np.cumsum(stored['lengths'])[:-1]
  lines = np.split(stored['candidates'], ends)
  return context_lib.Ids(
    stored['history'].tolist(), [line.tolist() for line in lines]
  )


def report(stored: Iterable[dict[str, np.ndarray]]) -> dict[str, Any]:
  """Counts: `slates`, `unchanged` in all and by fault, `longest`, `kept`.

  `longest` counts tokens beside the marks, as a prompt has room for; `kept` is
  the share of all tokens, marks included.
  """
  faults = dict.fromkeys(FAULTS[1:], 0)
  n = longest = kept = whole = 0
  for one in stored:
    own = len(one['history']) + len(one['candidates'])
    marks = 2 + len(one['lengths'])
    n, longest = n + 1, max(longest, own)
    kept, whole = kept + own + marks, whole + int(one['whole']) + marks
    if fault := int(one['fault']):
      faults[FAULTS[fault]] += 1
  return {
    'slates': n,
    'unchanged': sum(faults.values()),
    'faults': {name: number for name, number in faults.items() if number},
    'longest': longest,
    'kept': kept / max(whole, 1),
  }


class Joined:
  """Random access to slates with what was written of them.

  Args:
    slates: random access to slate records.
    written: random access to what `record` returns, of the first of them, as
      many as there are; a file is opened by `records.Records`.

  Raises:
    ValueError: there are more than slates.
  """

  def __init__(self, slates: Any, written: Any):
    self._slates, self._written = slates, written
    if len(slates) < len(written):
      raise ValueError(
        f'{len(written)} contexts were written for {len(slates)} slates: they '
        'are of others; delete the folder of `compress` to write them again'
      )

  def __len__(self) -> int:
    return len(self._written)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._slates[index] | {'written': context(self._written[index])}
