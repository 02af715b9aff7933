"""Who takes part in a run: processes that meet, and notice when one is gone.

Process 0 listens; every other one holds a connection to it until the end. Who
has not come in time, runs another command or dies is named to all, and all
stop: a collective operation would wait for it for ever. Plain sockets, no JAX:
it starts before JAX and outlives what JAX does.

A message is one line of JSON. A dead process closes its connection; that of a
dead machine is closed by the system's keep-alive probes.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# Exit code of a run that goes on when the same command is given again (75 is
# EX_TEMPFAIL of sysexits.h): launchers restart on it and on no other.
EXIT_RETRY = 75
FAILED = 1

_LINE = 1 << 20  # bytes of a message, at most
_RETRY = 0.2  # seconds between two tries to connect
_HELLO = 10.0  # seconds in which a new connection has to say who it is
_SHOWN = 5  # differing facts in a message


class RosterError(ValueError):
  """The processes did not come together; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Member:
  """A process of the run."""

  index: int
  host: str
  pid: int

  def __str__(self) -> str:
    return f'process {self.index} (host {self.host}, pid {self.pid})'


def _stop(message: str, code: int) -> None:
  """Ends this process at once: its main thread may wait for ever."""
  print(message, file=sys.stderr, flush=True)
  os._exit(code)


class Roster:
  """This process's place among `count`; made by `meet`.

  Attributes:
    index: its number.
    members: all of them, by number.
  """

  def __init__(self, index: int, on_stop: Callable[[str, int], None]):
    self.index = index
    self.members: tuple[Member, ...] = ()
    self._on_stop = on_stop
    self._lock = threading.Lock()
    self._lines: dict[int, socket.socket] = {}
    self._gone: set[int] = set()  # Who has said goodbye.
    self._over = False  # This process ends, or has ended, by itself.
    self._told = False  # The others know why they stop.

  def bye(self) -> None:
    """Says that this process ends as it should."""
    with self._lock:
      self._over = True
    self._tell({'bye': True})

  def fail(self, message: str) -> None:
    """Has all the others stop, because this process does.

    Args:
      message: what went wrong, for people.
    """
    with self._lock:
      self._told = self._over = True
    where = str(self.members[self.index])
    self._tell({'stop': f'{where} failed: {message}', 'code': FAILED})

  def _tell(self, message: dict[str, Any], but: int | None = None) -> None:
    """Sends a message along every line, but that of one process."""
    for index, line in list(self._lines.items()):
      if index != but:
        # Where it is gone, whoever reads from it will say so.
        with contextlib.suppress(OSError):
          _send(line, message)

  def _end(self, message: str, code: int, but: int) -> None:
    """Tells all but one why they stop, and stops this process; once.

    Whom that reaches is gone at once: what is heard of it then is no news.
    """
    with self._lock:
      told, over = self._told, self._over
      self._told = self._over = True
    if told:
      return
    self._tell({'stop': message, 'code': code}, but)
    if not over:
      self._on_stop(message, code)

  def _watch(self, member: Member, lines: Any) -> None:
    """Reads what a process says, until it is gone."""
    for message in _messages(lines):
      if 'stop' in message:
        self._end(message['stop'], message['code'], but=member.index)
        return
      if 'bye' in message:
        self._gone.add(member.index)
    if member.index in self._gone:
      return
    text = (
      f'{member} is gone; all that is saved stays: give the same command again'
    )
    self._end(text, EXIT_RETRY, but=member.index)

  def _follow(self, member: Member, line: socket.socket, lines: Any) -> None:
    self._lines[member.index] = line
    threading.Thread(
      target=self._watch, args=(member, lines), daemon=True
    ).start()


def meet(
  address: str,
  count: int,
  index: int,
  facts: dict[str, str],
  timeout: float,
  on_stop: Callable[[str, int], None] = _stop,
) -> Roster:
  """Waits until all processes are there and want the same.

  Args:
    address: HOST:PORT where process 0 listens.
    count: of processes.
    index: of this one.
    facts: what must be the same everywhere, by name.
    timeout: seconds to wait.
    on_stop: what a process does when the run cannot go on; called from another
      thread with a message and an exit code.

  Raises:
    RosterError: somebody did not come in time, or has other facts.
  """
  own = Member(index, socket.gethostname(), os.getpid())
  host, _, port = address.rpartition(':')
  roster = Roster(index, on_stop)
  deadline = time.monotonic() + timeout
  if index:
    _join(roster, own, (host, int(port)), count, facts, deadline, timeout)
  else:
    _gather(roster, own, int(port), count, facts, deadline, timeout)
  return roster


