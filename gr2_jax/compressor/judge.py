"""Who judges compressions: a frozen ranker, or a model behind an endpoint.

Both say whether a slate is still solvable, how well it is still ranked, and
what that comes to, r_judge, from preservation p and ranking q:

  0.2 p + 0.8 q where it is solvable, else 0.8 p + 0.2 q

The ranker reads a compression in place of the whole, on the device, and is held
to the labels or to its own order of the whole. The other reads it in words
beside the whole, on the host, and is told no label: p, q and solvable are its
opinions.

Axes: P prompts, G compressions of each, T compression tokens, K candidates.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.compressor import grammar
from gr2_jax.distributed import processes, sharding
from gr2_jax.models import transformer
from gr2_jax.ops import compression, masking
from gr2_jax.policy import policy, sampling
from gr2_jax.teachers import dialogue as dialogue_lib
from gr2_jax.teachers import judge as judge_lib

JUDGES = ('ranker', 'remote')
JUDGED_BY = ('labels', 'order')  # what the ranker's order is held against

# What of a slate's record goes with a prompt that is judged in words.
_TOLD = (
  'history',
  'history_length',
  'history_grades',
  'history_ages',
  'candidates',
  'evidence',
)
_PREFIX = 'slate/'


class Drawn(NamedTuple):
  """Compressions that were sampled, and what is verified of them: [P, G]."""

  source: grammar.Source
  rollouts: sampling.Rollouts
  verdict: jax.Array  # int32, of `compression.VERDICTS`
  saved: jax.Array  # float32, r_comp
  preservation: jax.Array  # float32, share of the history's evidence
  ellipsis: jax.Array  # float32, l


class Judgement(NamedTuple):
  """What compressions are worth; arrays [P, G]."""

  verdict: jax.Array  # int32, of `compression.VERDICTS`
  kept: jax.Array  # float32, share of the context's tokens
  preservation: jax.Array  # float32, share of the history's evidence
  solvable: jax.Array  # bool, the ranker still finds a positive, or as told
  ranking: jax.Array  # float32, NDCG of the ranker's read-out, or as told
  judge: jax.Array  # float32, r_judge
  judge_failed: jax.Array  # bool, no mark could be had; `judge` is 0
  reward: jax.Array  # float32, Eq. 10


def pay(drawn: Drawn, judged: compression.Judged, weight: float) -> Judgement:
  """What compressions are worth, by what a judge says; pure.

  Args:
    drawn: compressions.
    judged: of them; a total of NaN is none, and counts as 0.
    weight: a of Eq. 10.
  """
  failed = jnp.isnan(judged.total)
  total = jnp.where(failed, 0.0, judged.total)
  return Judgement(
    verdict=drawn.verdict,
    kept=1 - drawn.saved,
    preservation=drawn.preservation,
    solvable=judged.solvable,
    ranking=judged.ranking,
    judge=total,
    judge_failed=failed,
    reward=compression.reward(
      drawn.verdict, drawn.saved, total, drawn.ellipsis, weight
    ),
  )


def watch(judged: Judgement) -> dict[str, jax.Array]:
  """Means of a judgement, and the share of each verdict."""
  means = {
    name: getattr(judged, name).mean()
    for name in Judgement._fields
    if name != 'verdict'
  }
  return means | {
    f'verdict/{name}': (judged.verdict == code).mean()
    for code, name in enumerate(compression.VERDICTS)
  }


def read_whole(spec: policy.PolicySpec, params, rows) -> jax.Array:
  """A ranker's scores of whole contexts; pure.

  Args:
    spec: of `compressor.of`.
    params: the ranker's.
    rows: of prompts: prompt, prompt_length, slots.

  Returns:
    float32 [P, K].
  """
  hidden, _ = transformer.encode_prompt(
    spec.model, params, rows['prompt'], rows['prompt_length']
  )
  return transformer.slot_scores(params, hidden, rows['slots'])


def make_likeness(
  spec: policy.PolicySpec, marks: compression.Symbols, stage
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
  """How like what it is held to a ranker finds what it reads.

  Finer than an order, and so less noisy where compressions are to be told
  apart: sum_k t_k log softmax(scores)_k, t the softmax of its own scores of the
  whole context or, where it is held to the labels, these as shares.

  Args:
    spec: of `compressor.of`.
    marks: of `compressor.symbols`.
    stage: judge_by.

  Returns:
    `(ranker's parameters, rows) -> t`, float32 [P, K], and `(ranker's
    parameters, t, count, tokens, length) -> float32 [P, G]`; both are pure.
  """
  read = make_reader(spec, marks)

  def shares(scores, count):
    real = masking.length_mask(count, scores.shape[-1])
    return jax.nn.log_softmax(jnp.where(real, scores, -jnp.inf), axis=-1), real

  def target(params, rows) -> jax.Array:
    if stage.judge_by != 'order':
      grades = rows['grades'].astype(jnp.float32)
      return masking.divide(grades, grades.sum(-1, keepdims=True))
    logs, _ = shares(read_whole(spec, params, rows), rows['count'])
    return jnp.exp(logs)

  def likeness(params, target, count, tokens, length) -> jax.Array:
    logs, real = shares(read(params, tokens, length), count[:, None])
    return jnp.sum(target[:, None] * jnp.where(real, logs, 0.0), axis=-1)

  return target, likeness


def make_reader(
  spec: policy.PolicySpec, marks: compression.Symbols
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
  """How a ranker reads compressions in place of the whole.

  Args:
    spec: of `compressor.of`.
    marks: of `compressor.symbols`.

  Returns:
    `(ranker's parameters, tokens [P, G, T], length [P, G]) -> scores
    [P, G, K]`; pure.
  """
  before = jnp.array([*spec.prompter.opening, marks.history], jnp.int32)

  def read(params, tokens: jax.Array, length: jax.Array) -> jax.Array:
    P, G, T = tokens.shape
    K = spec.prompter.num_candidates
    tokens = tokens.reshape(P * G, T)
    opening = jnp.broadcast_to(before, (P * G, len(before)))
    prompt = jnp.concatenate([opening, tokens], axis=1)
    slot = marks.slot_base + jnp.arange(K)
    places = jnp.argmax(tokens[:, None] == slot[:, None], axis=-1)
    hidden, _ = transformer.encode_prompt(
      spec.model,
      params,
      prompt,
      length.reshape(-1) + len(before),
    )
    scores = transformer.slot_scores(params, hidden, places + len(before))
    return scores.reshape(P, G, K)

  return read


def make_ranker(
  spec: policy.PolicySpec, marks: compression.Symbols, stage
) -> Callable[..., compression.Judged]:
  """How a ranker judges what it reads.

  Args:
    spec: of `compressor.of`.
    marks: of `compressor.symbols`.
    stage: judge_by, judge_k, judge_top.

  Returns:
    `(ranker's parameters, rows, rollouts, preservation) -> Judged`; pure.
  """
  read = make_reader(spec, marks)

  def judge(params, rows, rollouts, preservation) -> compression.Judged:
    grades = rows['grades']
    if stage.judge_by == 'order':
      scores = read_whole(spec, params, rows)
      grades = compression.order_grades(scores, rows['count'])
    return compression.judge(
      read(params, rollouts.tokens, rollouts.length),
      grades,
      rows['count'],
      preservation,
      k=stage.judge_k,
      top=stage.judge_top,
    )

  return judge


def nobody(ranker, rows, rollouts, preservation) -> compression.Judged:
  """What is known where nobody judges: no mark, as of `make_ranker`."""
  del ranker, rows, rollouts
  nothing = jnp.zeros_like(preservation)
  return compression.Judged(nothing > 0, nothing, nothing + jnp.nan)


def told(slate: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Fields of a prompt's row that `Remote` needs; no label is among them."""
  return {_PREFIX + name: slate[name] for name in _TOLD}


