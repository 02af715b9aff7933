"""Import: leaf by leaf and shard by shard, into sharded arrays.

The host holds one shard of one parameter at a time.
"""

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
  """Reads parameters straight into sharded arrays.

  The host holds one shard of one parameter at a time. The read-out vector is
  the one that `export` wrote beside the model, or zeros.

  Args:
    backbone: of `open_backbone`.
    model: the decoder; agrees with `backbone.fields` but for rope scaling, and
      has at least `backbone.vocab_size` tokens.
    shardings: a Sharding for every leaf of the unboxed parameters.
    new_rows: float [n, D], what the last n rows of the embedding start as; n
      may be larger than the rows added, where a checkpoint has spare ones.
    new_output_rows: the same for an untied output embedding; None: `new_rows`.

  Returns:
    Parameters as of `transformer.init_params`, unboxed, float32.

  Raises:
    ValueError: a leaf is missing, superfluous or of another shape, a field of
      `model` differs from the checkpoint's, or rows do not fit. The message
      names leaf, file and both shapes.
  """
  wanted = abstract_params(model)
  if new_rows is None:
    new_rows = np.zeros((0, model.d_model), np.float32)
  if new_output_rows is None:
    new_output_rows = new_rows
  rows = {'embedding': new_rows, 'unembedding': new_output_rows}
  _check(backbone, model, wanted, rows)

  def load(path, leaf, placement):
    name = leaf_name(path)
    if name == 'readout':
      readout = _readout(backbone.source, model)
      return _place(leaf.shape, placement, lambda index: readout[index])
    if name in rows:
      return _place(
        leaf.shape,
        placement,
        lambda index: _with_rows(backbone, name, leaf.shape, rows[name], index),
      )
    return _place(
      leaf.shape, placement, lambda index: backbone.read(name, index)
    )

  return jax.tree_util.tree_map_with_path(load, wanted, shardings)


def _place(shape, placement, read) -> jax.Array:
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


def _with_rows(backbone, name, shape, new, index) -> np.ndarray:
  """A block of an embedding whose last rows are `new`."""
  rows, columns = index
  old = shape[0] - len(new)
  out = np.empty([s.stop - s.start for s in index], np.float32)
  split = min(max(old, rows.start), rows.stop)
  here = split - rows.start
  if here:
    out[:here] = backbone.read(name, (slice(rows.start, split), columns))
  out[here:] = new[max(split - old, 0) : rows.stop - old, columns]
  return out


def _readout(source, model) -> np.ndarray:
  file = source / READOUT
  if not file.is_file():
    return np.zeros(model.d_model, np.float32)
  import safetensors.numpy

  found = safetensors.numpy.load_file(file)['readout']
  if found.shape != (model.d_model,):
    raise ValueError(
      f'{file}: leaf readout has shape {found.shape}, but the config asks for '
      f'{(model.d_model,)}'
    )
  return found


def _check(backbone, model, wanted, rows) -> None:
  """Compares the checkpoint with the decoder, before anything is read."""
  shapes, used = backbone.tensors.shapes, set()
  lengths = leaves.sizes(model)
  for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
    name = leaf_name(path)
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
      one = tensor.format(layer)
      used.add(one)
      if one not in shapes:
        raise ValueError(
          f'{backbone.source}: leaf {name} {leaf.shape}: tensor {one} {shape} '
          'is not in the checkpoint'
        )
      if shapes[one] != shape:
        raise ValueError(
          f'{backbone.tensors.file(one)}: leaf {name} {leaf.shape}: tensor '
          f'{one} has shape {shapes[one]}, but the config asks for {shape}'
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


def _check_rows(backbone, name, shape, new) -> tuple[int, int]:
  """The shape that an embedding has in the checkpoint."""
  V, D = shape
  if new.ndim != 2 or new.shape[1] != D or len(new) > V:
    raise ValueError(f'leaf {name} {shape}: new rows have shape {new.shape}')
  if not V - len(new) <= backbone.vocab_size <= V:
    raise ValueError(
      f'{backbone.source}: leaf {name} has shape ({backbone.vocab_size}, '
      f'{backbone.fields["d_model"]}) there and {len(new)} new rows, but the '
      f'vocabulary asks for {shape}'
    )
  return backbone.vocab_size, D


def abstract_params(model: transformer.TransformerConfig) -> Any:
  """Shapes of the parameters, unboxed."""
  return sharding.unbox(
    jax.eval_shape(
      lambda key: transformer.init_params(model, key), jax.random.key(0)
    )
  )


def leaf_name(path: tuple) -> str:
  """A leaf's keys, joined by dots."""
  return '.'.join(entry.key for entry in path)
