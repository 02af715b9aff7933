"""Splits, labels, and statistics that never contain their own user."""

import dataclasses

import numpy as np
import pytest

from configs import slates as slates_config
from gr2_jax.data import log as log_lib
from gr2_jax.data import slates, splits
from gr2_jax.data.sources import world


def make(n_users=40, n_items=60, length=30, seed=0):
  """A log of random walks: an item is followed by a near one."""
  rng = np.random.default_rng(seed)
  catalog = log_lib.Catalog(
    tuple(map(str, range(n_items))),
    tuple(f'word{i % 7} thing{i % 5}' for i in range(n_items)),
    tuple((f'c{i % 4}',) for i in range(n_items)),
    (1990 + np.arange(n_items) % 30).astype(np.int32),
  )
  users = np.repeat(np.arange(n_users), length)
  walk = rng.integers(-3, 4, size=(n_users, length)).cumsum(axis=1)
  items = (walk + rng.integers(n_items, size=(n_users, 1))) % n_items
  times = rng.integers(10**6, 10**8, size=(n_users, length))
  return log_lib.make_log(
    catalog,
    tuple(map(str, range(n_users))),
    users,
    items.ravel(),
    np.sort(times, axis=1).ravel(),
    rng.integers(1, 3, size=users.shape),
    seed,
  )


def config(split='user', **changes):
  section = slates_config.section(test=True)
  section.split = split
  section.update(changes)
  return section


@pytest.fixture(scope='module')
def log():
  return make()


@pytest.fixture(scope='module')
def built(log):
  return slates.build(log, config())[0]


def own(part, user, before=None):
  chosen = part.user == user
  if before is not None:
    chosen &= part.time < before
  return splits.take(part, chosen)


def assert_equal(a, b, skip=()):
  for name in slates.NAMES:
    if name not in skip:
      x, y = getattr(a, name), getattr(b, name)
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y, err_msg=name)


def test_users_are_split_without_overlap(built):
  users = [set(part.user.tolist()) for part in built.values()]
  assert all(users)
  assert sum(map(len, users)) == len(set.union(*users))


def test_labels_are_the_next_items_and_candidates_are_new(log, built):
  offsets = log.offsets()
  part = built['train']
  assert len(part) > 20
  for row in range(len(part)):
    begin, end = offsets[part.user[row] : part.user[row] + 2]
    place = begin + np.searchsorted(log.times[begin:end], part.time[row])
    following = log.items[place : min(place + 10, end)].tolist()
    grades = log.grades[place : min(place + 10, end)].tolist()
    for item, grade in zip(part.candidates[row], part.grades[row], strict=True):
      seen = [g for i, g in zip(following, grades, strict=True) if i == item]
      assert grade == max(seen, default=0)
    past = log.items[begin:place]
    assert not np.isin(part.candidates[row], past).any()
    length = part.history_length[row]
    np.testing.assert_array_equal(
      part.history[row, :length], past[-20:][-length:]
    )
    assert (part.history[row, length:] == -1).all()
    np.testing.assert_array_equal(
      part.history_grades[row, :length], log.grades[begin:place][-length:]
    )
    np.testing.assert_array_equal(
      part.history_ages[row, :length],
      part.time[row] - log.times[begin:place][-length:],
    )
    assert (part.history_ages[row, :length] >= 0).all()
    assert not part.history_grades[row, length:].any()
    assert (part.history_ages[row, length:] == -1).all()
  assert {1, 2} <= set(part.history_grades.ravel().tolist())


def test_every_slate_has_a_positive_and_a_negative(built):
  for part in built.values():
    real = part.candidates >= 0
    assert (part.grades > 0).any(axis=1).all()
    assert ((part.grades == 0) & real).any(axis=1).all()
    np.testing.assert_array_equal(real.sum(axis=1), part.count)
    assert (part.evidence[~real] == 0).all()
    assert np.isfinite(part.evidence).all()
    assert (np.diff(part.scores, axis=1) <= 0).all()


def test_a_users_future_changes_nothing_before_it(log, built):
  for user in np.unique(built['train'].user)[:3]:
    begin, end = log.offsets()[user : user + 2]
    cut = end - 12
    items = log.items.copy()
    items[cut:end] = (items[cut:end] + 17) % len(log.catalog)
    other = dataclasses.replace(log, items=items)
    changed = slates.build(other, config())[0]['train']
    before = log.times[cut - 10]
    expected = own(built['train'], user, before)
    assert len(expected)
    assert_equal(own(changed, user, before), expected)


