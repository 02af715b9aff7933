"""Clients that misbehave get a clear error and disturb nobody else."""

import contextlib
import json
import socket

import pytest

from . import live
from .live import GOOD, StubPolicy

HEAD = b'POST /rank HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n'


@pytest.fixture
def policy():
  return StubPolicy()


def raw(service, *parts):
  """All bytes that the service sends until it ends the connection."""
  with socket.create_connection(('127.0.0.1', service.port), 60) as client:
    for part in parts:
      client.sendall(part)
    said = b''
    # Who is still sending when the service is done may find the line cut.
    with contextlib.suppress(ConnectionResetError):
      while found := client.recv(1 << 16):
        said += found
  return said


def test_a_million_candidates_are_refused(policy):
  body = {'slates': [{'history': [], 'candidates': list(range(1_000_000))}]}
  with live.serving(policy) as service:
    status, found, headers = service.ask('POST', '/rank', body)
    assert (status, headers['connection']) == (413, 'close')
    assert found['error'].startswith('the body is larger than 1048576 bytes')
    assert service.rank(GOOD)[0] == 200
  with live.serving(policy, body_bytes=1 << 25) as service:
    status, found, _ = service.ask('POST', '/rank', body)
    assert status == 400
    assert 'a list of 1000000, room for 5' in found['error']
    assert service.rank(GOOD)[0] == 200


def test_endless_descriptions_are_refused(policy):
  many = [{'item_id': i, 'title': 'x'} for i in range(100_000)]
  long = [{'item_id': 0, 'title': 'x' * 1_000_000}]
  with live.serving(policy, body_bytes=1 << 23) as service:
    for items, message in (
      (many, "field 'items': a list of 100000, room for 35: describe only"),
      (long, ': it must be text that is not blank, of at most 1000 characters'),
    ):
      status, found, _ = service.rank(GOOD | {'items': items})
      assert status == 400
      assert message in found['error']
    assert service.rank(GOOD)[0] == 200


def test_a_body_without_end_is_cut_off(policy):
  chunk = b'%x\r\n%s\r\n' % (4096, b' ' * 4096)
  with live.serving(policy, body_bytes=8192, read_seconds=0.5) as service:
    head = (
      b'POST /rank HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n'
    )
    assert b' 413 ' in raw(service, head, chunk, chunk, chunk, b'0\r\n\r\n')
    assert b' 408 ' in raw(service, head, chunk)
    told = (
      b'POST /rank HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n'
    )
    assert b' 413 ' in raw(service, told)


@pytest.mark.parametrize(
  'sent',
  [
    (),
    (b'POST /ra',),
    (HEAD,),
    (HEAD, b'\r\n'),
    (HEAD, b'\r\n', b'{"slates": '),
  ],
)
def test_a_client_that_hangs_gets_408_and_is_cut(policy, sent):
  with live.serving(policy, read_seconds=0.3) as service:
    said = raw(service, *sent)
    assert b' 408 ' in said
    assert b'took more than 0.3 s to arrive' in said
    assert service.rank(GOOD)[0] == 200


def test_a_head_that_comes_drop_by_drop_is_cut(policy):
  with live.serving(policy, read_seconds=0.3) as service:
    with socket.create_connection(('127.0.0.1', service.port), 60) as client:
      client.settimeout(0.02)
      said = b''
      for _ in range(5000):
        try:
          client.sendall(b'x')
          said += client.recv(4096)
        except TimeoutError:
          continue
        except OSError:
          break
        if said:
          break
    assert b' 408 ' in said


def test_the_second_request_of_a_connection_has_a_clock_too(policy):
  body = json.dumps({'slates': [GOOD]}).encode()
  whole = b'POST /rank HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s'
  with (
    live.serving(policy, read_seconds=0.3) as service,
    socket.create_connection(('127.0.0.1', service.port), 60) as client,
  ):
    client.sendall(whole % (len(body), body))
    assert client.recv(1 << 16).startswith(b'HTTP/1.1 200')
    client.sendall(b'POST /rank')
    said = b''
    while found := client.recv(1 << 16):
      said += found
  assert said.count(b'HTTP/1.1 408') == 1


