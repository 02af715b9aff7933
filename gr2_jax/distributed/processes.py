"""The processes of a run, and what each of them does.

The same command runs on every host, in a workdir that all of them share. They
train the language model together; whatever else is to be done, process 0 does
alone, on its own devices, while the others wait for the result. Process 0 is
also the one that writes logs and files.

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

_POLL = 0.5  # seconds between two looks for a file
_APART = 1000  # between the ports of JAX's coordinator and of the roster


class Preempted(Exception):
  """The machine is taken away; all is saved."""


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a process stands.

  Attributes:
    coordinator: HOST:PORT of process 0.
    count: of processes.
    index: of this one.
    devices: ids of those local devices that are its own; None for all.
  """

  coordinator: str
  count: int
  index: int
  devices: tuple[int, ...] | None = None

  @property
  def roster(self) -> str:
    """HOST:PORT of the roster: JAX has the other port."""
    host, _, port = self.coordinator.rpartition(':')
    port = int(port)
    return f'{host}:{port - _APART if port > 2 * _APART else port + _APART}'


_alone = False
_asked_to_leave = False


def define_flags() -> None:
  """Flags of whoever starts processes."""
  flags.DEFINE_enum(
    'cluster',
    'none',
    ['none', 'auto'],
    'auto: JAX finds the other processes (Cloud TPU, GKE, SLURM, Open MPI).',
  )
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0.')
  flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
  flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')
  flags.DEFINE_float(
    'meeting_timeout', 300.0, 'Seconds to wait for the other processes.'
  )


def find_place(values: flags.FlagValues) -> Place | None:
  """This process's place, from flags or what JAX knows of the cluster.

  Returns:
    None where there is but one process.

  Raises:
    ValueError: some of the flags are missing, or there is no known cluster.
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
  # JAX asks environments by this function alone, and has no public one.
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
  place: Place | None, facts: dict[str, str], timeout: float
) -> Iterator[None]:
  """Takes part in a run; what ends this process badly ends the others.

  Args:
    place: of `find`; None for a run of one process.
    facts: what must be the same everywhere, by name.
    timeout: seconds to wait for the others.

  Raises:
    RosterError: the others did not come, or were started otherwise.
  """
  if place is None or place.count == 1:
    yield
    return
  everyone = rendezvous.meet(
    place.roster, place.count, place.index, facts, timeout
  )
  if place.index == 0:
    print(
      'processes:', ', '.join(f'{m.index} {m.host}' for m in everyone.members)
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
    everyone.bye()  # All of them leave at this step.
    raise
  except BaseException as e:
    everyone.fail(f'{type(e).__name__}: {e}')
    atexit.register(_exit)
    raise
  everyone.bye()


def _exit() -> None:
  """Ends a process that failed: JAX would wait for those who have stopped."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(rendezvous.FAILED)


def size() -> int:
  """How many processes act together just now."""
  return 1 if _alone else jax.process_count()


def is_main_process() -> bool:
  """Whether this process writes: logs, tables, files."""
  return jax.process_index() == 0


def devices() -> list[jax.Device]:
  """The devices of all processes that act together just now."""
  return jax.local_devices() if _alone else jax.devices()


def is_main_process_only() -> bool:
  """Whether process 0 does something that the others wait for."""
  return _alone


@contextlib.contextmanager
def main_process_only() -> Iterator[None]:
  """What process 0 does meanwhile, it does on its own devices."""
  global _alone
  before, _alone = _alone, jax.process_count() > 1
  try:
    yield
  finally:
    _alone = before


def broadcast_flag(value: bool) -> bool:
  """Process 0's word, on all of them: they must not decide apart."""
  if size() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def broadcast_from_main(make: Callable[[], np.ndarray], like: np.ndarray) -> np.ndarray:
  """What process 0 makes, on all of them; the others make nothing.

  Args:
    make: what only one of them may do, such as asking somebody.
    like: an array of the same shape and type.
  """
  if size() == 1:
    return make()
  made = make() if is_main_process() else like
  return np.asarray(multihost_utils.broadcast_one_to_all(made))


def assert_same_everywhere(what: str, value: int) -> None:
  """Raises a ValueError unless all processes have the same number.

  Args:
    what: its name, for people.
    value: this process's.
  """
  if size() == 1:
    return
  found = np.ravel(multihost_utils.process_allgather(np.int32(value)))
  for index, other in enumerate(found.tolist()):
    if other != found[0]:
      raise ValueError(
        f'{what} is {found[0]} on process 0, but {other} on process {index}: '
        'do they share the workdir?'
      )


def wait_for(path: pathlib.Path) -> None:
  """Waits for a file that process 0 writes; the roster ends a vain wait."""
  while not path.exists():
    time.sleep(_POLL)


def gather_to_host(tree: Any) -> Any:
  """Whole arrays on every host, as NumPy.

  Args:
    tree: of jax.Arrays, wherever their parts are; all processes call this.
  """

  def one(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(one, tree)


@contextlib.contextmanager
def handle_preemption() -> Iterator[None]:
  """Within, a signal to terminate is heard by `preempted` and kills nothing.

  Of several processes JAX tells all what one has heard.
  """
  global _asked_to_leave
  _asked_to_leave = False
  if size() > 1:
    yield
    return

  def hear(number, frame):
    global _asked_to_leave
    del number, frame
    _asked_to_leave = True

  try:
    before = signal.signal(signal.SIGTERM, hear)
  except ValueError:  # Not the main thread: nobody would hear it here.
    yield
    return
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def preempted(step: int) -> bool:
  """Whether to save and leave after this step; the same on all processes."""
  if size() == 1:
    return _asked_to_leave
  return multihost_utils.reached_preemption_sync_point(step)
