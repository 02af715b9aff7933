import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gr2_jax.distributed import sharding


@pytest.mark.parametrize(
  ('sizes', 'want'),
  [((), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, 4, 2), (1, 4, 2))],
)
def test_a_mesh_takes_all_devices(sizes, want):
  mesh = sharding.make_mesh(*sizes, devices=jax.devices())
  assert mesh.shape == dict(zip(sharding.MESH_AXES, want, strict=True))
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ((-1, 3, 1), 'mesh.fsdp=3 x mesh.tensor=1 = 3 does not divide the 8'),
    ((3, 1, 1), r'mesh.data=3 .* = 3, but there are 8 devices'),
    ((-1, 0, 1), 'mesh.fsdp=0: must be at least 1'),
  ],
)
def test_a_mesh_that_cannot_be_says_which_number(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(*sizes)


def test_a_mesh_can_be_of_given_devices():
  some = jax.devices()[:4]
  mesh = sharding.make_mesh(-1, 2, 1, devices=some)
  assert mesh.shape == {'data': 2, 'fsdp': 2, 'tensor': 1}
  assert set(mesh.devices.flat) == set(some)
  with pytest.raises(ValueError, match='but there are 4 devices'):
    sharding.make_mesh(8, 1, 1, devices=some)


class _Layer(nn.Module):
  axes: tuple[str | None, ...] = ('embed', 'mlp')
  shape: tuple[int, ...] = (8, 12)

  @nn.compact
  def __call__(self):
    init = nn.initializers.ones
    self.param('bias', init, (3,))
    return self.param('w', nn.with_logical_partitioning(init, self.axes),
                      self.shape)  # fmt: skip


def _abstract(*args):
  return jax.eval_shape(_Layer(*args).init, jax.random.key(0))


def test_parameters_are_sharded_by_their_logical_axes():
  mesh = sharding.make_mesh(1, 4, 2)
  shardings = sharding.param_shardings(mesh, _abstract())['params']
  assert shardings['w'].spec == PartitionSpec('fsdp', 'tensor')
  assert shardings['bias'].spec == PartitionSpec()
  init = jax.jit(
    lambda key: nn.unbox(_Layer().init(key)),
    out_shardings=sharding.param_shardings(mesh, _abstract()),
  )
  w = init(jax.random.key(0))['params']['w']
  assert w.addressable_shards[0].data.shape == (2, 6)


def test_a_parameter_that_does_not_divide_is_named():
  mesh = sharding.make_mesh(1, 4, 2)
  with pytest.raises(ValueError, match=r"'w'.*size 10 of axis 0 .*by 4.*fsdp"):
    sharding.param_shardings(mesh, _abstract(('embed', 'mlp'), (10, 12)))


def test_a_vocabulary_that_does_not_divide_stays_whole():
  mesh = sharding.make_mesh(1, 4, 2)
  even = sharding.param_shardings(mesh, _abstract(('vocab', 'embed'), (10, 8)))
  assert even['params']['w'].spec == PartitionSpec('tensor', 'fsdp')
  odd = sharding.param_shardings(mesh, _abstract(('vocab', 'embed'), (11, 8)))
  assert odd['params']['w'].spec == PartitionSpec(None, 'fsdp')


def test_an_unknown_logical_axis_is_named():
  mesh = sharding.make_mesh()
  with pytest.raises(ValueError, match="no rule for logical axis 'embbed'"):
    sharding.param_shardings(mesh, _abstract(('embbed', None)))


def test_there_are_at_most_twelve_logical_axes():
  names = [name for name, _ in sharding.RULES]
  assert len(set(names)) == len(names) <= 12


def test_a_batch_is_split_over_data_and_fsdp():
  mesh = sharding.make_mesh(2, 2, 2)
  batch = {'x': np.arange(24).reshape(8, 3), 'scale': np.float32(2)}
  put = sharding.shard_batch(batch, mesh)
  assert put['x'].sharding == sharding.batch_sharding(mesh)
  assert put['x'].addressable_shards[0].data.shape == (2, 3)
  assert put['scale'].sharding.is_fully_replicated
  np.testing.assert_array_equal(put['x'], batch['x'])
  assert float(jax.jit(lambda b: jnp.sum(b['x']) * b['scale'])(put)) == 552


def test_a_batch_that_does_not_divide_says_which_number():
  with pytest.raises(ValueError, match="'x'.*size 12 .*not divisible by 8.*da"):
    sharding.shard_batch({'x': np.zeros((12, 3))}, sharding.make_mesh(8))
