"""`python -m gr2_jax.serve`: reloads, a kill, and an orderly end."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

pytestmark = pytest.mark.slow

TOKEN = 'a token of a test'


@contextlib.contextmanager
def command(artifact, *flags, **environment):
  """The running command and its port, once it listens."""
  process = subprocess.Popen(
    [
      sys.executable,
      '-m',
      'gr2_jax.serve',
      f'--artifact={artifact}',
      '--port=0',
      '--modes=score',
      '--largest_batch=1',
      *flags,
    ],
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  try:
    said = ''
    for line in process.stdout:
      said += line
      if found := re.search(r'serving \S+ at http://127.0.0.1:(\d+)', line):
        break
    else:
      raise AssertionError(said)
    port = int(found.group(1))
    process.said = said
    while True:  # It says so just before it listens.
      with contextlib.suppress(ConnectionRefusedError):
        ask(port, 'GET', '/health')
        break
      time.sleep(0.01)
    yield process, port
  finally:
    process.kill()
    process.said += process.stdout.read()
    process.wait()


def ask(port, method, path, body=None, headers=None):
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=300)
  with contextlib.closing(connection):
    body = None if body is None else json.dumps(body)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_a_kill_during_a_reload_and_an_end_in_order(world, slates):
  body = {'slates': slates[:3]}
  headers = {'authorization': f'Bearer {TOKEN}'}
  variable = '--admin_token_variable=ADMIN_TOKEN'
  with command(world['rl'], variable, ADMIN_TOKEN=TOKEN) as (process, port):
    before = ask(port, 'POST', '/rank', body)
    assert before[0] == 200
    status, found = ask(
      port, 'POST', '/reload', {'artifact': world['tokenizer'].name}, headers
    )
    assert status == 400
    assert 'leaves no policy' in found['error']

    def reload():
      with contextlib.suppress(OSError, http.client.HTTPException):
        ask(port, 'POST', '/reload', {'artifact': world['sft'].name}, headers)

    thread = threading.Thread(target=reload)
    thread.start()
    assert ask(port, 'POST', '/rank', body)[0] == 200
    process.kill()
    thread.join()
    process.wait()
  assert TOKEN not in process.said
  # Nothing is left behind that the next one would trip over.
  with command(world['rl'], variable, ADMIN_TOKEN=TOKEN) as (process, port):
    assert ask(port, 'POST', '/rank', body) == before
    status, found = ask(
      port, 'POST', '/reload', {'artifact': world['sft'].name}, headers
    )
    assert (status, found) == (200, {'artifact': world['sft'].name})
    assert ask(port, 'POST', '/rank', body)[1]['artifact'] == world['sft'].name
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
  assert TOKEN not in process.said
  assert 'Traceback' not in process.said


def test_a_wrong_flag_is_one_line(world):
  found = subprocess.run(
    [
      sys.executable,
      '-m',
      'gr2_jax.serve',
      f'--artifact={world["rl"]}',
      '--admin_token_variable=GR2_JAX_NONE',
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert found.returncode == 1
  *_, last = found.stdout.strip().splitlines()
  assert last.startswith('error: the environment variable GR2_JAX_NONE ')