def test_bytes_that_are_not_http_are_refused(policy):
  with live.serving(policy) as service:
    assert raw(service, b'\x16\x03\x01 hello\r\n\r\n').startswith(
      b'HTTP/1.1 400'
    )
    huge = b'GET / HTTP/1.1\r\nhost: x\r\nx: ' + b'y' * (1 << 17)
    assert raw(service, huge)[:12] in (b'HTTP/1.1 400', b'')
    assert service.rank(GOOD)[0] == 200


def test_a_client_that_leaves_disturbs_nobody(policy):
  policy.gate.clear()
  body = json.dumps({'slates': [GOOD]}).encode()
  with live.serving(policy, seconds=60.0) as service:
    for _ in range(3):
      with socket.create_connection(('127.0.0.1', service.port), 60) as client:
        client.sendall(
          b'POST /rank HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s'
          % (len(body), body)
        )
    live.until(lambda: sum(n for _, n in policy.batches) >= 1)
    policy.gate.set()
    assert service.rank(GOOD)[0] == 200


def test_out_of_time_the_incoming_order_is_the_answer(policy):
  policy.gate.clear()
  with live.serving(policy, seconds=60.0) as service:
    status, found, _ = service.rank(GOOD, GOOD, timeout=0.05)
    assert status == 200
    for answer in found['answers']:
      assert answer['timed_out']
      assert answer['ranking'] == GOOD['candidates']
      assert answer['order'] == [0, 1, 2]
      assert answer['verdict'] is None
      assert answer['scores'] == [None] * 3
    late = 'gr2_slates_total{mode="score",outcome="timed_out"}'
    assert service.metric(late) == 2
    policy.gate.set()
    _, found, _ = service.rank(GOOD)
    assert not found['answers'][0]['timed_out']
    assert found['answers'][0]['order'] == [2, 1, 0]


def test_a_full_queue_refuses_and_recovers(policy):
  policy.gate.clear()
  with live.serving(policy, seconds=60.0, queue=4, slates=4) as service:
    first = live.aside(service.rank, GOOD)
    assert policy.entered.wait(60)
    waiting = live.aside(service.rank, GOOD, GOOD, GOOD)
    live.until(lambda: service.metric('gr2_queue_slates') == 3)
    status, found, headers = service.rank(GOOD, GOOD)
    assert status == 503
    assert int(headers['retry-after']) >= 1
    assert found['error'] == '3 slates wait, room for 4: try again'
    refused = 'gr2_slates_total{mode="score",outcome="refused"}'
    assert service.metric(refused) == 2
    assert service.ask('GET', '/health')[0] == 200
    policy.gate.set()
    for thread in (first, waiting):
      thread.join()
      assert thread.result[0] == 200
    assert service.rank(GOOD, GOOD)[0] == 200


def test_connections_are_bounded(policy):
  with live.serving(policy, connections=3) as service:
    idle = [
      socket.create_connection(('127.0.0.1', service.port), 60)
      for _ in range(3)
    ]
    live.until(lambda: len(service.server.server_state.connections) == 3)
    assert service.ask('GET', '/health')[0] == 503
    for client in idle:
      client.close()
    live.until(lambda: not service.server.server_state.connections)
    assert service.ask('GET', '/health')[0] == 200


def test_at_its_end_the_service_answers_pending_requests(policy):
  policy.gate.clear()
  with live.serving(policy, seconds=60.0) as service:
    first = live.aside(service.rank, GOOD)
    assert policy.entered.wait(60)
    second = live.aside(service.rank, GOOD, GOOD)
    live.until(lambda: service.metric('gr2_queue_slates') == 2)
    service.server.should_exit = True
    live.until(lambda: not service.server.servers[0].is_serving())
    with pytest.raises(OSError):
      service.rank(GOOD)
  for thread in (first, second):
    thread.join()
    assert thread.result[0] == 200
    assert not thread.result[1]['answers'][0]['timed_out']
