import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.ops import gates, judge, metrics, parsing, rewards

from . import oracles

# The slate of the docstrings: A B C D in incoming order.
GRADES = np.array([0, 2, 0, 1])
COUNT = np.int32(4)
INCOMING = np.arange(4)


def order(letters):
  return np.array(['ABCD'.index(letter) for letter in letters], np.int32)


def over_batch(oracle, slates, *rest):
  return [oracle(*row, *rest) for row in zip(*slates, strict=True)]


@pytest.mark.parametrize('jitted', [False, True])
def test_rewards_equal_the_oracles(jitted):
  ranking, grades, count, incoming = oracles.random_slates(0, 500, 12)
  slates = (ranking, grades, count)
  cases = [
    (rewards.auc, oracles.auc),
    (rewards.reciprocal_rank, oracles.reciprocal_rank),
  ]
  for k in (1, 3, 5, 12, 40):
    for name in ('ndcg', 'recall'):
      cases.append(
        (
          functools.partial(getattr(rewards, name), k=k),
          functools.partial(getattr(oracles, name), k=k),
        )
      )
  for op, oracle in cases:
    run = jax.jit(op) if jitted else op
    got = run(*slates)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, over_batch(oracle, slates), atol=2e-6)
  op = jax.jit(rewards.rank_promotion) if jitted else rewards.rank_promotion
  np.testing.assert_allclose(
    op(*slates, incoming),
    over_batch(oracles.promotion, (*slates, incoming)),
    atol=1e-6,
  )


def test_auc_example():
  assert rewards.auc(order('BACD'), GRADES, COUNT) == 0.5
  assert rewards.auc(order('BDAC'), GRADES, COUNT) == 1


def test_ndcg_example():
  value = rewards.ndcg(order('DBAC'), GRADES, COUNT, 4)
  np.testing.assert_allclose(value, 2.8928 / 3.6309, atol=1e-4)
  np.testing.assert_allclose(value, 0.7967, atol=1e-4)


def test_rank_promotion_example():
  assert rewards.rank_promotion(order('BACD'), GRADES, COUNT, INCOMING) == 0.25
  assert rewards.rank_promotion(order('ACDB'), GRADES, COUNT, INCOMING) == -0.5


def test_reciprocal_rank_example():
  value = rewards.reciprocal_rank(order('ACDB'), GRADES, COUNT)
  np.testing.assert_allclose(value, 1 / 3, rtol=1e-6)


def test_recall_example():
  values = [
    float(rewards.recall(order('BADC'), GRADES, COUNT, k)) for k in (1, 2, 3)
  ]
  assert values == [1, 0.5, 1]


def test_copied_example():
  assert rewards.copied(order('ABCD'), INCOMING, COUNT)
  assert not rewards.copied(order('BACD'), INCOMING, COUNT)


def test_positives_by_rank_example():
  value = rewards.positives_by_rank(order('DBAC'), GRADES, COUNT)
  np.testing.assert_array_equal(value, [1, 1, 0, 0])


def test_misordered_pairs_example():
  assert rewards.misordered_pairs(order('BACD'), GRADES, COUNT) == (2, 4)


def test_target_rank_example():
  value = rewards.target_rank(order('DABC'), GRADES, COUNT, INCOMING)
  assert value == (1, 2, True)


@pytest.mark.parametrize(
  ('kind', 'opened', 'total'),
  [('none', True, 0.7), ('v1', False, 0.5), ('v2', False, 0.2)],
)
def test_gate_example(kind, opened, total):
  valid = jnp.array(True)
  found = gates.gate_open(
    valid,
    copied_suboptimal=jnp.array(True),
    improved=jnp.array(False),
    kind=kind,
  )
  assert found == opened
  value = gates.apply_gate(jnp.float32(0.5), valid, found, kind=kind)
  np.testing.assert_allclose(value, total, rtol=1e-6)
  found = gates.gate_open(
    valid,
    copied_suboptimal=jnp.array(False),
    improved=jnp.array(True),
    kind=kind,
  )
  assert found
  value = gates.apply_gate(jnp.float32(0.5), valid, found, kind=kind)
  np.testing.assert_allclose(value, 0.7, rtol=1e-6)


