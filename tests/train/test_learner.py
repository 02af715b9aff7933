import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.policy import grammar
from gr2_jax.train import learner, policy_gradient

from .. import tiny

G = tiny.GRAMMAR
K = G.num_candidates
OPTIMIZER = learner.OptimizerOptions(
  steps=4, learning_rate=1e-2, warmup=1, weight_decay=0.1, max_grad_norm=1.0
)


@functools.lru_cache
def supervised_loss(**kwargs):
  return jax.jit(
    jax.value_and_grad(
      learner.supervised_loss(tiny.MODEL, G, **kwargs), has_aux=True
    )
  )


@pytest.mark.parametrize('constrained', [True, False])
def test_chunks_of_time_change_nothing(constrained):
  params = tiny.params()
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(5, 3, 10, 16)).astype(np.float32)
  config = tiny.sampler(constrained=constrained)
  batch = tiny.policy_batch(config)
  constraint = None
  if constrained:
    progress = grammar.replay(G, batch.constraint_inputs, batch.tokens, True)
    constraint = (progress, batch.constraint_inputs)
  weight = np.where(np.arange(10) < batch.length[..., None], 1.0, 0.0)

  @functools.partial(jax.jit, static_argnums=0)
  def score(chunk):
    def loss(hidden, params):
      found = learner.score_tokens(
        params, hidden, batch.tokens, G, temperature=0.7, chunk=chunk,
        constraint=constraint,
      )  # fmt: skip
      total = (found.logp + 0.1 * found.entropy) * weight
      return jnp.sum(total), found

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, params)

  (_, whole), gradients = score(10)
  for chunk in (1, 4) if constrained else (4,):
    (_, found), others = score(chunk)
    tiny.assert_trees_close(
      jax.tree.map(lambda x: jnp.maximum(x, -1e9), found),
      jax.tree.map(lambda x: jnp.maximum(x, -1e9), whole),
      1e-5,
    )
    tiny.assert_trees_close(others, gradients, 1e-4)


def readout(params, batch):
  ids = np.asarray(batch.prompt)
  hidden = np.asarray(tiny.plain_hidden(tiny.MODEL, params, ids), np.float64)
  scores = np.take_along_axis(hidden, batch.slots[..., None], 1)
  return scores @ np.asarray(params['readout'], np.float64)


def log_softmax(x):
  return x - x.max() - np.log(np.exp(x - x.max()).sum())


def supervised_oracle(params, batch, listwise_weight, ranking_weight, sharp):
  scores = readout(params, batch)
  completion = np.array(batch.completion)
  listwise, orders = [], []
  for p, count in enumerate(batch.count):
    gain = 2.0 ** batch.grades[p, :count] - 1
    if gain.sum():
      logp = log_softmax(scores[p, :count])
      listwise.append(-(gain / gain.sum() * logp).sum())
    orders.append(np.argsort(-scores[p, :count], kind='stable'))
    if ranking_weight:
      for g in np.flatnonzero(batch.rank_by_readout[p]):
        at = batch.answer_at[p, g]
        completion[p, g, at : at + count] = G.slot_base + orders[p]
  logp = tiny.plain_logp(params, batch.prompt, batch.prompt_length, completion)
  own = np.take_along_axis(logp, completion[..., None], -1)[..., 0]
  loss = -(batch.weights * own).sum() / batch.weights.sum()
  loss += listwise_weight * np.mean(listwise)
  distilled = []
  for p, g in np.argwhere(batch.rank_by_readout):
    for rank, left in enumerate(orders[p][r:] for r in range(batch.count[p])):
      soft = np.exp(log_softmax(sharp * scores[p, left]))
      at = logp[p, g, batch.answer_at[p, g] + rank, G.slot_base + left]
      distilled.append(-(soft * at).sum())
  return loss + ranking_weight * np.mean(distilled)


@pytest.mark.parametrize(('ranking_weight', 'sharp'), [(0.0, 1.0), (0.7, 3.0)])
def test_the_supervised_loss_equals_a_numpy_oracle(ranking_weight, sharp):
  batch, params = tiny.examples(), tiny.params()
  (found, metrics), _ = supervised_loss(
    listwise_weight=0.5, ranking_weight=ranking_weight, sharpness=sharp
  )(params, batch)
  wanted = supervised_oracle(params, batch, 0.5, ranking_weight, sharp)
  np.testing.assert_allclose(float(found), wanted, rtol=2e-5)
  assert ('ranking_loss' in metrics) == bool(ranking_weight)


