"""Low-rank adapters, and how they join the frozen parameters.

LoRA (Hu et al., arXiv 2106.09685). The decoder is independent of it: a training
step joins the frozen parameters with the trainable ones and calls the usual
loss:

  W = W_frozen + (alpha / rank) down @ up

The embedding rows of the added symbols and the read-out train too, as a whole.
A stage leaves joined parameters: a plain policy.

Axes: L layers, I inputs of a projection, O its outputs, R rank, V vocabulary,
D model width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

# Leaves of a layer that can have an adapter, and how many axes (after the
# layers') are inputs.
INPUT_AXES = {
  'query': 1,
  'key': 1,
  'value': 1,
  'out': 2,
  'gate': 1,
  'up': 1,
  'down': 1,
}


@dataclasses.dataclass(frozen=True)
class Adapters:
  """The parameters that train."""

  rank: int = 0  # R; 0 trains everything and has no adapter.
  targets: tuple[str, ...] = tuple(INPUT_AXES)  # Projections with an adapter.
  first_row: int = 0  # Embedding rows from here on train whole.
  alpha: float = 16.0  # The adapters' product is scaled by alpha / rank.

  def __post_init__(self):
    unknown = [name for name in self.targets if name not in INPUT_AXES]
    if unknown:
      raise ValueError(
        f'model.lora_targets: no projection {unknown[0]!r}; known: '
        f'{", ".join(INPUT_AXES)}'
      )
    if self.rank < 0:
      raise ValueError(f'model.lora_rank={self.rank}: must be 0 or more')

  def start(self, params: Any, key: jax.Array) -> Any:
    """Trainable parameters whose join with `params` is `params`.

    `params` are the whole policy, unboxed. `key` is for the `down` matrices;
    `up` starts at zero. Returns `params` themselves where rank is 0; else a
    tree with `down` [L, I, R] and `up` [L, R, O] of each target, `rows` of each
    embedding and `readout`.
    """
    if not self.rank:
      return params
    layers = traverse_util.flatten_dict(params['layers'], sep='/')
    down, up = {}, {}
    for number, path in enumerate(self._adapted(layers)):
      L, I, O = self._shape(path, layers[path].shape)  # noqa: E741
      noise = jax.random.normal(
        jax.random.fold_in(key, number), (L, I, self.rank), jnp.float32
      )
      down[path] = noise / math.sqrt(I)
      up[path] = jnp.zeros((L, self.rank, O), jnp.float32)
    tables = [n for n in ('embedding', 'unembedding') if n in params]
    rows = {name: params[name][self.first_row :] for name in tables}
    # A copy: a training state donates its buffers, `params` stay.
    readout = jnp.copy(params['readout'])
    return {'down': down, 'up': up, 'rows': rows, 'readout': readout}

  def join(self, trainable: Any, frozen: Any) -> Any:
    """The whole policy, unboxed and shaped like `frozen`.

    `frozen` are the parameters that were given to `start`; they are not read
    where rank is 0.
    """
    if not self.rank:
      return trainable
    layers = traverse_util.flatten_dict(frozen['layers'], sep='/')
    for path, down in trainable['down'].items():
      change = jnp.einsum('lir,lro->lio', down, trainable['up'][path])
      change = (self.alpha / self.rank) * change.reshape(layers[path].shape)
      layers[path] = layers[path] + change.astype(layers[path].dtype)
    joined = dict(frozen, readout=trainable['readout'])
    joined['layers'] = traverse_util.unflatten_dict(layers, sep='/')
    for name, rows in trainable['rows'].items():
      joined[name] = jax.lax.dynamic_update_slice_in_dim(
        frozen[name], rows.astype(frozen[name].dtype), self.first_row, axis=0
      )
    return joined

  def joiner(self) -> Callable[[Any, Any], Any]:
    """`join`, compiled where the rank is not 0."""
    return jax.jit(self.join) if self.rank else self.join

  def wrap(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`(params, *batch)` -> `(trainable, frozen, *batch)`, the same loss."""

    def loss_of_trainable(trainable: Any, frozen: Any, *batch: Any) -> Any:
      return loss_fn(self.join(trainable, frozen), *batch)

    return loss_of_trainable

  def _adapted(self, layers: dict[str, jax.Array]) -> list[str]:
    return [p for p in sorted(layers) if p.split('/')[-1] in self.targets]

  def _shape(self, path: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(L, I, O) of a projection [L, *inputs, *outputs]."""
    inputs = 1 + INPUT_AXES[path.split('/')[-1]]
    return shape[0], math.prod(shape[1:inputs]), math.prod(shape[inputs:])
