"""A language model behind an OpenAI-compatible endpoint.

What fails and may pass (429, 5xx, time-outs, cut connections, bodies that are
no answer) is asked again, a bounded number of times, after waits that double;
what cannot pass (a wrong key, an unknown model) stops the run. The key comes
from the environment and goes into the request's header, nowhere else: it is
struck out of whatever the server says.
"""

import concurrent.futures
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from gr2_jax.teachers import ledger as ledger_lib

Message = dict[str, str]  # role and content
T = TypeVar('T')

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds between tries
_PASSING = (408, 409, 425, 429)  # and 500 and above: may pass
_DECLINED = (400, 413, 422)  # this request, where others are answered
_SHOWN = 200  # characters of what a server says


class EndpointError(ValueError):
  """The endpoint cannot be used; the message says why, never the key."""


class Unanswered(Exception):
  """No answer to this request after all tries."""


class Declined(Unanswered):
  """The server does not take this request; asking again is no use."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to reach and ask a model.

  Attributes:
    base_url: e.g. http://localhost:8000/v1.
    model: its name there.
    key_variable: the environment variable that holds the key; '': no key.
    fields: of every request, beside model and messages.
    answer_tokens: of an answer, at most; what is set aside for it.
    concurrency: requests under way at once.
    timeout: seconds without a byte until a request counts as lost.
    retries: of a request, after the first try.
    section: of the config, where all this is said.
  """

  base_url: str
  model: str
  key_variable: str
  fields: Mapping[str, Any]
  answer_tokens: int
  concurrency: int
  timeout: float
  retries: int
  section: str = 'traces'


@dataclasses.dataclass(frozen=True)
class _Fault:
  """Why a try failed."""

  what: str
  status: int | None = None  # of HTTP
  wait: float = 0.0  # seconds that the server asks for
  may_cost: bool = True  # tokens may have been written
  hopeless: bool = False


