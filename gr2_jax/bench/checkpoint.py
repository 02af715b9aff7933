"""Host memory of a sharded checkpoint, written on one mesh and read on another.

python -m gr2_jax.bench.checkpoint

One process makes a billion parameters on a mesh of virtual CPU devices and
saves them; another restores them on a mesh of another shape. The table compares
the growth of each process's peak memory with the size of the parameters, which
are host memory, too, on these devices.
"""

import multiprocessing
import os
import resource
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.pipeline import checkpoint, reporting

_LAYERS = flags.DEFINE_integer('layers', 19, 'Of the model.', 1)
_WIDTH = flags.DEFINE_integer('width', 2048, 'Of a layer.', 128)
_DIRECTORY = flags.DEFINE_string(
  'directory', None, 'Of the temporary checkpoint; default: /tmp.'
)
_DEVICES = 8
# Without the axis `data`, which would hold copies.
MESHES = {
  'saved': dict(data=1, fsdp=8, tensor=1),
  'restored': dict(data=1, fsdp=4, tensor=2),
}


def shape(layers: int, width: int) -> transformer.TransformerConfig:
  """Qwen3-1.7B by default, with fewer layers and a small vocabulary."""
  return transformer.TransformerConfig(
    vocab_size=16 * width,
    d_model=width,
    num_layers=layers,
    num_heads=16,
    num_kv_heads=8,
    head_dim=width // 16,
    d_ff=3 * width,
  )


def abstract(
  model: transformer.TransformerConfig, mesh: jax.sharding.Mesh
) -> Any:
  """Shapes and shardings of the parameters."""
  boxed = jax.eval_shape(
    lambda key: transformer.init_params(model, key), jax.random.key(0)
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    sharding.unbox(boxed),
    sharding.param_shardings(mesh, boxed),
  )


def _value(
  place: int, index: tuple[slice, ...], leaf: jax.ShapeDtypeStruct
) -> np.ndarray:
  """A shard of a leaf; values tell leaves and positions apart."""
  starts = [s.indices(n)[0] for s, n in zip(index, leaf.shape, strict=True)]
  sizes = [
    len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)
  ]
  out = np.full(sizes, place, leaf.dtype)
  for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
    ramp = (np.arange(start, start + size) % 251).astype(leaf.dtype)
    out += ramp.reshape([-1 if a == axis else 1 for a in range(len(sizes))])
  return out


def part(
  name: str,
  model: transformer.TransformerConfig,
  path: str,
  out: multiprocessing.Queue,
) -> None:
  """Saves or restores in a process of its own, and sends a row of the table."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', _DEVICES)
  expected = abstract(model, sharding.make_mesh(**MESHES[name]))
  leaves, treedef = jax.tree.flatten(expected)
  size = sum(x.size * x.dtype.itemsize for x in leaves)
  before = _peak()
  if name == 'saved':
    params = treedef.unflatten(
      jax.make_array_from_callback(
        x.shape, x.sharding, lambda index, i=i, x=x: _value(i, index, x)
      )
      for i, x in enumerate(leaves)
    )
    held = _peak()
    clock = time.monotonic()
    checkpoint.save_params(path, params)
  else:
    held = before
    clock = time.monotonic()
    params = checkpoint.load_params(path, expected)
    jax.block_until_ready(params)
  seconds, peak = time.monotonic() - clock, _peak()
  for i, x in enumerate(jax.tree.leaves(params)):
    for shard in x.addressable_shards:
      np.testing.assert_array_equal(shard.data, _value(i, shard.index, x))
  out.put(
    {
      'tree': name,
      'mesh': ' x '.join(f'{k} {v}' for k, v in MESHES[name].items()),
      'parameters': f'{sum(x.size for x in leaves):,}',
      'tree GB': f'{size / 1e9:.2f}',
      'made GB': f'{(held - before) / 1e9:.2f}',
      'peak GB': f'{(peak - before) / 1e9:.2f}',
      'ratio': f'{(peak - before) / size:.2f}',
      'seconds': f'{seconds:.1f}',
    }
  )


def _peak() -> int:
  """Peak memory of this process in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str]) -> None:
  """Prints a row for each process."""
  del argv
  rows, context = [], multiprocessing.get_context('spawn')
  model = shape(_LAYERS.value, _WIDTH.value)
  with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as directory:
    path = os.path.join(directory, 'params')
    for name in MESHES:
      out = context.Queue()
      process = context.Process(target=part, args=(name, model, path, out))
      process.start()
      process.join()
      if process.exitcode:
        raise SystemExit(f'{name}: the process ended with {process.exitcode}')
      rows.append(out.get())
  print(reporting.table(rows, tuple(rows[0])))


if __name__ == '__main__':
  app.run(main)
