"""Depth pruning: which layers a policy can do without.

The effect of a layer is what distillation would have to win back without it:
the divergence from the whole policy, on that policy's own rollouts, of every
token and of the scores at the slots (Eq. 4, the loss that follows). Layers go
one at a time, that of least effect first, and the effects of the others are
measured anew without it, for two that can each be spared may not both be.

Axes: L layers, R layers that go.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gr2_jax.policy import policy, sampling
from gr2_jax.train import policy_gradient


class Chosen(NamedTuple):
  """Which layers stay, and why.

  Attributes:
    kept: int32 [L - R], places of the layers that stay, rising.
    effects: float32 [R, L], of each layer before each is left out; NaN of one
      that is left out already.
  """

  kept: np.ndarray
  effects: np.ndarray


def shallower(spec: policy.PolicySpec, layers: int) -> policy.PolicySpec:
  """The spec of a policy that has fewer layers.

  Args:
    spec: of the whole policy.
    layers: that are left.
  """
  model = dataclasses.replace(spec.model, num_layers=layers)
  return dataclasses.replace(spec, model=model)


def take(
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  params: Any,
  kept: Sequence[int],
) -> Any:
  """Parameters of some layers, on the mesh; all else as it is.

  Args:
    spec: of the whole policy.
    params: of it.
    kept: places of the layers.
  """
  wanted = shallower(spec, len(kept)).abstract_params(mesh)['layers']
  places = tuple(x.sharding for x in jax.tree.leaves(wanted))
  return params | {'layers': _take(params['layers'], np.asarray(kept), places)}


@functools.partial(jax.jit, static_argnums=2)
def _take(layers: Any, kept: jax.Array, places: tuple[Any, ...]) -> Any:
  """Rows of every leaf, each where its `places` says: one trace a depth."""
  leaves, tree = jax.tree.flatten(layers)
  taken = [
    jax.lax.with_sharding_constraint(x[kept], place)
    for x, place in zip(leaves, places, strict=True)
  ]
  return jax.tree.unflatten(tree, taken)


def make_measure(
  spec: policy.PolicySpec, sampler: sampling.SamplingOptions, stage
) -> Callable[..., float]:
  """What policies of fewer layers are apart from the whole one.

  Args:
    spec: of the whole policy.
    sampler: how the rollouts were sampled.
    stage: section `prune`: kl_weight, kl_kind, average, readout_weight.

  Returns:
    `(params, batches, *said) -> apart`, in nats: the mean over batches, which
    hold what the teacher says; `said` is what it says of its vocabulary.
  """

  @functools.cache
  def compiled(layers: int):
    loss_fn = policy_gradient.make_loss(
      shallower(spec, layers).model,
      spec.grammar,
      sampler,
      clip_low=stage.clip_low,
      clip_high=stage.clip_high,
      average=stage.average,
      kl_weight=stage.kl_weight,
      divergence=stage.kl_kind,
      readout_weight=stage.readout_weight,
    )

    @jax.jit
    def apart(params, batch, *said):
      _, found = loss_fn(params, batch, *said)
      readout = stage.readout_weight * found.get('readout_kl', 0.0)
      return stage.kl_weight * found['teacher_kl'] + readout

    return apart

  def measure(
    params: Any, batches: Sequence[policy_gradient.PolicyBatch], *said
  ) -> float:
    layers = jax.tree.leaves(params['layers'])[0].shape[0]
    found = [compiled(layers)(params, batch, *said) for batch in batches]
    return float(np.mean([float(x) for x in found]))

  return measure


def choose(
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  params: Any,
  layers: int,
  measure: Callable[[Any], float],
) -> Chosen:
  """Leaves out the layer of least effect until few enough are left.

  Args:
    spec: of the whole policy.
    params: of it.
    layers: that are to be left.
    measure: parameters of fewer layers to what they are apart from the whole.

  Raises:
    ValueError: there are not more layers than are to be left.
  """
  total = spec.model.num_layers
  if not 1 <= layers < total:
    raise ValueError(
      f'prune.layers={layers}: must be at least 1, and less than the {total} '
      'layers that there are'
    )
  kept, effects = list(range(total)), []
  while len(kept) > layers:
    row = np.full(total, np.nan, np.float32)
    for layer in kept:
      rest = [other for other in kept if other != layer]
      row[layer] = measure(take(spec, mesh, params, rest))
    kept.remove(int(np.nanargmin(row)))
    effects.append(row)
  return Chosen(np.array(kept, np.int32), np.stack(effects))
