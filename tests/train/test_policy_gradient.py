import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.train import distillation, policy_gradient

from .. import tiny

G = tiny.GRAMMAR


@functools.lru_cache
def policy_loss(config, **kwargs):
  options = tiny.gradient_options(**kwargs)
  teacher = None
  if options.kl_weight:
    teacher = distillation.SampledTokens(None, G, config, options.kl_kind)
  loss_fn = policy_gradient.make_loss(tiny.MODEL, G, config, options, teacher)
  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


score = jax.jit(policy_gradient.score, static_argnums=(0, 3, 4))


@pytest.mark.parametrize(
  ('thinking', 'constrained', 'temperature'),
  [
    (True, True, 0.7),
    (True, False, 1.0),
    (False, True, 1.0),
    (False, False, 0.7),
  ],
)
def test_the_learner_scores_what_the_sampler_drew(
  thinking, constrained, temperature
):
  config = tiny.sampler(thinking, constrained, temperature)
  batch = tiny.policy_batch(config)
  _, _, rollouts = tiny.rollouts(config)
  found = score(tiny.MODEL, tiny.params(), batch, G, config)
  written = np.arange(10) < batch.length[..., None]
  for name in ('logp', 'entropy'):
    np.testing.assert_allclose(
      np.asarray(getattr(found, name))[written],
      np.asarray(getattr(rollouts, name))[written],
      atol=1e-5,
    )
  assert batch.logp[written].min() < -0.5


def test_the_gap_of_sampler_and_learner_is_a_metric():
  config = tiny.sampler()
  batch = tiny.policy_batch(config)
  (_, metrics), _ = policy_loss(config)(tiny.params(), batch)
  assert float(metrics['sampler_gap']) < 1e-5
  np.testing.assert_allclose(float(metrics['ratio']), 1.0, atol=1e-5)
  logp = batch.logp.copy()
  logp[1, 0, 0] -= 0.25  # In a group that does not count: still a watch.
  (_, metrics), _ = policy_loss(config)(
    tiny.params(), dataclasses.replace(batch, logp=logp)
  )
  np.testing.assert_allclose(float(metrics['sampler_gap']), 0.25, atol=1e-4)


def off_policy(config):
  """A batch whose sampler was another policy; the clip bites."""
  batch = tiny.policy_batch(config)
  rng = np.random.default_rng(1)
  moved = batch.logp + rng.normal(size=batch.logp.shape) * 0.3
  return dataclasses.replace(batch, logp=moved.astype(np.float32))


def with_options(batch):
  """Importance weights, a reference, and an advantage for every token."""
  rng = np.random.default_rng(2)
  shape = batch.tokens.shape
  reference = batch.logp + 0.5 * rng.normal(size=shape)
  beyond = np.arange(shape[-1]) >= batch.length[..., None]
  return dataclasses.replace(
    batch,
    advantage=rng.normal(size=shape).astype(np.float32),
    importance=rng.uniform(0.5, 2.0, shape).astype(np.float32),
    teacher_scores=tiny.sampled_scores(np.where(beyond, np.nan, reference)),
  )


@pytest.mark.parametrize(
  ('options', 'average', 'kl_weight'),
  [
    (False, 'token', 0.0),
    (True, 'token', 0.3),
    (True, 'sequence', 0.3),
  ],
)
def test_the_policy_loss_equals_a_numpy_oracle(options, average, kl_weight):
  config, params = tiny.sampler(constrained=False), tiny.params()
  batch = off_policy(config)
  if options:
    batch = with_options(batch)
  logp = tiny.plain_logp(
    params, batch.prompt, batch.prompt_length, batch.tokens, 0.7
  )
  clipped, entropy, rollouts, apart = 0, [], {}, {}
  for p, g, t in np.ndindex(batch.tokens.shape):
    if t >= batch.length[p, g]:
      continue
    row = logp[p, g, t]
    entropy.append(-(np.exp(row) * row).sum())
    own = row[batch.tokens[p, g, t]]
    if kl_weight:
      gap = batch.teacher_scores.logp[p, g, t] - own
      apart.setdefault((p, g), []).append(np.exp(gap) - 1 - gap)
    if not batch.use[p]:
      continue
    ratio = np.exp(own - batch.logp[p, g, t])
    gain = batch.advantage[p, g, t] if options else batch.advantage[p, g]
    bound = min(ratio * gain, np.clip(ratio, 0.8, 1.28) * gain)
    clipped += bound != ratio * gain
    weight = batch.importance[p, g, t] if options else 1.0
    rollouts.setdefault((p, g), []).append(-weight * bound)

  def mean(by_rollout):
    sums = [sum(values) for values in by_rollout.values()]
    lengths = [len(values) for values in by_rollout.values()]
    match average:
      case 'token':
        return sum(sums) / sum(lengths)
      case 'sequence':
        return np.mean(np.divide(sums, lengths))

  wanted = mean(rollouts)
  (found, metrics), _ = policy_loss(
    config, average=average, kl_weight=kl_weight
  )(params, batch)
  assert ('teacher_kl' in metrics) == bool(kl_weight)
  if kl_weight:
    np.testing.assert_allclose(metrics['teacher_kl'], mean(apart), rtol=1e-4)
    wanted += kl_weight * mean(apart)
  np.testing.assert_allclose(float(found), wanted, rtol=1e-4)
  assert clipped > 3
  tokens = sum(map(len, rollouts.values()))
  np.testing.assert_allclose(metrics['clip_fraction'], clipped / tokens)
  np.testing.assert_allclose(metrics['entropy'], np.mean(entropy), rtol=1e-4)


