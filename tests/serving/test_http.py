"""The HTTP service: answers, refusals and reloads, over real sockets."""

import json

import pytest

from gr2_jax.serving import reranker as reranker_lib

from . import live
from .live import GOOD, StubPolicy

TOKEN = 'sixteen letters..'
ADMIN = {'authorization': f'Bearer {TOKEN}'}


@pytest.fixture
def policy():
  return StubPolicy()


@pytest.fixture
def service(policy):
  with live.serving(
    policy,
    token=TOKEN,
    slates=8,
    history=10,
    queue=8,
    seconds=60.0,
    body_bytes=4096,
  ) as found:
    yield found


def test_slates_are_answered_in_their_order(service):
  status, found, _ = service.rank(GOOD, GOOD | {'id': 'x'}, mode='rank')
  assert status == 200
  assert found['artifact'] == 'rl-00000000'
  first, second = found['answers']
  assert first['ranking'] == [7, 'b', 'a']
  assert first['order'] == [2, 1, 0]
  assert (first['id'], second['id']) == (1, 'x')
  assert {a['mode'] for a in found['answers']} == {'rank'}
  assert not any(a['timed_out'] for a in found['answers'])


def test_the_first_mode_is_the_default(service):
  _, found, _ = service.rank(GOOD)
  assert found['answers'][0]['mode'] == 'score'


def test_grades_and_times_of_a_history_are_accepted(service):
  told = {'history_grades': [2], 'history_times': [None], 'time': 9}
  status, found, _ = service.rank(GOOD | told)
  assert (status, found['answers'][0]['unknown_history']) == (200, 0)


def test_unknown_items_are_flagged(service):
  slate = {'history': ['c', 'gone'], 'candidates': ['a', 'new', 'b']}
  _, found, _ = service.rank(slate)
  (answer,) = found['answers']
  assert answer['unknown_history'] == 1
  assert answer['unknown_candidates'] == ['new']
  assert service.metric('gr2_unknown_candidates_total') == 1


def test_described_items_are_flagged(service, policy):
  items = [{'item_id': 'new', 'title': 'A new one'}]
  slate = {'history': ['c', 'new'], 'candidates': ['a', 'new'], 'items': items}
  _, found, _ = service.rank(slate)
  (answer,) = found['answers']
  assert answer['described_candidates'] == ['new']
  assert answer['unknown_candidates'] == []
  assert answer['unknown_history'] == 0
  assert service.metric('gr2_described_candidates_total') == 1
  policy.unreadable = 'tokenizer-1: too old'
  _, found, _ = service.rank(slate)
  (answer,) = found['answers']
  assert answer['described_candidates'] == []
  assert answer['unknown_candidates'] == ['new']
  _, health, _ = service.ask('GET', '/health')
  assert health['described_items'] == 'unknown'


@pytest.mark.parametrize(
  ('body', 'message'),
  [
    (b'', 'the body is not valid JSON'),
    (b'{"slates": [', 'the body is not valid JSON'),
    (b'\xff\xfe\x00', 'the body is not valid JSON'),
    (b'[' * 4000, 'the body is not valid JSON'),
    (b'1' * 4090, 'not valid JSON|not a JSON object'),
    (b'[]', 'the body: not a JSON object: write'),
    (b'{}', "field 'slates': missing: every body needs it"),
    ({'slates': []}, "field 'slates': an empty list: give one or more"),
    (
      {'slates': [GOOD] * 9},
      "field 'slates': a list of 9, room for 8: send more in",
    ),
    ({'slate': GOOD}, "field 'slate': unknown: known are slates, mode"),
    ({'slates': [GOOD], 'mode': 'fast'}, "'mode': 'fast': it must be one of"),
    ({'slates': [GOOD], 'mode': ['x']}, "field 'mode': .*one of score, rank"),
    ({'slates': [GOOD], 'timeout': 0}, "field 'timeout': 0: it must be a"),
    ({'slates': [GOOD], 'timeout': 61}, "'timeout': 61: .* at most 60"),
    ({'slates': [GOOD], 'timeout': True}, "field 'timeout': True: it must"),
    ({'slates': [GOOD], 'timeout': float('nan')}, "'timeout': nan: it must be"),
    ({'slates': [GOOD, 7]}, r'slates\[1\]: not a JSON object: write'),
    (
      {'slates': [GOOD | {'candidates': list('abcdef')}]},
      r"slates\[0\], field 'candidates': a list of 6, room for 5: cut",
    ),
    (
      {'slates': [GOOD | {'history': ['a'] * 11}]},
      r"slates\[0\], field 'history': a list of 11, room for 10: send the last",
    ),
    (
      {'slates': [GOOD, GOOD | {'history_grades': [3]}]},
      r"slates\[1\], field 'history_grades': 3: each must be 1 or 2",
    ),
    (
      {'slates': [GOOD | {'history_times': [1, 2]}]},
      r"slates\[0\], field 'history_times': 2 values, but history has 1",
    ),
    (
      {'slates': [GOOD | {'candidates': ['new', 'new']}]},
      r"slates\[0\], field 'candidates': 'new' again: each once",
    ),
    (
      {'slates': [GOOD, GOOD | {'items': [{'item_id': 'new'}]}]},
      r"slates\[1\], items\[0\], field 'title': missing: every description",
    ),
    (
      {'slates': [GOOD, GOOD | {'Time': 1, 'hystory_times': [3]}]},
      r"slates\[1\], fields 'Time', 'hystory_times': unknown: known are cand",
    ),
  ],
)
def test_a_bad_request_names_field_and_cure(service, body, message):
  status, found, _ = service.ask('POST', '/rank', body)
  assert status == 400
  with pytest.raises(AssertionError, match=message):
    raise AssertionError(found['error'])
  assert service.rank(GOOD)[0] == 200


