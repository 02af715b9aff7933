r"""Runs several processes on this machine, each with virtual CPU devices.

python -m launch.local_multiprocess --processes=2 --devices-per-process=4 -- \
  --config=configs/rl.py:test --workdir=runs

A small cluster: the processes find each other over the network and share one
mesh of all devices. If the first word after `--` is no flag, the words are
another command than gr2_jax.main, which gets the same three flags.

When a process fails or is lost, the others have `--grace` seconds to stop by
themselves. None outlives the launcher, even if that is killed (on Linux).
"""

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from launch import commands

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def exit_code(codes: Sequence[int]) -> int:
  """The launcher's exit code, from those of `subprocess` (-N for signal N).

  An error takes precedence, then RESTART: processes with other codes were lost
  or had finished.
  """
  errors = [x for x in codes if x > 0 and x != commands.RESTART]
  if errors:
    return max(errors)
  if commands.RESTART in codes:
    return commands.RESTART
  return max((128 - x for x in codes if x < 0), default=0)


def _words(args, words: list[str], process: int, port: int) -> list[str]:
  if not words or words[0].startswith('-'):
    words = [sys.executable, '-m', 'gr2_jax.main', *words]
  return [
    *words,
    f'--coordinator=127.0.0.1:{port}',
    f'--num_processes={args.processes}',
    f'--process_id={process}',
  ]


def _environment(args) -> dict[str, str]:
  return {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(args.devices_per_process),
    'PYTHONUNBUFFERED': '1',
  }


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _log(text: str) -> None:
  print(f'[launch] {text}', flush=True)


class _Group:
  """The processes of one attempt."""

  def __init__(self, args, words: list[str]):
    self._grace = args.grace
    self._deadline = None
    self._signalled = False
    port = _free_port()
    libc = ctypes.CDLL(None)

    def die_with_parent():
      if sys.platform == 'linux':
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    self._running = {}
    with contextlib.ExitStack() as stack:
      stack.callback(self.kill)
      for i in range(args.processes):
        self._running[i] = subprocess.Popen(
          _words(args, words, i, port),
          env=os.environ | _environment(args),
          stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          start_new_session=True,
          preexec_fn=die_with_parent,
        )
      stack.pop_all()
    self._readers = [
      threading.Thread(target=_copy, args=(i, p.stdout))
      for i, p in self._running.items()
    ]
    for thread in self._readers:
      thread.start()

  def forward(self, number: int) -> None:
    """Passes a signal on; kills all processes the second time."""
    if self._signalled:
      self.kill()
      return
    self._signalled = True
    self._expect_end()
    for process in self._running.values():  # Not reaped: the pid is theirs.
      os.kill(process.pid, number)

  def kill(self) -> None:
    """Kills the running processes and their children."""
    for process in self._running.values():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

  def wait(self) -> list[int]:
    """Waits for all processes; returns their exit codes in order."""
    codes = {}
    try:
      while self._running:
        for i, process in list(self._running.items()):
          if _has_ended(process):
            codes[i] = self._reap(i, process)
        if self._deadline and time.monotonic() > self._deadline:
          names = ', '.join(map(str, self._running))
          _log(f'{self._grace} s are over; killing {names}')
          self._deadline = None
          self.kill()
        time.sleep(0.05)
    finally:
      self.kill()
      for thread in self._readers:
        thread.join()
    return [codes[i] for i in sorted(codes)]

  def _reap(self, i: int, process: subprocess.Popen) -> int:
    # Kills its children first: after `wait` their group's id may be reused.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    del self._running[i]
    code = process.wait()
    if code:
      how = (
        f'was killed by {signal.Signals(-code).name}'
        if code < 0
        else f'ended with exit code {code}'
      )
      _log(f'process {i} {how}')
      self._expect_end()
    return code

  def _expect_end(self) -> None:
    if self._deadline is None:
      self._deadline = time.monotonic() + self._grace


def _has_ended(process: subprocess.Popen) -> bool:
  flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
  return os.waitid(os.P_PID, process.pid, flags) is not None


def _copy(i: int, stream) -> None:
  for line in stream:
    sys.stdout.write(f'[{i}] {line.decode(errors="replace").rstrip()}\n')
    sys.stdout.flush()


def _dry_run(args, words: list[str]) -> None:
  port = _free_port()
  environment = ' '.join(f'{k}={v}' for k, v in _environment(args).items())
  for i in range(args.processes):
    print(f'{environment} {shlex.join(_words(args, words, i, port))} &')
  print('wait')


def launch(flags: list[str], words: list[str]) -> int:
  """Runs the processes, or prints their commands."""
  parser = commands.Parser(__doc__)
  add = parser.add_argument
  add('--processes', type=commands.whole(1), default=2)
  add('--devices-per-process', type=commands.whole(1), default=4)
  add(
    '--grace',
    type=commands.whole(1),
    default=120,
    help='Seconds for the other processes to stop, once one has.',
  )
  add(
    '--restarts',
    type=commands.whole(0),
    default=0,
    help=f'Restarts after exit code {commands.RESTART}.',
  )
  args = parser.parse_args(flags)
  if not words or words[0].startswith('-'):
    commands.check(words, shared=False)
  if args.dry_run:
    _dry_run(args, words)
    return 0
  return _run(args, words)


def _run(args, words: list[str]) -> int:
  group, stopped = None, None

  def forward(number, frame):
    nonlocal stopped
    stopped = number
    if group is not None:
      group.forward(number)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, forward)
  # If nothing reads the output any more, end the launcher and its processes.
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  for attempt in range(args.restarts + 1):
    try:
      group = _Group(args, words)
    except OSError as e:
      raise commands.LaunchError(f'{words[0]}: {e.strerror}') from e
    if stopped:  # Signalled between two attempts, or while this one started.
      group.forward(stopped)
    code = exit_code(group.wait())
    if code != commands.RESTART or stopped or attempt == args.restarts:
      break
    _log(f'the same command again, {attempt + 1} of {args.restarts}')
  return code


if __name__ == '__main__':
  commands.main(launch)
