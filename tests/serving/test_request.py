"""Slates from outside: errors name the line; evidence equals the data set's."""

import dataclasses
import json

import numpy as np
import pytest

from configs import slates as slates_config
from gr2_jax.data import log as log_lib
from gr2_jax.data import slates
from gr2_jax.data.sources import world
from gr2_jax.serving import knowledge
from gr2_jax.serving import request as request_lib

CATALOG = log_lib.Catalog(
  ('a', 'b', 'c', '7'), ('',) * 4, ((),) * 4, np.zeros(4, np.int32)
)
GOOD = {'history': ['c', 'gone', 7], 'candidates': ['b', 'a']}


def write(path, *rows):
  path = path / 'slates.jsonl'
  lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
  path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
  return path


def read(path, width=3):
  return list(request_lib.read(path, CATALOG, width))


def test_fields_and_their_defaults(tmp_path):
  full = GOOD | {'scores': [0.5, -1], 'time': 9.5, 'id': 'x', 'user': 3}
  first, second = read(write(tmp_path, GOOD, '', full))
  assert (first.id, second.id) == (1, 'x')
  assert first.names == ('b', 'a')
  assert first.candidates == (1, 0)
  assert first.history == (2, 3)
  assert first.unknown == 1
  assert first.scores[0] > first.scores[1]
  assert (first.time, second.time) == (None, 9)
  assert second.scores == (0.5, -1.0)
  assert (first.grades, first.times) == ((0, 0), (None, None))


def test_grades_and_times_stay_with_their_items(tmp_path):
  rows = [
    GOOD | {'history_grades': [1, 2, 2], 'history_times': [5, 6.5, 7]},
    GOOD | {'history_grades': [None, 1, None], 'history_times': [1, 2, None]},
    GOOD | {'history_grades': None, 'history_times': None},
    {'candidates': ['a'], 'history': [], 'history_grades': []},
  ]
  found = read(write(tmp_path, *rows))
  # The second item is none of the catalog.
  assert [r.grades for r in found] == [(1, 2), (0, 0), (0, 0), ()]
  assert [r.times for r in found] == [(5, 7), (1, None), (None, None), ()]


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('candidates', ['a', 'gone'], "'gone' is not in the catalog: remove it"),
    ('candidates', ['a', 'b', 'a'], "'a' again: each once"),
    ('candidates', ['7', 7], "'7' again: each once"),
    ('candidates', [], 'an empty list: give one or more'),
    ('candidates', list('abc7'), 'a list of 4, room for 3: cut the list'),
    ('candidates', 'a', "'a': it must be a list"),
    ('candidates', [['a']], r"\['a'\]: each must be text or a whole number"),
    ('history', None, 'missing: every slate needs it'),
    ('history', [1.5], '1.5: each must be text or a whole number'),
    ('history', [True], 'True: each must be text or a whole number'),
    ('scores', [1], '1 values, but candidates has 2: give one for each'),
    ('scores', 1, '1: it must be a list'),
    ('scores', [1, float('nan')], 'nan: each must be a finite number'),
    ('scores', [1, float('inf')], 'inf: each must be a finite number'),
    ('scores', [1, 1e39], '1e\\+39: each must be a finite number'),
    ('scores', [1, '2'], "'2': each must be a finite number"),
    ('scores', [1, None], 'None: each must be a finite number'),
    ('time', 'today', "'today': it must be a number within"),
    ('time', float('nan'), 'nan: it must be a number within'),
    ('time', 1e300, '1e\\+300: it must be a number within'),
    ('history_grades', [1, 2], '2 values, but history has 3: give one'),
    ('history_grades', 2, '2: it must be a list'),
    ('history_grades', [1, 0, 2], '0: each must be 1 or 2, or null'),
    ('history_grades', [1, 2, True], 'True: each must be 1 or 2, or null'),
    (
      'history_grades',
      [1, 2, [1]],
      r'\[1\]: each must be 1 or 2, or null',
    ),
    ('history_grades', [1, '2', 2], "'2': each must be 1 or 2, or null"),
    ('history_times', [1], '1 values, but history has 3: give one'),
    ('history_times', {}, '{}: it must be a list'),
    ('history_times', [1, 'x', 2], "'x': each must be a number within"),
    ('history_times', [1, 2, True], 'True: each must be a number within'),
    (
      'history_times',
      [1, float('nan'), 2],
      'nan: each must be a number within',
    ),
    ('history_times', [2**54, 1, 2], f'{2**54}: each must be a number'),
    ('id', ['x'], 'it must be text or a whole number'),
    ('user', {}, 'it must be text or a whole number'),
  ],
)
def test_a_bad_field_names_file_line_field_and_cure(
  tmp_path, field, value, message
):
  path = write(tmp_path, GOOD, GOOD | {field: value})
  place = f"slates.jsonl, line 2, field '{field}': .*"
  with pytest.raises(log_lib.DataError, match=place + message):
    read(path)


