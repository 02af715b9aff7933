"""A service on a free port of this process, and a policy held by a gate."""

import contextlib
import http.client
import json
import pathlib
import threading
import time
import types

from gr2_jax.serving import answer as answer_lib
from gr2_jax.serving import app as app_lib
from gr2_jax.serving import memories
from gr2_jax.serving import request as requests_lib
from gr2_jax.serving import reranker as reranker_lib
from gr2_jax.serving import server as server_lib
from gr2_jax.serving import service as service_lib

ITEMS = ('a', 'b', 'c', 'd', '7')
GOOD = {'history': ['c'], 'candidates': ['a', 'b', 7]}


class StubPolicy:
  """Reverses slates; blocks while `gate` is closed."""

  def __init__(self, name='rl-00000000'):
    self.artifact = pathlib.Path('/runs') / name
    self.programs = {'score': {1: None, 4: None}, 'rank': {1: None, 4: None}}
    self.candidates, self.largest_batch = 5, 4
    self.gate, self.entered = threading.Event(), threading.Event()
    self.gate.set()
    self.batches, self.memories = [], memories.Memories(1000)
    self.error, self.unreadable = None, ''
    mesh = types.SimpleNamespace(shape={'tensor': 1})
    self.policy = types.SimpleNamespace(mesh=mesh)

  def request(self, fields, place):
    index = {name: i for i, name in enumerate(ITEMS)}
    return requests_lib.resolve(fields, place + 1, index, self.unreadable)

  def answer(self, asked, mode):
    self.batches.append((mode, len(asked)))
    self.entered.set()
    self.gate.wait()
    if self.error:
      raise self.error
    lines = []
    for request, _ in asked:
      line = answer_lib.incoming_order(request, mode)
      for name in ('ranking', 'order'):
        line[name].reverse()
      lines.append(line | {'verdict': 'valid'})
    return reranker_lib.Answers(lines, prompts=len(asked), decoded=0)


class Live:
  """A service under test."""

  server = service = port = None

  @property
  def url(self):
    return f'http://127.0.0.1:{self.port}'

  def connect(self):
    return http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)

  def ask(self, method, path, body=None, headers=None):
    """(status, content, headers) of one request on a connection of its own."""
    connection = self.connect()
    if body is not None and not isinstance(body, bytes):
      body = json.dumps(body).encode()
    with contextlib.closing(connection):
      connection.request(method, path, body, headers or {})
      response = connection.getresponse()
      content = response.read()
    if response.headers.get_content_type() == 'application/json':
      content = json.loads(content)
    return response.status, content, response.headers

  def rank(self, *slates, **fields):
    return self.ask('POST', '/rank', {'slates': list(slates)} | fields)

  def metric(self, line):
    """Value of a line of /metrics; 0 where there is none yet."""
    _, text, _ = self.ask('GET', '/metrics')
    for found in text.decode().splitlines():
      if found.rpartition(' ')[0] == line:
        return float(found.rpartition(' ')[2])
    return 0.0


@contextlib.contextmanager
def serving(policy, token='', examples=False, drain=30, **limits):
  """Serves while the block runs; at its end the service has drained."""
  limits = service_lib.Limits(**limits)
  live = Live()

  def start():
    live.service = service_lib.Service(policy, limits)
    return live.service

  app = app_lib.build(start, token=token, examples=examples)
  live.server = server_lib.make(app, limits, drain, host='127.0.0.1', port=0)
  socket = live.server.config.bind_socket()
  live.port = socket.getsockname()[1]
  thread = threading.Thread(
    target=live.server.run, kwargs={'sockets': [socket]}, daemon=True
  )
  thread.start()
  until(lambda: live.server.started)
  try:
    yield live
  finally:
    if isinstance(policy, StubPolicy):
      policy.gate.set()
    live.server.should_exit = True
    thread.join()


def until(condition):
  """Waits for a condition that must come true."""
  while not condition():
    time.sleep(0.005)


def aside(function, *args, **kwargs):
  """Runs a call in a thread; `.join()`, then `.result`."""
  thread = threading.Thread(daemon=True)

  def work():
    thread.result = function(*args, **kwargs)

  thread.run = work
  thread.start()
  return thread
