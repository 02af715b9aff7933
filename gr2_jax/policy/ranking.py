"""Ranks a whole split with a policy: prompts in, permutations out.

Used by validation, evaluation and bulk re-ranking. Greedy, under the
permutation mask unless told, so that every answer is valid.

A prompt with memory tokens may be read in two programs: one makes what is kept
of histories, one answers from that and the rest of the prompt.

Axes: n slates, B batch, K candidates, T completion tokens, L layers, N
key-value heads, M memory tokens, H head width.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import processes, sharding
from gr2_jax.models import transformer
from gr2_jax.ops import masking, metrics
from gr2_jax.pipeline import reporting
from gr2_jax.policy import policy, sampling
from gr2_jax.prompts import examples

# What an answer is made of: the read-out at the slots, in one prefill; a
# ranking that is decoded; one that is decoded after its reasoning.
MODES = ('score', 'rank', 'reason')
SENSITIVITY_SLATES = 256  # Enough to see it, a fraction of a validation.


@dataclasses.dataclass(frozen=True)
class Ranked:
  """Answers to a split; rankings are in incoming ranks, best first.

  Attributes:
    generated: int32 [n, K], the order the policy wrote.
    readout: int32 [n, K], the order of the scores at its slot tokens.
    scores: float32 [n, K], those scores, in the incoming order.
    verdict: int32 [n], of `parsing.VERDICTS`.
    tokens: int32 [n, T], the completions.
    length: int32 [n].
    presented: int32 [n, K], incoming rank of each slot.
    count: int32 [n], real candidates.
  """

  generated: np.ndarray
  readout: np.ndarray
  scores: np.ndarray
  verdict: np.ndarray
  tokens: np.ndarray
  length: np.ndarray
  presented: np.ndarray
  count: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answer(model, grammar, config, params, batch) -> dict[str, jax.Array]:
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
    config,
    encoded,
  )
  tokens, length = rollouts.tokens[:, 0], rollouts.length[:, 0]
  answer = sampling.parse(
    grammar, config, tokens, length, batch['count'], batch['incoming']
  )
  return _read_out(params, encoded[0], batch) | dict(
    generated=metrics.in_incoming_ranks(answer.ranking, batch['incoming']),
    verdict=answer.verdict,
    tokens=tokens,
    length=length,
  )


@functools.partial(jax.jit, static_argnums=0)
def _score(model, params, batch) -> dict[str, jax.Array]:
  """One prefill of one batch: its read-out is the answer, nothing decodes."""
  hidden, _ = _encode(model, params, batch)
  found = _read_out(params, hidden, batch)
  none = jnp.zeros_like(batch['count'])
  return found | dict(
    generated=found['readout'], verdict=none, tokens=none[:, None], length=none
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _remember(model, num_memory, params, batch) -> jax.Array:
  """What is kept of histories: [B, 2, L, N, M, H], keys and values."""
  kv = transformer.encode_memory(
    model, params, batch['prompt'], batch['prompt_length'], num_memory
  ).kv
  return jnp.moveaxis(jnp.stack([kv.k, kv.v]), 2, 0)


def _encode(model, params, batch) -> tuple[jax.Array, transformer.Prefix]:
  """Encodes prompts, or the rests of prompts behind their memories."""
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


def _read_out(params, hidden, batch) -> dict[str, jax.Array]:
  """The fields of `Ranked` that a prefill gives."""
  incoming = batch['incoming']
  scores = transformer.slot_scores(params, hidden, batch['slots'])
  real = masking.length_mask(batch['count'], scores.shape[-1])
  order = jnp.argsort(jnp.where(real, -scores, jnp.inf), axis=-1)
  return dict(
    readout=metrics.in_incoming_ranks(order, incoming),
    scores=jnp.take_along_axis(scores, jnp.argsort(incoming, -1), -1),
    presented=incoming,
    count=batch['count'],
  )


def compiled(
  setup: policy.Setup, mode: str, batch_size: int
) -> Callable[[Any, Any], dict[str, jax.Array]]:
  """Compiles the answer to batches of one size, ahead of time.

  Args:
    setup: tokens and shapes.
    mode: of MODES; `score` decodes nothing, and its `generated` order is the
      read-out's.
    batch_size: a multiple of the devices that split a batch.

  Returns:
    `(params, batch) -> arrays of Ranked`; the batch is of `examples.requests`
    on the mesh, without its grades. Where prompts have memory tokens it is of
    `examples.behind_memory`, the second, with a `memory` of `compiled_memory`.
  """
  K, T = setup.prompter.num_candidates, setup.prompter.prompt_tokens
  widths = dict(slots=(K,), incoming=(K,), count=())
  model, num_memory = setup.model, setup.prompter.context.memory
  if num_memory:
    T = setup.prompter.rest_tokens
    widths |= dict(memory_length=())
  batch = _abstract(setup, batch_size, prompt=(T,), prompt_length=(), **widths)
  if num_memory:
    heads = model.num_kv_heads
    shape = 2, model.num_layers, heads, num_memory, model.head_dim
    batch |= _abstract(setup, batch_size, model.dtype, memory=shape)
  params = setup.abstract_params()
  with sharding.activate(setup.mesh):
    if mode == 'score':
      return _score.lower(setup.model, params, batch).compile()
    config = setup.sampling(1, mode == 'reason', 0.0, True)
    return _answer.lower(
      setup.model, setup.grammar, config, params, batch
    ).compile()


def compiled_memory(
  setup: policy.Setup, batch_size: int
) -> Callable[[Any, Any], jax.Array]:
  """Compiles what makes memories, for batches of one size, ahead of time.

  Args:
    setup: whose prompts have memory tokens.
    batch_size: a multiple of the devices that split a batch.

  Returns:
    `(params, batch) -> [B, 2, L, N, M, H]`, the keys and values that are kept;
    the batch is of `examples.behind_memory`, the first, on the mesh.
  """
  prompter = setup.prompter
  batch = _abstract(
    setup,
    batch_size,
    prompt=(prompter.memory_prompt_tokens,),
    prompt_length=(),
  )
  with sharding.activate(setup.mesh):
    return _remember.lower(
      setup.model, prompter.context.memory, setup.abstract_params(), batch
    ).compile()


def _abstract(
  setup: policy.Setup, batch_size: int, dtype: Any = jnp.int32, **widths
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch on the mesh, split by rows."""
  split = sharding.batch_sharding(setup.mesh)
  return {
    name: jax.ShapeDtypeStruct((batch_size, *width), dtype, sharding=split)
    for name, width in widths.items()
  }


