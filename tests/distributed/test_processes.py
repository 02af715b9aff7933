"""RL on several real processes: killed, preempted, on fewer processes."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from gr2_jax.distributed import processes as processes_lib
from gr2_jax.distributed import rendezvous
from gr2_jax.pipeline import artifacts, reporting

from .. import tiny, tiny_world

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).parent.parent.parent
_DEVICES = 4  # of all processes
_STEPS = 20
_CHANGES = {'rl.steps': _STEPS, 'rl.eval_every': 5, 'rl.refill_size': 4}


def _start(root, count, others=()):
  """Starts the processes of a cluster in a workdir."""
  port = _port()
  command = [
    sys.executable, '-m', 'tests.distributed.cluster_member',
    f'--workdir={root}',
    '--config=configs/rl.py:test,dataset=world', *tiny_world.OVERRIDES,
    *(f'--config.{name}={value}' for name, value in _CHANGES.items()),
  ]  # fmt: skip
  place = [f'--coordinator=localhost:{port}', f'--num_processes={count}']
  environment = os.environ | {'JAX_NUM_CPU_DEVICES': str(_DEVICES // count)}
  return [
    subprocess.Popen(
      [
        *command,
        *(place + [f'--process_id={i}'] if count > 1 else []),
        *(others if i else ()),
      ],
      cwd=_ROOT,
      env=environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(count)
  ]


def _port():
  """A port that is free, and so is the roster's."""
  while True:
    with socket.create_server(('localhost', 0)) as server:
      port = server.getsockname()[1]
      address = processes_lib.Place(f'localhost:{port}', 1, 0).roster
      try:
        with socket.create_server(('', int(address.rpartition(':')[2]))):
          return port
      except OSError:
        continue


def _ends(processes):
  """Exit codes and outputs."""
  try:
    outputs = [p.communicate(timeout=600)[0] for p in processes]
  finally:
    for process in processes:
      process.kill()
  return [p.returncode for p in processes], outputs


def _workdir(world, root):
  """A workdir where all that RL needs is finished."""
  root.mkdir()
  for stage, path in world.items():
    if stage != 'rl':
      (root / path.name).symlink_to(path)
  return root


def _run(root):
  """The directory of stage `rl` in a workdir."""
  (found,) = root.glob('rl-*')
  return found


def _left(world, root):
  config = tiny_world.config(
    **{name.replace('.', '__'): value for name, value in _CHANGES.items()}
  )
  return tiny_world.left(world, 'rl', _run(root), config)[0]


def _metrics(root):
  lines = reporting.read_metrics(_run(root) / 'metrics.jsonl')
  return [
    {k: v for k, v in line.items() if k != 'steps_per_second'} for line in lines
  ]


def _assert_close(world, one, two):
  """Every number of two runs, and their parameters, to 1e-5."""
  for a, b in zip(_metrics(one), _metrics(two), strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], 1e-5, 1e-5, err_msg=name)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-5),
    _left(world, one)['params'],
    _left(world, two)['params'],
  )


def _wait_for_step(processes, root, step):
  """Waits until that checkpoint is on disk."""
  while not list(root.glob(f'rl-*/checkpoints/{step}')):
    for process in processes:
      assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)


@pytest.fixture(scope='module')
def single(world, tmp_path_factory):
  """Twenty steps of one process that has all devices."""
  root = _workdir(world, tmp_path_factory.mktemp('single') / 'runs')
  codes, outputs = _ends(_start(root, 1))
  assert codes == [0], outputs
  return root


@pytest.fixture(scope='module')
def two(world, tmp_path_factory):
  """Twenty steps of two processes."""
  root = _workdir(world, tmp_path_factory.mktemp('two') / 'runs')
  codes, outputs = _ends(_start(root, 2))
  assert codes == [0, 0], outputs
  assert 'processes: 0' in outputs[0]
  assert 'rl' not in outputs[1]  # One writes.
  return root


def test_two_processes_equal_one(world, single, two):
  assert len(_metrics(single)) > _STEPS
  _assert_close(world, single, two)


def test_a_kill_names_the_process_and_two_go_on_bit_for_bit(
  world, two, tmp_path
):
  root = _workdir(world, tmp_path / 'runs')
  processes = _start(root, 2)
  _wait_for_step(processes, root, 5)
  began = time.monotonic()
  processes[1].send_signal(signal.SIGKILL)
  codes, outputs = _ends(processes)
  assert time.monotonic() - began < 60
  assert codes == [rendezvous.EXIT_RETRY, -signal.SIGKILL], outputs
  assert f'process 1 (host {socket.gethostname()}' in outputs[0]
  assert 'is gone' in outputs[0]
  assert not (_run(root) / 'results.json').exists()

  codes, outputs = _ends(_start(root, 2))
  assert codes == [0, 0], outputs
  assert 'resumes in' in outputs[0]
  tiny.assert_trees_equal(_left(world, root), _left(world, two))
  assert _metrics(root) == _metrics(two)
  assert artifacts.read_results(_run(root)) == artifacts.read_results(_run(two))


def test_a_signal_saves_and_half_of_four_processes_go_on(
  world, single, tmp_path
):
  root = _workdir(world, tmp_path / 'runs')
  processes = _start(root, 4)
  _wait_for_step(processes, root, 5)
  processes[2].send_signal(signal.SIGTERM)
  codes, outputs = _ends(processes)
  assert codes == [rendezvous.EXIT_RETRY] * 4, outputs
  assert 'saved at step' in outputs[0]
  step = max(int(p.name) for p in (_run(root) / 'checkpoints').iterdir())
  assert 5 <= step < _STEPS

  codes, outputs = _ends(_start(root, 2))
  assert codes == [0, 0], outputs
  _assert_close(world, single, root)


def test_a_field_that_differs_is_named(world, tmp_path):
  root = _workdir(world, tmp_path / 'runs')
  codes, outputs = _ends(_start(root, 2, others=['--config.rl.gate=none']))
  assert codes == [rendezvous.FAILED] * 2
  for text in outputs:
    assert 'process 1 (host' in text
    assert 'config.rl.gate is none, not v2' in text


def _values(**given):
  """Flags as `processes.find_place` reads them."""
  names = ('coordinator', 'num_processes', 'process_id')
  return types.SimpleNamespace(
    **{'cluster': 'none', 'meeting_timeout': 1.0} | dict.fromkeys(names) | given
  )


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'coordinator': 'a:1'}, '--num_processes, --process_id missing'),
    ({'coordinator': 'a', 'num_processes': 2, 'process_id': 0}, 'HOST:PORT'),
    (
      {'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2},
      '--process_id=2: must be from 0 to --num_processes=2 - 1',
    ),
    ({'cluster': 'auto'}, 'no cluster that JAX knows was found'),
  ],
)
def test_an_invalid_place_names_its_flag(given, message):
  with pytest.raises(ValueError, match=message):
    processes_lib.find_place(_values(**given))


def test_slurm_is_found(monkeypatch):
  for name, value in {
    'SLURM_JOB_ID': '70',
    'SLURM_STEP_NODELIST': 'node[3-4]',
    'SLURM_NTASKS': '4',
    'SLURM_PROCID': '2',
    'SLURM_LOCALID': '0',
  }.items():
    monkeypatch.setenv(name, value)
  place = processes_lib.find_place(_values(cluster='auto'))
  assert (place.count, place.index, place.devices) == (4, 2, (0,))
  assert place.coordinator.startswith('node3:')
  assert place.roster.startswith('node3:')
  assert place.roster != place.coordinator


def test_one_process_is_no_cluster():
  assert processes_lib.find_place(_values()) is None
