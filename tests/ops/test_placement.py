import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr2_jax.ops import advantages, placement, rewards

from . import oracles

EXAMPLE = (np.int32([3, 1, 0, 2]), np.float32([0, 2, 0, 1]), np.int32(4))


def reward(kind, ranking, grades, count, k):
  parts = []
  if 'auc' in kind:
    parts.append(oracles.auc(ranking, grades, count))
  if 'ndcg' in kind:
    parts.append(oracles.ndcg(ranking, grades, count, k))
  return sum(parts) / len(parts)


def expected(kind, ranking, grades, count, k):
  """By enumeration of everything that may follow."""
  found = []
  for t in range(len(ranking)):
    rests = list(itertools.permutations(ranking[t:count]))
    tail = list(ranking[count:])
    head = list(ranking[: min(t, count)])
    values = [
      reward(kind, head + list(rest) + tail, grades, count, k) for rest in rests
    ]
    found.append(np.mean(values))
  return found


@pytest.mark.parametrize('kind', placement.KINDS)
@pytest.mark.parametrize('k', [2, 5])
def test_expectations_equal_an_enumeration(kind, k):
  ranking, grades, count, _ = oracles.random_slates(3, 24, 5)
  assert set(count) == {1, 2, 3, 4, 5}
  run = jax.jit(
    functools.partial(placement.expected_if_shuffled, kind=kind, k=k)
  )
  found = run(ranking, grades, count)
  wanted = [
    expected(kind, *slate, k)
    for slate in zip(ranking, grades, count, strict=True)
  ]
  np.testing.assert_allclose(found, wanted, atol=1e-6)
  assert np.ptp(wanted, axis=1).max() > 0.3
  one = placement.expected_if_shuffled(
    ranking[0], grades[0], count[0], kind=kind, k=k
  )
  np.testing.assert_allclose(one, wanted[0], atol=1e-6)


def test_the_worked_example():
  found = placement.expected_if_shuffled(*EXAMPLE, kind='auc', k=4)
  np.testing.assert_allclose(found, [0.5, 0.75, 1, 1])
  np.testing.assert_array_equal(
    placement.settled(*EXAMPLE), [False, False, True, True]
  )


def test_a_reward_without_an_expectation_is_an_error():
  with pytest.raises(ValueError, match="'rr' use rl.credit=answer"):
    placement.expected_if_shuffled(*EXAMPLE, kind='rr', k=4)


def test_settled_is_when_grades_left_are_equal():
  ranking, grades, count, _ = oracles.random_slates(4, 40, 5)
  found = np.asarray(jax.jit(placement.settled)(ranking, grades, count))
  for b, t in np.ndindex(found.shape):
    left = grades[b, ranking[b, t : count[b]]]
    assert found[b, t] == (len(set(left.tolist())) < 2)
  assert 0.2 < found.mean() < 0.9


def group(seed=0, groups=3, size=6, ranks=4):
  rng = np.random.default_rng(seed)
  total = rng.normal(size=(groups, size)).astype(np.float32)
  baseline = rng.normal(size=(groups, size, ranks)).astype(np.float32)
  baseline[..., 0] = baseline[:, :1, 0]  # Nothing placed: all alike.
  settled = rng.random((groups, size, ranks)) < 0.3
  settled[..., 0] = False
  settled[0, :, -1] = True
  return total, baseline, settled


@pytest.mark.parametrize('normalize', [False, True])
def test_placement_advantages_equal_numpy(normalize):
  total, baseline, settled = group()
  run = jax.jit(
    functools.partial(placement.placement_advantage, normalize=normalize)
  )
  found = np.asarray(run(total, baseline, settled))
  for p in range(len(total)):
    value = np.float64(total[p])[:, None] - baseline[p]
    wanted = np.zeros_like(value)
    for t in range(value.shape[1]):
      open_ = ~settled[p, :, t]
      if open_.any():
        wanted[open_, t] = value[open_, t] - value[open_, t].mean()
    if normalize:
      wanted /= np.sqrt(np.mean(wanted[~settled[p]] ** 2))
    np.testing.assert_allclose(found[p], wanted, atol=1e-5)
    if not normalize:
      own = advantages.group_advantage(total[p], kind='dr_grpo')
      np.testing.assert_allclose(found[p, :, 0], own, atol=1e-5)
  assert not found[settled].any()


def test_equal_placements_have_no_advantage():
  total = np.full((1, 4), 0.7, np.float32)
  total[0, 0] += np.float32(6e-8)
  baseline = np.full((1, 4, 3), 0.5, np.float32)
  for settled in (np.zeros((1, 4, 3), bool), np.ones((1, 4, 3), bool)):
    found = placement.placement_advantage(
      total, baseline, settled, normalize=True
    )
    assert np.abs(found).max() < 1e-3


