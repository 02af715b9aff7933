"""The clients of the load test, and its tables."""

import numpy as np
import pytest

pytest.importorskip('starlette', reason='needs the extra: gr2_jax[serve]')

from gr2_jax.bench import serving_load, serving_table  # noqa: E402
from gr2_jax.data import slates as slates_lib  # noqa: E402

from ..serving import live  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture
def service():
  with live.serving(live.StubPolicy(), seconds=60.0) as found:
    yield found


@pytest.mark.parametrize('tool', ['wrk', 'asyncio'])
def test_requests_of_clients_are_counted(service, tool, monkeypatch):
  if tool == 'asyncio':
    monkeypatch.setattr(serving_load.shutil, 'which', lambda _: None)
  elif serving_load.tool() != tool:
    pytest.skip('no wrk')
  row = serving_load.measure(service.url, [live.GOOD] * 3, 'rank', 2, 1.0)
  assert row['errors'] == row['late'] == 0
  assert row['slates/s'] > 0
  assert 0 < row['p50'] <= row['p95'] <= row['p99']
  assert row['prefills'] == 1.0
  assert row['decoded'] == 0.0
  assert 1.0 <= row['batch'] <= 2.0
  assert row['MB'] > 10


def test_slates_are_sent_as_they_are_stored(world):
  slates, grades, count = serving_load.slates_of(world['rl'], 7)
  test = slates_lib.read(world['slates'], 'test')
  names = slates_lib.read_catalog(world['slates']).item_ids
  index = {name: i for i, name in enumerate(names)}
  assert len(slates) == len(grades) == len(count) == 7
  for slate, grade, size in zip(slates, grades, count, strict=True):
    shown = [index[name] for name in slate['candidates']]
    length = len(slate['history'])
    (row,) = (
      row
      for row in range(len(test))
      if test.candidates[row, :size].tolist() == shown
      and test.time[row] == slate['time']
      and test.history_length[row] == length
    )
    np.testing.assert_array_equal(test.grades[row], grade)
    history = [index[name] for name in slate['history']]
    assert test.history[row, :length].tolist() == history
    assert slate['history_grades'] == test.history_grades[row, :length].tolist()
    ages = slate['time'] - np.array(slate['history_times'])
    assert test.history_ages[row, :length].tolist() == ages.tolist()


def test_refusals_are_errors(service):
  found = serving_load.drive(service.url, ['{"slates": []}'], 2, 1.0)
  assert found['errors'] == found['answers'] > 0


def test_answers_come_back_in_order_and_late_ones_as_none(service):
  slates = [live.GOOD, live.GOOD | {'candidates': ['d', 'a']}] * 9
  found = serving_load.orders(service.url, slates, 'rank')
  assert found == [[2, 1, 0], [1, 0]] * 9
  service.service.limits = live.service_lib.Limits(seconds=0.001)
  service.service.policy.gate.clear()
  assert serving_load.orders(service.url, slates[:2], 'rank') == [None, None]


def test_a_service_that_does_not_start_raises():
  with (
    pytest.raises(serving_load.NotServed, match='platform ended before'),
    serving_load.service('platform', []),
  ):
    pass


def cells(table):
  """First cell of a row -> column -> cell."""
  columns, _, *rows = (
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in table.splitlines()
  )
  return {row[0]: dict(zip(columns, row, strict=True)) for row in rows}


def row(mode, clients, rate, p50, decoded):
  return {
    'mode': mode,
    'clients': clients,
    'slates/s': rate,
    'p50': p50,
    'decoded': decoded,
  }


def test_gains_compare_with_reason_at_the_same_number_of_clients():
  rows = [
    row('score', 1, 30.0, 2.0, 0.0),
    row('score', 8, 90.0, 3.0, 0.0),
    row('rank', 1, 20.0, 4.0, 9.0),
    row('reason', 1, 10.0, 8.0, 26.0),
    row('reason', 8, 30.0, 12.0, 28.0),
  ]
  quality = {'incoming': 0.3, 'score': 0.55, 'rank': 0.5, 'reason': 0.52}
  found = cells(serving_table.gains(rows, quality))
  assert list(found) == ['incoming', 'score', 'rank', 'reason']
  assert found['score'] == {
    'mode': 'score',
    'N@5': '0.5500',
    'lost': '-0.0300',
    'decoded': '0.0',
    '/ tokens': '-',
    'x slates/s, 1': '3.00',
    'x slates/s, 8': '3.00',
    '/ p50, 1': '4.00',
    '/ p50, 8': '4.00',
  }
  assert found['rank']['/ tokens'] == '3.00'
  assert found['rank']['/ p50, 1'] == '2.00'
  assert found['rank']['x slates/s, 8'] == '-'
  assert found['incoming']['lost'] == '0.2200'
  assert found['incoming']['decoded'] == '-'


def test_without_reason_and_grades_gains_are_empty():
  found = cells(serving_table.gains([row('rank', 1, 20.0, 4.0, 9.0)], {}))
  assert found['rank'].pop('decoded') == '9.0'
  assert found['rank'].pop('mode') == 'rank'
  assert set(found['rank'].values()) == {'-'}


def test_orders_are_graded_and_compared():
  grades = np.array([[0, 0, 2], [1, 0, 0]])
  count = np.array([3, 2])
  best, worst = [[2, 0, 1], [0, 1]], [[0, 1, 2], [1, 0]]
  assert serving_table.ndcg(best, grades, count) == pytest.approx(1.0)
  found = serving_table.ndcg(worst, grades, count)
  assert found == pytest.approx((1 / np.log2(4) + 1 / np.log2(3)) / 2)
  assert np.isnan(serving_table.ndcg([best[0], None], grades, count))
  assert serving_table.agreement(best, [best[0], worst[1]]).startswith('1 of 2')
  assert serving_table.agreement(best, [None, best[1]]).startswith('1 of 1')
