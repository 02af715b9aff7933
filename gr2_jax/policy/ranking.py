"""Ranks a whole split with a policy: prompts in, permutations out.

Validation, evaluation and bulk re-ranking use it. Decoding is greedy, and by
default under the permutation mask, so that every answer is valid.

A prompt with memory tokens can be split over two programs: one encodes the
history into memories that can be kept, one answers from a memory and the rest
of the prompt.

Axes: n slates, B batch, K candidates, T completion tokens, L layers, N
key-value heads, M memory tokens, H head width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import processes, sharding
from gr2_jax.models import transformer
from gr2_jax.ops import masking, metrics
from gr2_jax.pipeline import reporting
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import policy as policy_lib
from gr2_jax.policy import sampling
from gr2_jax.prompts import examples

# How an answer is made: `score` sorts the read-out at the slots, in one
# prefill; `rank` decodes a ranking; `reason` decodes reasoning first.
MODES = ('score', 'rank', 'reason')
SENSITIVITY_SLATES = 256  # enough for a mean, a fraction of a validation


@dataclasses.dataclass(frozen=True)
class Ranked:
  """Answers to a split; rankings are in incoming ranks, best first."""

  generated: np.ndarray  # int32 [n, K], the order that the policy wrote
  readout: (
    np.ndarray
  )  # int32 [n, K], the order of the scores at its slot tokens
  scores: np.ndarray  # float32 [n, K], those scores, in the incoming order
  verdict: np.ndarray  # int32 [n], of `parsing.VERDICTS`
  tokens: np.ndarray  # int32 [n, T], the completions
  length: np.ndarray  # int32 [n]
  presented: np.ndarray  # int32 [n, K], incoming rank of each slot
  count: np.ndarray  # int32 [n], real candidates


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answer(
  model: transformer.TransformerConfig,
  grammar: grammar_lib.Ranking,
  options: sampling.SamplingOptions,
  params: Any,
  batch: dict[str, jax.Array],
) -> dict[str, jax.Array]:
  """Greedy answers of one batch, one rollout a slate."""
  encoded = _encode(model, params, batch)
  rollouts = sampling.sample(
    model,
    params,
    batch['prompt'],
    batch['prompt_length'],
    batch['count'],
    jax.random.key(0),
    grammar,
    options,
    encoded,
  )
  tokens, length = rollouts.tokens[:, 0], rollouts.length[:, 0]
  answer = sampling.parse(
    grammar, options, tokens, length, batch['count'], batch['incoming']
  )
  return _read_out(params, encoded[0], batch) | dict(
    generated=metrics.in_incoming_ranks(answer.ranking, batch['incoming']),
    verdict=answer.verdict,
    tokens=tokens,
    length=length,
  )


@functools.partial(jax.jit, static_argnums=0)
def _score(
  model: transformer.TransformerConfig,
  params: Any,
  batch: dict[str, jax.Array],
) -> dict[str, jax.Array]:
  """Answers of one batch from the read-out of one prefill."""
  hidden, _ = _encode(model, params, batch)
  fields = _read_out(params, hidden, batch)
  none = jnp.zeros_like(batch['count'])
  return fields | dict(
    generated=fields['readout'], verdict=none, tokens=none[:, None], length=none
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _remember(
  model: transformer.TransformerConfig,
  num_memory: int,
  params: Any,
  batch: dict[str, jax.Array],
) -> jax.Array:
  """Keys and values of histories' memory tokens: [B, 2, L, N, M, H]."""
  kv = transformer.encode_memory(
    model, params, batch['prompt'], batch['prompt_length'], num_memory
  ).kv
  return jnp.moveaxis(jnp.stack([kv.k, kv.v]), 2, 0)


def _encode(
  model: transformer.TransformerConfig,
  params: Any,
  batch: dict[str, jax.Array],
) -> tuple[jax.Array, transformer.Prefix]:
  """Encodes whole prompts, or rests of prompts after their memories."""
  memory = None
  if 'memory' in batch:
    k, v = jnp.moveaxis(batch['memory'], 0, 2)
    length = batch['memory_length']
    memory = transformer.Prefix(
      kv=transformer.KeyValues(k=k, v=v),
      mask=jnp.ones((len(length), k.shape[3]), bool),
      length=length,
      last=length - 1,
    )
  return transformer.encode_prompt(
    model, params, batch['prompt'], batch['prompt_length'], memory
  )


