"""Depth pruning: which layers a policy can lose.

The effect of a layer is the loss that distillation would have to recover
without it: the divergence from the full policy on that policy's own rollouts,
of every token and of the read-out (Eq. 4). Layers are removed one at a time,
least effect first. The effects of the rest are measured again after each
removal, because two layers that can each be spared may not both be.

Axes: L layers, R removed layers.
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
  """The layers that stay, and the effects that decided.

  Attributes:
    kept: int32 [L - R], indices of the layers that stay, rising.
    effects: float32 [R, L], effect of each layer before each removal; NaN of a
      layer that was removed before.
  """

  kept: np.ndarray
  effects: np.ndarray


def shallower(spec: policy.PolicySpec, layers: int) -> policy.PolicySpec:
  """The spec of the same policy with fewer layers."""
  model = dataclasses.replace(spec.model, num_layers=layers)
  return dataclasses.replace(spec, model=model)


def take(
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  params: Any,
  kept: Sequence[int],
) -> Any:
  """Parameters of the full policy with only the layers `kept`, on the mesh."""
  wanted = shallower(spec, len(kept)).abstract_params(mesh)['layers']
  places = tuple(x.sharding for x in jax.tree.leaves(wanted))
  return params | {'layers': _take(params['layers'], np.asarray(kept), places)}


@functools.partial(jax.jit, static_argnums=2)
def _take(layers: Any, kept: jax.Array, places: tuple[Any, ...]) -> Any:
  """Rows of every leaf, with the shardings `places`: one trace a depth."""
  leaves, tree = jax.tree.flatten(layers)
  taken = [
    jax.lax.with_sharding_constraint(x[kept], place)
    for x, place in zip(leaves, places, strict=True)
  ]
  return jax.tree.unflatten(tree, taken)


def make_measure(
  spec: policy.PolicySpec,
  sampler: sampling.SamplingOptions,
  options: policy_gradient.PolicyGradientOptions,
  teacher: policy_gradient.Teacher,
) -> Callable[[Any, Sequence[policy_gradient.PolicyBatch]], float]:
  """Makes the divergence between a pruned and the full policy, in nats.

  Returns:
    `(pruned params, scored batches) -> mean of kl_weight * divergence of the
    tokens + readout_weight * divergence of the read-out`.
  """

  @functools.cache
  def compiled(layers: int):
    loss_fn = policy_gradient.make_loss(
      shallower(spec, layers).model, spec.grammar, sampler, options, teacher
    )

    @jax.jit
    def divergence(
      params: Any, batch: policy_gradient.PolicyBatch, *vocabulary: jax.Array
    ):
      _, metrics = loss_fn(params, batch, *vocabulary)
      readout = options.readout_weight * metrics.get('readout_kl', 0.0)
      return options.kl_weight * metrics['teacher_kl'] + readout

    return divergence

  def measure(
    params: Any, batches: Sequence[policy_gradient.PolicyBatch]
  ) -> float:
    divergence = compiled(jax.tree.leaves(params['layers'])[0].shape[0])
    each = [divergence(params, batch, *teacher.vocabulary) for batch in batches]
    return float(np.mean([float(x) for x in each]))

  return measure


def choose(
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  params: Any,
  layers: int,
  measure: Callable[[Any], float],
) -> Chosen:
  """Removes the layer of least effect until `layers` are left.

  Args:
    spec: of the full policy.
    mesh: devices of the parameters.
    params: of the full policy.
    layers: layers that stay.
    measure: divergence of pruned parameters from the full policy.

  Raises:
    ValueError: the policy does not have more layers than are to stay.
  """
  total = spec.model.num_layers
  if not 1 <= layers < total:
    raise ValueError(
      f'prune.layers={layers}: must be at least 1, and less than the {total} '
      'layers of the policy'
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
