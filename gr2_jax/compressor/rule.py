"""The rule that the compressor begins by imitating: what its ranker reads.

Which tokens of a candidate's line to keep first is asked of the ranker, by a
backward elimination: of those that are left the one goes without which its view
of the candidates stays most like what it is held to (`judge_by`).

Axes: n slates, P of them at a time, A alternatives, K candidates, U units,
T tokens.
"""

from typing import Any

import jax
import numpy as np

from gr2_jax.compressor import extracts, judge, rollouts
from gr2_jax.distributed import processes, sharding
from gr2_jax.policy import policy
from gr2_jax.prompts import examples, prompt


def most_telling(
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  ranker: Any,
  stage,
  order: str,
  slates: Any,
) -> list[extracts.Unit]:
  """Places of a candidate's line in the order in which they are worth keeping.

  Args:
    spec: the ranker's.
    mesh: devices of the parameters.
    ranker: its parameters.
    stage: section `compress`: judge_by, eval_batch_size.
    order: in which candidates are shown, of `prompt.ORDERS`.
    slates: random access to records, on which it is measured.

  Returns:
    All of `extracts.units`, the most telling first.
  """
  prompter = spec.prompter
  units = extracts.units(prompter.lines(slates[0]).candidates[0])
  place = {unit: i for i, unit in enumerate(units)}
  target, likeness = map(
    jax.jit,
    judge.make_likeness(spec, rollouts.symbols(spec.vocabulary), stage),
  )
  whole = rollouts.requests(prompter, {1.0: prompter.prompt_tokens}, order)

  def render(slate, rng):
    row = whole(slate, rng)
    shown = row['incoming'][: int(row['count'])]
    return row | {'lines': _lines(prompter, slate, shown, units)}

  cases = []
  with sharding.activate(mesh):
    for n, batch in examples.in_order(slates, render, stage.eval_batch_size, 0):
      lines, count = batch.pop('lines'), batch['count']
      rows = sharding.shard_batch(batch, mesh)
      cases.append((n, lines, count, target(ranker, rows)))

  def worth(alternatives: list[list[extracts.Unit]]) -> np.ndarray:
    """[A], the mean likeness over the slates."""
    kept = np.array([sorted(place[u] for u in one) for one in alternatives])
    # As many alternatives every time, so that all are one trace.
    kept = np.pad(kept, [(0, len(units) - len(kept)), (0, 0)], mode='edge')
    found = []
    with sharding.activate(mesh):
      for n, lines, count, held_to in cases:
        case = (count, *_written(spec, lines[:, :, kept], count, len(units)))
        case = sharding.shard_batch(case, mesh)
        found.append(
          processes.gather_to_host(likeness(ranker, held_to, *case))[:n]
        )
    return np.concatenate(found).mean(0)[: len(alternatives)]

  return extracts.most_telling(units, worth)


def _lines(
  prompter: prompt.Prompter,
  slate: dict[str, np.ndarray],
  order: np.ndarray,
  units: list[extracts.Unit],
) -> np.ndarray:
  """int32 [K, U], ids of the units, candidates as they are shown."""
  lines = prompter.lines(slate).candidates
  found = np.zeros((prompter.num_candidates, len(units)), np.int32)
  for slot, rank in enumerate(order):
    found[slot] = [lines[rank][field][place] for field, place in units]
  return found


def _written(
  spec: policy.PolicySpec, kept: np.ndarray, count: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
  """Compressions that keep these tokens and the marks alone.

  Args:
    spec: the ranker's.
    kept: int32 [P, K, A, u], of every candidate's line.
    count: int32 [P].
    most: U, what a line may have.

  Returns:
    int32 [P, A, T] and [P, A], with <eos>.
  """
  P, K, A, u = kept.shape
  words = spec.vocabulary
  slots = words.slot_base + np.arange(K, dtype=np.int32)
  slots = np.broadcast_to(slots[:, None, None], (P, K, A, 1))
  lines = np.concatenate([kept, slots], axis=-1).transpose(0, 2, 1, 3)
  body = lines.reshape(P, A, K * (u + 1))
  tokens = np.full((P, A, K * (most + 1) + 2), words.pad, np.int32)
  tokens[..., 0] = words.control['<candidates>']
  tokens[..., 1 : 1 + K * (u + 1)] = body
  end = np.broadcast_to((1 + count * (u + 1))[:, None], (P, A))
  place = np.arange(tokens.shape[-1])
  tokens = np.where(place < end[..., None], tokens, words.pad)
  np.put_along_axis(tokens, end[..., None], words.eos, axis=-1)
  return tokens, (end + 1).astype(np.int32)