def rank(
  setup: policy.Setup,
  params: Any,
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
  """Ranks every slate once, in order.

  Args:
    setup: tokens and shapes.
    params: of the policy.
    slates: random access to slate records.
    thinking: whether the policy reasons first.
    order: in which candidates are shown, of `prompts.ORDERS`.
    batch_size: slates at a time; one trace for all.
    seed: of the presentation, a function of (seed, index).
    constrained: the permutation mask.
    desc: of a progress bar; empty for none.
    first: index of the first slate in a longer run that these are a part of.

  Returns:
    The answers, on the host.
  """
  render = examples.requests(
    setup.prompter, '<think>' if thinking else '<answer>', order
  )
  config = setup.sampling(1, thinking, 0.0, constrained)
  answer = functools.partial(_answer, setup.model, setup.grammar, config)
  parts = []
  with (
    reporting.progress(
      len(slates), desc or 'rank', unit='slate', quiet=not desc
    ) as bar,
    sharding.activate(setup.mesh),
  ):
    for n, batch in examples.in_order(slates, render, batch_size, seed, first):
      batch.pop('grades')  # What the policy must not see.
      found = answer(params, sharding.shard_batch(batch, setup.mesh))
      parts.append({k: v[:n] for k, v in processes.gather_to_host(found).items()})
      bar.update(n)
  return Ranked(**{k: np.concatenate([p[k] for p in parts]) for k in parts[0]})


def watch(
  ranking: np.ndarray, grades: np.ndarray, count: np.ndarray
) -> dict[str, np.ndarray]:
  """Per-slate ranking metrics and the watches for copying.

  Args:
    ranking: int32 [n, K] in incoming ranks.
    grades: [n, K] in the incoming order.
    count: int32 [n].

  Returns:
    Name -> float32 [n]: r@1 .. auc, copied, top3_unchanged, kendall_tau,
    first_pick (the incoming rank of the first).
  """
  incoming = jnp.broadcast_to(jnp.arange(ranking.shape[-1]), ranking.shape)
  found = metrics.ranking_metrics(ranking, grades, count)
  found = dict(found) | {
    'copied': metrics.top_unchanged(
      ranking, incoming, count, k=ranking.shape[-1]
    ),
    'top3_unchanged': metrics.top_unchanged(ranking, incoming, count, k=3),
    'kendall_tau': metrics.kendall_tau(ranking, incoming, count),
    'first_pick': ranking[..., 0],
  }
  return {k: np.asarray(v, np.float32) for k, v in found.items()}


def validator(config, setup: policy.Setup, slates: os.PathLike[str], stage):
  """Held-out ranking while training, on the first validation slates.

  Args:
    config: sections prompt.
    setup: tokens and shapes.
    slates: the slates artifact.
    stage: eval_slates, eval_batch_size, thinking.

  Returns:
    `params -> {name: mean}` for the generated order, `readout_n@5`, and
    `order_sensitivity`: how much the answer to the first of the slates changes
    with a shuffled presentation.
  """
  held_out = slates_lib.read(slates, 'validation')
  rng = np.random.default_rng(0)
  chosen = rng.permutation(len(held_out))[: stage.eval_slates]
  source = Chosen(setup.source('validation'), chosen)
  grades, count = held_out.grades[chosen], held_out.count[chosen]

  few = Chosen(source, np.arange(min(len(chosen), SENSITIVITY_SLATES)))

  def validate(params) -> dict[str, float]:
    def ranked_in(order: str, slates: Chosen, seed: int) -> Ranked:
      return rank(
        setup,
        params,
        slates,
        thinking=stage.thinking,
        order=order,
        batch_size=stage.eval_batch_size,
        seed=seed,
      )

    ranked = ranked_in(config.prompt.order, source, 0)
    shuffled = ranked_in('shuffled', few, 1)
    found = watch(ranked.generated, grades, count)
    readout = watch(ranked.readout, grades, count)
    means = {name: float(values.mean()) for name, values in found.items()}
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

  def __init__(self, source, index: np.ndarray):
    self._source, self._index = source, index

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, i: int):
    return self._source[int(self._index[i])]