@pytest.mark.parametrize('kind', gates.GATES)
def test_no_gate_is_open_to_an_invalid_answer(kind):
  for copy, improved in itertools.product((False, True), repeat=2):
    assert not gates.gate_open(
      jnp.array(False),
      copied_suboptimal=jnp.array(copy),
      improved=jnp.array(improved),
      kind=kind,
    )


def test_gated_extras_example():
  extras = (jnp.full(2, 0.1), jnp.full(2, -0.05))
  value = gates.gated_extras(extras, jnp.array([True, False]))
  np.testing.assert_allclose(value, [0.05, -0.05], rtol=1e-5)
  np.testing.assert_array_equal(
    gates.gated_extras((), jnp.array([True, False])), [0, 0]
  )


def test_rank_reward_example():
  expected = {
    'auc': 1,
    'ndcg': 0.7967,
    'auc+ndcg': 0.8984,
    'promotion': 0,
    'rr': 1,
  }
  for kind, value in expected.items():
    got = rewards.rank_reward(
      order('DBAC'), GRADES, COUNT, INCOMING, kind=kind, k=4
    )
    np.testing.assert_allclose(got, value, atol=1e-4)
  got = rewards.rank_reward(
    order('DBAC'), GRADES, COUNT, INCOMING, kind='recall', k=1
  )
  assert got == 1


def test_reward_example():
  def run(letters, verdict, extras=()):
    return rewards.reward(
      order(letters),
      np.int32(verdict),
      GRADES,
      COUNT,
      INCOMING,
      kind='ndcg',
      k=4,
      extras=extras,
    )

  good = run('DBAC', parsing.VALID)
  np.testing.assert_allclose(good, [0.9967, 0.7967, 1, 0, 0], atol=1e-4)
  copy = run('ABCD', parsing.VALID)
  np.testing.assert_allclose(copy, [0.2, 0.6399, 1, 1, 0], atol=1e-4)
  invalid = run('ABCD', parsing.MISSING)
  np.testing.assert_allclose(invalid, [0, 0.6399, 0, 0, 0], atol=1e-4)
  extras = (jnp.float32(0.1), jnp.float32(-0.05))
  totals = [
    run(letters, verdict, extras).total
    for letters, verdict in (('DBAC', 0), ('ABCD', 0), ('ABCD', 4))
  ]
  np.testing.assert_allclose(totals, [1.0467, 0.15, -0.05], atol=1e-4)


@pytest.mark.parametrize('module', [rewards, gates, metrics, judge])
def test_every_public_function_has_a_worked_example(module):
  functions = [
    value
    for name, value in vars(module).items()
    if inspect.isfunction(value)
    and value.__module__ == module.__name__
    and not name.startswith('_')
  ]
  assert functions
  for function in functions:
    assert 'Example: ' in function.__doc__, function.__name__


@pytest.mark.parametrize('grades', [[0, 0, 0, 0], [1, 2, 1, 1]])
def test_a_slate_without_pairs_has_auc_one_half(grades):
  for letters in ('ABCD', 'DCBA'):
    assert rewards.auc(order(letters), np.array(grades), COUNT) == 0.5


def test_copying_a_slate_without_pairs_is_no_fault():
  grades = np.array([1, 1, 1, 1])
  result = rewards.reward(
    order('ABCD'), np.int32(0), grades, COUNT, INCOMING, kind='auc', k=4
  )
  np.testing.assert_allclose(result.total, 0.7, rtol=1e-6)


def test_copying_a_perfect_order_keeps_its_reward():
  grades = np.array([2, 1, 0, 0])
  result = rewards.reward(
    order('ABCD'), np.int32(0), grades, COUNT, INCOMING, kind='ndcg', k=4
  )
  np.testing.assert_allclose(result.total, 1.2, rtol=1e-6)
  assert result.copied == 1


def test_no_positive_gives_zero_but_for_auc():
  grades = np.zeros(4, np.int32)
  for kind in ('ndcg', 'promotion', 'rr', 'recall'):
    value = rewards.rank_reward(
      order('DBAC'), grades, COUNT, INCOMING, kind=kind, k=3
    )
    assert value == 0


