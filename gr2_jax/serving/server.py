"""uvicorn, with a deadline for the head of a request.

uvicorn closes a connection that idles between two requests, and bounds the size
of a head, but a client that sends a head slowly keeps its connection for ever.
"""

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http import h11_impl

from gr2_jax.serving import service as service_lib

_TOO_SLOW = (
  b'HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\n'
  b'connection: close\r\ncontent-length: %d\r\n\r\n%s'
)


def make(
  app: Any, limits: service_lib.Limits, drain_seconds: int, **address: Any
) -> uvicorn.Server:
  """Makes a server that is not started yet; `address` is host and port."""
  config = uvicorn.Config(
    app,
    http=_protocol(limits.read_seconds),
    ws='none',
    lifespan='on',
    log_config=None,
    access_log=False,
    server_header=False,
    proxy_headers=False,
    # uvicorn answers 503 at the limit, and counts the new connection as well.
    limit_concurrency=limits.connections + 1,
    timeout_graceful_shutdown=drain_seconds,
    **address,
  )
  return uvicorn.Server(config)


def _protocol(seconds: float) -> type[asyncio.Protocol]:
  """HTTP/1.1 of uvicorn; a head must arrive within so many seconds."""

  class Protocol(h11_impl.H11Protocol):
    """The clock runs from the connection, or the first byte after an answer."""

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport):
      super().connection_made(transport)
      self._watch()

    def data_received(self, data):
      super().data_received(data)
      self._watch()

    def connection_lost(self, exc):
      self._stop()
      super().connection_lost(exc)

    def _watch(self):
      if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
        self._stop()
      elif self._clock is None:
        self._clock = self.loop.call_later(seconds, self._too_slow)

    def _stop(self):
      if self._clock is not None:
        self._clock.cancel()
        self._clock = None

    def _too_slow(self):
      self._clock = None
      text = b'{"error": "the head took more than %g s to arrive"}' % seconds
      self.transport.write(_TOO_SLOW % (len(text), text))
      self.transport.close()

  return Protocol