def _gather(
  roster: Roster,
  own: Member,
  port: int,
  count: int,
  facts: dict[str, str],
  deadline: float,
  timeout: float,
) -> None:
  """Process 0: lets everybody in, then tells them who is there."""
  here: dict[int, tuple[Member, socket.socket, Any]] = {}
  lines_to_all, wrong = [], ''
  with socket.create_server(('', port), backlog=count) as server:
    while len(here) < count - 1 and not wrong:
      server.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        line, _ = server.accept()
      except TimeoutError:
        missing = sorted(set(range(1, count)) - here.keys())
        wrong = (
          f'process {", ".join(map(str, missing))} of {count} did not come '
          f'within {timeout:g} s; here are: '
          + ', '.join(str(m) for m in (own, *(h[0] for h in here.values())))
        )
        break
      said, lines = _hello(line)
      if said is None:
        line.close()  # Nobody of ours.
        continue
      lines_to_all.append(line)
      member = Member(said['index'], said['host'], said['pid'])
      if said['count'] != count:
        wrong = (
          f'{member} is one of {said["count"]} processes, {own} of {count}'
        )
      elif not 0 < member.index < count:
        wrong = f'{member}: there are {count} processes, from 0 on'
      elif member.index in here:
        wrong = f'{member}: there is one of that number already'
      elif differing := _differences(facts, said['facts']):
        wrong = f'{member} was started otherwise than {own}: {differing}'
      here[member.index] = member, line, lines
  if wrong:
    for line in lines_to_all:
      with contextlib.suppress(OSError):
        _send(line, {'refused': wrong})
    raise RosterError(wrong)
  members = [own, *(here[i][0] for i in range(1, count))]
  roster.members = tuple(members)
  for member, line, lines in here.values():
    _send(line, {'members': [dataclasses.astuple(m) for m in members]})
    roster._follow(member, line, lines)


def _join(
  roster: Roster,
  own: Member,
  address: tuple[str, int],
  count: int,
  facts: dict[str, str],
  deadline: float,
  timeout: float,
) -> None:
  """The others: find process 0 and wait for its word."""
  while True:
    try:
      line = socket.create_connection(address, timeout=_HELLO)
      break
    except OSError as e:
      if time.monotonic() > deadline:
        raise RosterError(
          f'process 0 did not come within {timeout:g} s: nobody listens at '
          f'{address[0]}:{address[1]} ({e})'
        ) from e
      time.sleep(_RETRY)
  hello = dataclasses.asdict(own) | {'count': count, 'facts': facts}
  _send(line, {'hello': hello})
  lines = line.makefile('rb')
  # It answers when all are there: by its own clock, and a little later.
  line.settimeout(max(deadline - time.monotonic(), 0) + _HELLO)
  answer = next(_messages(lines), {})
  if 'members' not in answer:
    raise RosterError(
      answer.get('refused', 'process 0 closed the connection: see its log')
    )
  _prepare(line)
  roster.members = tuple(Member(*m) for m in answer['members'])
  roster._follow(roster.members[0], line, lines)


def _hello(line: socket.socket) -> tuple[dict[str, Any] | None, Any]:
  """What a new connection says of itself; None if it makes no sense."""
  line.settimeout(_HELLO)
  lines = line.makefile('rb')
  said = next(_messages(lines), {}).get('hello')
  types = {'index': int, 'host': str, 'pid': int, 'count': int, 'facts': dict}
  if not isinstance(said, dict) or any(
    not isinstance(said.get(name), kind) for name, kind in types.items()
  ):
    return None, lines
  _prepare(line)
  return said, lines


def _prepare(line: socket.socket) -> None:
  """Has the system notice a dead machine within half a minute."""
  line.settimeout(None)
  line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in (
    ('TCP_KEEPIDLE', 10),
    ('TCP_KEEPINTVL', 5),
    ('TCP_KEEPCNT', 4),
  ):
    if hasattr(socket, name):
      line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _differences(ours: dict[str, str], theirs: dict[str, str]) -> str:
  """Names what is not the same, for people; empty where all is."""
  names = [
    name
    for name in sorted(ours.keys() | theirs.keys())
    if ours.get(name) != theirs.get(name)
  ]
  shown = [
    f'{name} is {theirs.get(name)}, not {ours.get(name)}'
    for name in names[:_SHOWN]
  ]
  more = f' and {len(names) - _SHOWN} more' if names[_SHOWN:] else ''
  return '; '.join(shown) + more


def _send(line: socket.socket, message: dict[str, Any]) -> None:
  line.sendall(json.dumps(message).encode() + b'\n')


def _messages(lines: Any):
  """Yields messages until the connection ends or says nonsense."""
  while True:
    try:
      line = lines.readline(_LINE)
    except OSError:  # Closed by its machine's death, or silent for too long.
      return
    try:
      message = json.loads(line)
    except ValueError:
      return
    if not isinstance(message, dict):
      return
    yield message
