"""TPU slices that can be compiled for without having one.

`libtpu` (extra `tpu`) holds the compiler; it describes a slice by name, and
`jax.jit(...).lower(...).compile()` works on the devices of that description.
"""

import dataclasses
import importlib.util
import math
import os

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip of a family, as Google Cloud documents it."""

  hbm: float  # bytes
  flops: float  # bf16, a second
  hbm_bandwidth: float  # bytes a second
  ici_bandwidth: float  # bytes a second out of the chip, all links together
  slices: tuple[str, ...]  # shapes of one slice, small to large


# Per chip, from docs.cloud.google.com/tpu/docs/{v5e,v5p-training,v6e}. The
# interconnect of v5e and v6e is documented in both directions together (400 and
# 800 GB/s): half of it leaves the chip. That of v5p is 4,800 Gb/s, read as one
# direction, as the older 1,600 Gb/s of v5e is.
CHIPS = {
  'v5e': Chip(
    hbm=16e9,
    flops=197e12,
    hbm_bandwidth=819e9,
    ici_bandwidth=200e9,
    slices=('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
  ),
  'v5p': Chip(
    hbm=95e9,
    flops=459e12,
    hbm_bandwidth=2765e9,
    ici_bandwidth=600e9,
    slices=('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8'),
  ),
  'v6e': Chip(
    hbm=32e9,
    flops=918e12,
    hbm_bandwidth=1638e9,
    ici_bandwidth=400e9,
    slices=('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
  ),
}

# What `libtpu` asks for where there is no TPU. It locks itself to one process,
# for the sake of hardware that is not used here.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
}


class TopologyError(ValueError):
  """A slice that cannot be compiled for; the message says what can."""


def available() -> bool:
  """Whether the extra `tpu` is there."""
  return importlib.util.find_spec('libtpu') is not None


def chip(topology: str) -> Chip:
  """The chip of a topology such as `v5p:4x4x4`.

  Raises:
    TopologyError: an unknown family or shape.
  """
  family, _, shape = topology.partition(':')
  found = CHIPS.get(family)
  if found is None or shape not in found.slices:
    known = '; '.join(
      f'{name}: {" ".join(one.slices)}'
      for name, one in CHIPS.items()
      if found is None or name == family
    )
    raise TopologyError(
      f'unknown topology {topology!r}: write FAMILY:SHAPE, of {known}'
    )
  return found


def slices(family: str) -> list[str]:
  """Topologies of a family, small to large."""
  found = CHIPS.get(family)
  if found is None:
    raise TopologyError(f'unknown family {family!r}: {", ".join(CHIPS)}')
  return [f'{family}:{shape}' for shape in found.slices]


def size(topology: str) -> int:
  """Chips of a topology."""
  chip(topology)
  return math.prod(map(int, topology.partition(':')[2].split('x')))


def devices(topology: str) -> list[jax.Device]:
  """Describes a slice; the process itself computes on the CPU.

  Args:
    topology: of `slices`.

  Returns:
    Its devices, one a chip. Nothing can be put on them.

  Raises:
    TopologyError: an unknown topology, or `libtpu` is not installed.
  """
  chip(topology)
  if not available():
    raise TopologyError(
      f'{topology}: its compiler is not installed; pip install "gr2_jax[tpu]" '
      '(the package libtpu, for Linux on x86)'
    )
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  if not jax.config.jax_platforms:
    jax.config.update('jax_platforms', 'cpu')
  # By default a host has four chips; a slice of one has a host of its own.
  host = {'chips_per_host_bounds': (1, 1, 1)} if size(topology) == 1 else {}
  found = topologies.get_topology_desc(topology, 'tpu', **host)
  return list(found.devices)