def test_a_reference_pulls_the_policy_towards_itself():
  config, params = tiny.sampler(constrained=False), tiny.params()
  batch = with_options(tiny.policy_batch(config))
  loss = policy_loss(config, average='token', kl_weight=0.3)
  still = dataclasses.replace(
    batch,
    advantage=np.zeros_like(batch.advantage),
    teacher_scores=tiny.sampled_scores(batch.logp),
  )
  (_, metrics), gradient = loss(params, still)
  assert abs(float(metrics['teacher_kl'])) < 1e-6
  for x in jax.tree.leaves(gradient):
    np.testing.assert_allclose(x, 0, atol=1e-5)
  other = dataclasses.replace(
    still, teacher_scores=tiny.sampled_scores(batch.logp + 0.5)
  )
  (before, _), gradient = loss(params, other)
  moved = jax.tree.map(lambda x, g: x - 1e-3 * g, params, gradient)
  (after, _), _ = loss(moved, other)
  assert 0 < float(after) < float(before)


def test_the_policy_gradient_equals_finite_differences():
  config, params = tiny.sampler(), tiny.params()
  batch = off_policy(config)
  loss = policy_loss(config)
  _, gradient = loss(params, batch)
  rng = np.random.default_rng(0)
  direction = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), params
  )
  wanted = sum(
    float((a * b).sum())
    for a, b in zip(
      jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True
    )
  )

  def at(size):
    moved = jax.tree.map(lambda x, d: x + size * d, params, direction)
    return float(loss(moved, batch)[0][0])

  found = (at(5e-5) - at(-5e-5)) / 1e-4
  assert abs(wanted) > 0.05
  np.testing.assert_allclose(found, wanted, rtol=0.05, atol=5e-3)


def test_what_lies_outside_the_rollouts_changes_no_policy_gradient():
  config = tiny.sampler(thinking=False)
  batch = tiny.policy_batch(config)
  beyond = np.arange(10) >= batch.length[..., None]
  assert beyond.any()
  unused = ~batch.use[:, None, None]
  prompt = batch.prompt.copy()
  prompt[np.arange(7) >= batch.prompt_length[:, None]] = 39
  other = dataclasses.replace(
    batch,
    prompt=prompt,
    tokens=np.where(beyond, 33, batch.tokens),
    logp=np.where(beyond | unused, -5.0, batch.logp).astype(np.float32),
    advantage=np.where(batch.use[:, None], batch.advantage, 7.0).astype(
      np.float32
    ),
  )
  loss = policy_loss(config)
  (a, _), one = loss(tiny.params(), batch)
  (b, _), two = loss(tiny.params(), other)
  np.testing.assert_allclose(a, b, atol=1e-6)
  tiny.assert_trees_close(one, two, 1e-6)


def test_a_batch_without_a_used_group_teaches_nothing():
  config = tiny.sampler()
  batch = tiny.policy_batch(config)
  batch = dataclasses.replace(batch, use=np.zeros(5, bool))
  (loss, _), gradient = policy_loss(config)(tiny.params(), batch)
  assert float(loss) == 0.0
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradient))


def groups(use, name):
  """Groups that can be told apart: those of `name` count up from 100 * name."""
  n = len(use)
  first = 100 * name + np.arange(n)
  return policy_gradient.PolicyBatch(
    prompt=np.stack([first, first], 1).astype(np.int32),
    prompt_length=first.astype(np.int32),
    constraint_inputs=first.astype(np.int32),
    tokens=np.broadcast_to(first[:, None, None], (n, 2, 3)).astype(np.int32),
    length=np.stack([first, first], 1).astype(np.int32),
    logp=np.broadcast_to(first[:, None, None], (n, 2, 3)).astype(np.float32),
    advantage=np.stack([first, first], 1).astype(np.float32),
    use=np.array(use, bool),
  )


