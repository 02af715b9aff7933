"""Answers to slates of which the policy is shown a part."""

import dataclasses
from typing import Any

from gr2_jax.serving import request as requests_lib


def known_part(request: requests_lib.Request) -> requests_lib.Request:
  """The request without the candidates of which nothing is known."""
  kept = known_ranks(request)
  return dataclasses.replace(
    request,
    names=tuple(request.names[rank] for rank in kept),
    candidates=tuple(request.candidates[rank] for rank in kept),
    scores=tuple(request.scores[rank] for rank in kept),
  )


def known_ranks(request: requests_lib.Request) -> list[int]:
  """Incoming ranks of the candidates that are known or described."""
  return [rank for rank, item in enumerate(request.candidates) if item >= 0]


def around_unknown(
  request: requests_lib.Request, line: dict[str, Any]
) -> dict[str, Any]:
  """The line of a request's known part, for the whole request."""
  kept = known_ranks(request)
  order = list(range(len(request.names)))
  scores = [None] * len(request.names)
  for place, rank in zip(kept, line['order'], strict=True):
    order[place] = kept[rank]
  for rank, score in zip(kept, line['scores'], strict=True):
    scores[rank] = score
  return line | {
    'ranking': [request.names[rank] for rank in order],
    'order': order,
    'scores': scores,
  }