def _read_out(
  params: Any, hidden_BxTxD: jax.Array, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """The fields of `Ranked` that need no decoding."""
  incoming = batch['incoming']
  scores = transformer.slot_scores(params, hidden_BxTxD, batch['slots'])
  real = masking.length_mask(batch['count'], scores.shape[-1])
  order = jnp.argsort(jnp.where(real, -scores, jnp.inf), axis=-1)
  return dict(
    readout=metrics.in_incoming_ranks(order, incoming),
    scores=jnp.take_along_axis(scores, jnp.argsort(incoming, -1), -1),
    presented=incoming,
    count=batch['count'],
  )


def compiled(
  spec: policy_lib.PolicySpec, mesh: Mesh, mode: str, batch_size: int
) -> Callable[[Any, Any], dict[str, jax.Array]]:
  """Compiles the answer to batches of one size, ahead of time.

  The mode is one of MODES; `score` decodes nothing, and its `generated` order
  is the read-out's. The devices that split a batch divide `batch_size`.

  Returns:
    `(params, batch) -> fields of Ranked`. The batch is of
    `examples.generation_rows`, on the mesh, without its grades. Where prompts
    have memory tokens it is the second of `examples.behind_memory`, with a
    `memory` of `compiled_memory`.
  """
  prompter, model = spec.prompter, spec.model
  K, T, num_memory = (
    prompter.num_candidates, prompter.prompt_tokens, prompter.context.memory,
  )  # fmt: skip
  widths = dict(slots=(K,), incoming=(K,), count=())
  if num_memory:
    T = prompter.rest_tokens
    widths |= dict(memory_length=())
  batch = _abstract(mesh, batch_size, prompt=(T,), prompt_length=(), **widths)
  if num_memory:
    shape = 2, model.num_layers, model.num_kv_heads, num_memory, model.head_dim
    batch |= _abstract(mesh, batch_size, model.dtype, memory=shape)
  params = spec.abstract_params(mesh)
  with sharding.activate(mesh):
    if mode == 'score':
      return _score.lower(model, params, batch).compile()
    options = spec.sampling(1, mode == 'reason', 0.0, True)
    return _answer.lower(model, spec.grammar, options, params, batch).compile()


def compiled_memory(
  spec: policy_lib.PolicySpec, mesh: Mesh, batch_size: int
) -> Callable[[Any, Any], jax.Array]:
  """Compiles the encoder of memories for batches of one size.

  Returns:
    `(params, batch) -> [B, 2, L, N, M, H]`, keys and values; the batch is the
    first of `examples.behind_memory`, on the mesh.
  """
  prompter = spec.prompter
  batch = _abstract(
    mesh, batch_size, prompt=(prompter.memory_prompt_tokens,), prompt_length=()
  )
  with sharding.activate(mesh):
    return _remember.lower(
      spec.model, prompter.context.memory, spec.abstract_params(mesh), batch
    ).compile()


def _abstract(
  mesh: Mesh, batch_size: int, dtype: Any = jnp.int32, **widths: tuple[int, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch on the mesh, split by rows."""
  split = sharding.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct((batch_size, *width), dtype, sharding=split)
    for name, width in widths.items()
  }


def rank(
  policy: policy_lib.Policy,
  slates: Any,
  *,
  thinking: bool,
  order: str,
  batch_size: int,
  seed: int,
  constrained: bool = True,
  desc: str = '',
  first: int = 0,
) -> Ranked:
  """Ranks every slate once, in order; the answers are on the host.

  Args:
    policy: the ranker.
    slates: random access to slate records.
    thinking: whether the policy reasons first.
    order: how candidates are presented, one of `prompt.ORDERS`.
    batch_size: slates at a time; all batches share one compiled program.
    seed: the presentation is a function of (seed, index).
    constrained: whether the permutation mask applies.
    desc: label of the progress bar; empty for none.
    first: index of the first slate, where these are a part of a longer run.
  """
  spec, mesh = policy.spec, policy.mesh
  render = examples.generation_rows(
    spec.prompter, '<think>' if thinking else '<answer>', order
  )
  options = spec.sampling(1, thinking, 0.0, constrained)
  answer = functools.partial(_answer, spec.model, spec.grammar, options)
  parts = []
  with (
    reporting.progress(
      len(slates), desc or 'rank', unit='slate', quiet=not desc
    ) as bar,
    sharding.activate(mesh),
  ):
    for n, batch in examples.in_order(slates, render, batch_size, seed, first):
      batch.pop('grades')  # The policy must not see the labels.
      fields = answer(policy.params, sharding.shard_batch(batch, mesh))
      parts.append(
        {k: v[:n] for k, v in processes.gather_to_host(fields).items()}
      )
      bar.update(n)
  return Ranked(**{k: np.concatenate([p[k] for p in parts]) for k in parts[0]})


def slate_metrics(
  ranking: np.ndarray, grades: np.ndarray, count: np.ndarray
) -> dict[str, np.ndarray]:
  """Quality of each slate's ranking, and how much it copies the input.

  Args:
    ranking: int32 [n, K] in incoming ranks.
    grades: [n, K] in the incoming order.
    count: int32 [n].

  Returns:
    Name -> float32 [n]: r@1 .. auc, copied, top3_unchanged, kendall_tau,
    first_pick (the incoming rank of the first).
  """
  K = ranking.shape[-1]
  incoming = jnp.broadcast_to(jnp.arange(K), ranking.shape)
  values = dict(metrics.ranking_metrics(ranking, grades, count)) | {
    'copied': metrics.top_unchanged(ranking, incoming, count, k=K),
    'top3_unchanged': metrics.top_unchanged(ranking, incoming, count, k=3),
    'kendall_tau': metrics.kendall_tau(ranking, incoming, count),
    'first_pick': ranking[..., 0],
  }
  return {k: np.asarray(v, np.float32) for k, v in values.items()}


def validator(
  spec: policy_lib.PolicySpec,
  mesh: Mesh,
  slates: Any,
  labels: slates_lib.Slates,
  *,
  thinking: bool,
  order: str,
  num_slates: int,
  batch_size: int,
) -> Callable[[Any], dict[str, float]]:
  """Ranks a fixed draw of validation slates, for use while training.

  `slates` and `labels` are the same slates, by random access and as arrays;
  `num_slates` of them are drawn, at most.

  Returns:
    `params -> {name: mean}` for the generated order, `readout_n@5`, and
    `order_sensitivity`: how much an answer changes with a shuffled
    presentation, over the first SENSITIVITY_SLATES of the draw.
  """
  draw = np.random.default_rng(0).permutation(len(labels))[:num_slates]
  grades, count = labels.grades[draw], labels.count[draw]
  chosen = Chosen(slates, draw)
  few = Chosen(slates, draw[:SENSITIVITY_SLATES])

  def validate(params: Any) -> dict[str, float]:
    ranked, shuffled = (
      rank(
        policy_lib.Policy(spec, params, mesh),
        part,
        thinking=thinking,
        order=shown,
        batch_size=batch_size,
        seed=seed,
      )
      for seed, (shown, part) in enumerate([(order, chosen), ('shuffled', few)])
    )
    means = {
      name: float(values.mean())
      for name, values in slate_metrics(ranked.generated, grades, count).items()
    }
    readout = slate_metrics(ranked.readout, grades, count)
    sensitivity = metrics.order_sensitivity(
      ranked.generated[: len(few)], shuffled.generated, shuffled.count
    )
    return means | {
      'readout_n@5': float(readout['n@5'].mean()),
      'order_sensitivity': float(sensitivity.mean()),
    }

  return validate


class Chosen:
  """Random access to some records of a source."""

  def __init__(self, source: Any, index: np.ndarray):
    self._source, self._index = source, index

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, i: int) -> Any:
    return self._source[int(self._index[i])]
