import logging
import pathlib
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest

from gr2_jax.teachers import endpoint, ledger

from .. import chat_server
from ..chat_server import Answer, completion

GOOD = Answer(completion('yes'))
MESSAGES = [{'role': 'user', 'content': 'well?'}]


@pytest.fixture(autouse=True)
def _key(monkeypatch):
  monkeypatch.setenv(chat_server.VARIABLE, chat_server.KEY)


def ask(tmp_path, answer, limit=None, times=1, **changes):
  """Replies or errors, the waits, the server, and the ledger."""
  waits, results = [], []
  with (
    chat_server.serve(answer) as server,
    ledger.Ledger(tmp_path / 'answers.jsonl', limit) as book,
    endpoint.Endpoint(
      chat_server.settings(server, **changes), book, waits.append
    ) as model,
  ):
    for number in range(times):
      try:
        results.append(model.complete(MESSAGES, number))
      except Exception as e:
        results.append(e)
  return results, waits, server, book


FAULTS = {
  'busy': Answer({'error': {'message': 'slow down'}}, status=429),
  'broken': Answer('<html>', status=500),
  'away': Answer('', status=503),
  'torn': Answer('{"choices": [{"mess'),
  'cut': Answer(completion('yes'), cut=True),
  'no choices': Answer({'choices': []}),
  'null': Answer({'choices': None}),
  'list': Answer([1]),
  'error in 200': Answer({'error': {'message': 'later'}}),
  'parts': Answer(completion([{'type': 'text', 'text': 'yes'}])),
  'negative': Answer(completion('yes', usage=(-1, 2))),
  'page': Answer('<html>gateway</html>'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_transient_faults_are_retried(tmp_path, fault):
  results, waits, server, book = ask(
    tmp_path, lambda _, n: FAULTS[fault] if n < 3 else GOOD
  )
  assert results == [ledger.Reply('yes', 'stop', 30, 20)]
  assert len(server.requests) == 3
  assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2
  may_cost = FAULTS[fault].status == 200
  assert book.charged == 50 + 2 * may_cost * (50 + 32 + len('well?'))


@pytest.mark.parametrize('fault', FAULTS)
def test_retries_are_bounded(tmp_path, fault):
  results, waits, server, _ = ask(tmp_path, lambda *_: FAULTS[fault], retries=2)
  assert isinstance(results[0], endpoint.Unanswered)
  assert '(3 attempts)' in str(results[0])
  assert (len(server.requests), len(waits)) == (3, 2)


def test_a_silent_server_times_out(tmp_path):
  silent = Answer(silent=True)
  results, _, server, _ = ask(
    tmp_path, lambda _, n: silent if n == 1 else GOOD, timeout=0.1
  )
  assert results[0].text == 'yes'
  assert len(server.requests) == 2


def test_a_refused_connection_costs_nothing(tmp_path):
  with chat_server.serve(lambda *_: GOOD) as gone:
    pass
  with (
    ledger.Ledger(tmp_path / 'a.jsonl', None) as book,
    endpoint.Endpoint(
      chat_server.settings(gone, retries=1), book, lambda _: None
    ) as model,
  ):
    with pytest.raises(endpoint.Unanswered, match='connection'):
      model.complete(MESSAGES)
    assert book.charged == 0


@pytest.mark.parametrize(
  ('header', 'low', 'high'),
  [
    ('7', 7, 7),
    ('1e9', 60, 60),
    ('nan', 0.5, 1),
    ('soon', 0.5, 1),
    ('-3', 0.5, 1),
    ('Fri, 01 Jan 2100 00:00:00 GMT', 60, 60),
    ('Fri, 01 Jan 2010 00:00:00 GMT', 0.5, 1),
  ],
)
def test_retry_after_sets_the_wait(tmp_path, header, low, high):
  busy = Answer('', status=429, headers={'retry-after': header})
  _, waits, *_ = ask(tmp_path, lambda _, n: busy if n == 1 else GOOD)
  assert low <= waits[0] <= high


@pytest.mark.parametrize('status', [401, 403, 404])
def test_permanent_faults_stop_at_once(tmp_path, status):
  results, waits, server, _ = ask(
    tmp_path, lambda *_: Answer('', status=status)
  )
  assert isinstance(results[0], endpoint.EndpointError)
  assert f'HTTP {status}' in str(results[0])
  assert (len(server.requests), waits) == (1, [])


def test_an_empty_account_is_not_retried(tmp_path):
  body = {'error': {'message': 'pay', 'code': 'insufficient_quota'}}
  results, *_ = ask(tmp_path, lambda *_: Answer(body, status=429))
  assert isinstance(results[0], endpoint.EndpointError)


@pytest.mark.parametrize('status', [400, 413, 422])
def test_a_request_may_be_declined(tmp_path, status):
  results, _, server, _ = ask(tmp_path, lambda *_: Answer('', status=status))
  assert isinstance(results[0], endpoint.Declined)
  assert len(server.requests) == 1


def test_a_stored_answer_needs_no_request(tmp_path):
  first, _, server, _ = ask(tmp_path, lambda *_: GOOD, times=2)
  url = server.url
  with (
    ledger.Ledger(tmp_path / 'answers.jsonl', None) as book,
    endpoint.Endpoint(chat_server.settings(server), book) as model,
  ):
    assert [model.complete(MESSAGES, n) for n in (0, 1)] == first, url
  assert len(server.requests) == 2  # It is gone.


@pytest.mark.parametrize(
  ('answer', 'finish', 'text'),
  [
    (completion(None), 'stop', ''),
    (completion(None, refusal='I will not'), 'refusal', ''),
    (completion('ye', 'length'), 'length', 'ye'),
  ],
)
def test_a_reply_has_its_finish_reason(tmp_path, answer, finish, text):
  (reply,), *_ = ask(tmp_path, lambda *_: Answer(answer))
  assert (reply.finish, reply.text) == (finish, text)


def test_without_counts_the_reservation_is_charged(tmp_path):
  body = completion('yes')
  del body['usage']
  results, _, _, book = ask(tmp_path, lambda *_: Answer(body))
  assert (results[0].prompt_tokens, results[0].completion_tokens) == (0, 0)
  assert book.charged == 50 + 32 + len('well?')


def test_the_limit_on_tokens_is_never_passed(tmp_path):
  results, _, server, book = ask(tmp_path, lambda *_: GOOD, limit=200, times=9)
  assert len(server.requests) == 3
  assert book.charged == 150
  assert all(isinstance(e, ledger.OverLimit) for e in results[3:])


def test_the_key_goes_into_the_header_and_nowhere_else(
  tmp_path, monkeypatch, caplog
):
  caplog.set_level(logging.DEBUG)
  for name in ('OPENAI_API_KEY', 'OPENAI_ORG_ID', 'OPENAI_PROJECT_ID'):
    monkeypatch.setenv(name, f'other-{name}')
  leak = f'no such key: {chat_server.KEY}'
  answers = [
    Answer({'error': {'message': leak}}, status=429),
    Answer(leak),
    Answer({'error': {'message': leak}}),
    Answer(completion(leak, finish=chat_server.KEY)),
    Answer(leak, status=400),
    Answer(leak, status=500),
    Answer(leak, status=500),
    Answer(leak, status=500),
    Answer(leak, status=500),
    Answer({'error': {'message': leak}}, status=401),
  ]
  results, _, server, book = ask(tmp_path, lambda _, n: answers[n - 1], times=4)
  assert set(server.keys) == {f'Bearer {chat_server.KEY}'}
  assert 'other-' not in str(server.headers)
  kinds = (
    ledger.Reply,
    endpoint.Declined,
    endpoint.Unanswered,
    endpoint.EndpointError,
  )
  texts = [caplog.text, book.path.read_text(), repr(results[0])]
  for error, kind in zip(results, kinds, strict=True):
    assert isinstance(error, kind)
  for error in results[1:]:
    assert '[key]' in str(error)
    assert error.__context__ is None
    texts += [repr(error), *traceback.format_exception(error)]
  assert caplog.records
  assert all(chat_server.KEY not in text for text in texts)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'base_url': ''}, 'traces.endpoint must be'),
    ({'base_url': 'localhost:8000'}, 'traces.endpoint must be'),
    ({'base_url': 'http://me:secret@x/v1'}, 'credentials'),
    ({'base_url': 'http://x/v1?key=secret'}, 'credentials'),
    ({'model': ''}, 'traces.model is empty'),
    ({'key_variable': 'sk-secret'}, 'must be the name'),
    ({'key_variable': 'GR2_UNSET'}, 'GR2_UNSET .* is not set'),
    ({'concurrency': 0}, 'traces.concurrency must be above 0'),
    ({'timeout': 0.0}, 'traces.timeout must be above 0'),
  ],
)
def test_settings_are_checked_and_secrets_not_repeated(
  tmp_path, changes, message
):
  with (
    chat_server.serve(lambda *_: GOOD) as server,
    ledger.Ledger(tmp_path / 'a.jsonl', None) as book,
    pytest.raises(endpoint.EndpointError, match=message) as raised,
  ):
    endpoint.Endpoint(chat_server.settings(server, **changes), book)
  assert 'secret' not in str(raised.value)


