"""The routes of the HTTP service, on top of `service.py`."""

import asyncio
import contextlib
import hmac
import json
import pathlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gr2_jax.data import log as log_lib
from gr2_jax.serving import batching, metrics, schema
from gr2_jax.serving import examples as examples_lib
from gr2_jax.serving import service as service_lib

T = TypeVar('T')
PAGE = pathlib.Path(__file__).parent / 'page.html'
_LARGEST_DISCARDED = 64 << 20  # bytes of a body above the limit
_PAGE_HEADERS = {
  'content-type': 'text/html; charset=utf-8',
  'content-security-policy': (
    "default-src 'none'; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action "
    "'none'; frame-ancestors 'none'"
  ),
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
}


class _Refusal(Exception):
  """An error response; `close` ends the connection, its body being unread."""

  def __init__(
    self, status: int, message: str, close: bool = False, **headers: str
  ):
    super().__init__(message)
    self.status = status
    self.headers = headers | ({'connection': 'close'} if close else {})


def build(
  start: Callable[[], service_lib.Service],
  *,
  token: str = '',
  examples: bool = False,
) -> Starlette:
  """Builds the application; `start` makes the service in its event loop.

  Without a token there is no /reload. `examples` adds /example, which shows
  test slates: data of users.
  """
  routes = _Routes(start, token)
  handlers = {
    '/rank': ('POST', routes.rank),
    '/health': ('GET', routes.health),
    '/metrics': ('GET', routes.metrics),
    '/openapi.json': ('GET', routes.openapi),
    '/items': ('GET', routes.items),
    '/': ('GET', routes.page),
  }
  if examples:
    handlers['/example'] = ('GET', routes.example)
  if token:
    handlers['/reload'] = ('POST', routes.reload)
  routes.paths = tuple(handlers)
  app = Starlette(
    routes=[
      Route(path, routes.counted(path, handler), methods=[method])
      for path, (method, handler) in handlers.items()
    ],
    exception_handlers={HTTPException: _http_error, Exception: _bug},
    lifespan=routes.life,
  )
  app.router.redirect_slashes = False
  return app


class _Routes:
  """The handlers, and the service that they share."""

  def __init__(self, start: Callable[[], service_lib.Service], token: str):
    self._start, self._token = start, token
    self.paths: tuple[str, ...] = ()

  @contextlib.asynccontextmanager
  async def life(self, unused_app: Starlette) -> AsyncIterator[None]:
    """Makes the service, and drains it at the end."""
    self.service = self._start()
    yield
    await self.service.drain()

  def counted(
    self, path: str, handler: Callable[[Request], Awaitable[Response]]
  ) -> Callable[[Request], Awaitable[Response]]:
    """Wraps a handler: refusals become responses, all responses are counted."""

    async def handle(request: Request) -> Response:
      status = 500
      try:
        try:
          response = await handler(request)
        except _Refusal as e:
          response = _json({'error': str(e)}, e.status, e.headers)
        status = response.status_code
        return response
      finally:
        self.service.metrics.requests.labels(path, str(status)).inc()

    return handle

  async def rank(self, request: Request) -> Response:
    """Ranks slates."""
    checked = await self._body(request, self.service.check)
    try:
      answers = await self.service.rank(checked)
    except batching.Refused as e:
      raise _Refusal(
        503, f'{e}: try again', **{'retry-after': str(e.retry_after)}
      ) from e
    return _json({'artifact': checked.policy.artifact.name, 'answers': answers})

  async def health(self, unused_request: Request) -> Response:
    """The state of the service, for a load balancer."""
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
    """The OpenAPI document."""
    service = self.service
    return _json(schema.openapi(service.policy, service.limits, self.paths))

  async def items(self, request: Request) -> Response:
    """Titles of items, for people."""
    names = _check(
      lambda names: examples_lib.NAMES.check(names, '', 'id'),
      request.query_params.getlist('id'),
    )
    return _json(examples_lib.items(self.service.policy, names))

  async def example(self, request: Request) -> Response:
    """A test slate of the data set."""
    text = request.query_params.get('place', '0')
    place = _check(
      lambda place: examples_lib.PLACE.check(place, '', 'place'),
      int(text) if re.fullmatch('[0-9]{1,9}', text) else text,
    )
    return _json(
      await asyncio.to_thread(examples_lib.example, self.service.policy, place)
    )

  async def page(self, unused_request: Request) -> Response:
    """The page for people."""
    text = await asyncio.to_thread(PAGE.read_bytes)
    return Response(text, headers=_PAGE_HEADERS)

  async def reload(self, request: Request) -> Response:
    """Swaps the policy, for clients that have the token."""
    given = request.headers.get('authorization', '').encode()
    if not hmac.compare_digest(given, f'Bearer {self._token}'.encode()):
      raise _Refusal(
        401,
        'the header Authorization: Bearer <token> is missing or wrong',
        close=True,
        **{'www-authenticate': 'Bearer'},
      )
    name = (await self._body(request, service_lib.RELOAD.check))['artifact']
    try:
      await self.service.reload(name)
    except service_lib.Busy:
      raise _Refusal(409, 'another reload is under way') from None
    except Exception as e:  # In any case the present policy stays.
      logging.exception('reload of %r failed', name)
      raise _Refusal(400, f'the present policy stays: {e}') from e
    return _json({'artifact': self.service.policy.artifact.name})

  async def _body(self, request: Request, check: Callable[[Any], T]) -> T:
    """Reads a body within the limits of size and time, and checks its JSON."""
    limits = self.service.limits
    too_large = _Refusal(
      413,
      f'the body is larger than {limits.body_bytes} bytes: send fewer or '
      'smaller slates',
      close=True,
    )
    if int(request.headers.get('content-length', '0')) > _LARGEST_DISCARDED:
      raise too_large
    body, size = bytearray(), 0
    try:
      async with asyncio.timeout(limits.read_seconds):
        async for part in request.stream():
          size += len(part)
          # Most clients read the error only after they have sent everything.
          if size > _LARGEST_DISCARDED:
            raise too_large
          if size <= limits.body_bytes:
            body += part
    except TimeoutError:
      raise _Refusal(
        408,
        f'the body took more than {limits.read_seconds:g} s to arrive',
        close=True,
      ) from None
    except ClientDisconnect:
      raise _Refusal(400, 'the connection was cut', close=True) from None
    if size > limits.body_bytes:
      raise too_large
    try:
      value = json.loads(bytes(body))
    except (ValueError, RecursionError) as e:
      reason = ' '.join(str(e).split())
      raise _Refusal(400, f'the body is not valid JSON: {reason}') from None
    return _check(check, value)


def _check(check: Callable[[Any], T], value: Any) -> T:
  """Runs a check; its errors become refusals."""
  try:
    return check(value)
  except log_lib.DataError as e:
    raise _Refusal(400, str(e)) from None
  except RecursionError:
    raise _Refusal(400, 'the body is nested too deeply') from None


def _json(
  content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
  """ASCII, so that any text that a client sent can be sent back."""
  return Response(
    json.dumps(content, allow_nan=False).encode('ascii'),
    status,
    headers={'content-type': 'application/json'} | dict(headers or {}),
  )


async def _http_error(
  unused_request: Request, error: HTTPException
) -> Response:
  """No such path, or not this method."""
  return _json({'error': error.detail}, error.status_code, error.headers)


async def _bug(unused_request: Request, unused_error: Exception) -> Response:
  """The error is logged, and the service goes on."""
  return _json({'error': "internal error: see the service's log"}, 500)
