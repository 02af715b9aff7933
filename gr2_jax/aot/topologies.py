"""TPU slices that can be compiled for on a machine without them.

`libtpu` (extra `tpu`) holds the compiler and describes a slice by name;
`jax.jit(...).lower(...).compile()` accepts the devices of that description.
"""

import dataclasses
import importlib.util
import math
import os

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip of a family."""

  hbm: float  # bytes
  flops: float  # bf16, a second
  hbm_bandwidth: float  # bytes a second
  ici_bandwidth: float  # bytes a second out of the chip, all links together
  slices: tuple[str, ...]  # shapes of one slice, small to large


# Per chip, from docs.cloud.google.com/tpu/docs/{v5e,v5p-training,v6e}. The
# documented interconnect of v5e and v6e (400 and 800 GB/s) is the sum of both
# directions: half of it leaves the chip. That of v5p, 4,800 Gb/s, is read as
# one direction, as the older 1,600 Gb/s of v5e is.
_SQUARES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8')
CHIPS = {
  'v5e': Chip(16e9, 197e12, 819e9, 200e9, _SQUARES),
  'v5p': Chip(95e9, 459e12, 2765e9, 600e9, _CUBES),
  'v6e': Chip(32e9, 918e12, 1638e9, 400e9, _SQUARES),
}

# `libtpu` requires these where there is no TPU.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # No TPU needs to be locked.
  'TPU_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
}


class TopologyError(ValueError):
  """A slice that cannot be compiled for; the message lists those that can."""


def available() -> bool:
  """Whether the extra `tpu` is installed."""
  return importlib.util.find_spec('libtpu') is not None


def chip(topology: str) -> Chip:
  """The chip of a topology such as `v5p:4x4x4`.

  Raises:
    TopologyError: an unknown family or shape.
  """
  family, _, shape = topology.partition(':')
  if family in CHIPS and shape in CHIPS[family].slices:
    return CHIPS[family]
  known = '; '.join(
    f'{name}: {" ".join(CHIPS[name].slices)}'
    for name in ([family] if family in CHIPS else CHIPS)
  )
  raise TopologyError(
    f'unknown topology {topology!r}: write FAMILY:SHAPE, of {known}'
  )


def slices(family: str) -> list[str]:
  """Topologies of a family, small to large.

  Raises:
    TopologyError: an unknown family.
  """
  if family not in CHIPS:
    raise TopologyError(f'unknown family {family!r}: {", ".join(CHIPS)}')
  return [f'{family}:{shape}' for shape in CHIPS[family].slices]


def size(topology: str) -> int:
  """Chips of a topology."""
  chip(topology)
  return math.prod(map(int, topology.partition(':')[2].split('x')))


def devices(topology: str) -> list[jax.Device]:
  """Describes a slice; the process itself computes on the CPU.

  Returns:
    Its devices, one a chip. They hold no arrays.

  Raises:
    TopologyError: an unknown topology, or `libtpu` is not installed.
  """
  count = size(topology)
  if not available():
    raise TopologyError(
      f'{topology}: its compiler is not installed; pip install "gr2_jax[tpu]" '
      '(the package libtpu, for Linux on x86)'
    )
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  if not jax.config.jax_platforms:
    jax.config.update('jax_platforms', 'cpu')
  # By default a host has four chips; a slice of one chip needs its own host.
  host = {'chips_per_host_bounds': (1, 1, 1)} if count == 1 else {}
  return list(topologies.get_topology_desc(topology, 'tpu', **host).devices)
