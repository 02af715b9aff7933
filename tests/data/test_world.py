"""The world's best order is the best, and nothing is seen before its day."""

import dataclasses

import numpy as np
import pytest

from configs import slates as slates_config
from gr2_jax.data.sources import world


def config(**changes):
  section = slates_config.section(test=True)
  section.source = 'world'
  section.world.update(changes)
  return section


@pytest.fixture(scope='module')
def log():
  return world.load(config())


def ndcg(grades, order, k=5):
  gain = 2.0 ** np.take_along_axis(grades, order, axis=1) - 1
  discount = 1 / np.log2(np.arange(2, 2 + k))
  best = -np.sort(-(2.0**grades - 1), axis=1)
  ideal = (best[:, :k] * discount).sum(1)
  kept = ideal > 0
  return ((gain[:, :k] * discount).sum(1)[kept] / ideal[kept]).mean()


def test_best_order_beats_incoming_order_which_beats_random(log):
  shown = log.impressions
  grades = shown.grades.astype(float)
  best = ndcg(grades, np.argsort(-shown.utility, axis=1))
  incoming = ndcg(grades, np.argsort(-shown.scores, axis=1))
  shuffled = np.random.default_rng(0).random(grades.shape).argsort(axis=1)
  assert best > incoming + 0.1
  assert incoming > ndcg(grades, shuffled) + 0.02


def test_items_are_absent_before_their_day(log):
  day = (log.times - world.START) // world.DAY
  first = np.full(len(log.catalog), 10**6)
  np.minimum.at(first, log.items, day)
  late = np.flatnonzero(log.catalog.years == 2021)
  assert len(late)
  assert first[late].min() >= 1
  shown_day = (log.impressions.times - world.START) // world.DAY
  early = log.impressions.candidates[shown_day == 0]
  assert not np.isin(early, late).any()


def test_some_users_appear_later(log):
  first = np.array([t[0] for t in np.split(log.times, log.offsets()[1:-1])])
  assert (first > world.START + world.DAY).any()


def test_grades_follow_utility(log):
  gain = 2.0**log.impressions.grades - 1
  unbiased = world.load(config(position_bias=0.0)).impressions
  gain = 2.0**unbiased.grades - 1
  assert gain.mean() == pytest.approx(unbiased.utility.mean(), abs=0.05)


def test_position_bias_hides_low_ranks_in_training_only():
  biased = world.load(config(position_bias=2.0)).impressions
  part = world.splits.user_parts(200, config())[biased.users]
  gap = 2.0**biased.grades - 1 - biased.utility
  assert gap[part == 0][:, 5:].mean() < -0.3
  assert abs(gap[part > 0][:, 5:].mean()) < 0.1


def test_the_seed_decides_everything(log):
  again = world.load(config())
  for field in dataclasses.fields(log.impressions):
    np.testing.assert_array_equal(
      getattr(again.impressions, field.name),
      getattr(log.impressions, field.name),
    )
  np.testing.assert_array_equal(again.items, log.items)
  other = config()
  other.split_seed = 1
  assert not np.array_equal(world.load(other).items[:50], log.items[:50])
