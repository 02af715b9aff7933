import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from gr2_jax.distributed import sharding
from gr2_jax.models import lora
from gr2_jax.pipeline import checkpoint
from gr2_jax.prompts import examples
from gr2_jax.train import learner, loop

from .. import tiny

FIRST = 12
MODEL = dataclasses.replace(
  tiny.MODEL, num_heads=8, num_kv_heads=8, head_dim=2, num_layers=2
)
SETTINGS = dict(steps=4, eval_every=2, learning_rate=1e-2, warmup=1,
                weight_decay=0.1, max_grad_norm=1.0, patience=0,
                reward_divergence_patience=0, resume='',
                init_from='')  # fmt: skip


def flat(params):
  return flax.traverse_util.flatten_dict(jax.device_get(params), sep='/')


def trained(start, seed=1):
  """Trainable parameters after a training that moved them all."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), start
  )


def test_a_start_joins_to_what_it_started_from():
  params = tiny.params()
  own = lora.Adapters(rank=3, first_row=FIRST)
  start = own.start(params, jax.random.key(0))
  tiny.assert_trees_equal(own.join(start, params), params)
  assert start['rows']['embedding'].shape == (40 - FIRST, 16)
  for path, down in start['down'].items():
    assert abs(float(down.std()) * np.sqrt(down.shape[1]) - 1) < 0.4
    assert not start['up'][path].any()
  # Every target's noise is its own.
  names = list(start['down'])
  a, b = (start['down'][p] for p in names if p.split('/')[-1] in ('key', 'up'))
  assert (a != b).any()
  other = own.start(params, jax.random.key(1))['down']
  assert all((other[p] != start['down'][p]).all() for p in names)


def joined_by_hand(own, start, params):
  """numpy: W + alpha / rank (down @ up), one layer after the other."""
  wanted = {path: leaf.copy() for path, leaf in flat(params).items()}
  for path, down in start['down'].items():
    weight = wanted[f'layers/{path}']
    for layer, (a, b) in enumerate(zip(down, start['up'][path], strict=True)):
      change = np.float64(a) @ np.float64(b) * (own.alpha / own.rank)
      weight[layer] += change.reshape(weight.shape[1:])
  for name, rows in start['rows'].items():
    wanted[name][own.first_row :] = rows
  wanted['readout'] = start['readout']
  return wanted


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('targets', [tuple(lora.INPUT_AXES), ('out',)])
def test_a_join_equals_numpy(targets, tied):
  model = dataclasses.replace(tiny.MODEL, tie_embeddings=tied)
  params = tiny.params(model)
  own = lora.Adapters(rank=2, targets=targets, first_row=FIRST, alpha=5.0)
  start = trained(own.start(params, jax.random.key(0)))
  found = flat(own.join(start, params))
  wanted = joined_by_hand(own, jax.device_get(start), params)
  assert set(found) == set(wanted)
  for path, leaf in found.items():
    np.testing.assert_allclose(leaf, wanted[path], atol=1e-5, err_msg=path)
  before = flat(params)
  changed = {p for p in found if (found[p] != before[p]).any()}
  free = {'embedding', 'readout'} | (set() if tied else {'unembedding'})
  adapted = {p for p in before if p.split('/')[-1] in targets}
  assert len(adapted) == len(targets)
  assert changed == adapted | free
  for name in free - {'readout'}:
    np.testing.assert_array_equal(found[name][:FIRST], before[name][:FIRST])


def test_an_outputs_adapter_reads_heads():
  """`out` is [L, N, H, D]: its inputs are both of the middle axes."""
  params = tiny.params()
  own = lora.Adapters(rank=1, targets=('out',), first_row=FIRST)
  start = own.start(params, jax.random.key(0))
  (down,), (up,) = start['down'].values(), start['up'].values()
  (out,) = (x for p, x in flat(params).items() if p.endswith('/out'))
  assert out.shape == (2, 4, 4, 16)
  assert (down.shape, up.shape) == ((2, 16, 1), (2, 1, 16))


def test_without_a_rank_everything_trains():
  params = tiny.params()
  own = lora.Adapters()
  assert own.start(params, jax.random.key(0)) is params
  assert own.join(params, {}) is params
  loss = own.wrap(lambda p, x: p['readout'].sum() * x)
  assert float(loss(params, {}, 2.0)) == 2 * float(params['readout'].sum())


def test_what_cannot_be_says_why():
  with pytest.raises(ValueError, match="lora_targets: no projection 'norm'"):
    lora.Adapters(rank=1, targets=('query', 'norm'))
  with pytest.raises(ValueError, match='lora_rank=-1'):
    lora.Adapters(rank=-1)


def distance(params, batch):
  """A loss that every parameter and the batch have a part in."""
  scale = 1.0 + batch.grades.mean()
  leaves = jax.tree.leaves(params)
  loss = sum(jnp.mean(jnp.square(scale * x + 0.1 * x**2)) for x in leaves)
  return loss, {'scale': scale}


def render(record, rng):
  del rng
  row = tiny.examples(size=1, seed=int(record))
  return {
    field.name: getattr(row, field.name)[0]
    for field in dataclasses.fields(row)
    if getattr(row, field.name) is not None
  }


def fit(workdir, mesh=None, loss_fn=distance, die_at=None, rank=2, **changes):
  own, mesh = ConfigDict(SETTINGS | changes), mesh or tiny.one_device()
  spec = tiny.spec(MODEL, lora.Adapters(rank=rank, first_row=FIRST))
  iterator = examples.iterate(examples.dataset(range(16), render, 8, 0))
  optimizer = learner.make_optimizer(learner.OptimizerOptions.from_config(own))
  step_ = loop.supervised_step(spec, mesh, loss_fn, optimizer, iterator)

  def take_step(state, frozen, step):
    if step == die_at:
      raise KeyboardInterrupt
    return step_(state, frozen, step)

  result = loop.fit(
    loop.LoopOptions.from_config(own),
    spec=spec,
    mesh=mesh,
    workdir=workdir,
    seed=0,
    optimizer=optimizer,
    take_step=take_step,
    iterator=iterator,
    validate=lambda params: {'score': float(np.abs(params['readout']).sum())},
    selection_metric='score',
  )
  return result, jax.device_get(spec.load_params(workdir, mesh))


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """An artifact to start from."""
  path = tmp_path_factory.mktemp('start')
  checkpoint.save_params(path / 'params', tiny.params(MODEL))
  return path


@pytest.fixture(scope='module')
def whole(start, tmp_path_factory):
  """The run on one device that nothing befell."""
  path = tmp_path_factory.mktemp('whole')
  return path, *fit(path, init_from=str(start))


def test_a_run_trains_adapters_new_rows_and_the_read_out(whole):
  _, _, params = whole
  found, before = flat(params), flat(tiny.params(MODEL))
  assert set(found) == set(before)
  for path, leaf in found.items():
    if path == 'embedding':
      assert leaf[:FIRST].tobytes() == before[path][:FIRST].tobytes()
      assert (leaf[FIRST:] != before[path][FIRST:]).mean() > 0.9
    elif path == 'readout' or path.split('/')[-1] in lora.INPUT_AXES:
      assert (leaf != before[path]).mean() > 0.9, path
    else:
      assert leaf.tobytes() == before[path].tobytes(), path


@pytest.mark.parametrize('sizes', [None, (2, 2, 2)])
def test_a_killed_run_ends_like_a_whole_one(whole, start, tmp_path, sizes):
  mesh = sharding.make_mesh(*sizes) if sizes else None
  with pytest.raises(KeyboardInterrupt):
    fit(tmp_path, mesh, die_at=4, init_from=str(start))
  result, params = fit(tmp_path, mesh, init_from=str(start))
  if not sizes:
    assert result == whole[1]
    tiny.assert_trees_equal(params, whole[2])
    return
  # Sums run in another order: close, and the frozen rows are the same bytes.
  assert result['step'] == whole[1]['step']
  tiny.assert_trees_close(params, whole[2], 1e-5)
  rows = params['embedding'][:FIRST]
  assert rows.tobytes() == whole[2]['embedding'][:FIRST].tobytes()


def test_the_gradient_is_that_of_the_whole_by_the_chain_rule():
  params, batch = tiny.params(), tiny.examples()
  own = lora.Adapters(rank=2, first_row=FIRST)
  start = trained(own.start(params, jax.random.key(0)))
  run = jax.jit(jax.grad(own.wrap(distance), has_aux=True))
  gradient, _ = run(start, params, batch)
  whole, _ = jax.jit(jax.grad(distance, has_aux=True))(
    own.join(start, params), batch
  )
  layers = flat(whole['layers'])
  for path, up in gradient['up'].items():
    down = np.asarray(start['down'][path])
    change = layers[path].reshape(*down.shape[:2], -1)
    by_hand = (own.alpha / own.rank) * np.einsum('lir,lio->lro', down, change)
    np.testing.assert_allclose(up, by_hand, atol=1e-5, err_msg=path)
    by_hand = (own.alpha / own.rank) * np.einsum(
      'lro,lio->lir', start['up'][path], change
    )
    np.testing.assert_allclose(gradient['down'][path], by_hand, atol=1e-5)
  np.testing.assert_allclose(
    gradient['rows']['embedding'], whole['embedding'][FIRST:], atol=1e-6
  )