def test_rows_without_a_slate_have_no_listwise_loss():
  batch = dataclasses.replace(tiny.examples(), count=np.zeros(5, np.int32))
  (loss, metrics), gradient = supervised_loss(
    listwise_weight=0.5, ranking_weight=0.7, sharpness=3.0
  )(tiny.params(), batch)
  assert float(metrics['listwise_loss']) == 0.0
  assert float(metrics['ranking_loss']) == 0.0
  np.testing.assert_allclose(loss, metrics['token_loss'])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_the_read_out_teaches_the_answer_and_learns_nothing_from_it():
  loss = supervised_loss(listwise_weight=0.0, ranking_weight=1.0)
  _, gradient = loss(tiny.params(), tiny.examples())
  assert not np.asarray(gradient['readout']).any()
  assert np.asarray(gradient['embedding']).any()


def test_supervised_padding_is_never_read():
  batch = tiny.examples()
  prompt, completion = batch.prompt.copy(), batch.completion.copy()
  prompt[np.arange(12) >= batch.prompt_length[:, None]] = 39
  weights = batch.weights.copy()
  weights[..., 5:] = 0
  batch = dataclasses.replace(
    batch, weights=weights, rank_by_readout=np.zeros((5, 2), bool)
  )
  completion[..., 5:] = 38
  other = dataclasses.replace(batch, prompt=prompt, completion=completion)
  loss = supervised_loss(listwise_weight=0.5, ranking_weight=0.7, sharpness=3.0)
  tiny.assert_trees_close(
    loss(tiny.params(), batch), loss(tiny.params(), other), 1e-6
  )


def test_answers_are_written_where_they_stand():
  completion = np.full((2, 2, 8), 9, np.int32)
  ranking = np.array([[2, 0, 1, 3, 4], [1, 0, 2, 3, 4]])
  found = learner.write_answer(
    completion, np.array([[0, 3], [6, 1]]), ranking, np.array([3, 2]), G
  )
  assert found.tolist() == [
    [[12, 10, 11, 9, 9, 9, 9, 9], [9, 9, 9, 12, 10, 11, 9, 9]],
    [[9, 9, 9, 9, 9, 9, 11, 10], [9, 11, 10, 9, 9, 9, 9, 9]],
  ]


WIDE = dataclasses.replace(
  tiny.MODEL, num_heads=8, num_kv_heads=8, head_dim=2, num_layers=1
)


def cases():
  config = tiny.sampler(group=2)
  supervised = learner.supervised_loss(
    WIDE, G, listwise_weight=0.5, ranking_weight=0.7, sharpness=3.0
  )
  policy = policy_gradient.make_loss(WIDE, G, config, tiny.gradient_options())
  return {
    'supervised': (supervised, tiny.examples(size=8)),
    'policy': (policy, tiny.policy_batch(config, size=8)),
  }


@functools.lru_cache
def alone(name):
  """The update where nothing is sharded."""
  loss_fn, batch = cases()[name]
  optimizer = learner.make_optimizer(OPTIMIZER)
  params = tiny.params(WIDE)
  begun = jax.tree.map(np.array, params)  # The update takes its state away.
  state = learner.TrainState(jnp.int32(0), params, optimizer.init(params))
  # From the second step on the warm-up is over and the parameters move.
  update = learner.make_update(loss_fn, optimizer)
  for _ in range(2):
    state, metrics = update(state, batch)
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), state.params, begun)
  assert min(jax.tree.leaves(moved)) > 1e-4 or name == 'policy'
  return jax.device_get((state, metrics))


