import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import local_multiprocess

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).parent.parent.parent

# What the fake processes begin with: their flags, and a note of who they are.
_HEAD = """
import os, pathlib, signal, subprocess, sys, time
flags = dict(x.lstrip('-').split('=', 1) for x in sys.argv[1:])
me = int(flags['process_id'])
here = pathlib.Path(__file__).parent
def note(name, text=''):
  (here / f'{name}.part').write_text(str(text))
  (here / f'{name}.part').rename(here / name)
def wait_for(name):
  while not (here / name).exists():
    time.sleep(0.01)
note(f'pid{me}', os.getpid())
"""


def _start(tmp_path, body, *flags):
  child = tmp_path / 'child.py'
  child.write_text(_HEAD + body)
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'launch.local_multiprocess', *flags),
      *('--', sys.executable, '-S', str(child)),
    ],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _run(tmp_path, body, *flags):
  """Runs to the end; returns (exit code, output)."""
  process = _start(tmp_path, body, *flags)
  output = process.communicate()[0]
  return process.returncode, output


def _wait_for(path):
  while not path.exists():
    time.sleep(0.01)
  return path.read_text()


def _runs(pid):
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except FileNotFoundError:
    return False
  return stat.rpartition(')')[2].split()[0] not in 'ZX'


def test_every_process_is_told_who_it_is(tmp_path):
  body = """
import json
print(json.dumps([flags, {k: v for k, v in os.environ.items() if 'JAX' in k}]))
print('to the error stream', file=sys.stderr)
"""
  code, output = _run(
    tmp_path, body, '--processes=3', '--devices_per_process=2'
  )
  assert code == 0
  lines = sorted(output.splitlines())
  assert len(lines) == 6
  coordinators = set()
  for i in range(3):
    errors, told = lines[2 * i + 1], lines[2 * i]
    if told.endswith('stream'):
      errors, told = told, errors
    assert errors == f'[{i}] to the error stream'
    assert told.startswith(f'[{i}] ')
    flags, environment = json.loads(told[4:])
    assert flags['process_id'] == str(i)
    assert flags['num_processes'] == '3'
    assert environment['JAX_PLATFORMS'] == 'cpu'
    assert environment['JAX_NUM_CPU_DEVICES'] == '2'
    coordinators.add(flags['coordinator'])
  assert len(coordinators) == 1
  assert int(coordinators.pop().removeprefix('127.0.0.1:')) > 0


def test_a_lost_process_is_named_and_the_others_say_how_it_goes_on(tmp_path):
  body = """
if me == 1:
  os.kill(os.getpid(), signal.SIGKILL)
while True:
  try:
    os.kill(int((here / 'pid1').read_text()), 0)
  except (FileNotFoundError, ValueError):
    pass
  except ProcessLookupError:
    sys.exit(75)
  time.sleep(0.01)
"""
  code, output = _run(tmp_path, body)
  assert code == 75
  first, second = output.splitlines()
  assert first == '[launch] process 1 was killed by SIGKILL'
  assert second == '[launch] process 0 ended with exit code 75'


def test_a_preempted_run_goes_on_with_the_same_command(tmp_path):
  body = """
first = not (here / f'been{me}').exists()
note(f'been{me}')
print('first' if first else 'then')
sys.exit(75 if first else 0)
"""
  code, output = _run(tmp_path, body, '--restarts=3')
  assert code == 0
  lines = output.splitlines()
  assert lines.count('[launch] the same command again, 1 of 3') == 1
  assert not any('2 of 3' in x for x in lines)
  for i in range(2):
    assert lines.index(f'[{i}] first') < lines.index(f'[{i}] then')


def test_restarts_end(tmp_path):
  code, output = _run(tmp_path, 'sys.exit(75)', '--restarts=2')
  assert code == 75
  assert '2 of 2' in output
  assert output.count('ended with exit code 75') == 6


def test_an_error_is_not_started_again(tmp_path):
  body = 'sys.exit(75 if me == 0 else 1)'
  code, output = _run(tmp_path, body, '--restarts=3')
  assert code == 1
  assert 'again' not in output


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_and_is_the_end(tmp_path, number):
  body = """
def stop(number, frame):
  print('got', number, flush=True)
  sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
note(f'ready{me}')
while True:
  time.sleep(1)
"""
  process = _start(tmp_path, body, '--restarts=3')
  for i in range(2):
    _wait_for(tmp_path / f'ready{i}')
  process.send_signal(number)
  output = process.communicate()[0]
  assert process.returncode == 75
  assert 'again' not in output
  for i in range(2):
    assert f'[{i}] got {int(number)}' in output.splitlines()


