"""A test server for chat completions that can also fail."""

import contextlib
import dataclasses
import http.server
import json
import re
import socket
import threading

from gr2_jax.teachers import endpoint

KEY = 'sk-not-to-be-seen-0123456789'
VARIABLE = 'GR2_TEST_KEY'


def completion(text, finish='stop', usage=(30, 20), **message):
  usage = dict(zip(('prompt_tokens', 'completion_tokens'), usage, strict=True))
  message = {'role': 'assistant', 'content': text} | message
  choice = {'index': 0, 'finish_reason': finish, 'message': message}
  return {'id': 'x', 'object': 'chat.completion', 'created': 1, 'model': 'm',
          'choices': [choice], 'usage': usage}  # fmt: skip


@dataclasses.dataclass
class Answer:
  body: object = None  # JSON, or text as it is
  status: int = 200
  headers: dict = dataclasses.field(default_factory=dict)
  cut: bool = False  # close the connection inside the body
  silent: bool = False  # send nothing until the client disconnects


class Server:
  """Replies with `answer(body, number)`, where `number` counts requests."""

  def __init__(self, answer):
    self.answer, self.requests, self.keys = answer, [], []
    self.under_way = self.most = 0
    self.lock = threading.Lock()
    self.over = threading.Event()

  def handle(self, body, headers):
    with self.lock:
      self.requests.append(body)
      self.keys.append(headers.get('authorization'))
      self.headers = headers
      self.under_way += 1
      self.most = max(self.most, self.under_way)
      number = len(self.requests)
    return self.answer(body, number)


@contextlib.contextmanager
def serve(answer):
  server = Server(answer)

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
      pass

    def do_POST(self):
      size = int(self.headers['content-length'])
      body = json.loads(self.rfile.read(size))
      answer = server.handle(body, dict(self.headers.items()))
      with server.lock:
        server.under_way -= 1
      if answer.silent:
        server.over.wait(5)
        self.close_connection = True
        return
      content = answer.body
      if not isinstance(content, str):
        content = json.dumps(content)
      content = content.encode()
      self.send_response(answer.status)
      self.send_header('content-type', 'application/json')
      self.send_header('content-length', str(len(content) + 9 * answer.cut))
      for name, value in answer.headers.items():
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(content)
      if answer.cut:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

  http_server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  http_server.daemon_threads = True
  server.url = f'http://127.0.0.1:{http_server.server_port}/v1'
  thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield server
  finally:
    server.over.set()
    http_server.shutdown()
    http_server.server_close()
    thread.join()


def settings(server, **changes):
  fields = dict(
    base_url=server.url,
    model='m',
    key_variable=VARIABLE,
    fields={'max_tokens': 50},
    answer_tokens=50,
    concurrency=3,
    timeout=5.0,
    retries=3,
  )
  return endpoint.Settings(**(fields | changes))


def candidates(body):
  """The number of candidates in a request, and its target."""
  text = body['messages'][1]['content']
  target = re.search(r'engaged with \[(\d+)\] next', text)
  return len(re.findall(r'^\[\d+\]', text, re.M)), target and int(target[1])


def ranks(body, number=0):
  """A valid answer: the target, if any, then the others by number."""
  del number
  count, target = candidates(body)
  order = sorted(range(1, count + 1), key=lambda n: (n != target, n))
  text = f'Likes soap as in [h1], so [{order[0]}] fits.\nRANKING: '
  return Answer(completion(text + ', '.join(map(str, order))))
