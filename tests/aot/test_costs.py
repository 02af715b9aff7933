import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gr2_jax.aot import costs
from gr2_jax.distributed import sharding

# A loop of 3 that gathers, a loop whose trip count depends on the data,
# an asynchronous all-gather that runs beside two fusions, a reduce-scatter in
# the form of a fusion, and a fusion that reads a slice of its operand.
TEXT = """\
HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%cond (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %wide = f32[16,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%next, %x)
}

%until (p: (s32[], pred[])) -> pred[] {
  %p = (s32[], pred[]) parameter(0)
  ROOT %go = pred[] get-tuple-element(%p), index=1
}

%again (p: (s32[], pred[])) -> (s32[], pred[]) {
  %p = (s32[], pred[]) parameter(0)
  %go = pred[] get-tuple-element(%p), index=1
  %any = pred[]{:T(512)} all-reduce(%go), channel_id=2, to_apply=%add
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %out = (s32[], pred[]) tuple(%i, %any)
}

%all-reduce-scatter (p: bf16[32]) -> bf16[4] {
  %p = bf16[32]{0} parameter(0)
  %zero = s32[] constant(0)
  %sum = bf16[32]{0} all-reduce(%p), channel_id=3, to_apply=%add
  ROOT %mine = bf16[4]{0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={4}
}

%starts (p: f32[4]) -> f32[32] {
  %p = f32[4]{0} parameter(0)
  ROOT %g = f32[32]{0:S(1)} all-gather(%p), channel_id=4, dimensions={0}
}

%goes_on (p: f32[4]) -> f32[32] {
  %p = f32[4]{0} parameter(0)
  ROOT %h = f32[32]{0:S(1)} all-gather(%p), channel_id=4, dimensions={0}
}

%sliced (p: f32[100,8], i: s32[]) -> f32[1,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), \
dynamic_slice_sizes={1,8}
}

ENTRY %main (a: f32[4,8], b: bf16[32], c: f32[4], d: f32[100,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = bf16[32]{0} parameter(1)
  %c = f32[4]{0} parameter(2)
  %d = f32[100,8]{1,0} parameter(3)
  %one = s32[] constant(1)
  %true = pred[] constant(true)
  %begin = (s32[], f32[4,8]{1,0}) tuple(%one, %a)
  %loop = (s32[], f32[4,8]{1,0}) while(%begin), condition=%cond, body=%body
  %flag = (s32[], pred[]) tuple(%one, %true)
  %open = (s32[], pred[]) while(%flag), condition=%until, body=%again
  %rs = bf16[4]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter
  %g1 = f32[32]{0:S(1)} fusion(%c), kind=kCustom, calls=%starts
  %g2 = f32[32]{0:S(1)} fusion(%c), kind=kCustom, calls=%goes_on
  %row = f32[1,8]{1,0} fusion(%d, %one), kind=kLoop, calls=%sliced
  %moved = (f32[4]{0:S(1)}, f32[4]{0}, u32[]{:S(2)}) copy-start(%c)
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_are_counted_as_often_as_they_run():
  counts = costs.read(TEXT, unknown_trips=5)
  assert counts.by_kind() == {
    'all-gather': (3 + 1, 3 * 16 * 8 * 4 + 32 * 4),
    'all-reduce': (5, 5),
    'reduce-scatter': (1, 64),
  }
  assert counts.unknown_loops == 1
  assert counts.largest == ('all-gather', 16 * 8 * 4, 3)
  assert counts.sent == 3 * 512 + 128 + 2 * 5 + 64


# A loop of 4 whose permutes are asynchronous, and one that is not.
RING = """\
HloModule jit_f, is_scheduled=true

%cond (p: (s32[], f32[8], f32[8], f32[2])) -> pred[] {
  %p = (s32[], f32[8]{0}, f32[8]{0}, f32[2]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(8)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8], f32[8], f32[2])) -> \
(s32[], f32[8], f32[8], f32[2]) {
  %p = (s32[], f32[8]{0}, f32[8]{0}, f32[2]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %l1 = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), \
channel_id=1
  %m1 = f32[8]{0} collective-permute-done(%l1)
  %l2 = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%m1), \
channel_id=2
  %m2 = f32[8]{0} collective-permute-done(%l2)
  %y = f32[8]{0} get-tuple-element(%p), index=2
  %r1 = f32[8]{0} collective-permute(%y), channel_id=3
  %r2 = f32[8]{0} collective-permute(%r1), channel_id=4
  %s = f32[2]{0} get-tuple-element(%p), index=3
  %moved = f32[2]{0} collective-permute(%s), channel_id=5
  %sum = f32[2]{0} add(%moved, %s)
  ROOT %out = (s32[], f32[8]{0}, f32[8]{0}, f32[2]{0}) \
