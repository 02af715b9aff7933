"""The processes of a run, and how they act together.

The same command runs on every host, in a workdir that all hosts share. All
processes train the language model together. Process 0 does the rest alone, on
its own devices, while the others wait; it also writes all logs and files.

| how the processes find each other | flags |
|---|---|
| Cloud TPU, GKE, Kubernetes, SLURM, Open MPI | `--cluster=auto` |
| anywhere | `--coordinator=HOST:PORT --num_processes=N --process_id=I` |
"""

import atexit
import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from gr2_jax.distributed import rendezvous

_POLL_SECONDS = 0.5  # between two checks for a file
_PORT_OFFSET = 1000  # from the port of JAX's coordinator to the roster's


class Preempted(Exception):
  """The machine is being taken away; the state is saved."""


@dataclasses.dataclass(frozen=True)
class Place:
  """The place of a process in the cluster.

  Attributes:
    coordinator: HOST:PORT of process 0.
    count: number of processes.
    index: of this process, from 0.
    devices: ids of the local devices that it may use; None for all.
  """

  coordinator: str
  count: int
  index: int
  devices: tuple[int, ...] | None = None

  @property
  def roster(self) -> str:
    """HOST:PORT of the roster (the coordinator's port belongs to JAX)."""
    host, _, port = self.coordinator.rpartition(':')
    offset = -_PORT_OFFSET if int(port) > 2 * _PORT_OFFSET else _PORT_OFFSET
    return f'{host}:{int(port) + offset}'


_main_process_only = False
_received_sigterm = False


def define_flags() -> None:
  """Defines the flags that launchers set for each process."""
  flags.DEFINE_enum(
    'cluster',
    'none',
    ['none', 'auto'],
    'auto: JAX finds the other processes (Cloud TPU, GKE, SLURM, Open MPI).',
  )
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0.')
  flags.DEFINE_integer('num_processes', None, 'Number of processes.')
  flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.')
  flags.DEFINE_float(
    'meeting_timeout', 300.0, 'Seconds to wait for the other processes.'
  )


def find_place(values: flags.FlagValues) -> Place | None:
  """This process's place, from the flags or from the cluster's environment.

  Returns:
    None for a run of one process.

  Raises:
    ValueError: the flags are incomplete, or JAX detects no cluster.
  """
  names = ('coordinator', 'num_processes', 'process_id')
  given = {name: getattr(values, name) for name in names}
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if len(missing) < len(names):
    if missing:
      raise ValueError(f'{", ".join(missing)} missing: give all three, or none')
    coordinator, count, index = given.values()
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
      raise ValueError(f'--coordinator={coordinator}: must be HOST:PORT')
    if not 0 <= index < count:
      raise ValueError(
        f'--process_id={index}: must be from 0 to --num_processes={count} - 1'
      )
    return Place(coordinator, count, index)
  if values.cluster == 'none':
    return None
  # JAX has no public function that detects a cluster.
  from jax._src import clusters

  coordinator, count, index, devices = (
    clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, int(values.meeting_timeout)
    )
  )
  if None in (coordinator, count, index):
    raise ValueError(
      '--cluster=auto: no cluster that JAX knows was found; give '
      '--coordinator, --num_processes and --process_id'
    )
  devices = None if devices is None else tuple(devices)
  return Place(coordinator, count, index, devices)


@contextlib.contextmanager
def initialize(
  place: Place | None, settings: dict[str, str], timeout: float
) -> Iterator[None]:
  """Connects the processes; if the block fails in one, all processes end.

  Args:
    place: of `find_place`; None for a run of one process.
    settings: name -> value that must be the same on all processes.
    timeout: seconds to wait for the others.

  Raises:
    RosterError: a process is missing, or has other settings.
  """
  if place is None or place.count == 1:
    yield
    return
  roster = rendezvous.meet(
    place.roster, place.count, place.index, settings, timeout
  )
  if place.index == 0:
    print(
      'processes:', ', '.join(f'{m.index} {m.host}' for m in roster.members)
    )
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.count,
      place.index,
      local_device_ids=place.devices,
      cluster_detection_method='deactivate',
      initialization_timeout=int(timeout),
      shutdown_timeout_seconds=60,
    )
    yield
  except Preempted:
    roster.bye()  # All processes leave at this step.
    raise
  except BaseException as e:
    roster.fail(f'{type(e).__name__}: {e}')
    atexit.register(_exit_without_jax)
    raise
  roster.bye()


def _exit_without_jax() -> None:
  """Skips JAX's shutdown, which would wait for processes that have ended."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(rendezvous.FAILED)


def size() -> int:
  """Number of processes that act together at the moment."""
  return 1 if _main_process_only else jax.process_count()


def is_main_process() -> bool:
  """Whether this is process 0, which writes logs, tables and files."""
  return jax.process_index() == 0


def devices() -> list[jax.Device]:
  """The devices of all processes that act together at the moment."""
  return jax.local_devices() if _main_process_only else jax.devices()


def is_main_process_only() -> bool:
  """Whether process 0 works alone while the others wait."""
  return _main_process_only


@contextlib.contextmanager
def main_process_only() -> Iterator[None]:
  """Process 0 runs the block alone, on its own devices."""
  global _main_process_only
  before, _main_process_only = _main_process_only, jax.process_count() > 1
  try:
    yield
  finally:
    _main_process_only = before


def broadcast_flag(value: bool) -> bool:
  """Process 0's value, so that all processes take the same branch."""
  if size() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def broadcast_from_main(
  make: Callable[[], np.ndarray], like: np.ndarray
) -> np.ndarray:
  """Calls `make` on process 0 alone and returns its array on all processes.

  `like` has the shape and dtype of that array.
  """
  if size() == 1:
    return make()
  value = make() if is_main_process() else like
  return np.asarray(multihost_utils.broadcast_one_to_all(value))


def assert_same_everywhere(name: str, value: int) -> None:
  """Raises a ValueError with the name unless all processes have this value."""
  if size() == 1:
    return
  values = np.ravel(multihost_utils.process_allgather(np.int32(value)))
  for index, other in enumerate(values.tolist()):
    if other != values[0]:
      raise ValueError(
        f'{name} is {values[0]} on process 0, but {other} on process {index}: '
        'do they share the workdir?'
      )


def wait_for(path: pathlib.Path) -> None:
  """Waits for a file from process 0; the roster ends a hopeless wait."""
  while not path.exists():
    time.sleep(_POLL_SECONDS)


def gather_to_host(tree: Any) -> Any:
  """Whole arrays as NumPy on every host; all processes call this together."""

  def gather(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(gather, tree)


@contextlib.contextmanager
def handle_preemption() -> Iterator[None]:
  """Within the block SIGTERM makes `preempted` true and ends nothing.

  In a run of several processes JAX itself handles the signal, for all.
  """
  global _received_sigterm
  _received_sigterm = False
  if size() > 1:
    yield
    return

  def handle(number: int, frame: Any) -> None:
    global _received_sigterm
    del number, frame
    _received_sigterm = True

  try:
    before = signal.signal(signal.SIGTERM, handle)
  except ValueError:  # Only the main thread receives signals.
    yield
    return
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def preempted(step: int) -> bool:
  """Whether to save and exit after this step; the same on all processes."""
  if size() == 1:
    return _received_sigterm
  return multihost_utils.reached_preemption_sync_point(step)
