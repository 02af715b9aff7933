"""The load tables: what is counted, and what is compared with what."""

import numpy as np
import pytest

pytest.importorskip('starlette', reason='needs the extra: gr2_jax[serve]')

from gr2_jax.bench import serve  # noqa: E402
from gr2_jax.data import slates as slates_lib  # noqa: E402

from ..serving import live  # noqa: E402

ROW = {'mode': 'score', 'clients': 8, 'slates/s': 30.0, 'p50': 2.0}


@pytest.fixture
def service():
  with live.serving(live.StubPolicy(), seconds=60.0) as found:
    yield found


@pytest.mark.parametrize('tool', ['wrk', 'asyncio'])
def test_clients_ask_and_are_counted(service, tool, monkeypatch):
  if tool == 'asyncio':
    monkeypatch.setattr(serve.shutil, 'which', lambda _: None)
  elif not serve.shutil.which(tool):
    pytest.skip('no wrk')
  row = serve.measure(service.url, [live.GOOD] * 3, 'rank', 2, 1.0)
  assert row['errors'] == row['late'] == 0
  assert row['slates/s'] > 0
  assert 0 < row['p50'] <= row['p95'] <= row['p99']
  assert row['prefills'] == 1.0
  assert row['decoded'] == 0.0
  assert 1.0 <= row['batch'] <= 2.0
  assert row['MB'] > 10


def test_slates_are_asked_as_they_are_stored(world):
  asked, grades, count = serve._slates(world['rl'], 7)
  test = slates_lib.read(world['slates'], 'test')
  names = slates_lib.read_catalog(world['slates']).item_ids
  index = {name: i for i, name in enumerate(names)}
  assert len(asked) == len(grades) == len(count) == 7
  for slate, grade, size in zip(asked, grades, count, strict=True):
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
    told = test.history_grades[row, :length].tolist()
    assert slate['history_grades'] == told
    ages = slate['time'] - np.array(slate['history_times'])
    assert test.history_ages[row, :length].tolist() == ages.tolist()


def test_refusals_are_errors(service):
  found = serve.drive(service.url, ['{"slates": []}'], 2, 1.0)
  assert found['errors'] == found['answers'] > 0


def test_rows_are_beside_reason_with_as_many_clients():
  reason = ROW | {'mode': 'reason', 'slates/s': 10.0, 'p50': 8.0}
  other = ROW | {'clients': 64}
  scored, _, alone = serve.compare([ROW, reason, other])
  assert scored['x slates/s'] == 3.0
  assert scored['x p50'] == 0.25
  assert 'x p50' not in alone
