"""A language model behind an OpenAI-compatible endpoint.

Transient failures (429, 5xx, timeouts, broken connections, malformed bodies)
are retried a bounded number of times, after waits that double. Permanent ones
(a wrong key, an unknown model) stop the run. The key comes from the environment
and appears only in the header of requests: it is removed from all server text.
"""

import concurrent.futures
import contextlib
import dataclasses
import email.utils
import itertools
import json
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from gr2_jax.teachers import ledger as ledger_lib

Message = dict[str, str]  # role and content
T = TypeVar('T')

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds between attempts
_TRANSIENT = (408, 409, 425, 429)  # HTTP statuses, beside 500 and above
_DECLINED = (400, 413, 422)  # faults of one request, not of the endpoint
_EXCERPT = 200  # characters of a server's text in an error


class EndpointError(ValueError):
  """The endpoint cannot be used; the message never contains the key."""


class Unanswered(Exception):
  """All attempts at a request failed."""


class Declined(Unanswered):
  """The server rejects this request; a retry would not help."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """Address, request fields and limits of an endpoint."""

  base_url: str  # e.g. http://localhost:8000/v1
  model: str
  key_variable: str  # environment variable that holds the key; '': no key
  fields: Mapping[str, Any]  # of each request, beside model and messages
  answer_tokens: int  # longest answer; reserved in the ledger
  concurrency: int  # requests in flight
  timeout: float  # seconds without a byte before a request fails
  retries: int  # per request, after the first attempt
  section: str = 'traces'  # of the config, for errors


@dataclasses.dataclass(frozen=True)
class _Fault:
  """The failure of one attempt."""

  message: str
  status: int | None = None  # of HTTP
  wait: float = 0.0  # seconds that the server demands
  may_cost: bool = True  # the model may have written tokens
  permanent: bool = False


def settings(section: str, stage: Any, temperature: float) -> Settings:
  """Reads the fields of `configs.common.endpoint` from section `stage`.

  Raises:
    ValueError: `stage.request` is not a JSON object.
  """
  try:
    fields = {
      'temperature': temperature,
      'max_tokens': stage.answer_tokens,
    } | json.loads(stage.request or '{}')
  except (ValueError, TypeError) as e:
    raise ValueError(
      f'{section}.request must be a JSON object or empty ({e})'
    ) from e
  same = ('model', 'key_variable', 'answer_tokens', 'concurrency', 'timeout')
  return Settings(
    base_url=stage.endpoint,
    fields={k: v for k, v in fields.items() if v is not None},
    section=section,
    **{name: stage[name] for name in (*same, 'retries')},
  )


class Endpoint(contextlib.AbstractContextManager):
  """A client of one endpoint, which threads may share.

  Args:
    settings: address and limits.
    ledger: stores the answers and counts the tokens.
    pause: sleeps for some seconds; None: sleeps until `map` is aborted at most.

  Raises:
    EndpointError: invalid settings, or no key in the environment.
    ModuleNotFoundError: the extra `teacher` is not installed.
  """

  def __init__(
    self,
    settings: Settings,
    ledger: ledger_lib.Ledger,
    pause: Callable[[float], object] | None = None,
  ):
    try:
      import openai
    except ModuleNotFoundError as e:
      raise ModuleNotFoundError(
        f"a model over HTTP needs {e.name}: pip install 'gr2_jax[teacher]'"
      ) from e
    self._openai = openai
    _check(settings)
    self.settings, self._ledger = settings, ledger
    self._stopped = threading.Event()
    self._pause = pause or self._stopped.wait
    self._key = _read_key(settings)
    self._client = openai.OpenAI(
      api_key=self._key or 'none',
      base_url=settings.base_url,
      timeout=settings.timeout,
      max_retries=0,
      # The environment may name them for another account than the key's.
      default_headers={
        'OpenAI-Organization': openai.Omit(),
        'OpenAI-Project': openai.Omit(),
      },
    )

  def complete(
    self, messages: Sequence[Message], *name: object
  ) -> ledger_lib.Reply:
    """Returns the answer to a chat, from the ledger or from the server.

    The name distinguishes requests with equal messages.

    Raises:
      Unanswered: all attempts failed, or `map` was aborted.
      Declined: the server rejects the request.
      EndpointError: the server can answer no request.
      ledger.OverLimit: the answer might exceed the limit on tokens.
    """
    s = self.settings
    key = ledger_lib.key(s.base_url, s.model, dict(s.fields), messages, name)
    stored = self._ledger.get(key)
    if stored is not None:
      return stored
    # A token has at least one byte; chat templates add a few tokens per turn.
    need = s.answer_tokens + sum(
      32 + len(m['content'].encode()) for m in messages
    )
    fault = _Fault('')
    for attempt in range(max(s.retries, 0) + 1):
      if attempt:
        wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1))
        self._pause(max(wait * random.uniform(0.5, 1.0), fault.wait))
      if self._stopped.is_set():
        raise Unanswered('stopped')
      self._ledger.reserve(need)
      charged, reply = need, None  # An interrupted request may have a cost.
      try:
        result = self._try(messages)
        if isinstance(result, ledger_lib.Reply):
          reply = result
          charged = reply.prompt_tokens + reply.completion_tokens or need
        else:
          fault, charged = result, need if result.may_cost else 0
      finally:
        self._ledger.settle(need, charged, key, reply)
      if reply is not None:
        return reply
      if fault.permanent and fault.status in _DECLINED:
        raise Declined(fault.message)
      if fault.permanent:
        raise EndpointError(
          f'{s.base_url}, model {s.model!r}: {fault.message}; check the '
          f'endpoint, the model and the key in ${s.key_variable or "(none)"}'
        )
    raise Unanswered(f'{fault.message} ({attempt + 1} attempts)')

  def map(
    self, work: Callable[[T], object], items: Iterable[T]
  ) -> Generator[tuple[T, Any, Unanswered | None], None, None]:
    """Runs `work` on items in threads, `concurrency` at a time.

    Items are drawn lazily. If the caller stops or `work` fails otherwise than
    with `Unanswered`, retries are abandoned and requests in flight are awaited.

    Yields:
      An item, and the result of `work` or its `Unanswered` error, in the order
      of completion.
    """
    limit, items, running = self.settings.concurrency, iter(items), {}
    pool = concurrent.futures.ThreadPoolExecutor(limit)
    try:
      while True:
        for item in itertools.islice(items, limit - len(running)):
          running[pool.submit(work, item)] = item
        if not running:
          return
        done, _ = concurrent.futures.wait(
          running, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in done:
          item, error = running.pop(future), future.exception()
          if not isinstance(error, Unanswered | None):
            raise error
          yield item, None if error else future.result(), error
    except BaseException:
      self._stopped.set()
      raise
    finally:
      pool.shutdown(wait=True, cancel_futures=True)

  def raise_if_down(
    self, failures: int, noun: str, error: Unanswered | None
  ) -> None:
    """Raises an EndpointError after too many failures in a row."""
    if failures >= 2 * self.settings.concurrency:
      raise EndpointError(
        f'{self.settings.base_url}: {failures} {noun} in a row without an '
        f'answer, the last: {error}. The earlier answers are stored: repeat '
        'the command to continue'
      )

  def __exit__(self, *unused_exception) -> None:
    self._client.close()

  def _try(self, messages: Sequence[Message]) -> ledger_lib.Reply | _Fault:
    """Sends a request. Client errors are not chained: they may hold keys."""
    openai, seconds = self._openai, self.settings.timeout
    try:
      raw = self._client.chat.completions.with_raw_response.create(
        model=self.settings.model,
        messages=list(messages),
        extra_body=dict(self.settings.fields),
      )
      return self._read(raw.http_response.text)
    except openai.APITimeoutError:
      return _Fault(f'no answer within {seconds:g} s')
    except openai.APIStatusError as e:
      return self._status_fault(e.response)
    except openai.APIConnectionError as e:
      cause = e.__cause__
      message = f'{type(cause).__name__}: {cause}' if cause else str(e)
      refused = isinstance(cause, OSError) or 'ConnectError' in message
      return _Fault(f'connection: {self._clean(message)}', may_cost=not refused)
    except openai.OpenAIError as e:
      return _Fault(self._clean(f'{type(e).__name__}: {e}'))

  def _status_fault(self, response: Any) -> _Fault:
    """Interprets an HTTP status of 400 and above."""
    status, text = response.status_code, response.text
    try:
      error = json.loads(text)['error']
      text, code = error.get('message') or text, error.get('code')
    except (ValueError, TypeError, KeyError, AttributeError):
      code = None
    transient = status in _TRANSIENT or status >= 500
    return _Fault(
      f'HTTP {status}: {self._clean(str(text))}',
      status=status,
      wait=_retry_after(response.headers.get('retry-after')),
      may_cost=False,
      permanent=not transient or code == 'insufficient_quota',
    )

  def _read(self, text: str) -> ledger_lib.Reply | _Fault:
    """Reads the body of an answer."""
    try:
      body = json.loads(text)
      choice = body['choices'][0]
      message = choice['message']
      content, refusal = message.get('content'), message.get('refusal')
      usage = body.get('usage') or {}
      counts = [usage.get(f'{k}_tokens') or 0 for k in ('prompt', 'completion')]
      if not isinstance(content, str | None) or not all(
        isinstance(n, int) and n >= 0 for n in counts
      ):
        raise TypeError
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
      return _Fault(f'not a chat completion: {self._clean(text)!r}')
    finish = 'refusal' if refusal else str(choice.get('finish_reason'))
    return ledger_lib.Reply(
      self._without_key(content or ''), self._without_key(finish), *counts
    )

  def _without_key(self, text: str) -> str:
    return text.replace(self._key, '[key]') if self._key else text

  def _clean(self, text: str) -> str:
    """Shortens a server's text to one line without the key."""
    return ' '.join(self._without_key(text).split())[:_EXCERPT]


