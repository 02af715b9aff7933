"""Compressions by rule, which the compressor imitates before RL.

Every candidate keeps the same number of tokens, the most important first. The
history keeps a few tokens of its latest items, or none. What is kept is drawn
at random each time, so that RL starts from varied compressions.

A unit is a place in a field of a candidate's line: an evidence column, or a
level of the semantic ID. The ranker decides which units are important, in a
backward elimination: each step drops the unit without which the ranker's
read-out stays closest to its target (`judge.likeness`).

Axes: n slates, P of them at a time, A alternatives, K candidates, U units,
T tokens.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from gr2_jax.compressor import judge, rollouts
from gr2_jax.compressor.options import CompressorOptions
from gr2_jax.distributed import processes, sharding
from gr2_jax.policy import policy
from gr2_jax.prompts import context, examples, prompt

Unit = tuple[str, int]  # field, place

_FIXED_LENGTH = ('sid', 'evidence')  # fields of one length for all candidates
# In log-probability, how much likelier a unit is kept than the next in order.
_STEP = 1.0
_HISTORY_SHARES = (0.0, 0.1, 0.2, 0.4)  # of the tokens besides the anchors


def units(line: context.Line) -> list[Unit]:
  """The units of a candidate's line, in its order."""
  return [
    (field, place)
    for field, ids in line.items()
    if field in _FIXED_LENGTH
    for place in range(len(ids))
  ]


def rank_units(
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  ranker: Any,
  compressor: CompressorOptions,
  order: str,
  slates: Any,
) -> list[Unit]:
  """Sorts units by their importance to the ranker, measured on some slates.

  Args:
    spec: of the ranker.
    mesh: devices of the parameters.
    ranker: its parameters.
    compressor: its options.
    order: of the candidates, see `prompt.ORDERS`.
    slates: random access to records.
  """
  prompter = spec.prompter
  all_units = units(prompter.lines(slates[0]).candidates[0])
  index = {unit: i for i, unit in enumerate(all_units)}
  by = compressor.judge_by
  target = jax.jit(functools.partial(judge.likeness_target, spec, by))
  likeness = jax.jit(functools.partial(judge.likeness, spec))
  render_whole = rollouts.generation_rows(
    prompter, {1.0: prompter.prompt_tokens}, order
  )

  def render(slate, rng):
    row = render_whole(slate, rng)
    shown = row['incoming'][: int(row['count'])]
    return row | {'lines': _unit_ids(prompter, slate, shown, all_units)}

  cases = []
  with sharding.activate(mesh):
    for n, batch in examples.in_order(
      slates, render, compressor.eval_batch_size, 0
    ):
      lines, count = batch.pop('lines'), batch['count']
      rows = sharding.shard_batch(batch, mesh)
      cases.append((n, lines, count, target(ranker, rows)))

  def mean_likeness(alternatives: list[list[Unit]]) -> np.ndarray:
    """Mean over the slates: [A]."""
    kept = np.array([sorted(index[u] for u in one) for one in alternatives])
    # Padded to U alternatives, so that all calls share one compilation.
    padding = [(0, len(all_units) - len(kept)), (0, 0)]
    kept = np.pad(kept, padding, mode='edge')
    values = []
    with sharding.activate(mesh):
      for n, lines, count, t in cases:
        written = _compressions(spec, lines[:, :, kept], count, len(all_units))
        case = sharding.shard_batch((count, *written), mesh)
        values.append(processes.gather_to_host(likeness(ranker, t, *case))[:n])
    return np.concatenate(values).mean(0)[: len(alternatives)]

  return backward_elimination(all_units, mean_likeness)


def backward_elimination(
  candidates: Collection[Unit],
  worth: Callable[[list[list[Unit]]], Sequence[float]],
) -> list[Unit]:
  """Sorts units, the most important first, by dropping one after another.

  Each step drops the unit without which the others are worth most; of equals,
  the last. A forward selection would start from contexts of one or two tokens,
  which are unlike any that the ranker has learned from.

  Args:
    candidates: the units.
    worth: returns the worth of each of several lists of units.
  """
  left, dropped = list(candidates), []
  while len(left) > 1:
    values = worth([left[:i] + left[i + 1 :] for i in range(len(left))])
    last = len(left) - 1 - int(np.argmax(values[::-1]))
    dropped.append(left.pop(last))
  return left + dropped[::-1]


