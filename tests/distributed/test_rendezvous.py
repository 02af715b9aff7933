"""The roster, with real processes that do not load JAX."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from gr2_jax.distributed import rendezvous

# Meets, prints the members, then obeys lines on its standard input.
_MEMBER = """
import json, os, sys
from gr2_jax.distributed import rendezvous
address, count, index, settings, timeout = json.loads(sys.argv[1])
try:
  roster = rendezvous.meet(address, count, index, settings, timeout)
except rendezvous.RosterError as e:
  sys.exit(f'error: {e}')
print('met', ' '.join(f'{m.index}:{m.pid}' for m in roster.members), flush=True)
for line in sys.stdin:
  if line.strip() == 'bye':
    roster.bye()
    os._exit(0)
  roster.fail(line.strip())
  os._exit(1)
"""


def _port():
  with socket.create_server(('localhost', 0)) as server:
    return server.getsockname()[1]


def _start(port, count, index, settings=None, timeout=30):
  what = [f'localhost:{port}', count, index, settings or {}, timeout]
  return subprocess.Popen(
    [sys.executable, '-c', _MEMBER, json.dumps(what)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _all(count, **options):
  port = _port()
  return [_start(port, count, index, **options) for index in range(count)]


def _ends(process):
  process.wait(timeout=60)
  return process.returncode, process.stdout.read(), process.stderr.read()


def test_all_processes_get_the_members_and_leave_normally():
  members = _all(3)
  met = [m.stdout.readline() for m in members]
  pids = [f'{i}:{m.pid}' for i, m in enumerate(members)]
  assert met == [f'met {" ".join(pids)}\n'] * 3
  for member in (members[1], members[0], members[2]):
    member.stdin.write('bye\n')
    member.stdin.flush()
    assert _ends(member) == (0, '', '')


@pytest.mark.parametrize('victim', [0, 2])
def test_a_killed_process_is_named_to_all_others(victim):
  members = _all(3)
  for member in members:
    member.stdout.readline()
  began = time.monotonic()
  members[victim].send_signal(signal.SIGKILL)
  for index, member in enumerate(members):
    code, _, err = _ends(member)
    if index == victim:
      assert code == -signal.SIGKILL
      continue
    assert code == rendezvous.EXIT_RETRY == os.EX_TEMPFAIL
    pid = members[victim].pid
    assert f'process {victim} (host {socket.gethostname()}, pid {pid})' in err
    assert 'is gone' in err
  assert time.monotonic() - began < 60


def test_a_failure_ends_all_processes_with_its_message():
  members = _all(3)
  for member in members:
    member.stdout.readline()
  members[1].stdin.write('no such file\n')
  members[1].stdin.flush()
  for index in (0, 2):
    code, _, err = _ends(members[index])
    assert code == rendezvous.FAILED
    assert err.startswith('process 1 (host')
    assert 'no such file' in err
  assert _ends(members[1])[0] == 1


def test_missing_processes_are_named():
  port = _port()
  members = [_start(port, 4, index, timeout=6) for index in (0, 2)]
  for member in members:
    code, _, err = _ends(member)
    assert code == 1
    assert 'process 1, 3 of 4 did not come within 6 s' in err
    host = socket.gethostname()
    assert f'here are: process 0 (host {host}, pid {members[0].pid})' in err
    assert f'process 2 (host {host}' in err


def test_without_process_0_the_others_name_its_address():
  port = _port()
  code, _, err = _ends(_start(port, 2, 1, timeout=0.5))
  assert code == 1
  assert 'process 0 did not come within 0.5 s: nobody listens at' in err


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'lr': '2'}, 'has other settings than process 0 .*: lr is 2, not 1'),
    ({}, 'lr is None, not 1'),
  ],
)
def test_other_settings_are_refused_by_name(settings, message):
  port = _port()
  members = [
    _start(port, 2, 0, settings={'lr': '1'}),
    _start(port, 2, 1, settings=settings),
  ]
  for member in members:
    code, _, err = _ends(member)
    assert code == 1
    with pytest.raises(ValueError, match=message):
      raise ValueError(err)


def test_a_number_twice_is_refused():
  port = _port()
  members = [_start(port, 3, index) for index in (0, 1, 1)]
  ends = [_ends(m) for m in members]
  assert [code for code, _, _ in ends] == [1, 1, 1]
  assert all('there is one of that number already' in e for _, _, e in ends)


def test_other_connections_are_ignored():
  port = _port()
  leader = _start(port, 2, 0)
  for message in (
    b'GET / HTTP/1.1\r\n\r\n',
    b'{"hello": {"index": "1"}}\n',
    b'',
  ):
    deadline = time.monotonic() + 30
    while True:
      try:
        stranger = socket.create_connection(('localhost', port))
        break
      except ConnectionRefusedError:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stranger.sendall(message)
    stranger.close()
  follower = _start(port, 2, 1)
  for member in (leader, follower):
    assert member.stdout.readline().startswith('met 0:')
  for member in (leader, follower):
    member.stdin.write('bye\n')
    member.stdin.flush()
  assert [_ends(m)[0] for m in (leader, follower)] == [0, 0]
