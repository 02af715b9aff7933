"""Judges of compressions: a frozen ranker, or a model behind an endpoint.

A judge decides whether a slate is still solvable. From the preservation p of
the history and the quality q of the ranking follows its reward r_judge:

  0.2 p + 0.8 q if the slate is solvable, else 0.8 p + 0.2 q

The ranker reads the compression in place of the full context, on the device.
Its order is compared with the labels or with its own order of the full context.
The model reads both contexts in words, on the host, without labels, and returns
p, q and solvable as its marks.

Axes: P prompts, G compressions of each, T compression tokens, K candidates.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.compressor import grammar
from gr2_jax.compressor.options import CompressorOptions
from gr2_jax.distributed import processes, sharding
from gr2_jax.models import transformer
from gr2_jax.ops import compression, masking
from gr2_jax.policy import policy, sampling
from gr2_jax.teachers import dialogue as dialogue_lib
from gr2_jax.teachers import judge as judge_lib

# Fields of a slate that are shown in words.
_SLATE_FIELDS = (
  'history',
  'history_length',
  'history_grades',
  'history_ages',
  'candidates',
  'evidence',
)
_PREFIX = 'slate/'


class Verified(NamedTuple):
  """Sampled compressions, and what is computed without a judge: [P, G]."""

  source: grammar.Source
  rollouts: sampling.Rollouts
  verdict: jax.Array  # int32, of `compression.VERDICTS`
  saved: jax.Array  # float32, r_comp
  preservation: jax.Array  # float32, share of the history's evidence
  ellipsis: jax.Array  # float32, l


class Judgment(NamedTuple):
  """Rewards of compressions and their parts: [P, G]."""

  verdict: jax.Array  # int32, of `compression.VERDICTS`
  kept: jax.Array  # float32, share of the context's tokens
  preservation: jax.Array  # float32, share of the history's evidence
  solvable: jax.Array  # bool, the ranker's top has a positive, or a mark
  ranking: jax.Array  # float32, NDCG of the ranker's read-out, or a mark
  judge: jax.Array  # float32, r_judge
  judge_failed: jax.Array  # bool, there is no mark; `judge` is 0
  reward: jax.Array  # float32, Eq. 10


def judgment(
  verified: Verified, judged: compression.Judged, weight: float
) -> Judgment:
  """Rewards compressions by Eq. 10 with weight a; NaN totals count as 0."""
  failed = jnp.isnan(judged.total)
  total = jnp.where(failed, 0.0, judged.total)
  return Judgment(
    verdict=verified.verdict,
    kept=1 - verified.saved,
    preservation=verified.preservation,
    solvable=judged.solvable,
    ranking=judged.ranking,
    judge=total,
    judge_failed=failed,
    reward=compression.reward(
      verified.verdict, verified.saved, total, verified.ellipsis, weight
    ),
  )


def metrics(judgments: Judgment) -> dict[str, jax.Array]:
  """Mean of each field, and the share of each verdict."""
  means = {
    name: getattr(judgments, name).mean()
    for name in Judgment._fields
    if name != 'verdict'
  }
  return means | {
    f'verdict/{name}': (judgments.verdict == code).mean()
    for code, name in enumerate(compression.VERDICTS)
  }


def read_whole(
  spec: policy.PolicySpec, params: Any, rows: dict[str, jax.Array]
) -> jax.Array:
  """A ranker's read-out of full contexts: float32 [P, K]."""
  hidden, _ = transformer.encode_prompt(
    spec.model, params, rows['prompt'], rows['prompt_length']
  )
  return transformer.slot_scores(params, hidden, rows['slots'])


def read(
  spec: policy.PolicySpec,
  params: Any,
  tokens_PxGxT: jax.Array,
  length_PxG: jax.Array,
) -> jax.Array:
  """A ranker's read-out of compressions alone: float32 [P, G, K]."""
  P, G, T = tokens_PxGxT.shape
  K, words = spec.prompter.num_candidates, spec.vocabulary
  before = jnp.array(
    [*spec.prompter.opening, words.control['<history>']], jnp.int32
  )
  tokens = tokens_PxGxT.reshape(P * G, T)
  opening = jnp.broadcast_to(before, (P * G, len(before)))
  slot = words.slot_base + jnp.arange(K)
  places = jnp.argmax(tokens[:, None] == slot[:, None], axis=-1)
  hidden, _ = transformer.encode_prompt(
    spec.model,
    params,
    jnp.concatenate([opening, tokens], axis=1),
    length_PxG.reshape(-1) + len(before),
  )
  scores = transformer.slot_scores(params, hidden, places + len(before))
  return scores.reshape(P, G, K)