@pytest.mark.parametrize('field', ['history', 'candidates'])
def test_a_missing_field_is_named(tmp_path, field):
  row = {key: value for key, value in GOOD.items() if key != field}
  message = f"line 1, field '{field}': missing: every slate needs it"
  with pytest.raises(log_lib.DataError, match=message):
    read(write(tmp_path, row))


def test_misspelt_fields_of_a_slate_are_all_named(tmp_path):
  row = GOOD | {'scors': [2, 1], 'histroy_times': [1, 2, 3], 'time': 5}
  message = (
    "slates.jsonl, line 2, fields 'scors', 'histroy_times': unknown: known are "
    'candidates, history, items, history_grades, history_times, scores, time'
  )
  with pytest.raises(log_lib.DataError, match=message):
    read(write(tmp_path, GOOD, row))
  many = GOOD | {f'x{i}' * 40: 0 for i in range(1000)}
  with pytest.raises(
    log_lib.DataError, match="'x4x4.*[.]{3}, [.]{3}: unkn"
  ) as e:
    read(write(tmp_path, many))
  assert len(str(e.value)) < 800


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{"history": [], "candi', 'not valid JSON .* cut off here'),
    ('[1, 2]', 'not a JSON object'),
    ('[' * 100_000, 'not valid JSON'),
  ],
)
def test_a_malformed_or_torn_line_is_named(tmp_path, text, message):
  path = write(tmp_path, GOOD, GOOD, text)
  with pytest.raises(log_lib.DataError, match=f'line 3: {message}'):
    read(path)


def test_bytes_that_are_not_text_are_named(tmp_path):
  path = write(tmp_path, GOOD)
  path.write_bytes(path.read_bytes() + b'{"id": "\xff\xfe"}\n')
  with pytest.raises(log_lib.DataError, match='line 2: not valid JSON'):
    read(path)


def test_an_empty_and_a_missing_file_are_named(tmp_path):
  with pytest.raises(log_lib.DataError, match='at least one slate'):
    read(write(tmp_path, ''))
  for path in (tmp_path / 'no.jsonl', tmp_path):
    with pytest.raises(log_lib.DataError, match='no such file'):
      read(path)


def walks(config):
  """A log whose slates the pre-ranker makes; many times are tied."""
  rng = np.random.default_rng(0)
  n_users, length, n_items = 40, 30, 60
  catalog = log_lib.Catalog(
    tuple(f'item-{i}' for i in range(n_items)),
    tuple(f'word{i % 7} thing{i % 5}' for i in range(n_items)),
    tuple((f'c{i % 4}',) for i in range(n_items)),
    (1990 + np.arange(n_items) % 30).astype(np.int32),
  )
  walk = rng.integers(-3, 4, size=(n_users, length)).cumsum(axis=1)
  items = (walk + rng.integers(n_items, size=(n_users, 1))) % n_items
  times = np.sort(rng.integers(10, size=(n_users, length)), axis=1) * 10**7
  return log_lib.make_log(
    catalog,
    tuple(map(str, range(n_users))),
    np.repeat(np.arange(n_users), length),
    items.ravel(),
    times.ravel(),
    np.ones(n_users * length),
    config.split_seed,
  )