def _check(settings: Settings) -> None:
  """Rejects invalid settings; repeats no value that may contain a key."""
  url, section = urllib.parse.urlsplit(settings.base_url), settings.section
  if url.scheme not in ('http', 'https') or not url.hostname:
    raise EndpointError(
      f'{section}.endpoint must be the base URL of an OpenAI-compatible '
      'server, e.g. http://localhost:8000/v1'
    )
  if url.username or url.password or url.query or url.fragment:
    raise EndpointError(
      f'{section}.endpoint contains credentials or a query: remove them, and '
      'put the key into the environment variable that '
      f'{section}.key_variable names'
    )
  if not settings.model:
    raise EndpointError(f'{section}.model is empty: set the name of the model')
  for name in ('concurrency', 'timeout', 'answer_tokens'):
    if not getattr(settings, name) > 0:
      raise EndpointError(f'{section}.{name} must be above 0')


def _read_key(settings: Settings) -> str:
  variable, field = settings.key_variable, f'{settings.section}.key_variable'
  if not variable:
    return ''
  if not re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', variable):
    raise EndpointError(
      f'{field} must be the name of an environment variable, not the key '
      'itself; config.json of this run contains the value that you set'
    )
  key = os.environ.get(variable, '').strip()
  if not key:
    raise EndpointError(
      f'the environment variable {variable} ({field}) is not set: store the '
      'key of the endpoint there'
    )
  return key


def _retry_after(value: str | None) -> float:
  """Reads a wait from a header, in seconds or as a date; bounded."""
  try:
    seconds = float(value or '')
  except (TypeError, ValueError):
    try:
      moment = email.utils.parsedate_to_datetime(value or '')
      seconds = moment.timestamp() - time.time()
    except (TypeError, ValueError):
      return 0.0
  return min(max(seconds, 0.0), _LONGEST_WAIT) if seconds == seconds else 0.0
