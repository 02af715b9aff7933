"""The HTTP service: routes, bodies, errors. What it does is in `service.py`."""

import asyncio
import contextlib
import hmac
import json
import pathlib
from collections.abc import Awaitable, Callable
from typing import Any

import starlette.applications
import starlette.exceptions
import starlette.requests
import starlette.responses
import starlette.routing
from absl import logging

from gr2_jax.serving import batching, metrics, schema
from gr2_jax.serving import examples as examples_lib
from gr2_jax.serving import service as service_lib

Request = starlette.requests.Request
Response = starlette.responses.Response

PAGE = pathlib.Path(__file__).parent / 'page.html'
_MOST_THROWN_AWAY = 64 << 20  # bytes of a body that is too large
_SAFE = {
  'content-security-policy': (
    "default-src 'none'; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action "
    "'none'; frame-ancestors 'none'"
  ),
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
}


class _Refusal(Exception):
  """An answer other than 200; `close` where the body was not read."""

  def __init__(self, status: int, message: str, close: bool = False, **headers):
    super().__init__(message)
    self.status, self.close, self.headers = status, close, headers


def build(
  start: Callable[[], service_lib.Service],
  *,
  token: str = '',
  examples: bool = False,
) -> starlette.applications.Starlette:
  """The application.

  Args:
    start: makes the service, once the event loop runs.
    token: that /reload asks for; empty: there is no /reload.
    examples: /example shows test slates of the data set: what its users did.
  """
  routes = _Routes(start, token)
  table = {
    '/rank': ('POST', routes.rank),
    '/health': ('GET', routes.health),
    '/metrics': ('GET', routes.metrics),
    '/openapi.json': ('GET', routes.openapi),
    '/items': ('GET', routes.items),
    '/': ('GET', routes.page),
  }
  if examples:
    table['/example'] = ('GET', routes.example)
  if token:
    table['/reload'] = ('POST', routes.reload)
  app = starlette.applications.Starlette(
    routes=[
      starlette.routing.Route(path, routes.counted(path, act), methods=[method])
      for path, (method, act) in table.items()
    ],
    exception_handlers={
      starlette.exceptions.HTTPException: _http_error,
      Exception: _bug,
    },
    lifespan=routes.life,
  )
  app.router.redirect_slashes = False
  routes.paths = tuple(table)
  return app


