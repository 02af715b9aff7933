import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from gr2_jax.distributed import sharding
from gr2_jax.pipeline import checkpoint


@struct.dataclass
class _State:
  params: dict
  opt: optax.OptState
  key: jax.Array
  step: jax.Array


def _state(width=16):
  params = {
    'dense': {'w': jnp.arange(8 * width, dtype=jnp.float32).reshape(8, width)},
    'bias': jnp.ones(3),
  }
  opt = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)
  return _State(params, opt, jax.random.key(5), jnp.int32(7))


def _iterator():
  data = grain.MapDataset.range(64).seed(3).shuffle().repeat().batch(4)
  return iter(data.to_iter_dataset())


def _assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_state_keys_iterator_and_facts_come_back(tmp_path):
  state, iterator = _state(), _iterator()
  for _ in range(3):
    next(iterator)
  with checkpoint.Checkpointer(tmp_path / 'c') as checkpointer:
    assert checkpointer.restore(state) is None
    checkpointer.save(3, state, iterator, {'best': 0.5})
    want = [next(iterator) for _ in range(3)]
  fresh = _iterator()
  abstract = jax.eval_shape(lambda: state)
  with checkpoint.Checkpointer(tmp_path / 'c') as checkpointer:
    restored, step, meta = checkpointer.restore(abstract, fresh)
  assert (step, meta) == (3, {'best': 0.5})
  _assert_equal(restored, state)
  np.testing.assert_array_equal([next(fresh) for _ in range(3)], want)


def test_only_the_latest_are_kept_and_steps_grow(tmp_path):
  state = {'w': jnp.zeros(2)}
  with checkpoint.Checkpointer(tmp_path, keep=2) as checkpointer:
    for step in (1, 2, 3):
      checkpointer.save(step, {'w': jnp.full(2, step, jnp.float32)})
    with pytest.raises(ValueError, match='step 3 is not after 3'):
      checkpointer.save(3, state)
    restored, step, _ = checkpointer.restore(state)
  assert step == 3
  np.testing.assert_array_equal(restored['w'], [3, 3])
  assert sorted(p.name for p in tmp_path.iterdir()) == ['2', '3']


def test_a_half_written_checkpoint_is_ignored(tmp_path):
  state = {'w': jnp.ones(2)}
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state)
  half = tmp_path / '2.orbax-checkpoint-tmp'
  (half / 'state').mkdir(parents=True)
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.restore(state)[1] == 1
    checkpointer.save(2, state)
    assert checkpointer.restore(state)[1] == 2
  assert not half.exists()


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
  spec = PartitionSpec('data', 'tensor')
  old = NamedSharding(sharding.make_mesh(2, 1, 4), spec)
  new = NamedSharding(sharding.make_mesh(4, 1, 2), spec)
  w = jnp.arange(128.0).reshape(8, 16)
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, {'w': jax.device_put(w, old)})
    abstract = {'w': jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=new)}
    restored, _, _ = checkpointer.restore(abstract)
  assert restored['w'].sharding == new
  np.testing.assert_array_equal(restored['w'], w)


def test_another_shape_names_the_leaf_both_shapes_and_the_file(tmp_path):
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, _state(16))
    with pytest.raises(
      ValueError, match=r'1/state: .*params\.dense\.w .*\(8, 16\).*\(8, 12\)'
    ):
      checkpointer.restore(_state(12))


def test_resuming_an_iterator_that_was_not_saved_is_an_error(tmp_path):
  state = {'w': jnp.ones(2)}
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state)
    with pytest.raises(ValueError, match='without a data iterator'):
      checkpointer.restore(state, _iterator())


def test_params_alone(tmp_path):
  params = _state().params
  path = tmp_path / 'params'
  with pytest.raises(FileNotFoundError, match='params'):
    checkpoint.load_params(path, params)
  checkpoint.save_params(path, jax.tree.map(jnp.zeros_like, params))
  checkpoint.save_params(path, params)  # Replaces.
  mesh = sharding.make_mesh(2, 4, 1)
  split = NamedSharding(mesh, PartitionSpec(None, 'fsdp'))
  wanted = jax.eval_shape(lambda: params)
  wanted['dense']['w'] = jax.ShapeDtypeStruct(
    (8, 16), jnp.float32, sharding=split
  )
  restored = checkpoint.load_params(path, wanted)
  _assert_equal(restored, params)
  assert restored['dense']['w'].sharding == split


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'bias': jnp.ones(4)},
      r'leaf bias has shape \(3,\).*but \(4,\) in the config',
    ),
    ({'more': jnp.ones(4)}, r'leaf more \(4,\) is not in the checkpoint'),
    ({'bias': None}, r'leaf bias \(3,\) .* not in the model'),
  ],
)
def test_params_that_do_not_fit_name_the_leaf(tmp_path, change, message):
  checkpoint.save_params(tmp_path / 'p', _state().params)
  with pytest.raises(ValueError, match=message):
    checkpoint.load_params(tmp_path / 'p', _state().params | change)


def test_a_damaged_checkpoint_is_named(tmp_path):
  (tmp_path / 'p').mkdir()
  with pytest.raises(ValueError, match='p: not a readable checkpoint'):
    checkpoint.load_params(tmp_path / 'p', _state().params)
