"""The roster of a run: its processes meet, and notice when one is lost.

Process 0 listens; every other process keeps a connection to it until the end.
A process that is late, runs another command or dies is named to all, and all
exit: otherwise a collective operation would wait for it forever. Plain sockets
without JAX, because the roster starts before JAX and ends after it.

A message is one line of JSON. The connection of a dead process is closed at
once, that of a dead machine by the system's keep-alive probes.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Exit code of a run that can be resumed by the same command (EX_TEMPFAIL of
# sysexits.h). Launchers restart after this code and no other.
EXIT_RETRY = 75
FAILED = 1

_MAX_MESSAGE = 1 << 20  # bytes
_RETRY_SECONDS = 0.2  # between two attempts to connect
_HELLO_SECONDS = 10.0  # until a new connection must have introduced itself
_MAX_DIFFERENCES = 5  # settings named in an error


class RosterError(ValueError):
  """The processes did not meet; the message names the one and the reason."""


@dataclasses.dataclass(frozen=True)
class Member:
  """A process of the run."""

  index: int
  host: str
  pid: int

  def __str__(self) -> str:
    return f'process {self.index} (host {self.host}, pid {self.pid})'


def _exit(message: str, code: int) -> None:
  """Ends this process at once: its main thread may be waiting forever."""
  print(message, file=sys.stderr, flush=True)
  os._exit(code)


class Roster:
  """This process's connections to the others; made by `meet`.

  Attributes:
    index: number of this process.
    members: all processes, by number.
  """

  def __init__(self, index: int, on_stop: Callable[[str, int], None]):
    self.index = index
    self.members: tuple[Member, ...] = ()
    self._on_stop = on_stop
    self._lock = threading.Lock()
    self._connections: dict[int, socket.socket] = {}
    self._left: set[int] = set()  # Processes that have sent `bye`.
    self._is_ending = False  # This process ends by itself.
    self._has_reported = False  # The others have the reason to stop.

  def bye(self) -> None:
    """Announces that this process ends normally."""
    with self._lock:
      self._is_ending = True
    self._send_to_all({'bye': True})

  def fail(self, message: str) -> None:
    """Stops all other processes with the reason why this one fails."""
    with self._lock:
      self._has_reported = self._is_ending = True
    text = f'{self.members[self.index]} failed: {message}'
    self._send_to_all({'stop': text, 'code': FAILED})

  def _send_to_all(
    self, message: dict[str, Any], but: int | None = None
  ) -> None:
    for index, connection in list(self._connections.items()):
      if index != but:
        # The thread that reads from a lost connection reports it.
        with contextlib.suppress(OSError):
          _send(connection, message)

  def _stop(self, message: str, code: int, but: int) -> None:
    """Stops all processes but one, and this one, once.

    The stopped processes exit at once, so later losses are no news.
    """
    with self._lock:
      has_reported, is_ending = self._has_reported, self._is_ending
      self._has_reported = self._is_ending = True
    if has_reported:
      return
    self._send_to_all({'stop': message, 'code': code}, but)
    if not is_ending:
      self._on_stop(message, code)

  def _read(self, member: Member, lines: Any) -> None:
    """Handles the messages of a process until its connection is closed."""
    for message in _messages(lines):
      if 'stop' in message:
        self._stop(message['stop'], message['code'], but=member.index)
        return
      if 'bye' in message:
        self._left.add(member.index)
    if member.index not in self._left:
      self._stop(
        f'{member} is gone; what is saved stays: run the same command again to '
        'resume',
        EXIT_RETRY,
        but=member.index,
      )

  def _follow(
    self, member: Member, connection: socket.socket, lines: Any
  ) -> None:
    """Reads from a process in a thread."""
    self._connections[member.index] = connection
    threading.Thread(
      target=self._read, args=(member, lines), daemon=True
    ).start()


def meet(
  address: str,
  count: int,
  index: int,
  settings: dict[str, str],
  timeout: float,
  on_stop: Callable[[str, int], None] = _exit,
) -> Roster:
  """Waits until all processes are there, with the same settings.

  Args:
    address: HOST:PORT where process 0 listens.
    count: number of processes.
    index: of this process.
    settings: name -> value that must be the same on all processes.
    timeout: seconds to wait.
    on_stop: called with a message and an exit code, from another thread, when
      the run cannot continue.

  Raises:
    RosterError: a process is missing, or has other settings.
  """
  this = Member(index, socket.gethostname(), os.getpid())
  host, _, port = address.rpartition(':')
  roster = Roster(index, on_stop)
  deadline = time.monotonic() + timeout
  if index:
    hello = dataclasses.asdict(this) | {'count': count, 'settings': settings}
    _join(roster, (host, int(port)), hello, deadline, timeout)
  else:
    _gather(roster, this, int(port), count, settings, deadline, timeout)
  return roster


def _gather(
  roster: Roster,
  this: Member,
  port: int,
  count: int,
  settings: dict[str, str],
  deadline: float,
  timeout: float,
) -> None:
  """Process 0: accepts the others, then sends them the list of members."""
  joined: dict[int, tuple[Member, socket.socket, Any]] = {}
  connections, problem = [], ''
  with socket.create_server(('', port), backlog=count) as server:
    while len(joined) < count - 1 and not problem:
      server.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        connection, _ = server.accept()
      except TimeoutError:
        missing = sorted(set(range(1, count)) - joined.keys())
        present = ', '.join(map(str, (this, *(m for m, *_ in joined.values()))))
        problem = (
          f'process {", ".join(map(str, missing))} of {count} did not come '
          f'within {timeout:g} s; here are: {present}'
        )
        break
      hello, lines = _read_hello(connection)
      if hello is None:
        connection.close()  # Not a process of this project.
        continue
      connections.append(connection)
      member = Member(hello['index'], hello['host'], hello['pid'])
      if hello['count'] != count:
        problem = (
          f'{member} is one of {hello["count"]} processes, {this} of {count}'
        )
      elif not 0 < member.index < count:
        problem = f'{member}: there are {count} processes, from 0 on'
      elif member.index in joined:
        problem = f'{member}: there is one of that number already'
      elif differences := _differences(settings, hello['settings']):
        problem = f'{member} has other settings than {this}: {differences}'
      joined[member.index] = member, connection, lines
  if problem:
    for connection in connections:
      with contextlib.suppress(OSError):
        _send(connection, {'refused': problem})
    raise RosterError(problem)
  roster.members = (this, *(joined[i][0] for i in range(1, count)))
  members = [dataclasses.astuple(m) for m in roster.members]
  for member, connection, lines in joined.values():
    _send(connection, {'members': members})
    roster._follow(member, connection, lines)


def _join(
  roster: Roster,
  address: tuple[str, int],
  hello: dict[str, Any],
  deadline: float,
  timeout: float,
) -> None:
  """Other processes: connect to process 0 and wait for the members."""
  while True:
    try:
      connection = socket.create_connection(address, timeout=_HELLO_SECONDS)
      break
    except OSError as e:
      if time.monotonic() > deadline:
        raise RosterError(
          f'process 0 did not come within {timeout:g} s: nobody listens at '
          f'{address[0]}:{address[1]} ({e})'
        ) from e
      time.sleep(_RETRY_SECONDS)
  _send(connection, {'hello': hello})
  lines = connection.makefile('rb')
  # Process 0 answers when all are there, by its own clock.
  connection.settimeout(max(deadline - time.monotonic(), 0) + _HELLO_SECONDS)
  answer = next(_messages(lines), {})
  if 'members' not in answer:
    raise RosterError(
      answer.get('refused', 'process 0 closed the connection: see its log')
    )
  _enable_keep_alive(connection)
  roster.members = tuple(Member(*m) for m in answer['members'])
  roster._follow(roster.members[0], connection, lines)


def _read_hello(
  connection: socket.socket,
) -> tuple[dict[str, Any] | None, Any]:
  """The first message of a new connection; None if it is malformed."""
  connection.settimeout(_HELLO_SECONDS)
  lines = connection.makefile('rb')
  hello = next(_messages(lines), {}).get('hello')
  types = dict(index=int, host=str, pid=int, count=int, settings=dict)
  if not isinstance(hello, dict) or any(
    not isinstance(hello.get(name), kind) for name, kind in types.items()
  ):
    return None, lines
  _enable_keep_alive(connection)
  return hello, lines


def _enable_keep_alive(connection: socket.socket) -> None:
  """Makes the system notice a dead machine within half a minute."""
  connection.settimeout(None)
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  options = {'TCP_KEEPIDLE': 10, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 4}
  for name, value in options.items():
    if hasattr(socket, name):
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _differences(ours: dict[str, str], theirs: dict[str, str]) -> str:
  """Names the settings that differ; empty if all agree."""
  texts = [
    f'{name} is {theirs.get(name)}, not {ours.get(name)}'
    for name in sorted(ours.keys() | theirs.keys())
    if ours.get(name) != theirs.get(name)
  ]
  more = len(texts) - _MAX_DIFFERENCES
  listed = '; '.join(texts[:_MAX_DIFFERENCES])
  return f'{listed} and {more} more' if more > 0 else listed


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
  connection.sendall(json.dumps(message).encode() + b'\n')


def _messages(lines: Any) -> Iterator[dict[str, Any]]:
  """Yields messages until the connection ends or sends something else."""
  while True:
    try:
      message = json.loads(lines.readline(_MAX_MESSAGE))
    except (OSError, ValueError):  # Closed, silent for too long, or no JSON.
      return
    if not isinstance(message, dict):
      return
    yield message