@pytest.fixture(scope='module', params=['impressions', 'user', 'time'])
def data(request):
  config = slates_config.section(test=True)
  if request.param == 'impressions':
    config.world.update(n_items=60, n_users=40, visits=4, clusters=4)
    config.candidates = 6
    return world.load(config), config
  config.split = request.param
  config.history = 7
  return walks(config), config


@pytest.fixture(scope='module')
def stored(data):
  return slates.build(*data)[0]['test']


def test_exported_test_slates_have_the_stored_evidence(data, stored, tmp_path):
  log, config = data
  facts = knowledge.fit(log, config)
  path = tmp_path / 'requests.jsonl'
  request_lib.write_test(path, log, config, facts.statistics)
  width = stored.candidates.shape[1]
  found = request_lib.to_slates(
    list(request_lib.read(path, log.catalog, width)),
    log,
    facts,
    width,
    config.history,
  )
  np.testing.assert_allclose(
    found.evidence, stored.evidence, rtol=1e-6, atol=1e-6
  )
  assert np.abs(stored.evidence).sum() > 0
  for name in slates.NAMES:
    ours, theirs = getattr(found, name), getattr(stored, name)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
    if name not in ('user', 'grades', 'utility', 'evidence'):
      np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_a_record_goes_out_and_comes_in_as_it_is(data, stored):
  log, config = data
  # Of some items it is not known how they were taken, or when.
  grades, ages = stored.history_grades.copy(), stored.history_ages.copy()
  grades[::2, 0], ages[1::2, 1] = 0, -1
  stored = dataclasses.replace(stored, history_grades=grades, history_ages=ages)
  names = log.catalog.item_ids
  index = {name: i for i, name in enumerate(names)}
  width = stored.candidates.shape[1]
  asked = []
  for row in range(len(stored)):
    record = {name: getattr(stored, name)[row] for name in slates.NAMES}
    sent = json.loads(json.dumps(request_lib.of_record(record, names)))
    fields = request_lib.slate(width).check(sent)
    asked.append(request_lib.resolve(fields, row, index))
  found = request_lib.to_slates(
    asked, log, knowledge.fit(log, config), width, config.history
  )
  for name in slates.NAMES:
    # The evidence knows of all that came before; a record has the last of it.
    if name not in ('user', 'grades', 'utility', 'evidence'):
      np.testing.assert_array_equal(
        getattr(found, name), getattr(stored, name), err_msg=name
      )
  assert (found.history_ages > 0).any()


def test_an_empty_history_has_finite_evidence(data, tmp_path):
  log, config = data
  names = log.catalog.item_ids
  path = write(
    tmp_path,
    {'history': [], 'candidates': names[:3]},
    {'history': ['gone'], 'candidates': names[3:4], 'time': 0},
  )
  asked = list(request_lib.read(path, log.catalog, 5))
  found = request_lib.to_slates(asked, log, knowledge.fit(log, config), 5, 4)
  assert np.isfinite(found.evidence).all()
  assert found.count.tolist() == [3, 1]
  assert found.time.tolist() == [log.times.max(), 0]
  assert found.history_length.tolist() == [0, 0]
  assert (found.history == -1).all()
  assert not found.history_grades.any()
  assert (found.history_ages == -1).all()


def test_ages_are_counted_to_the_slate(data, tmp_path):
  log, config = data
  names = list(log.catalog.item_ids)
  asked = {'candidates': names[:2], 'history': [*names[2:5], 'gone', names[5]]}
  told = {
    'history_grades': [1, None, 2, 1, 2],
    'history_times': [3, 60, None, 5, 40],
  }
  path = write(
    tmp_path, asked | told | {'time': 50}, asked | told, asked | {'time': 50}
  )
  rows = list(request_lib.read(path, log.catalog, 5))
  found = request_lib.to_slates(rows, log, knowledge.fit(log, config), 5, 3)
  # The last three that the catalog has; none is older than the slate is.
  assert found.history.tolist() == [[3, 4, 5]] * 3
  assert found.history_grades.tolist() == [[0, 2, 2]] * 2 + [[0, 0, 0]]
  now = int(log.times.max())
  assert found.history_ages.tolist() == [
    [0, -1, 10],
    [max(now - 60, 0), -1, now - 40],
    [-1, -1, -1],
  ]