def test_v1_pays_format_where_the_target_rose_or_stood_first():
  def total(letters, grades):
    result = rewards.reward(
      order(letters),
      np.int32(0),
      np.array(grades),
      COUNT,
      INCOMING,
      kind='promotion',
      k=4,
      gate='v1',
    )
    return float(result.total)

  assert total('BACD', [0, 1, 0, 0]) == pytest.approx(0.25 + 0.2)
  assert total('ABCD', [0, 1, 0, 0]) == pytest.approx(0.0)
  assert total('ACBD', [0, 1, 0, 0]) == pytest.approx(-0.25)
  assert total('ABCD', [1, 0, 0, 0]) == pytest.approx(0.2)
  # Of two equal grades the target is the one that came first.
  assert total('DABC', [0, 0, 1, 1]) == pytest.approx(-0.25)


@functools.cache
def batched(kind, gate):
  return jax.jit(functools.partial(rewards.reward, kind=kind, k=5, gate=gate))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(rewards.KINDS))
def test_v2_pays_copies_and_faults_the_format_weight_at_most(seed, kind):
  ranking, grades, count, incoming = oracles.random_slates(seed, 64, 6)
  copy = np.asarray(parsing.incoming_ranking(incoming, count))
  ranking[::2] = copy[::2]
  rng = np.random.default_rng(seed)
  verdict = rng.choice([0, 0, 1, 2, 3, 4], 64).astype(np.int32)
  slate = (verdict, grades, count, incoming)
  result = batched(kind, 'v2')(ranking, *slate)
  total = np.asarray(result.total)
  invalid = verdict != parsing.VALID
  is_copy = (ranking == copy).all(axis=-1)
  pairs = [
    len({*np.sign(g[:n])}) == 2 for g, n in zip(grades, count, strict=True)
  ]
  suboptimal = np.array(over_batch(oracles.auc, (copy, grades, count))) < 1
  hacked = is_copy & suboptimal & pairs
  assert (total[invalid] == 0).all()
  assert (total[hacked] <= 0.2 + 1e-6).all()
  # Everyone else keeps the ranking reward, and the ungated sum pays all.
  free = ~invalid & ~hacked
  np.testing.assert_allclose(
    total[free], np.asarray(result.rank)[free] + 0.2, atol=1e-6
  )
  ungated = batched(kind, 'none')(ranking, *slate)
  np.testing.assert_allclose(
    ungated.total, ungated.rank + 0.2 * ~invalid, atol=1e-6
  )
  np.testing.assert_array_equal(result.copied, is_copy & ~invalid)


def answers_with_extras(seed, scale):
  """Copies, faults and others, with three extras of any sign."""
  ranking, grades, count, incoming = oracles.random_slates(seed, 64, 6)
  copy = np.asarray(parsing.incoming_ranking(incoming, count))
  ranking[::2] = copy[::2]
  rng = np.random.default_rng(seed)
  verdict = rng.choice([0, 0, 1, 2, 3, 4], 64).astype(np.int32)
  # An invalid answer falls back to the incoming order.
  ranking = np.where((verdict == parsing.VALID)[:, None], ranking, copy)
  extras = scale * rng.normal(size=(3, 64)).astype(np.float32)
  suboptimal = np.array(over_batch(oracles.misordered, (copy, grades, count)))
  hacked = (ranking == copy).all(axis=-1) & suboptimal
  slate = (ranking, verdict, grades, count, incoming)
  return slate, tuple(extras), hacked