# A process that neither stops nor is alone: it has a child in its group.
_STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = 'import time; time.sleep(999)'
child = subprocess.Popen([sys.executable, '-S', '-c', sleep])
note(f'child{me}', child.pid)
"""


def test_who_does_not_stop_is_killed_with_its_children(tmp_path):
  body = f"""
if me == 1:
  wait_for('child0')
  sys.exit(3)
{_STUBBORN}
time.sleep(999)
"""
  code, output = _run(tmp_path, body, '--grace=1')
  assert code == 3
  assert '[launch] 1 s are over; killing 0' in output
  assert '[launch] process 0 was killed by SIGKILL' in output
  for name in ('pid0', 'pid1', 'child0'):
    assert not _runs(int((tmp_path / name).read_text()))


def test_the_children_of_one_that_ended_are_not_left_behind(tmp_path):
  code, _ = _run(tmp_path, _STUBBORN, '--processes=1')
  assert code == 0
  assert not _runs(int((tmp_path / 'child0').read_text()))


@pytest.mark.skipif(sys.platform != 'linux', reason='needs prctl')
def test_processes_end_with_a_launcher_that_is_killed(tmp_path):
  body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
note(f'ready{me}')
time.sleep(999)
"""
  process = _start(tmp_path, body)
  pids = []
  for i in range(2):
    _wait_for(tmp_path / f'ready{i}')
    pids.append(int((tmp_path / f'pid{i}').read_text()))
  assert all(map(_runs, pids))
  process.kill()
  process.communicate()
  while any(map(_runs, pids)):
    time.sleep(0.01)


def test_a_second_signal_does_not_wait(tmp_path):
  body = """
signal.signal(signal.SIGTERM, lambda *_: note('told'))
note('ready')
while True:
  time.sleep(1)
"""
  process = _start(tmp_path, body, '--processes=1')
  for moment in ('ready', 'told'):
    _wait_for(tmp_path / moment)
    process.send_signal(signal.SIGTERM)
  process.communicate()
  assert process.returncode == 128 + signal.SIGKILL
  assert not _runs(int((tmp_path / 'pid0').read_text()))


@pytest.mark.parametrize(
  ('codes', 'expected'),
  [
    ((0, 0), 0),
    ((75, 75), 75),
    ((75, 0), 75),
    ((75, -9), 75),
    ((-15, -9), 143),
    ((0, -9), 137),
    ((75, 1), 1),
    ((-9, 2, 75), 2),
    ((130, 75), 130),
  ],
)
def test_one_exit_code_for_all(codes, expected):
  assert local_multiprocess.exit_code(codes) == expected
  assert local_multiprocess.exit_code(codes[::-1]) == expected


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--processes=0', '--', '--config=x'], '--processes: must be a whole'),
    (['--', '--workdir=x'], 'no --config for gr2_jax.main'),
    (['--', '--config=x', '--process_id=1'], '--process_id=1 is set by'),
    (['--', './no-such-program'], './no-such-program: No such file'),
  ],
)
def test_a_wrong_command_line_is_one_clean_line(words, message):
  done = subprocess.run(
    [sys.executable, '-m', 'launch.local_multiprocess', *words],
    cwd=_ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stdout == ''
  assert len(done.stderr.splitlines()) == 1
  assert done.stderr.startswith(f'error: {message}')


def test_a_dry_run_prints_commands_that_work(tmp_path):
  body = 'note(f"argv{me}", " ".join(sys.argv[1:2]))'
  code, output = _run(tmp_path, body, '--dry-run', '--processes=2')
  assert code == 0
  assert not list(tmp_path.glob('argv*'))
  subprocess.run(['bash', '-c', output], check=True)
  found = {p.read_text() for p in tmp_path.glob('argv?')}
  assert len(list(tmp_path.glob('argv?'))) == 2
  assert len(found) == 1
  assert found.pop().startswith('--coordinator=127.0.0.1:')


def test_jax_sees_one_cluster(tmp_path):
  script = tmp_path / 'cluster.py'
  script.write_text("""
import sys, jax
flags = dict(x.lstrip('-').split('=', 1) for x in sys.argv[1:])
jax.distributed.initialize(
  flags['coordinator'], int(flags['num_processes']), int(flags['process_id'])
)
print(jax.process_index(), jax.local_device_count(), jax.device_count())
""")
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'launch.local_multiprocess'),
      *('--devices-per-process=3', '--', sys.executable, str(script)),
    ],
    cwd=_ROOT,
    # The launcher's number of devices is the one that counts.
    env=os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout
  lines = done.stdout.splitlines()
  assert '[0] 0 3 6' in lines
  assert '[1] 1 3 6' in lines
