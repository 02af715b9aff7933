"""Compressions by rule: what the compressor begins by imitating.

Of every candidate the same few tokens, the more telling evidence columns with
a larger chance; of the history a few tokens of the last items. What is kept is
drawn anew every time, so that RL finds many ways to choose from.

Axes: K candidates, E evidence columns.
"""

import numpy as np

from gr2_jax.data import contexts, prompts
from gr2_jax.data import slates as slates_lib

# Chances of a line's other tokens, in terms of the sum of the columns'.
_OTHERS = {'sid': 0.05, 'categories': 0.02, 'title': 0.01}
_HISTORY_SHARES = (0.0, 0.1, 0.2, 0.4)  # of the tokens beside the marks


def telling(slates: slates_lib.Slates, index: np.ndarray) -> np.ndarray:
  """How well each evidence column, alone, tells positives from negatives.

  Args:
    slates: labelled.
    index: int [E], which columns.

  Returns:
    float64 [E], |2 AUC - 1|, the AUC over the pairs of a slate.
  """
  values = slates.evidence[..., index]
  real = np.arange(values.shape[1]) < slates.count[:, None]
  positive, negative = real & (slates.grades > 0), real & (slates.grades == 0)
  pairs = positive[:, :, None] & negative[:, None, :]
  right = np.zeros(len(index))
  for column in range(len(index)):
    apart = values[:, :, None, column] - values[:, None, :, column]
    right[column] = np.sign(apart)[pairs].sum()
  return np.abs(right) / max(int(pairs.sum()), 1)


def extract(
  prompter: prompts.Prompter,
  slate: dict[str, np.ndarray],
  order: np.ndarray,
  budget: int,
  weights_E: np.ndarray,
  rng: np.random.Generator,
) -> list[int]:
  """A compression of at most `budget` tokens, as `grammars.Extraction` has it.

  Args:
    prompter: of whole contexts.
    slate: one record.
    order: int [count], incoming ranks in the order of presentation.
    budget: tokens, <eos> included; at least the marks'.
    weights_E: of `telling`.
    rng: of what is kept.

  Returns:
    Ids, <eos> included.
  """
  words, lines = prompter.vocabulary, prompter.lines(slate)
  spare = max(0, budget - len(order) - 2)
  for_history = int(spare * rng.choice(_HISTORY_SHARES))
  ids = _of_history(lines.history, for_history, rng)
  shortest = min(
    sum(map(len, line.values())) for line in lines.candidates
  )  # So that all can be of one length.
  quota = min((spare - len(ids)) // len(order), shortest)
  kept = _of_candidates(lines.candidates, quota, weights_E, rng)
  ids.append(words.control['<candidates>'])
  for place, rank in enumerate(order):
    ids += [*kept[rank], words.slot_base + place]
  return [*ids, words.eos]


def _of_candidates(
  lines: list[contexts.Line],
  quota: int,
  weights_E: np.ndarray,
  rng: np.random.Generator,
) -> list[list[int]]:
  """`quota` tokens of every line, of the same places where it has them."""
  chances: dict[tuple[str, int], float] = {}
  for line in lines:
    for field, ids in line.items():
      for place in range(len(ids)):
        chances[field, place] = (
          weights_E[place] + 1e-3
          if field == 'evidence'
          else _OTHERS[field] * weights_E.sum() / (1 + place)
        )
  # Plackett-Luce: the order of log-chances with Gumbel noise.
  names = list(chances)
  drawn = 2 * np.log([chances[n] for n in names]) + rng.gumbel(size=len(names))
  ranked = [names[i] for i in np.argsort(-drawn)]
  kept = []
  for line in lines:
    have = [(f, p) for f, p in ranked if f in line and p < len(line[f])]
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
  lines: list[contexts.Line], room: int, rng: np.random.Generator
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
