"""Serves a finished policy over HTTP.

python -m gr2_jax.serving --artifact=runs/rl-1a2b3c4d

POST /rank ranks slates, GET /openapi.json describes it, / is a page for people.
SIGTERM and SIGINT end the service once pending requests are answered; the exit
code after SIGTERM is 0.
"""

import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

from gr2_jax.pipeline import artifacts, environment
from gr2_jax.policy import ranking

if TYPE_CHECKING:
  from gr2_jax.serving import reranker as reranker_lib

_ARTIFACT = flags.DEFINE_string(
  'artifact', None, 'Folder of a trained policy.', required=True
)
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen at.')
_PORT = flags.DEFINE_integer('port', 8080, 'Port; 0 takes a free one.', 0)
_MODES = flags.DEFINE_list(
  'modes', list(ranking.MODES), 'Modes that are loaded; the first is default.'
)
_LARGEST_BATCH = flags.DEFINE_integer(
  'largest_batch', 64, 'Slates answered at a time.', 1
)
_TENSOR = flags.DEFINE_integer(
  'tensor', 1, 'Devices that split the model; the rest split batches.', 1
)
_MEMORY_CACHE_BYTES = flags.DEFINE_integer(
  'memory_cache_bytes',
  256 << 20,
  'Bytes of cached histories, for a policy with memory tokens; 0: none.',
  0,
)
_MOMENT = flags.DEFINE_float(
  'moment', 0.002, 'Seconds that a short batch waits for more slates.', 0.0
)
_TIMEOUT = flags.DEFINE_float(
  'timeout', 2.0, 'Seconds until the incoming order is the answer.', 0.001
)
_READ_TIMEOUT = flags.DEFINE_float(
  'read_timeout', 10.0, 'Seconds for a head, and for a body, to arrive.', 0.001
)
_BODY_BYTES = flags.DEFINE_integer('body_bytes', 1 << 20, 'Of a request.', 1)
_SLATES = flags.DEFINE_integer('slates', 64, 'Slates of a request.', 1)
_HISTORY = flags.DEFINE_integer('history', 1000, 'Items of a history.', 0)
_QUEUE = flags.DEFINE_integer('queue', 256, 'Slates that may wait.', 1)
_CONNECTIONS = flags.DEFINE_integer('connections', 512, 'At a time.', 1)
_DRAIN = flags.DEFINE_integer(
  'drain', 30, 'Seconds for pending requests when the service ends.', 0
)
_EXAMPLES = flags.DEFINE_bool(
  'examples',
  False,
  'Show test slates on the page: histories of users of the data set.',
)
_ADMIN_TOKEN_VARIABLE = flags.DEFINE_string(
  'admin_token_variable',
  '',
  'Environment variable that holds the token of /reload; none: no /reload.',
)


def load() -> 'reranker_lib.Reranker':
  """Loads the policy that the flags describe."""
  from gr2_jax.serving import reranker as reranker_lib

  return reranker_lib.Reranker.load(
    _ARTIFACT.value,
    modes=_MODES.value,
    largest_batch=_LARGEST_BATCH.value,
    tensor=_TENSOR.value,
    memory_cache_bytes=_MEMORY_CACHE_BYTES.value,
  )


def run(load: Callable[[], 'reranker_lib.Reranker']) -> None:
  """Binds the port, calls `load`, and serves until a signal arrives."""
  try:
    from gr2_jax.serving import app as app_lib
    from gr2_jax.serving import server as server_lib
    from gr2_jax.serving import service as service_lib
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
      f"serving needs {e.name}: pip install 'gr2_jax[serve]'"
    ) from e
  limits = service_lib.Limits(
    body_bytes=_BODY_BYTES.value,
    slates=_SLATES.value,
    history=_HISTORY.value,
    queue=_QUEUE.value,
    seconds=_TIMEOUT.value,
    read_seconds=_READ_TIMEOUT.value,
    connections=_CONNECTIONS.value,
  )
  if limits.queue < limits.slates:
    raise ValueError(
      f'--queue={limits.queue} is less than --slates={limits.slates}: the '
      'largest requests would always be refused'
    )
  token = _token(_ADMIN_TOKEN_VARIABLE.value)
  policy = None
  server = server_lib.make(
    app_lib.build(
      lambda: service_lib.Service(policy, limits, _MOMENT.value),
      token=token,
      examples=_EXAMPLES.value,
    ),
    limits,
    _DRAIN.value,
    host=_HOST.value,
    port=_PORT.value,
  )
  # Bound before the policy is loaded; nobody can connect until it is.
  socket = server.config.bind_socket()
  print(f'loading {_ARTIFACT.value}')
  policy = load()
  host, port = socket.getsockname()[:2]
  print(
    f'serving {policy.artifact.name} '
    f'at http://{f"[{host}]" if ":" in host else host}:{port}'
  )
  # uvicorn drains, then raises the signal again; it must not end in an error.
  signal.signal(signal.SIGTERM, lambda number, frame: None)
  server.run(sockets=[socket])


def _token(variable: str) -> str:
  """The token in an environment variable; it is never printed."""
  if not variable:
    return ''
  if not re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', variable):
    raise ValueError(
      '--admin_token_variable must be the name of an environment variable, not '
      'the token itself'
    )
  token = os.environ.get(variable, '')
  if len(token) < 16 or not (token.isascii() and token.isprintable()):
    raise ValueError(
      f'the environment variable {variable} (--admin_token_variable) must hold '
      'a token of 16 ASCII characters or more'
    )
  return token


def main(
  argv: list[str], load: Callable[[], 'reranker_lib.Reranker'] = load
) -> None:
  """Entry point of `app.run`; `load` makes the policy."""
  if argv[1:]:
    sys.exit(f'error: {argv[1]!r} is not a flag')
  try:
    config = artifacts.read_run(pathlib.Path(_ARTIFACT.value))['config']
    environment.set_up(config.get('model', {}).get('dtype', ''))
    run(load)
  except KeyboardInterrupt:
    sys.exit('interrupted')
  except (OSError, ImportError, ValueError) as e:
    if not environment.is_for_the_user(e):
      raise
    sys.exit(f'error: {e}')
