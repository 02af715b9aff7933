"""TPU slices and their names on Google Cloud.

Names and runtime versions: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e} and
.../runtimes.
"""

import dataclasses

from gr2_jax.aot import topologies
from launch import commands


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice's `--accelerator-type` and `--runtime-version`."""

  accelerator: str
  runtime: str


# Prefix of the accelerator type, its count per chip (v5p counts TensorCores),
# and the runtime version for JAX.
_FAMILIES = {
  'v5e': ('v5litepod', 1, 'v2-alpha-tpuv5-lite'),
  'v5p': ('v5p', 2, 'v2-alpha-tpuv5'),
  'v6e': ('v6e', 1, 'v2-alpha-tpuv6e'),
}


def find(topology: str) -> Slice:
  """The slice of a topology such as `v5p:4x4x4`; else a LaunchError."""
  try:
    chips = topologies.size(topology)
  except topologies.TopologyError as e:
    raise commands.LaunchError(f'--topology: {e}') from e
  prefix, count, runtime = _FAMILIES[topology.partition(':')[0]]
  return Slice(f'{prefix}-{chips * count}', runtime)
