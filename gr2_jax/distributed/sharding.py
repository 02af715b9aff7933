"""The device mesh, and which of its axes splits which axis of an array.

A mesh has three axes: `data` splits the batch, `fsdp` splits the batch and the
parameters' embedding axis, `tensor` splits heads, feed-forward and vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gr2_jax.distributed import processes

MESH_AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axis. If two logical axes of one array map to the same
# mesh axis, only the first in this list is split.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  ('batch', ('data', 'fsdp')),
  ('vocab', 'tensor'),
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('mlp', 'tensor'),
  ('embed', 'fsdp'),
  ('group', None),
  ('time', None),
  ('head_dim', None),
  ('layers', None),
  ('codes', None),
  ('slots', None),
)

# Axes that stay whole if their mesh axis does not divide them: a pretrained
# vocabulary with added tokens can have any number of rows.
WHOLE_IF_UNEVEN = ('vocab',)


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Builds the mesh over all devices.

  Args:
    data: size of the data axis; -1 takes all devices that the others leave.
    fsdp: size of the fsdp axis.
    tensor: size of the tensor axis.
    devices: of a topology; by default those of all processes that act together.
      While process 0 works alone, sizes shrink to divide its own devices.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  of_topology = devices is not None
  devices = devices if of_topology else processes.devices()
  n = len(devices)
  for name, size in zip(MESH_AXES, (data, fsdp, tensor), strict=True):
    if size < 1 and not (name == 'data' and size == -1):
      raise ValueError(f'mesh.{name}={size}: must be at least 1')
  if processes.is_main_process_only() and not of_topology:
    tensor = math.gcd(tensor, n)
    fsdp = math.gcd(fsdp, n // tensor)
    data = -1
  if data == -1:
    if n % (fsdp * tensor):
      raise ValueError(
        f'mesh.fsdp={fsdp} x mesh.tensor={tensor} = {fsdp * tensor} does not '
        f'divide the {n} devices'
      )
    data = n // (fsdp * tensor)
  if data * fsdp * tensor != n:
    raise ValueError(
      f'mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor} = '
      f'{data * fsdp * tensor}, but there are {n} devices; mesh.data=-1 takes '
      'all that the others leave'
    )
  return jax.make_mesh(
    (data, fsdp, tensor),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * 3,
    devices=devices,
  )


def param_shardings(mesh: Mesh, abstract_variables: Any) -> Any:
  """Shardings of a module's variables from their logical axes.

  Args:
    mesh: of `make_mesh`.
    abstract_variables: `jax.eval_shape(module.init, ...)`, still boxed. Leaves
      without `nn.with_logical_partitioning` are replicated.

  Returns:
    The unboxed tree with a NamedSharding at every leaf.

  Raises:
    ValueError: a logical axis is not in RULES, or its mesh axis does not divide
      the dimension.
  """
  known = {name for name, _ in RULES}
  logical = nn.get_partition_spec(abstract_variables)
  for path, spec in jax.tree_util.tree_leaves_with_path(
    logical, is_leaf=lambda x: isinstance(x, PartitionSpec)
  ):
    unknown = [name for name in spec if name is not None and name not in known]
    if unknown:
      raise ValueError(
        f'parameter {jax.tree_util.keystr(path)}: no rule for logical axis '
        f'{unknown[0]!r}; known: {", ".join(sorted(known))}'
      )
  logical = jax.tree.map(
    lambda x, spec: _whole_if_uneven(x.shape, spec, mesh),
    unbox(abstract_variables),
    logical,
  )
  shardings = nn.logical_to_mesh_sharding(logical, mesh, RULES)
  jax.tree_util.tree_map_with_path(
    lambda path, x, sharding: _check_divides(
      f'parameter {jax.tree_util.keystr(path)}', x.shape, sharding
    ),
    unbox(abstract_variables),
    shardings,
  )
  return shardings


def unbox(variables: Any) -> Any:
  """Removes the axis names from a tree of arrays or shapes.

  `nn.unbox` would also add sharding constraints, which shapes cannot have.
  """
  return jax.tree.map(
    lambda x: x.value if isinstance(x, nn.Partitioned) else x,
    variables,
    is_leaf=lambda x: isinstance(x, nn.Partitioned),
  )


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
  """Resolves the logical axis constraints of modules to axes of this mesh."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of an array whose first axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts a batch that every process has whole on the mesh, split by rows.

  Args:
    batch: tree of arrays [B, ...]; scalars are replicated.
    mesh: of `make_mesh`.

  Raises:
    ValueError: the data and fsdp axes do not divide B.
  """
  return _shard(batch, mesh, np.arange(_num_shards(mesh)))


def shard_local_rows(batch: Any, mesh: Mesh) -> Any:
  """`shard_batch` where each process has only its `local_rows`, in order."""
  return _shard(batch, mesh, local_rows(mesh, _num_shards(mesh)))


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
  """Ascending indices of the batch rows that this process's devices hold.

  Raises:
    ValueError: the data and fsdp axes do not divide the batch size.
  """
  sharding = batch_sharding(mesh)
  _check_divides('a batch', (size,), sharding)
  slices = sharding.addressable_devices_indices_map((size,)).values()
  spans = {rows.indices(size)[:2] for (rows,) in slices}
  return np.concatenate([np.arange(*span) for span in sorted(spans)])


def _num_shards(mesh: Mesh) -> int:
  """Number of equal parts into which a batch is split."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def _shard(batch: Any, mesh: Mesh, parts: np.ndarray) -> Any:
  """Puts rows on the mesh; `parts` are their indices among all equal parts."""
  split, whole = batch_sharding(mesh), replicated(mesh)
  shards = _num_shards(mesh)

  def put(path, x):
    x = np.asarray(x)
    sharding = split if x.ndim else whole
    shape = x.shape
    if x.ndim and len(parts) < shards:
      shape = (x.shape[0] * shards // len(parts), *x.shape[1:])
    _check_divides(f'batch field {jax.tree_util.keystr(path)}', shape, sharding)

    def read(index):
      if not x.ndim:
        return x
      start, stop, _ = index[0].indices(shape[0])
      begin = np.searchsorted(parts, start * shards // shape[0])
      begin *= shape[0] // shards
      return x[begin : begin + stop - start]

    return jax.make_array_from_callback(shape, sharding, read)

  return jax.tree_util.tree_map_with_path(put, batch)


def _whole_if_uneven(
  shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> PartitionSpec:
  """Drops the names of WHOLE_IF_UNEVEN where their axis does not divide."""
  rules = dict(RULES)
  return PartitionSpec(
    *(
      None
      if name in WHOLE_IF_UNEVEN and size % mesh.shape[rules[name]]
      else name
      for size, name in zip(shape, spec, strict=False)
    )
  )


def _check_divides(
  name: str, shape: tuple[int, ...], sharding: NamedSharding
) -> None:
  """Raises a ValueError if a mesh axis does not divide its dimension."""
  for axis, mesh_axes in enumerate(sharding.spec):
    if mesh_axes is None:
      continue
    if isinstance(mesh_axes, str):
      mesh_axes = (mesh_axes,)
    size = math.prod(sharding.mesh.shape[x] for x in mesh_axes)
    if shape[axis] % size:
      raise ValueError(
        f'{name}: size {shape[axis]} of axis {axis} is not divisible by '
        f'{size}, the size of mesh axis {" x ".join(mesh_axes)}'
      )