def test_statistics_leave_the_own_user_out(log):
  settings = config()
  fold = splits.folds(len(log.user_ids), settings)
  known = splits.known_rows(log, settings)
  parts = splits.user_parts(len(log.user_ids), settings)
  assert not known[parts[log.users] > 0].any()
  for user in np.flatnonzero(parts == 0):
    rows = known & (fold[log.users] != fold[user])
    assert rows.any()
    assert not rows[log.users == user].any()


def test_evaluation_users_touch_no_training_slate(log, built):
  parts = splits.user_parts(len(log.user_ids), config())
  items = np.where(
    parts[log.users] > 0, (log.items + 5) % len(log.catalog), log.items
  )
  other, _ = slates.build(dataclasses.replace(log, items=items), config())
  assert_equal(other['train'], built['train'])


def test_time_split_is_leave_one_out_for_short_histories():
  assert splits.time_cuts(9) == (7, 8)
  assert splits.time_cuts(5) == (3, 4)
  assert splits.time_cuts(300) == (250, 280)


def test_time_split_trains_on_the_past(log):
  built, _ = slates.build(log, config('time'))
  for user in range(len(log.user_ids)):
    times = [own(part, user).time for part in built.values()]
    for earlier, later in zip(times[:-1], times[1:], strict=True):
      if len(earlier) and len(later):
        assert earlier.max() < later.min()
  items = log.items.copy()
  late = log.positions() >= splits.time_cuts(30)[1]
  items[late] = (items[late] + 9) % len(log.catalog)
  other, _ = slates.build(dataclasses.replace(log, items=items), config('time'))
  assert_equal(other['train'], built['train'])
  assert_equal(other['validation'], built['validation'])


def test_ties_do_not_follow_file_order():
  users, times = np.zeros(200, int), np.zeros(200, int)
  items = np.arange(200)
  args = (make().catalog, ('u',), users)
  first = log_lib.make_log(*args, items, times, times + 1, 0)
  share = (np.diff(first.items) > 0).mean()
  assert 0.35 < share < 0.65
  turned = log_lib.make_log(*args, items[::-1], times, times + 1, 0)
  np.testing.assert_array_equal(turned.items, first.items)
  other = log_lib.make_log(*args, items, times, times + 1, 1)
  assert not np.array_equal(other.items, first.items)


def test_core_keeps_the_largest_dense_part():
  users = np.array([0, 0, 0, 1, 1, 1, 2])
  items = np.array([0, 1, 2, 0, 1, 2, 0])
  np.testing.assert_array_equal(
    log_lib.core(users, items, 2), [1, 1, 1, 1, 1, 1, 0]
  )


def test_impressions_are_the_slates_by_descending_score():
  settings = config()
  settings.source = 'world'
  settings.world.update(n_users=60, visits=4)
  log = world.load(settings)
  for part in slates.build(log, settings)[0].values():
    assert (np.diff(part.scores, axis=1) <= 0).all()
    assert np.isfinite(part.utility).all()


def test_written_slates_read_back_bit_for_bit(tmp_path, log, built):
  slates.write(tmp_path / 'd', built, log.catalog, {'note': 1})
  for name, part in built.items():
    assert_equal(slates.read(tmp_path / 'd', name), part)
  source = slates.SlateSource(tmp_path / 'd', 'train')
  assert len(source) == len(built['train'])
  record = source[7]
  for name in slates.NAMES:
    expected = getattr(built['train'], name)[7]
    assert record[name].shape == expected.shape
    np.testing.assert_array_equal(record[name], expected)
  catalog = slates.read_catalog(tmp_path / 'd')
  assert catalog.titles == log.catalog.titles
  assert catalog.categories == log.catalog.categories
  meta = slates.read_meta(tmp_path / 'd')
  assert meta['slates']['train'] == len(built['train'])
  assert meta['note'] == 1
  with pytest.raises(FileExistsError, match='not overwritten'):
    slates.write(tmp_path / 'd', built, log.catalog, {})


def test_an_empty_split_writes_nothing(tmp_path, log, built):
  empty = splits.take(built['test'], np.zeros(0, int))
  with pytest.raises(log_lib.DataError, match="split 'test' has no slate"):
    slates.write(tmp_path / 'd', built | {'test': empty}, log.catalog, {})
  assert not (tmp_path / 'd').exists()


def test_the_seed_decides_everything(log, built):
  again, _ = slates.build(log, config())
  for name, part in built.items():
    assert_equal(again[name], part)