tuple(%next, %m2, %r2, %sum)
}

ENTRY %main (a: f32[8], b: f32[2]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[2]{0} parameter(1)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8]{0}, f32[8]{0}, f32[2]{0}) tuple(%zero, %a, %a, %b)
  %loop = (s32[], f32[8]{0}, f32[8]{0}, f32[2]{0}) while(%begin), \
condition=%cond, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_a_permute_sends_its_operand_in_every_round():
  counts = costs.read(RING)
  assert counts.by_kind() == {
    # The tuple of an asynchronous one has two numbers more.
    'collective-permute': (4 * 5, 4 * (2 * (32 + 8) + 2 * 32 + 8))
  }
  assert counts.unknown_loops == 0


def test_a_slice_is_read_not_the_whole_and_only_main_memory_counts():
  lines = TEXT.splitlines()
  loops = [line for line in lines if ' while(' in line]
  text = '\n'.join(line for line in lines if line not in loops)
  text = text.replace('get-tuple-element(%loop), index=1', 'bitcast(%a)')
  reduce_scatter, gathers, row, moved = 64 + 8, 2 * 16, 2 * 32 + 4, 16
  assert costs.read(text).bytes == reduce_scatter + gathers + row + moved


@pytest.mark.parametrize(
  ('shape', 'want'),
  [
    ('f32[2,3]{1,0:T(8,128)}', 24),
    ('(bf16[4]{0}, /*index=1*/s32[], pred[3])', 15),
    ('s4[6]', 3),
    ('f8e4m3fn[7]', 7),
    ('token[]', 0),
  ],
)
def test_bytes_of_a_shape(shape, want):
  assert costs.size(shape) == want


def test_other_text_is_an_error():
  with pytest.raises(ValueError, match='no HLO module'):
    costs.read('int main() {}')


def _compile(f, mesh, shapes, specs, out):
  arguments = [
    jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    for shape, spec in zip(shapes, specs, strict=True)
  ]
  place = NamedSharding(mesh, PartitionSpec(*out))
  traced = jax.jit(f, out_shardings=place).trace(*arguments)
  return traced.jaxpr.jaxpr, traced.lower().compile()


def test_a_compiled_gather_and_a_compiled_sum_are_of_known_size():
  mesh = sharding.make_mesh(1, 8, 1)
  _, gather = _compile(lambda x: x * 2, mesh, [(64, 32)], [('fsdp',)], ())
  assert costs.read(gather.as_text()).by_kind() == {
    'all-gather': (1, 64 * 32 * 4)
  }
  jaxpr, matmul = _compile(
    lambda x, w: x @ w, mesh, [(16, 64), (64, 32)], [(None, 'fsdp'), ('fsdp',)],
    (),
  )  # fmt: skip
  assert costs.read(matmul.as_text()).by_kind() == {
    'all-reduce': (1, 16 * 32 * 4)
  }
  flops = costs.flops(jaxpr) / mesh.size
  assert flops == 2 * 16 * 8 * 32
  # XLA counts the additions of the sum, too.
  assert matmul.cost_analysis()['flops'] == flops + 16 * 32


def test_layers_in_a_loop_count_each():
  def layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  x, w = np.zeros((4, 16), np.float32), np.zeros((5, 16, 16), np.float32)
  traced = jax.jit(layers).trace(x, w)
  flops = costs.flops(traced.jaxpr.jaxpr)
  assert flops == 5 * 2 * 4 * 16 * 16
  compiled = traced.lower().compile()
  counts = costs.read(compiled.as_text())
  assert counts.unknown_loops == 0
  assert counts.bytes >= w.nbytes
  analysis = compiled.cost_analysis()
  assert analysis['flops'] < flops  # XLA counts one.


def test_products_count_in_open_loops_and_in_gradients():
  def until(x, w):
    return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x)

  x, w = jnp.zeros((4, 16)), jnp.zeros((16, 16))
  one = 2 * 4 * 16 * 16
  assert costs.flops(jax.make_jaxpr(until)(x, w).jaxpr, 7) == 7 * one
  # A batched product, and the gradient with respect to both of its sides.
  batched = jnp.zeros((3, 4, 16)), jnp.zeros((3, 16, 16))
  loss = jax.grad(lambda x, w: (x @ w).sum(), argnums=(0, 1))
  assert costs.flops(jax.make_jaxpr(loss)(*batched).jaxpr) == 3 * 3 * one