class _Routes:
  """The handlers, and the service that they share."""

  def __init__(self, start: Callable[[], service_lib.Service], token: str):
    self._start, self._token = start, token
    self.paths: tuple[str, ...] = ()

  @contextlib.asynccontextmanager
  async def life(self, unused_app):
    """Makes the service; at the end answers what waits."""
    self.service = self._start()
    yield
    await self.service.drain()

  def counted(
    self, path: str, act: Callable[[Request], Awaitable[Response]]
  ) -> Callable[[Request], Awaitable[Response]]:
    """The handler; refusals become answers, and every answer is counted."""

    async def handle(request: Request) -> Response:
      status = 500
      try:
        try:
          response = await act(request)
        except _Refusal as e:
          closes = {'connection': 'close'} if e.close else {}
          response = _json({'error': str(e)}, e.status, e.headers | closes)
        except service_lib.BadRequest as e:
          response = _json({'error': str(e)}, 400)
        status = response.status_code
        return response
      finally:
        self.service.metrics.requests.labels(path, str(status)).inc()

    return handle

  async def rank(self, request: Request) -> Response:
    """Ranks slates."""
    body = await self._body(request)
    try:
      checked = self.service.check(body)
    except RecursionError:
      raise _Refusal(400, 'the body is nested too deeply') from None
    try:
      answers = await self.service.rank(checked)
    except batching.Refused as e:
      raise _Refusal(
        503, f'{e}: try again', **{'retry-after': str(e.retry_after)}
      ) from e
    return _json({'artifact': checked.policy.artifact.name, 'answers': answers})

  async def health(self, unused_request: Request) -> Response:
    """What it serves; a service that cannot answer does not answer."""
    policy = self.service.policy
    return _json(
      {
        'status': 'serving',
        'artifact': policy.artifact.name,
        'modes': list(policy.programs),
        'candidates': policy.candidates,
        'described_items': 'unknown' if policy.unreadable else 'ranked',
      }
    )

  async def metrics(self, unused_request: Request) -> Response:
    """Counters for Prometheus."""
    return Response(
      self.service.metrics.text(),
      headers={'content-type': metrics.CONTENT_TYPE},
    )

  async def openapi(self, unused_request: Request) -> Response:
    """What can be asked, and what is answered."""
    service = self.service
    return _json(schema.openapi(service.policy, service.limits, self.paths))

  async def items(self, request: Request) -> Response:
    """Titles of items, for people."""
    names = request.query_params.getlist('id')
    most = examples_lib.MOST
    if len(names) > most:
      raise _Refusal(400, f"field 'id': {len(names)} items: at most {most}")
    return _json(examples_lib.items(self.service.policy, names))

  async def example(self, request: Request) -> Response:
    """A test slate of the data set."""
    place = request.query_params.get('place', '0')
    if not (place.isascii() and place.isdecimal() and len(place) < 10):
      raise _Refusal(400, "field 'place': it must be a whole number from 0")
    found = await asyncio.to_thread(
      examples_lib.example, self.service.policy, int(place)
    )
    return _json(found)

  async def page(self, unused_request: Request) -> Response:
    """The page for people."""
    text = await asyncio.to_thread(PAGE.read_bytes)
    return Response(
      text, headers={'content-type': 'text/html; charset=utf-8'} | _SAFE
    )

  async def reload(self, request: Request) -> Response:
    """Swaps the policy, for who knows the token."""
    given = request.headers.get('authorization', '').encode()
    wanted = f'Bearer {self._token}'.encode()
    if not hmac.compare_digest(given, wanted):
      raise _Refusal(
        401,
        'the header Authorization: Bearer <token> is missing or wrong',
        close=True,
        **{'www-authenticate': 'Bearer'},
      )
    body = await self._body(request)
    name = body.get('artifact') if isinstance(body, dict) else None
    if not isinstance(name, str):
      raise _Refusal(400, 'write {"artifact": "<name of a folder>"}')
    try:
      await self.service.reload(name)
    except service_lib.Busy:
      raise _Refusal(409, 'another reload is under way') from None
    except service_lib.BadRequest:
      raise
    except Exception as e:  # Whatever it is, the present policy serves on.
      logging.exception('reload of %r failed', name)
      raise _Refusal(400, f'the present policy stays: {e}') from e
    return _json({'artifact': self.service.policy.artifact.name})

  async def _body(self, request: Request) -> object:
    """The JSON of a request that comes in within limits of size and time."""
    limits = self.service.limits
    too_large = _Refusal(
      413,
      f'the body is larger than {limits.body_bytes} bytes: send fewer or '
      'smaller slates',
      close=True,
    )
    if int(request.headers.get('content-length', '0')) > _MOST_THROWN_AWAY:
      raise too_large
    read, size = bytearray(), 0
    try:
      async with asyncio.timeout(limits.read_seconds):
        async for part in request.stream():
          size += len(part)
          # Who sends too much hears of it, most often, if it is still read.
          if size > _MOST_THROWN_AWAY:
            raise too_large
          if size <= limits.body_bytes:
            read += part
    except TimeoutError:
      raise _Refusal(
        408,
        f'the body took more than {limits.read_seconds:g} s to come in',
        close=True,
      ) from None
    except starlette.requests.ClientDisconnect:
      raise _Refusal(400, 'the connection was cut', close=True) from None
    if size > limits.body_bytes:
      raise too_large
    try:
      return json.loads(bytes(read))
    except (ValueError, RecursionError) as e:
      what = ' '.join(str(e).split())
      raise _Refusal(400, f'the body is not valid JSON: {what}') from None


def _json(
  content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
  """ASCII, so that whatever text a client sent can be sent back."""
  return Response(
    json.dumps(content, allow_nan=False).encode('ascii'),
    status,
    headers={'content-type': 'application/json'} | (headers or {}),
  )


async def _http_error(
  unused_request: Request, error: starlette.exceptions.HTTPException
) -> Response:
  """No such path, or not this method."""
  return _json(
    {'error': error.detail}, error.status_code, dict(error.headers or {})
  )


async def _bug(unused_request: Request, unused_error: Exception) -> Response:
  """The server logs it, and goes on."""
  return _json({'error': 'internal error: the log of the service has it'}, 500)