def test_any_text_comes_back(service):
  name = '\ud800\x00\u2028<b>'
  slate = GOOD | {'id': name, 'candidates': ['a', name]}
  status, found, _ = service.rank(slate)
  assert (status, found['answers'][0]['id']) == (200, name)
  assert found['answers'][0]['unknown_candidates'] == [name]
  status, found, _ = service.rank(GOOD, mode=name)
  assert status == 400


def test_unknown_paths_and_methods(service):
  status, found, _ = service.ask('GET', '/nowhere')
  assert (status, found) == (404, {'error': 'Not Found'})
  status, _, headers = service.ask('GET', '/rank')
  assert (status, headers['allow']) == (405, 'POST')
  assert service.ask('POST', '/rank/', b'{}')[0] == 404
  assert service.ask('GET', '/example')[0] == 404  # It shows people's data.


def test_health_names_the_policy(service):
  status, found, _ = service.ask('GET', '/health')
  assert status == 200
  assert found == {
    'status': 'serving',
    'artifact': 'rl-00000000',
    'modes': ['score', 'rank'],
    'candidates': 5,
    'described_items': 'ranked',
  }


def test_metrics_count_what_was_answered(service):
  service.rank(GOOD, GOOD, mode='rank')
  service.ask('POST', '/rank', b'{')
  ranked = 'gr2_slates_total{mode="rank",outcome="ranked"}'
  assert service.metric(ranked) == 2
  assert service.metric('gr2_prefills_total{mode="rank"}') == 2
  assert service.metric('gr2_rank_seconds_count{mode="rank"}') == 1
  assert service.metric('gr2_batch_slates_sum{mode="rank"}') == 2
  for status in ('200', '400'):
    line = f'gr2_requests_total{{route="/rank",status="{status}"}}'
    assert service.metric(line) == 1
  assert service.metric('gr2_policy_info{artifact="rl-00000000"}') == 1
  assert service.metric('process_resident_memory_bytes') > 1 << 20


def test_the_schema_has_the_limits_in_force(service):
  _, found, _ = service.ask('GET', '/openapi.json')
  post = found['paths']['/rank']['post']
  body = post['requestBody']['content']['application/json']['schema']
  slates = body['properties']['slates']
  assert slates['maxItems'] == 8
  assert slates['items']['properties']['candidates']['maxItems'] == 5
  fields = slates['items']['properties']
  assert fields['history']['maxItems'] == 10
  assert fields['history_grades']['items'] == {'enum': [1, 2, None]}
  assert fields['items']['maxItems'] == 35
  assert fields['items']['items']['required'] == ['item_id', 'title']
  for closed in (body, slates['items'], fields['items']['items']):
    assert closed['additionalProperties'] is False
  # A time of the history is one as the slate's is.
  moment = fields['history_times']['items']
  assert moment.items() <= fields['time'].items()
  assert body['properties']['mode']['enum'] == ['score', 'rank']
  assert '/reload' in found['paths']
  assert '/example' not in found['paths']


def test_connections_are_kept(service):
  connection = service.connect()
  connection.connect()
  socket = connection.sock
  for _ in range(3):
    connection.request('POST', '/rank', json.dumps({'slates': [GOOD]}))
    assert connection.getresponse().read()
    assert connection.sock is socket
  connection.close()


def test_a_bug_is_an_answer_too_and_the_next_request_is_served(service, policy):
  policy.error = KeyError('the cause')
  status, found, _ = service.rank(GOOD)
  assert status == 500
  assert 'the cause' not in found['error']
  policy.error = None
  assert service.rank(GOOD)[0] == 200