def extract(
  prompter: prompt.Prompter,
  slate: dict[str, np.ndarray],
  order: np.ndarray,
  budget: int,
  ranked: Sequence[Unit],
  rng: np.random.Generator | None,
) -> list[int]:
  """A compression of at most `budget` tokens that `Extraction` allows.

  Args:
    prompter: of full contexts.
    slate: one record.
    order: int [count], incoming rank of each slot.
    budget: tokens, <eos> included; at least enough for the anchors.
    ranked: of `rank_units`.
    rng: draws what is kept. None keeps the first units of `ranked` and nothing
      of the history.

  Returns:
    Ids, <eos> included.
  """
  words, lines = prompter.vocabulary, prompter.lines(slate)
  spare = max(0, budget - len(order) - 2)
  ids: list[int] = []
  if rng is not None:
    for_history = int(spare * rng.choice(_HISTORY_SHARES))
    ids = _extract_history(lines.history, for_history, rng)
  # At most the tokens of the shortest line, so that all have one length.
  shortest = min(sum(map(len, line.values())) for line in lines.candidates)
  quota = min((spare - len(ids)) // len(order), shortest)
  kept = _extract_candidates(lines.candidates, quota, ranked, rng)
  ids.append(words.control['<candidates>'])
  for place, rank in enumerate(order):
    ids += [*kept[rank], words.slot_base + place]
  return [*ids, words.eos]


def _extract_candidates(
  lines: list[context.Line],
  quota: int,
  ranked: Sequence[Unit],
  rng: np.random.Generator | None,
) -> list[list[int]]:
  """Keeps `quota` tokens of each line, at the same places if it has them."""
  longest = {
    field: max(len(line[field]) for line in lines) for field in lines[0]
  }
  rest = [(f, p) for f, n in longest.items() for p in range(n)]
  places = [*ranked, *(unit for unit in rest if unit not in set(ranked))]
  if rng is not None:  # A draw from Plackett-Luce, by Gumbel noise.
    keys = rng.gumbel(size=len(places)) - _STEP * np.arange(len(places))
    places = [places[i] for i in np.argsort(-keys)]
  kept = []
  for line in lines:
    ids = {(f, p): i for f, part in line.items() for p, i in enumerate(part)}
    chosen = set([unit for unit in places if unit in ids][:quota])
    kept.append([i for unit, i in ids.items() if unit in chosen])
  return kept


def _extract_history(
  lines: list[context.Line], room: int, rng: np.random.Generator
) -> list[int]:
  """The first tokens of some fields of the latest items that fit."""
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


def _unit_ids(
  prompter: prompt.Prompter,
  slate: dict[str, np.ndarray],
  order: np.ndarray,
  units: list[Unit],
) -> np.ndarray:
  """Token ids of the units, by slot: int32 [K, U]."""
  lines = prompter.lines(slate).candidates
  ids_KxU = np.zeros((prompter.num_candidates, len(units)), np.int32)
  for slot, rank in enumerate(order):
    ids_KxU[slot] = [lines[rank][field][place] for field, place in units]
  return ids_KxU


def _compressions(
  spec: policy.PolicySpec,
  kept_PxKxAxu: np.ndarray,
  count_P: np.ndarray,
  longest: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Compressions of these tokens and the anchors, in lines of up to `longest`.

  Returns tokens int32 [P, A, T] and lengths int32 [P, A], with <eos>.
  """
  P, K, A, u = kept_PxKxAxu.shape
  words = spec.vocabulary
  slots = words.slot_base + np.arange(K, dtype=np.int32)
  slots = np.broadcast_to(slots[:, None, None], (P, K, A, 1))
  lines = np.concatenate([kept_PxKxAxu, slots], axis=-1).transpose(0, 2, 1, 3)
  tokens = np.full((P, A, K * (longest + 1) + 2), words.pad, np.int32)
  tokens[..., 0] = words.control['<candidates>']
  tokens[..., 1 : 1 + K * (u + 1)] = lines.reshape(P, A, K * (u + 1))
  end = np.broadcast_to((1 + count_P * (u + 1))[:, None], (P, A))
  place = np.arange(tokens.shape[-1])
  tokens = np.where(place < end[..., None], tokens, words.pad)
  np.put_along_axis(tokens, end[..., None], words.eos, axis=-1)
  return tokens, (end + 1).astype(np.int32)
