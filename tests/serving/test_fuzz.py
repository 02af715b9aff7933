"""The service answers any body as its OpenAPI document describes."""

import json
import string

import hypothesis
import pytest
from hypothesis import strategies as st

from . import live

pytestmark = pytest.mark.slow

schemathesis = pytest.importorskip(
  'schemathesis', reason='needs the extra: gr2_jax[dev]'
)
TOKEN = 'sixteen letters..'


@pytest.fixture(scope='module')
def service(reranker):
  with live.serving(
    reranker, token=TOKEN, examples=True, seconds=60.0
  ) as found:
    yield found


@pytest.fixture(scope='module')
def described(service):
  return schemathesis.openapi.from_url(f'{service.url}/openapi.json')


@pytest.mark.parametrize('mode', list(schemathesis.GenerationMode))
@pytest.mark.parametrize(
  ('path', 'method'),
  [
    ('/rank', 'POST'),
    ('/reload', 'POST'),
    ('/items', 'GET'),
    ('/example', 'GET'),
  ],
)
def test_answers_are_as_described(described, path, method, mode):
  operation = described[path][method]

  @hypothesis.given(operation.as_strategy(generation_mode=mode))
  @hypothesis.settings(
    max_examples=10, suppress_health_check=list(hypothesis.HealthCheck)
  )
  def ask(case):
    case.call_and_validate(
      headers={'authorization': f'Bearer {TOKEN}'},
      excluded_checks=[
        # A schema cannot say that lists are as long as each other.
        schemathesis.checks.positive_data_acceptance,
        # Bodies are read as JSON whatever they are called.
        schemathesis.checks.negative_data_rejection,
      ],
    )

  ask()


def test_every_path_is_described(described, service):
  paths = service.ask('GET', '/openapi.json')[1]['paths']
  assert set(paths) == {
    '/rank',
    '/reload',
    '/items',
    '/example',
    '/health',
    '/metrics',
    '/openapi.json',
    '/',
  }


def anything():
  leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)
  )
  return st.recursive(
    leaves,
    lambda inner: st.one_of(
      st.lists(inner, max_size=3),
      st.dictionaries(st.text(string.ascii_letters, max_size=3), inner),
    ),
    max_leaves=6,
  )


def bodies(names):
  """Right ones, and nearly right ones."""
  name = st.sampled_from(names)
  new = st.sampled_from(['new', 7])
  strange = st.one_of(name, name, new, st.text(max_size=4), st.integers())
  text = st.text(max_size=40)
  item = st.fixed_dictionaries(
    {'item_id': new, 'title': st.one_of(text, text.map('Red '.__add__))},
    optional={
      'categories': st.lists(text, max_size=3),
      'brand': st.one_of(st.none(), text),
      'year': st.integers(0, 9999),
    },
  )
  right = {
    'history': st.lists(strange, max_size=6),
    'candidates': st.lists(strange, min_size=1, max_size=5, unique_by=str),
    'items': st.lists(item, max_size=2, unique_by=lambda x: str(x['item_id'])),
  }
  wrong = {
    'history': st.lists(st.one_of(strange, st.none()), max_size=6),
    'candidates': st.lists(st.one_of(strange, st.none()), max_size=6),
    'history_grades': st.lists(st.sampled_from([1, 2, 3, None]), max_size=6),
    'history_times': st.lists(st.one_of(st.floats(), st.none()), max_size=6),
    'scores': st.lists(st.floats(), max_size=6),
    'items': st.one_of(anything(), st.lists(st.one_of(item, anything()))),
    'time': st.one_of(st.integers(), st.floats()),
    'id': anything(),
    'user': anything(),
  }

  def body(slate, modes):
    return st.fixed_dictionaries(
      {'slates': st.lists(slate, min_size=1, max_size=3)},
      optional={'mode': st.sampled_from(modes)},
    )

  good = body(st.fixed_dictionaries(right), ['score', 'rank', 'reason'])
  flawed = st.fixed_dictionaries({}, optional=wrong)
  return st.one_of(good, body(st.one_of(flawed, anything()), ['score', 'x']))


def test_slates_that_are_nearly_right_are_answered_or_refused(
  service, reranker
):
  statuses = set()

  @hypothesis.given(bodies(reranker.knowledge.log.catalog.item_ids[:8]))
  @hypothesis.settings(max_examples=40)
  def ask(body):
    status, found, _ = service.ask('POST', '/rank', json.dumps(body).encode())
    statuses.add(status)
    assert status in (200, 400)
    if status == 400:
      assert found['error']
      return
    for row, answer in zip(body['slates'], found['answers'], strict=True):
      count = len(row['candidates'])
      assert sorted(answer['order']) == list(range(count))
      assert not answer['timed_out']
      described = {str(x['item_id']) for x in row.get('items') or ()}
      for candidate in answer['described_candidates']:
        assert str(candidate) in described

  ask()
  assert statuses == {200, 400}
