"""Compressions by rule: what the compressor begins by imitating.

Of every candidate the same few tokens, those that tell most first; of the
history a few tokens of the last items, or none. What is kept is drawn anew
every time, so that RL finds many ways to choose from.

A unit is a place in a field of a candidate's line: an evidence column, a level
of the semantic ID.

Axes: K candidates, U units.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from gr2_jax.prompts import context, prompt

Unit = tuple[str, int]

# Fields of a line that are as long for every candidate.
_REGULAR = ('sid', 'evidence')
# Nats by which a unit is likelier to be kept than the next in the order.
_STEP = 1.0
_HISTORY_SHARES = (0.0, 0.1, 0.2, 0.4)  # of the tokens beside the marks


def units(line: context.Line) -> list[Unit]:
  """What can be kept of any candidate's line, in the line's order."""
  return [
    (field, place)
    for field, ids in line.items()
    if field in _REGULAR
    for place in range(len(ids))
  ]


def most_telling(
  known: Collection[Unit],
  worth: Callable[[list[list[Unit]]], Sequence[float]],
) -> list[Unit]:
  """Units in the order of a backward elimination.

  Of those that are left the one goes that the others do best without; of equals
  the last. Forwards, whoever reads would be asked about contexts of one or two
  tokens, which are like nothing that it has learned from.

  Args:
    known: of `units`.
    worth: of every list of units, how well these alone do.

  Returns:
    All of them, the most telling first.
  """
  left, gone = list(known), []
  while len(left) > 1:
    found = worth([left[:i] + left[i + 1 :] for i in range(len(left))])
    last = len(left) - 1 - int(np.argmax(found[::-1]))
    gone.append(left.pop(last))
  return left + gone[::-1]


def extract(
  prompter: prompt.Prompter,
  slate: dict[str, np.ndarray],
  order: np.ndarray,
  budget: int,
  ranked: Sequence[Unit],
  rng: np.random.Generator | None,
) -> list[int]:
  """A compression of at most `budget` tokens, as `grammars.Extraction` has it.

  Args:
    prompter: of whole contexts.
    slate: one record.
    order: int [count], incoming ranks in the order of presentation.
    budget: tokens, <eos> included; at least the marks'.
    ranked: of `most_telling`.
    rng: of what is kept; None for the first units of `ranked`, and nothing of
      the history.

  Returns:
    Ids, <eos> included.
  """
  words, lines = prompter.vocabulary, prompter.lines(slate)
  spare = max(0, budget - len(order) - 2)
  ids: list[int] = []
  if rng is not None:
    for_history = int(spare * rng.choice(_HISTORY_SHARES))
    ids = _of_history(lines.history, for_history, rng)
  shortest = min(
    sum(map(len, line.values())) for line in lines.candidates
  )  # So that all can be of one length.
  quota = min((spare - len(ids)) // len(order), shortest)
  kept = _of_candidates(lines.candidates, quota, ranked, rng)
  ids.append(words.control['<candidates>'])
  for place, rank in enumerate(order):
    ids += [*kept[rank], words.slot_base + place]
  return [*ids, words.eos]


def _of_candidates(
  lines: list[context.Line],
  quota: int,
  ranked: Sequence[Unit],
  rng: np.random.Generator | None,
) -> list[list[int]]:
  """`quota` tokens of every line, of the same places where it has them."""
  longest = {
    field: max(len(line[field]) for line in lines) for field in lines[0]
  }
  rest = [(f, p) for f, n in longest.items() for p in range(n)]
  names = [*ranked, *(unit for unit in rest if unit not in set(ranked))]
  if rng is not None:  # Plackett-Luce: log-chances with Gumbel noise.
    drawn = rng.gumbel(size=len(names)) - _STEP * np.arange(len(names))
    names = [names[i] for i in np.argsort(-drawn)]
  kept = []
  for line in lines:
    have = [(f, p) for f, p in names if f in line and p < len(line[f])]
    chosen = set(have[:quota])
    kept.append(
      [
        i
        for field, ids in line.items()
        for place, i in enumerate(ids)
        if (field, place) in chosen
      ]
    )
  return kept


def _of_history(
  lines: list[context.Line], room: int, rng: np.random.Generator
) -> list[int]:
  """Some fields of the last items, the first tokens of each, as fit."""
  fields = {
    field: int(rng.integers(1, 5))
    for field in ('sid', 'categories', 'title', 'grade')
    if rng.random() < 0.5
  }
  kept: list[list[int]] = []
  for line in reversed(lines):
    ids = [
      i for field, part in line.items() for i in part[: fields.get(field, 0)]
    ]
    room -= len(ids)
    if room < 0:
      break
    kept.append(ids)
  return [i for ids in reversed(kept) for i in ids]