@pytest.mark.parametrize('name', ['supervised', 'policy'])
@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_sharded_update_equals_that_of_one_device(name, sizes):
  loss_fn, batch = cases()[name]
  wanted, wanted_metrics = alone(name)
  mesh = sharding.make_mesh(*sizes)
  optimizer = learner.make_optimizer(OPTIMIZER)
  with sharding.activate(mesh):
    boxed = jax.eval_shape(
      lambda key: transformer.init_params(WIDE, key), jax.random.key(0)
    )
    params = jax.device_put(
      tiny.params(WIDE), sharding.param_shardings(mesh, boxed)
    )
    opt_state = jax.jit(optimizer.init)(params)
    state = learner.TrainState(jnp.int32(0), params, opt_state)
    update = learner.make_update(loss_fn, optimizer)
    for _ in range(2):
      state, metrics = update(state, sharding.shard_batch(batch, mesh))
  if sizes != (8, 1, 1):
    embedding = state.params['embedding'].addressable_shards[0].data
    assert embedding.shape == (40 // sizes[2], 16 // sizes[1])
  tiny.assert_trees_close(metrics, wanted_metrics, 1e-5)
  tiny.assert_trees_close(state.params, wanted.params, 1e-5)


def test_a_state_is_made_where_the_rules_put_it():
  mesh = sharding.make_mesh(2, 2, 2)
  optimizer = learner.make_optimizer(OPTIMIZER)
  with sharding.activate(mesh):
    state, shardings = learner.init_state(
      WIDE, optimizer, jax.random.key(0), mesh
    )
  assert not any(isinstance(x, nn.Partitioned) for x in jax.tree.leaves(state))
  for leaf, wanted in zip(
    jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
  moments = state.opt_state[1][0].mu
  assert moments['embedding'].addressable_shards[0].data.shape == (20, 8)
  assert int(state.step) == 0


def test_one_trace_serves_every_update():
  loss_fn, _ = cases()['supervised']
  optimizer = learner.make_optimizer(OPTIMIZER)
  update = learner.make_update(loss_fn, optimizer)
  params = tiny.params(WIDE)
  state = learner.TrainState(jnp.int32(0), params, optimizer.init(params))
  steps = []
  for seed in range(3):
    state, metrics = update(state, tiny.examples(size=8, seed=seed))
    steps.append(float(metrics['loss']))
  assert update._cache_size() == 1
  assert len(set(steps)) == 3
  assert int(state.step) == 3


@pytest.mark.parametrize('updates', [1, 4])
def test_learning_rate_warms_up_and_decays_to_a_tenth(updates):
  config = learner.OptimizerOptions(
    steps=10, learning_rate=0.5, warmup=2, weight_decay=0.0, max_grad_norm=1e9
  )
  optimizer = learner.make_optimizer(config, updates)
  params = {'w': jnp.zeros(1)}
  state, rates = optimizer.init(params), []
  step = jax.jit(optimizer.update)
  for _ in range(10 * updates + 1):
    change, state = step({'w': jnp.ones(1)}, state, params)
    rates.append(float(-change['w'][0]))
  # Adam's steps for a constant gradient are the rate itself.
  schedule = [0.0, 0.25, 0.5, *(
    0.05 + 0.225 * (1 + np.cos(np.pi * i / 8)) for i in range(1, 9)
  )]  # fmt: skip
  np.testing.assert_allclose(rates[::updates], schedule, atol=1e-3)
  between = np.interp(
    np.arange(10 * updates + 1) / updates, range(11), schedule
  )
  np.testing.assert_allclose(rates, between, atol=0.01)


def test_gradients_are_clipped_by_their_norm():
  def loss_fn(params, scale):
    return scale * jnp.sum(params['w']), {}

  def step(scale):
    optimizer = optax.chain(learner.make_optimizer(OPTIMIZER))
    params = {'w': jnp.zeros(4)}
    state = learner.TrainState(jnp.int32(0), params, optimizer.init(params))
    update = learner.make_update(loss_fn, optimizer)
    state, metrics = update(state, jnp.float32(scale))
    return state.opt_state[0][1][0].mu['w'], metrics

  moment, metrics = step(100.0)
  assert float(metrics['gradient_norm']) == 200.0
  np.testing.assert_allclose(moment, 0.1 * 0.5 * np.ones(4), rtol=1e-5)
  moment, _ = step(0.25)
  np.testing.assert_allclose(moment, 0.1 * 0.25 * np.ones(4), rtol=1e-5)
