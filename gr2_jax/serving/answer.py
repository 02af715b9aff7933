"""The JSON of an answer, the same in bulk and over HTTP."""

from typing import Any

import numpy as np

from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import parsing
from gr2_jax.policy import policy, ranking
from gr2_jax.serving import request as requests_lib


def records(slates: slates_lib.Slates) -> list[dict[str, np.ndarray]]:
  """The slates by random access."""
  return [
    {name: getattr(slates, name)[row] for name in slates_lib.NAMES}
    for row in range(len(slates))
  ]


def answer(
  setup: policy.Setup,
  request: requests_lib.Request,
  ranked: ranking.Ranked,
  row: int,
) -> dict[str, Any]:
  """One line of the output."""
  count = len(request.names)
  order = ranked.generated[row, :count].tolist()
  return {
    'id': request.id,
    'ranking': [request.names[rank] for rank in order],
    'order': order,
    'reasoning': _reasoning(
      setup,
      ranked.tokens[row, : ranked.length[row]],
      ranked.presented[row, :count],
    ),
    'verdict': parsing.VERDICTS[ranked.verdict[row]],
    'scores': [round(x, 5) for x in ranked.scores[row, :count].tolist()],
    'unknown_history': request.unknown,
    'described_candidates': request.described_candidates,
  }


def _reasoning(
  setup: policy.Setup, tokens: np.ndarray, presented: np.ndarray
) -> str:
  """Text before </think>, slots renamed from place to incoming rank."""
  words = setup.vocabulary
  ends = np.flatnonzero(tokens == words.control['</think>'])
  ids = tokens[: ends[0]] if len(ends) else tokens[:0]
  place = ids - words.slot_base
  named = (place >= 0) & (place < len(presented))
  rank = presented[np.where(named, place, 0)]
  return words.decode(np.where(named, words.slot_base + rank, ids))