def likeness_target(
  spec: policy.PolicySpec, judge_by: str, params: Any, rows: dict[str, Any]
) -> jax.Array:
  """Softmax of the read-out of full contexts, or labels as shares: [P, K]."""
  if judge_by != 'order':
    grades = rows['grades'].astype(jnp.float32)
    return masking.divide(grades, grades.sum(-1, keepdims=True))
  scores = read_whole(spec, params, rows)
  real = masking.length_mask(rows['count'], scores.shape[-1])
  logs = jax.nn.log_softmax(jnp.where(real, scores, -jnp.inf), axis=-1)
  return jnp.exp(logs)


def likeness(
  spec: policy.PolicySpec,
  params: Any,
  target_PxK: jax.Array,
  count_P: jax.Array,
  tokens_PxGxT: jax.Array,
  length_PxG: jax.Array,
) -> jax.Array:
  """sum_k t_k log softmax(scores)_k, of a ranker's read-out: float32 [P, G].

  The higher, the closer is the read-out of a compression to the target t.
  Unlike an NDCG, it also reflects small differences.
  """
  scores = read(spec, params, tokens_PxGxT, length_PxG)
  real = masking.length_mask(count_P[:, None], scores.shape[-1])
  logs = jax.nn.log_softmax(jnp.where(real, scores, -jnp.inf), axis=-1)
  return jnp.sum(target_PxK[:, None] * jnp.where(real, logs, 0.0), axis=-1)


def judge_by_ranker(
  spec: policy.PolicySpec,
  compressor: CompressorOptions,
  params: Any,
  rows: dict[str, jax.Array],
  rollouts: sampling.Rollouts,
  preservation_PxG: jax.Array,
) -> compression.Judged:
  """The judgment of a ranker; NaN totals without one (`params` is None)."""
  if params is None:
    zeros = jnp.zeros_like(preservation_PxG)
    return compression.Judged(zeros > 0, zeros, zeros + jnp.nan)
  grades = rows['grades']
  if compressor.judge_by == 'order':
    scores = read_whole(spec, params, rows)
    grades = compression.order_grades(scores, rows['count'])
  return compression.judge(
    read(spec, params, rollouts.tokens, rollouts.length),
    grades,
    rows['count'],
    preservation_PxG,
    k=compressor.judge_k,
    top=compressor.judge_top,
  )


def slate_fields(slate: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The fields of a row that `HttpJudge` reads; no label is among them."""
  return {_PREFIX + name: slate[name] for name in _SLATE_FIELDS}


@dataclasses.dataclass(frozen=True)
class HttpJudge:
  """A model behind an endpoint as the judge."""

  dialogue: dialogue_lib.Dialogue  # puts the ranker's prompts into words
  mesh: jax.sharding.Mesh  # devices of the rows
  # A `teachers.judge.Judge`: texts -> marks [n, 3]; needed on process 0 alone.
  ask: Callable[[Iterable[str]], np.ndarray] | None

  def __call__(
    self, rows: dict[str, Any], rollouts: sampling.Rollouts, eligible: Any
  ) -> compression.Judged:
    """Judges compressions on the host; every process must call it.

    Rows have the fields of `slate_fields`. Compressions that are not `eligible`
    for a reward, bool [P, G], are not judged; their marks are 0. Returns arrays
    on the mesh; `total` is NaN where the model returned no marks.
    """
    names = ('incoming', 'count', *(_PREFIX + name for name in _SLATE_FIELDS))
    host = processes.gather_to_host(
      {name: rows[name] for name in names}
      | dict(tokens=rollouts.tokens, length=rollouts.length, eligible=eligible)
    )
    zeros = np.zeros((*host['eligible'].shape, 3), np.float32)
    marks = processes.broadcast_from_main(
      lambda: self._marks(host, zeros), zeros
    )
    return sharding.shard_batch(from_marks(marks), self.mesh)

  def _marks(
    self, host: dict[str, np.ndarray], zeros: np.ndarray
  ) -> np.ndarray:
    """float32 [P, G, 3]; NaN where the model returned none."""

    def text(p: int, g: int) -> str:
      slate = {name: host[_PREFIX + name][p] for name in _SLATE_FIELDS}
      count = host['count'][p]
      case = judge_lib.Compression(
        slate=slate | {'count': count},
        order=host['incoming'][p, :count],
        tokens=host['tokens'][p, g, : host['length'][p, g]],
      )
      return case.shown(self.dialogue)

    places = np.argwhere(host['eligible'])
    marks = zeros.copy()
    marks[tuple(places.T)] = self.ask(text(p, g) for p, g in places)
    return marks


def from_marks(marks_PxGx3: np.ndarray) -> compression.Judged:
  """Converts marks (preservation, ranking, solvable) or NaN, if there are none.

  Without marks a slate is not solvable, its ranking is 0, and its total NaN.
  """
  preservation, ranking, solvable = np.moveaxis(marks_PxGx3, -1, 0)
  weight = np.where(solvable > 0, 0.8, 0.2)
  total = (1 - weight) * preservation + weight * ranking
  return compression.Judged(
    solvable > 0, np.nan_to_num(ranking), total.astype(np.float32)
  )