@settings(max_examples=80)
@given(
  st.integers(0, 2**32 - 1),
  st.sampled_from(rewards.KINDS),
  st.sampled_from((0.05, 1.0, 100.0)),
)
def test_under_v2_no_extra_pays_copies_or_faults(seed, kind, scale):
  slate, extras, hacked = answers_with_extras(seed, scale)
  result = batched(kind, 'v2')(*slate, extras=extras)
  total = np.asarray(result.total)
  invalid = slate[1] != parsing.VALID
  assert (total[invalid] <= 0).all()
  assert (total[hacked] <= 0.2 + 1e-6).all()
  # Everyone else has the terms whole; these have the costs, and no less.
  free = ~invalid & ~hacked
  terms = np.where(free, extras, np.minimum(extras, 0))
  np.testing.assert_allclose(
    result.extra, terms.sum(0), rtol=1e-5, atol=1e-5 * scale
  )
  without = np.asarray(batched(kind, 'v2')(*slate).total)
  np.testing.assert_allclose(
    total, without + terms.sum(0), rtol=1e-5, atol=1e-5 * scale
  )


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(gates.GATES))
def test_a_bonus_is_paid_to_valid_answers_alone(seed, gate):
  slate, extras, _ = answers_with_extras(seed, 1.0)
  bonus = tuple(np.abs(term) for term in extras)
  result = batched('promotion', gate)(*slate, extras=bonus)
  improved = np.array(
    [
      not any(g[:n] > 0)
      or r.tolist().index(t := oracles.target(g, n, i)) < i[t]
      or i[t] == 0
      for r, _, g, n, i in zip(*slate, strict=True)
    ]
  )
  paid = np.asarray(result.extra) > 0
  invalid = slate[1] != parsing.VALID
  assert not paid[invalid].any()
  if gate == 'none':
    assert paid[~invalid].all()
  if gate == 'v1':
    has = np.array(
      [any(g[:n] > 0) for g, n in zip(slate[2], slate[3], strict=True)]
    )
    np.testing.assert_array_equal(paid[has], (~invalid & improved)[has])


@settings(max_examples=30)
@given(
  st.integers(0, 2**32 - 1),
  st.sampled_from(('auc', 'ndcg', 'auc+ndcg', 'rr', 'recall')),
)
def test_an_order_cost_within_the_format_weight_never_favours_faults(
  seed, kind
):
  slate, _, _ = answers_with_extras(seed, 1.0)
  valid = slate[1] == parsing.VALID
  charge = np.random.default_rng(seed).uniform(size=64).astype(np.float32)
  cost = (np.where(valid, -0.2 * charge, 0).astype(np.float32),)
  total = np.asarray(batched(kind, 'v2')(*slate, extras=cost).total)
  assert total[valid].min() >= total[~valid].max() - 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_presented_order_does_not_matter(seed):
  ranking, grades, count, incoming = oracles.random_slates(seed, 8, 6, 6)
  rng = np.random.default_rng(seed)
  shuffle = np.stack([rng.permutation(6) for _ in range(8)])
  back = np.argsort(shuffle, axis=-1)
  moved = np.take_along_axis(back, ranking, -1).astype(np.int32)
  verdict = np.zeros(8, np.int32)
  plain = batched('auc+ndcg', 'v2')(ranking, verdict, grades, count, incoming)
  shown = batched('auc+ndcg', 'v2')(
    moved,
    verdict,
    np.take_along_axis(grades, shuffle, -1),
    count,
    np.take_along_axis(incoming, shuffle, -1),
  )
  for a, b in zip(plain, shown, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_vmap_equals_batch():
  ranking, grades, count, incoming = oracles.random_slates(4, 30, 6)
  verdict = np.arange(30, dtype=np.int32) % 5
  arguments = (ranking, verdict, grades, count, incoming)
  whole = batched('ndcg', 'v1')(*arguments)
  mapped = jax.vmap(batched('ndcg', 'v1'))(*arguments)
  for a, b in zip(whole, mapped, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_unknown_names_and_cutoffs_are_errors():
  slate = (order('ABCD'), GRADES, COUNT)
  with pytest.raises(ValueError, match="'no_such'.*'rr'"):
    rewards.rank_reward(*slate, INCOMING, kind='no_such', k=3)
  with pytest.raises(ValueError, match="'v3'.*'v2'"):
    rewards.reward(
      order('ABCD'),
      np.int32(0),
      GRADES,
      COUNT,
      INCOMING,
      kind='auc',
      k=3,
      gate='v3',
    )
  for op in (rewards.ndcg, rewards.recall):
    with pytest.raises(ValueError, match='k is 0'):
      op(*slate, 0)