replace_flat_groups = jax.jit(policy_gradient.replace_flat_groups)


@settings(max_examples=60)
@given(
  st.lists(st.booleans(), min_size=6, max_size=6),
  st.lists(st.booleans(), min_size=1, max_size=8),
)
def test_replacing_flat_groups_keeps_the_groups_that_count(pool_use, fresh_use):
  pool, fresh = groups(pool_use, 1), groups(fresh_use, 2)
  found = jax.device_get(replace_flat_groups(pool, fresh))
  ids = [100 + i for i, use in enumerate(pool_use) if use]
  ids += [200 + i for i, use in enumerate(fresh_use) if use]
  ids += [100 + i for i, use in enumerate(pool_use) if not use]
  ids += [200 + i for i, use in enumerate(fresh_use) if not use]
  assert sum(found.use) == min(6, sum(pool_use) + sum(fresh_use))
  assert found.use.tolist() == sorted(found.use.tolist(), reverse=True)
  assert found.prompt_length.tolist() == ids[:6]
  for leaf in jax.tree.leaves(dataclasses.replace(found, use=None)):
    rows = leaf.reshape(6, -1)
    np.testing.assert_array_equal(rows, np.tile(rows[:, :1], rows.shape[1]))
    np.testing.assert_array_equal(rows[:, 0], found.prompt_length)


@pytest.mark.parametrize(('epochs', 'parts'), [(1, 1), (1, 4), (3, 2), (2, 1)])
def test_every_epoch_is_partitioned_anew(epochs, parts):
  batch = groups(np.arange(8) % 3 != 0, 1)
  batch = dataclasses.replace(batch, importance=batch.logp + 1)
  split = jax.jit(policy_gradient.minibatches, static_argnums=(1, 2))
  found = jax.device_get(split(batch, epochs, parts, jax.random.key(0)))
  assert len(found) == epochs * parts
  orders = []
  for epoch in range(epochs):
    rows = found[epoch * parts : (epoch + 1) * parts]
    assert all(part.use.shape == (8 // parts,) for part in rows)
    joined = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    orders.append(joined.prompt_length.tolist())
    back = functools.partial(
      np.take, indices=np.argsort(joined.constraint_inputs), axis=0
    )
    tiny.assert_trees_equal(jax.tree.map(back, joined), batch)
  if epochs * parts == 1:
    assert orders == [batch.prompt_length.tolist()]
  else:
    assert len({tuple(order) for order in orders}) == epochs
    assert sorted(orders[0]) != orders[0]
  again = jax.device_get(split(batch, epochs, parts, jax.random.key(0)))
  other = jax.device_get(split(batch, epochs, parts, jax.random.key(1)))
  tiny.assert_trees_equal(again, found)
  if epochs * parts > 1:
    assert any(
      (a.prompt_length != b.prompt_length).any()
      for a, b in zip(found, other, strict=True)
    )


def test_read_outs_are_compared_over_the_candidates_of_a_slate():
  config, params = tiny.sampler(), tiny.params()
  rng = np.random.default_rng(3)
  batch = tiny.policy_batch(config)
  slots = rng.integers(0, batch.prompt_length[:, None], (5, 5))
  batch = dataclasses.replace(
    batch,
    slots=slots.astype(np.int32),
    teacher_readout=rng.normal(size=(5, 5)).astype(np.float32),
  )
  hidden = np.asarray(tiny.plain_hidden(tiny.MODEL, params, batch.prompt))
  own = np.take_along_axis(hidden, slots[..., None], 1) @ params['readout']
  apart = []
  for p, n in enumerate(batch.constraint_inputs):
    theirs, ours = (
      x[p, :n] - np.log(np.exp(x[p, :n]).sum())
      for x in (batch.teacher_readout, own)
    )
    apart.append((np.exp(theirs) * (theirs - ours)).sum())
  (plain, _), _ = policy_loss(config)(params, batch)
  (loss, metrics), gradient = policy_loss(config, readout_weight=0.7)(
    params, batch
  )
  np.testing.assert_allclose(metrics['readout_kl'], np.mean(apart), rtol=1e-4)
  np.testing.assert_allclose(loss - plain, 0.7 * np.mean(apart), rtol=1e-3)
  assert float(np.abs(gradient['readout']).max()) > 0