class Endpoint:
  """Asks a model; safe to use from many threads.

  Args:
    settings: how.
    ledger: keeps the answers and counts the tokens.
    pause: waits for some seconds; None: until `stop` at most.

  Raises:
    EndpointError: the settings cannot be meant, or there is no key.
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
      # Of the account that the environment is set up for, not this one's.
      default_headers={
        'OpenAI-Organization': openai.Omit(),
        'OpenAI-Project': openai.Omit(),
      },
    )

  def ask(self, messages: Sequence[Message], *name: object) -> ledger_lib.Reply:
    """The answer to a request: the ledger's, or a new one.

    Args:
      messages: of the chat.
      *name: tells requests apart that have the same messages.

    Raises:
      Unanswered: every try failed, or the endpoint was stopped.
      Declined: the server does not take it.
      EndpointError: no request can be answered.
      ledger.OverLimit: it might exceed the limit on tokens.
    """
    s = self.settings
    key = ledger_lib.key(s.base_url, s.model, dict(s.fields), messages, name)
    found = self._ledger.get(key)
    if found is not None:
      return found
    # A token is a byte at least; a chat template puts a few around each turn.
    need = s.answer_tokens + sum(
      32 + len(m['content'].encode()) for m in messages
    )
    attempt = 0
    while True:
      if self._stopped.is_set():
        raise Unanswered('stopped')
      self._ledger.reserve(need)
      charged, reply = need, None  # Whatever interrupts us: it may have cost.
      try:
        reply = self._try(messages)
        if isinstance(reply, ledger_lib.Reply):
          charged = reply.prompt_tokens + reply.completion_tokens or need
        elif not reply.may_cost:
          charged = 0
      finally:
        answer = reply if isinstance(reply, ledger_lib.Reply) else None
        self._ledger.settle(need, charged, key, answer)
      if answer is not None:
        return answer
      self._give_up(reply, attempt)
      wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt)
      self._pause(max(wait * random.uniform(0.5, 1.0), reply.wait))
      attempt += 1

  def map(
    self, work: Callable[[T], object], items: Iterable[T]
  ) -> Iterator[tuple[T, concurrent.futures.Future]]:
    """Runs `work` on items, `concurrency` at a time.

    Items are drawn as they are needed. If the caller stops or fails, what
    waits to be tried again is given up, and what is under way is awaited.

    Args:
      work: asks, in a thread of its own.
      items: of the work.

    Yields:
      An item and its finished future, in the order in which they finish.
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
          yield running.pop(future), future
    except BaseException:
      self._stopped.set()
      raise
    finally:
      pool.shutdown(wait=True, cancel_futures=True)

  def close(self) -> None:
    """Closes the connections."""
    self._client.close()

  def __enter__(self) -> 'Endpoint':
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()

  def _try(self, messages: Sequence[Message]) -> ledger_lib.Reply | _Fault:
    """One request. Errors of the client are not chained: they may hold keys."""
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
      return self._refused(e.response)
    except openai.APIConnectionError as e:
      cause = e.__cause__
      what = f'{type(cause).__name__}: {cause}' if cause else str(e)
      refused = isinstance(cause, OSError) or 'ConnectError' in what
      return _Fault(f'connection: {self._clean(what)}', may_cost=not refused)
    except openai.OpenAIError as e:
      return _Fault(self._clean(f'{type(e).__name__}: {e}'))

  def _refused(self, response) -> _Fault:
    """What a status of 400 and above means."""
    status, text = response.status_code, response.text
    try:
      told = json.loads(text)['error']
      text, code = told.get('message') or text, told.get('code')
    except (ValueError, TypeError, KeyError, AttributeError):
      code = None
    passing = status in _PASSING or status >= 500
    return _Fault(
      f'HTTP {status}: {self._clean(str(text))}',
      status=status,
      wait=_retry_after(response.headers.get('retry-after')),
      may_cost=False,
      hopeless=not passing or code == 'insufficient_quota',
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
      self._strike(content or ''), self._strike(finish), *counts
    )

  def _give_up(self, fault: _Fault, attempt: int) -> None:
    """Raises where trying again is no use."""
    s = self.settings
    if fault.status in _DECLINED and fault.hopeless:
      raise Declined(fault.what)
    if fault.hopeless:
      raise EndpointError(
        f'{s.base_url}, model {s.model!r}: {fault.what}; check the endpoint, '
        f'the model and the key in ${s.key_variable or "(none)"}'
      )
    if attempt >= s.retries:
      raise Unanswered(f'{fault.what} (tried {attempt + 1} times)')

  def _strike(self, text: str) -> str:
    return text.replace(self._key, '[key]') if self._key else text

  def _clean(self, text: str) -> str:
    """One short line of what a server said."""
    return ' '.join(self._strike(text).split())[:_SHOWN]


def _check(settings: Settings) -> None:
  """Refuses what cannot be meant; repeats nothing that may hold a key."""
  url, section = urllib.parse.urlsplit(settings.base_url), settings.section
  if url.scheme not in ('http', 'https') or not url.hostname:
    raise EndpointError(
      f'{section}.endpoint must be the base URL of an OpenAI-compatible '
      'server, e.g. http://localhost:8000/v1'
    )
  if url.username or url.password or url.query or url.fragment:
    raise EndpointError(
      f'{section}.endpoint holds credentials or a query: leave them out, and '
      'put the key into the environment variable that '
      f'{section}.key_variable names'
    )
  if not settings.model:
    raise EndpointError(f'{section}.model is empty: name the model to ask')
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
      'itself; config.json of this run holds what you wrote'
    )
  key = os.environ.get(variable, '').strip()
  if not key:
    raise EndpointError(
      f'the environment variable {variable} ({field}) is not set: put the key '
      'of the endpoint there'
    )
  return key


def _retry_after(value: str | None) -> float:
  """Seconds that a header asks for, a number or a date; bounded."""
  try:
    seconds = float(value)
  except (TypeError, ValueError):
    try:
      moment = email.utils.parsedate_to_datetime(value)
      seconds = moment.timestamp() - time.time()
    except (TypeError, ValueError):
      return 0.0
  return min(max(seconds, 0.0), _LONGEST_WAIT) if seconds == seconds else 0.0