def test_no_more_requests_at_once_than_allowed(tmp_path):
  def answer(*_):
    time.sleep(0.02)
    return GOOD

  with (
    chat_server.serve(answer) as server,
    ledger.Ledger(tmp_path / 'a.jsonl', None) as book,
    endpoint.Endpoint(chat_server.settings(server), book) as model,
  ):
    done = model.map(lambda n: model.complete(MESSAGES, n).text, range(20))
    assert sorted(done) == [(n, 'yes', None) for n in range(20)]
    assert server.most == 3


def test_a_stopped_caller_waits_only_for_requests_in_flight(tmp_path):
  busy = Answer('', status=429, headers={'retry-after': '60'})
  with (
    chat_server.serve(lambda _, n: GOOD if n == 1 else busy) as server,
    ledger.Ledger(tmp_path / 'a.jsonl', None) as book,
    endpoint.Endpoint(chat_server.settings(server), book) as model,
  ):
    done = model.map(lambda n: model.complete(MESSAGES, n), range(1000))
    next(done)
    done.close()
    assert len(server.requests) <= 6
    with pytest.raises(endpoint.Unanswered, match='stopped'):
      model.complete(MESSAGES, 'more')


KILLED = """
import sys
from gr2_jax.teachers import endpoint, ledger
url, path = sys.argv[1:]
settings = endpoint.Settings(url, 'm', '', {}, 50, 1, 60.0, 3)
model = endpoint.Endpoint(settings, ledger.Ledger(path, None))
work = lambda n: model.complete([{'role': 'user', 'content': 'well?'}], n)
for _, _, error in model.map(work, range(10)):
  assert error is None
"""


def test_a_killed_process_repeats_only_missing_requests(tmp_path):
  path, fifth = tmp_path / 'a.jsonl', threading.Event()

  def answer(_, number):
    if number != 5:
      return GOOD
    fifth.set()
    return Answer(silent=True)

  with chat_server.serve(answer) as server:
    process = subprocess.Popen(
      [sys.executable, '-c', KILLED, server.url, str(path)],
      cwd=pathlib.Path(__file__).parents[2],
    )
    assert fifth.wait(60)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    settings = endpoint.Settings(server.url, 'm', '', {}, 50, 1, 60.0, 3)
    with (
      ledger.Ledger(path, None) as book,
      endpoint.Endpoint(settings, book) as model,
    ):
      assert len(book) == 4
      for number in range(10):
        model.complete(MESSAGES, number)
      assert len(book) == 10
    assert len(server.requests) == 5 + 6
