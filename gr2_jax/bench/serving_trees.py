"""A re-ranker of gradient-boosted trees: a peer for `bench.serve`.

It shares the slates' checks, the data and the evidence with the policy. The
trees read all evidence columns, and no prompt.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from configs import baselines as baselines_config
from gr2_jax.baselines import gbdt
from gr2_jax.data import slates as slates_lib
from gr2_jax.serving import answer as answer_lib
from gr2_jax.serving import request as requests_lib
from gr2_jax.serving import reranker as reranker_lib

if TYPE_CHECKING:
  import lightgbm


class Trees(reranker_lib.Reranker):
  """A re-ranker whose one program is `slates -> scores`, without params."""

  def answer(
    self, asked: Sequence[tuple[requests_lib.Request, int]], mode: str
  ) -> reranker_lib.Answers:
    """Orders by falling score; items without a score come last."""
    (program,) = self.programs[mode].values()
    requests = [request for request, _ in asked]
    scores_nxK = program(
      requests_lib.to_slates(
        requests,
        self.knowledge.log,
        self.knowledge.facts,
        self.candidates,
        self.history,
      )
    )
    lines = []
    for request, scores_K in zip(requests, scores_nxK, strict=True):
      scores = scores_K[: len(request.names)]
      order = np.argsort(-scores, kind='stable').tolist()
      lines.append(
        answer_lib.incoming_order(request, mode)
        | {
          'ranking': [request.names[rank] for rank in order],
          'order': order,
          'verdict': 'valid',
          'scores': [x if np.isfinite(x) else None for x in scores.tolist()],
        }
      )
    return reranker_lib.Answers(lines, prompts=0, decoded=0)


def fit(policy: reranker_lib.Reranker) -> 'lightgbm.Booster':
  """Trains the trees of stage `baselines` on a policy's slates."""
  source = policy.knowledge.source
  return gbdt.fit(
    baselines_config.gbdt(test=False),
    slates_lib.read(source, 'train'),
    slates_lib.read(source, 'validation'),
    tuple(slates_lib.read_meta(source)['evidence']),
    seed=0,
  )


def beside(
  policy: reranker_lib.Reranker, booster: 'lightgbm.Booster', largest_batch: int
) -> Trees:
  """Replaces a policy by the trees of `fit`, in the mode `score`."""
  fields = {
    field.name: getattr(policy, field.name)
    for field in dataclasses.fields(policy)
  }
  return Trees(
    **fields
    | {
      'policy': dataclasses.replace(policy.policy, params=None),
      'programs': {
        'score': {largest_batch: functools.partial(gbdt.score, booster)}
      },
    }
  )