class Remote:
  """A judge in words.

  Args:
    dialogue: of the ranker's prompts.
    mesh: of the policy.
    ask: texts to marks [n, 3], a `judge.Judge` of COMPRESSION; only the
      first process calls it, others may have None.
  """

  def __init__(
    self,
    dialogue: dialogue_lib.Dialogue,
    mesh: jax.sharding.Mesh,
    ask: Callable[[Iterable[str]], np.ndarray] | None,
  ):
    self._dialogue, self._mesh, self._ask = dialogue, mesh, ask

  def __call__(
    self, rows: dict[str, Any], rollouts: sampling.Rollouts, paid: Any
  ) -> compression.Judged:
    """Judges compressions on the host; all processes call this.

    Args:
      rows: of prompts, with the fields of `told`.
      rollouts: of these.
      paid: bool [P, G], which may earn anything. It is not asked about others;
        their marks are 0.

    Returns:
      Judged of [P, G], on the mesh; `total` is NaN where there is no mark.
    """
    names = ('incoming', 'count', *(_PREFIX + name for name in _TOLD))
    host = processes.gather_to_host(
      {name: rows[name] for name in names}
      | {'tokens': rollouts.tokens, 'length': rollouts.length, 'paid': paid}
    )
    empty = np.zeros((*host['paid'].shape, 3), np.float32)
    marks = processes.broadcast_from_main(
      lambda: self._marks(host, empty), empty
    )
    return sharding.shard_batch(judged(marks), self._mesh)

  def _marks(self, host: dict[str, np.ndarray], empty: np.ndarray):
    """float32 [P, G, 3]; NaN where there is none."""
    places = np.argwhere(host['paid'])
    marks = empty.copy()
    marks[tuple(places.T)] = self._ask(
      self._case(host, p, g).shown(self._dialogue) for p, g in places
    )
    return marks

  def _case(self, host, p: int, g: int) -> judge_lib.Compression:
    slate = {name: host[_PREFIX + name][p] for name in _TOLD}
    count = host['count'][p]
    return judge_lib.Compression(
      slate=slate | {'count': count},
      order=host['incoming'][p, :count],
      tokens=host['tokens'][p, g, : host['length'][p, g]],
    )


def judged(marks: np.ndarray) -> compression.Judged:
  """What marks come to.

  Args:
    marks: float32 [P, G, 3]: preservation, ranking, solvable; rows of NaN
      where there are none.

  Returns:
    Judged of [P, G]; where there are none not solvable, a ranking of 0 and a
    total of NaN.
  """
  preservation, ranking, solvable = np.moveaxis(marks, -1, 0)
  weight = np.where(solvable > 0, 0.8, 0.2)
  total = (1 - weight) * preservation + weight * ranking
  return compression.Judged(
    solvable > 0, np.nan_to_num(ranking), total.astype(np.float32)
  )
