"""Import: leaf by leaf and shard by shard, into sharded arrays.

The host holds one shard of one parameter at a time.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gr2_jax.distributed import sharding
from gr2_jax.hf import leaves
from gr2_jax.hf.backbone import Backbone
from gr2_jax.models import transformer

READOUT = 'gr2_readout.safetensors'


def import_params(
  backbone: Backbone,
  model: transformer.TransformerConfig,
  shardings: Any,
  new_rows: np.ndarray | None = None,
  new_output_rows: np.ndarray | None = None,
) -> Any:
  """Reads parameters, unboxed and float32, straight into sharded arrays.

  The read-out vector is the one that `export` wrote beside the model, or zeros.

  Args:
    backbone: of `open_backbone`.
    model: the decoder; agrees with `backbone.fields` but for rope scaling, and
      has at least `backbone.vocab_size` tokens.
    shardings: a Sharding for every leaf of the unboxed parameters.
    new_rows: float [n, D], initial values of the last n rows of the embedding;
      n exceeds the number of added rows where a checkpoint has spare ones.
    new_output_rows: the same for an untied output embedding; None: `new_rows`.

  Raises:
    ValueError: a leaf is missing, superfluous or of another shape, a field of
      `model` differs from the checkpoint's, or rows do not fit. The message
      names leaf, file and both shapes.
  """
  if new_rows is None:
    new_rows = np.zeros((0, model.d_model), np.float32)
  if new_output_rows is None:
    new_output_rows = new_rows
  rows = {'embedding': new_rows, 'unembedding': new_output_rows}
  _check(backbone, model, rows)

  def load(path, leaf, placement):
    name = leaf_name(path)
    if name == 'readout':
      read = _readout(backbone.source, model).__getitem__
    elif name in rows:
      read = functools.partial(
        _read_rows, backbone, name, leaf.shape[0] - len(rows[name]), rows[name]
      )
    else:
      read = functools.partial(backbone.read, name)
    return _place(leaf.shape, placement, read)

  return jax.tree_util.tree_map_with_path(
    load, abstract_params(model), shardings
  )


def _place(
  shape: tuple[int, ...], placement: jax.sharding.Sharding, read: Callable
) -> jax.Array:
  """A global array, read block by block; equal blocks are read once."""
  devices: dict[tuple, list] = {}
  indices = placement.addressable_devices_indices_map(shape)
  for device, index in indices.items():
    bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    devices.setdefault(bounds, []).append(device)
  shards = []
  for bounds, holders in devices.items():
    block = read(tuple(slice(*b) for b in bounds))
    shards += [jax.device_put(block, device) for device in holders]
    jax.block_until_ready(shards[-len(holders) :])
  return jax.make_array_from_single_device_arrays(shape, placement, shards)


def _read_rows(
  backbone: Backbone,
  name: str,
  old: int,
  new: np.ndarray,
  index: tuple[slice, slice],
) -> np.ndarray:
  """A block of an embedding: `old` rows of the checkpoint, then `new`."""
  rows, columns = index
  out = np.empty([s.stop - s.start for s in index], np.float32)
  split = min(max(old, rows.start), rows.stop)
  number = split - rows.start
  if number:
    out[:number] = backbone.read(name, (slice(rows.start, split), columns))
  out[number:] = new[max(split - old, 0) : rows.stop - old, columns]
  return out


def _readout(
  source: pathlib.Path, model: transformer.TransformerConfig
) -> np.ndarray:
  file = source / READOUT
  if not file.is_file():
    return np.zeros(model.d_model, np.float32)
  import safetensors.numpy

  readout = safetensors.numpy.load_file(file)['readout']
  if readout.shape != (model.d_model,):
    raise ValueError(
      f'{file}: leaf readout has shape {readout.shape}, but the config '
      f'requires {(model.d_model,)}'
    )
  return readout


def _check(
  backbone: Backbone,
  model: transformer.TransformerConfig,
  rows: Mapping[str, np.ndarray],
) -> None:
  """Compares the checkpoint with the decoder, before anything is read."""
  shapes, used = backbone.tensors.shapes, set()
  lengths = leaves.sizes(model)
  for name, leaf in named_leaves(abstract_params(model)).items():
    if name == 'readout':
      continue
    if name not in backbone.leaves:
      raise ValueError(
        f'{backbone.source}: leaf {name} {leaf.shape} is not in a '
        f'{backbone.family} checkpoint'
      )
    tensor, form = backbone.leaves[name]
    shape = leaves.shapes(form, lengths)[0]
    if name in rows:
      shape = _check_rows(backbone, name, leaf.shape, rows[name])
    for layer in range(model.num_layers if '{}' in tensor else 1):
      key = tensor.format(layer)
      used.add(key)
      if key not in shapes:
        raise ValueError(
          f'{backbone.source}: leaf {name} {leaf.shape}: tensor {key} {shape} '
          'is not in the checkpoint'
        )
      if shapes[key] != shape:
        raise ValueError(
          f'{backbone.tensors.file(key)}: leaf {name} {leaf.shape}: tensor '
          f'{key} has shape {shapes[key]}, but the config requires {shape}'
        )
  if model.tie_embeddings:
    used.add(backbone.leaves['unembedding'][0])  # a second copy, in some files
  for name in sorted(set(shapes) - used):
    if not name.endswith('.rotary_emb.inv_freq'):
      raise ValueError(
        f'{backbone.tensors.file(name)}: tensor {name} {shapes[name]} has no '
        f'place in a {backbone.family} decoder of {model.num_layers} layers'
      )
  for field, value in backbone.fields.items():
    stretch = field.startswith('rope_') and field != 'rope_base'
    if not stretch and getattr(model, field) != value:
      raise ValueError(
        f'{backbone.source}: model.{field} is {value} there, but '
        f'{getattr(model, field)} in the config'
      )


def _check_rows(
  backbone: Backbone, name: str, shape: tuple[int, int], new: np.ndarray
) -> tuple[int, int]:
  """The shape that an embedding has in the checkpoint."""
  V, D = shape
  if new.ndim != 2 or new.shape[1] != D or len(new) > V:
    raise ValueError(f'leaf {name} {shape}: new rows have shape {new.shape}')
  if not V - len(new) <= backbone.vocab_size <= V:
    raise ValueError(
      f'{backbone.source}: leaf {name} has shape ({backbone.vocab_size}, '
      f'{backbone.fields["d_model"]}) there and {len(new)} new rows, but the '
      f'vocabulary requires {shape}'
    )
  return backbone.vocab_size, D


def abstract_params(model: transformer.TransformerConfig) -> Any:
  """Shapes of the parameters, unboxed."""
  init = functools.partial(transformer.init_params, model)
  return sharding.unbox(jax.eval_shape(init, jax.random.key(0)))


def leaf_name(path: tuple) -> str:
  """A leaf's keys, joined by dots."""
  return '.'.join(entry.key for entry in path)


def named_leaves(params: Any) -> dict[str, Any]:
  """Name -> leaf."""
  return {
    leaf_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