def test_a_reload_swaps_the_policy_and_keeps_requests(
  service, policy, monkeypatch
):
  other = StubPolicy('rl-11111111')
  loads = []

  def load(path, *, beside, **kwargs):
    loads.append((path, kwargs))
    assert beside is policy
    return other

  monkeypatch.setattr(reranker_lib.Reranker, 'load', load)
  policy.gate.clear()
  under_way = live.aside(service.rank, GOOD)
  assert policy.entered.wait(60)
  waiting = live.aside(service.rank, GOOD)
  live.until(lambda: service.metric('gr2_queue_slates') == 1)
  body = {'artifact': 'rl-11111111'}
  status, found, _ = service.ask('POST', '/reload', body, ADMIN)
  assert (status, found) == (200, {'artifact': 'rl-11111111'})
  _, health, _ = service.ask('GET', '/health')
  assert health['artifact'] == 'rl-11111111'
  policy.gate.set()
  # Who was checked by the old one is answered by it.
  for thread in (under_way, waiting):
    thread.join()
    status, found, _ = thread.result
    assert (status, found['artifact']) == (200, 'rl-00000000')
  assert service.rank(GOOD)[1]['artifact'] == 'rl-11111111'
  ((path, kwargs),) = loads
  assert path == policy.artifact.parent / 'rl-11111111'
  assert kwargs == {
    'modes': ('score', 'rank'),
    'largest_batch': 4,
    'tensor': 1,
    'memory_cache_bytes': 1000,
  }
  assert service.metric('gr2_policy_info{artifact="rl-00000000"}') == 0
  assert service.metric('gr2_reloads_total{outcome="done"}') == 1


def test_a_reload_that_fails_or_hangs_leaves_the_policy(
  service, policy, monkeypatch
):
  gate = live.threading.Event()

  def load(path, **unused):
    gate.wait()
    raise ValueError(f'{path.name}: no such artifact')

  monkeypatch.setattr(reranker_lib.Reranker, 'load', load)
  body = {'artifact': 'rl-22222222'}
  first = live.aside(service.ask, 'POST', '/reload', body, ADMIN)
  live.until(lambda: service.service._reloading.locked())
  assert service.rank(GOOD)[0] == 200  # Meanwhile.
  assert service.ask('POST', '/reload', body, ADMIN)[0] == 409
  gate.set()
  first.join()
  status, found, _ = first.result
  assert status == 400
  assert found['error'] == (
    'the present policy stays: rl-22222222: no such artifact'
  )
  assert service.rank(GOOD)[1]['artifact'] == 'rl-00000000'
  assert service.metric('gr2_reloads_total{outcome="failed"}') == 1


@pytest.mark.parametrize(
  'headers',
  [{}, {'authorization': TOKEN}, {'authorization': f'Bearer {TOKEN} '[:-2]}],
)
def test_a_reload_requires_the_token(service, headers, monkeypatch):
  monkeypatch.setattr(
    reranker_lib.Reranker, 'load', lambda *_, **__: pytest.fail('loaded')
  )
  body = {'artifact': 'rl-11111111'}
  status, found, got = service.ask('POST', '/reload', body, headers)
  assert (status, got['www-authenticate']) == (401, 'Bearer')
  assert TOKEN not in found['error']


@pytest.mark.parametrize(
  'name', ['../rl-1', '/etc', 'a/b', '', '.', '..', 'x/', 7, ['x']]
)
def test_a_reload_takes_names_and_no_paths(service, name, monkeypatch):
  monkeypatch.setattr(
    reranker_lib.Reranker, 'load', lambda *_, **__: pytest.fail('loaded')
  )
  status, found, _ = service.ask('POST', '/reload', {'artifact': name}, ADMIN)
  assert status == 400
  assert 'it must be the name of a folder' in found['error']


@pytest.mark.parametrize(
  ('body', 'message'),
  [
    ([], 'not a JSON object: write {"artifact": '),
    ({}, "field 'artifact': missing"),
    ({'artifact': None}, "field 'artifact': missing"),
    ({'artefact': 'rl-1'}, "field 'artefact': unknown: known are artifact"),
  ],
)
def test_a_reload_s_body_is_checked(service, body, message):
  status, found, _ = service.ask('POST', '/reload', body, ADMIN)
  assert status == 400
  assert message in found['error']


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('/items?id=x' + '&id=x' * 256, "field 'id': a list of 257, room for 256"),
    ('/example?place=-1', "field 'place': '-1': it must be a whole number"),
    ('/example?place=1000000000', 'it must be a whole number from 0 to 9999'),
  ],
)
def test_queries_have_limits(policy, path, message):
  with live.serving(policy, examples=True) as service:
    status, found, _ = service.ask('GET', path)
  assert status == 400
  assert message in found['error']


def test_without_a_token_there_is_no_reload(policy):
  with live.serving(policy) as service:
    body = {'artifact': 'rl-11111111'}
    assert service.ask('POST', '/reload', body, ADMIN)[0] == 404
    _, schema, _ = service.ask('GET', '/openapi.json')
    assert '/reload' not in schema['paths']
