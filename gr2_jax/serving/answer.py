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
  spec: policy.PolicySpec,
  request: requests_lib.Request,
  ranked: ranking.Ranked,
  row: int,
) -> dict[str, Any]:
  """One line of the output, without the fields of the HTTP service.

  `ranked` has the answer to the request's known part at `row`. Unknown
  candidates keep their places.
  """
  kept = np.array(request.known_ranks)
  count = len(kept)
  order: list[int] = list(range(len(request.names)))
  scores: list[float | None] = [None] * len(request.names)
  for place, rank, score in zip(
    kept.tolist(),
    kept[ranked.generated[row, :count]].tolist(),
    ranked.scores[row, :count].tolist(),
    strict=True,
  ):
    order[place], scores[place] = rank, round(score, 5)
  return _unranked(request) | {
    'ranking': [request.names[rank] for rank in order],
    'order': order,
    'reasoning': _reasoning(
      spec,
      ranked.tokens[row, : ranked.length[row]],
      kept[ranked.presented[row, :count]],
    ),
    'verdict': parsing.VERDICTS[ranked.verdict[row]],
    'scores': scores,
  }


def incoming_order(request: requests_lib.Request, mode: str) -> dict[str, Any]:
  """The answer to a slate that the policy does not rank."""
  return _unranked(request) | {
    'mode': mode,
    'unknown_candidates': request.unknown_candidates,
  }


def _unranked(request: requests_lib.Request) -> dict[str, Any]:
  return {
    'id': request.id,
    'ranking': list(request.names),
    'order': list(range(len(request.names))),
    'reasoning': '',
    'verdict': None,
    'scores': [None] * len(request.names),
    'unknown_history': request.unknown,
    'described_candidates': request.described_candidates,
  }


def _reasoning(
  spec: policy.PolicySpec, tokens: np.ndarray, presented: np.ndarray
) -> str:
  """Text before </think>; slots are renamed from place to incoming rank."""
  words = spec.vocabulary
  ends = np.flatnonzero(tokens == words.control['</think>'])
  ids = tokens[: ends[0]] if len(ends) else tokens[:0]
  place = ids - words.slot_base
  named = (place >= 0) & (place < len(presented))
  rank = presented[np.where(named, place, 0)]
  return words.decode(np.where(named, words.slot_base + rank, ids))