def test_each_slot_gets_its_placements_advantage():
  own = np.float32([[-1, -2, -3]])
  by_rank = np.float32([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
  count = np.int32([[3, 2, 3]])
  # Direct; after three tokens of reasoning; and an answer that is invalid.
  length = np.int32([[4, 6, 4]])
  valid = np.array([[True, True, False]])
  found = jax.jit(placement.spread_over_tokens, static_argnums=5)(
    own, by_rank, length, count, valid, 7
  )
  assert found.tolist() == [
    [
      [1, 2, 3, -1, -1, -1, -1],
      [-2, -2, -2, 4, 5, -2, -2],
      [-3, -3, -3, -3, -3, -3, -3],
    ]
  ]


# A policy small enough to enumerate: Plackett-Luce over three candidates.
ORDERS = np.array(list(itertools.permutations(range(3))), np.int32)
SCORES = np.array([0.4, -0.7, 0.2])


def step_gradients():
  """Gradient of each placement's log-probability [orders, ranks, scores]."""
  found = np.zeros((len(ORDERS), 3, 3))
  for o, order in enumerate(ORDERS):
    for t in range(3):
      left = order[t:]
      found[o, t, left] -= np.exp(SCORES[left]) / np.exp(SCORES[left]).sum()
      found[o, t, order[t]] += 1
  return found


def chances():
  found = []
  for order in ORDERS:
    parts = [np.exp(SCORES[order[t:]]).sum() for t in range(3)]
    found.append(np.exp(SCORES[order]).prod() / np.prod(parts))
  return np.array(found)


@pytest.mark.parametrize('kind', placement.KINDS)
@pytest.mark.parametrize('grades', [(2, 0, 1), (0, 1, 0), (2, 0, 2)])
def test_credit_by_placement_has_the_gradient_of_the_answers_reward(
  kind, grades
):
  chance, gradients = chances(), step_gradients()
  np.testing.assert_allclose(chance.sum(), 1)
  slate = (
    ORDERS, np.tile(np.float32(grades), (6, 1)), np.full(6, 3, np.int32)
  )  # fmt: skip
  baseline = placement.expected_if_shuffled(*slate, kind=kind, k=2)
  settled = np.asarray(placement.settled(*slate))
  total = np.array([reward(kind, o, grades, 3, 2) for o in ORDERS])
  wanted = np.einsum('o,o,otc->tc', chance, total, gradients)
  assert np.abs(wanted.sum(0)).max() > 0.01

  # 1. A baseline of what was placed before changes no expectation.
  credit = np.where(settled, 0, total[:, None] - baseline)
  found = np.einsum('o,ot,otc->tc', chance, credit, gradients)
  np.testing.assert_allclose(found, wanted, atol=1e-6)

  # 2. Nor do groups of two, but for the share of each rank's own in the mean:
  # half of it where the other is open too, and all of it where it is not.
  first, second = (x.ravel() for x in np.indices((6, 6)))
  pair = np.stack([first, second], 1)
  group = placement.placement_advantage(
    jnp.asarray(total)[pair], baseline[pair], settled[pair], normalize=False
  )
  found = np.einsum(
    'n,nt,ntc->tc',
    chance[first] * chance[second],
    np.asarray(group)[:, 0],
    gradients[first],
  )
  share = (chance @ ~settled) / 2
  np.testing.assert_allclose(found, share[:, None] * wanted, atol=1e-6)


def test_repeats_is_whether_the_first_placements_are_the_incoming_ones():
  ranking = np.int32([[0, 1, 3, 2], [1, 0, 2, 3], [0, 1, 2, 3], [2, 0, 1, 3]])
  incoming = np.int32([[0, 1, 2, 3]] * 3 + [[1, 2, 0, 3]])
  count = np.int32([4, 4, 4, 3])
  found = placement.repeats(ranking, incoming, count)
  wanted = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
  np.testing.assert_array_equal(found[:, :3], np.bool_(wanted)[:, :3])
  np.testing.assert_array_equal(found[:3], np.bool_(wanted)[:3])


def test_a_gate_against_copies_is_credited_to_the_last_chance_to_differ():
  # One positive, at incoming rank 1: once it is placed, the rest decides only
  # whether the answer is a copy.
  orders = np.array(list(itertools.permutations(range(4))), np.int32)
  n = len(orders)
  slate = (orders, np.tile(np.float32([0, 1, 0, 0]), (n, 1)), np.full(n, 4))
  slate = (*slate[:2], slate[2].astype(np.int32))
  incoming = np.tile(np.arange(4, dtype=np.int32), (n, 1))
  total = rewards.reward(
    orders, np.zeros(n, np.int32), *slate[1:], incoming, kind='auc', k=4,
    gate='v2',
  ).total  # fmt: skip
  weight = np.exp(np.array([0.3, -0.2, 0.1, 0.0]))
  chance, gradients = np.ones(n), np.zeros((n, 4, 4))
  for o, order in enumerate(orders):
    for t in range(4):
      share = weight[order[t:]] / weight[order[t:]].sum()
      chance[o] *= share[0]
      gradients[o, t, order[t:]] -= share
      gradients[o, t, order[t]] += 1
  wanted = np.einsum('o,o,otc->tc', chance, total, gradients)
  baseline = placement.expected_if_shuffled(*slate, kind='auc', k=4)
  equal = np.asarray(placement.settled(*slate))
  waits = np.asarray(placement.repeats(orders, incoming, slate[2]))

  def found(closed):
    credit = np.where(closed, 0, total[:, None] - baseline)
    return np.einsum('o,ot,otc->tc', chance, credit, gradients)

  np.testing.assert_allclose(found(equal & ~waits), wanted, atol=1e-6)
  assert np.abs(found(equal) - wanted).max() > 0.01
