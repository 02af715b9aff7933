"""Planning for TPU slices; what needs `libtpu` is skipped without it."""

import math
import subprocess
import sys

import jax
import pytest

from configs import common
from gr2_jax.aot import abstract, costs, planning, topologies
from gr2_jax.bench import plan as bench_plan
from gr2_jax.bench import weak_scaling
from gr2_jax.distributed import sharding

pytestmark = pytest.mark.slow

LOAD = abstract.Load(slates=8, prompt_tokens=32, text_rows=500)


def _config(**overrides):
  config = common.compose('rl', 'test')
  config.update_from_flattened_dict({'model.num_layers': 2} | overrides)
  return config


def _step(config, *sizes, load=LOAD):
  return abstract.make_step(config, sharding.make_mesh(*sizes), load)


def _programs(step):
  return {program.name: program for program in abstract.lower(step)}


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v9:2x2', "unknown topology 'v9:2x2'.*v5e: 1x1.*v5p: 2x2x1.*v6e: 1x1"),
    ('v5p:3x3', "unknown topology 'v5p:3x3'.*of v5p: 2x2x1 .* 4x4x4"),
    ('v5e', "unknown topology 'v5e'.*v5e: 1x1 2x2"),
  ],
)
def test_an_unknown_topology_names_the_known_ones(topology, message):
  with pytest.raises(topologies.TopologyError, match=message):
    topologies.chip(topology)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(topologies, 'available', lambda: False)
  with pytest.raises(topologies.TopologyError, match=r'gr2_jax\[tpu\]'):
    topologies.devices('v5e:2x2')


def test_the_command_prints_an_error_in_one_line():
  command = '--config=configs/rl.py:test --topology=v5e:3x3'
  done = subprocess.run(
    [sys.executable, '-m', 'gr2_jax.aot', *command.split()],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert done.stderr.strip().startswith("error: unknown topology 'v5e:3x3'")


def test_slices_grow():
  for family in topologies.CHIPS:
    sizes = [topologies.size(name) for name in topologies.slices(family)]
    assert sizes == sorted(set(sizes))


def test_the_step_is_lowered_without_data_or_memory():
  step = _step(_config(**{'rl.epochs': 2, 'rl.minibatches': 2}), 1, 4, 2)
  programs = _programs(step)
  assert list(programs) == ['act', 'update']
  assert programs['act'].unknown_trips == 16 + 1 + 10 + 1 - 1
  assert programs['update'].runs == 4
  state, frozen, batch = programs['update'].program.args_info[0]
  assert all(leaf.donated for leaf in jax.tree.leaves(state))
  assert not frozen
  assert batch.prompt.shape == (4, 32)


def test_work_of_a_step_is_that_of_its_tokens():
  step = _step(_config(), 1, 8, 1)
  layers = step.spec.abstract_params(step.mesh)['layers']
  weights = sum(x.size for x in jax.tree.leaves(layers))
  prompt, written = 32, 4 * 28
  programs = _programs(step)
  # One slate a device; two FLOPs a weight and token, beside attention, logits.
  assert 1 < programs['act'].flops / (2 * weights * (prompt + written)) < 1.6
  # An update needs three passes; it may compute the forward one again.
  update = programs['update'].flops / (2 * weights * (prompt + written))
  assert 3 < update < 6.5


def test_arrays_of_the_update_take_memory_beside_the_rollouts():
  step = _step(_config(), 1, 8, 1)
  params = abstract.bytes_per_chip(step.spec.abstract_params(step.mesh))
  state = abstract.bytes_per_chip(step.state())
  resident = _programs(step)['act'].resident
  # The moments of AdamW are two more copies of the parameters.
  assert 2 * params <= resident <= 2 * params + 100
  assert 3 * params <= state <= 3 * params + 100
  # An update has gradients, too.
  assert step.min_update_bytes() >= state + params
  replicated = step.spec.abstract_params(sharding.make_mesh(8, 1, 1))
  assert params < abstract.bytes_per_chip(replicated) / 7


def test_adapters_have_a_small_state():
  step = _step(_config(**{'model.lora_rank': 4}), 1, 8, 1)
  update = _programs(step)['update']
  state, frozen, _ = update.program.args_info[0]
  assert set(state.params) == {'down', 'up', 'rows', 'readout'}
  params = step.spec.abstract_params(step.mesh)
  assert frozen.keys() == params.keys()
  assert not any(leaf.donated for leaf in jax.tree.leaves(frozen))
  # The merged copy of the rollouts is still there when the update runs.
  assert update.resident == abstract.bytes_per_chip(params)


@pytest.fixture(scope='module')
def updates():
  """The update of 4 slates a device, compiled for 2 and for 8 devices."""
  lowered = {
    data * 2: weak_scaling.programs(_config(), 4, data=data, fsdp=2)
    for data in (1, 4)
  }
  return {
    count: found['update'].program.compile(weak_scaling.QUICK)
    for count, found in lowered.items()
  }


def test_an_update_on_a_mesh_never_gathers_the_whole_tree(updates):
  params = _step(_config(), 4, 2, 1).spec.abstract_params(
    sharding.make_mesh(4, 2, 1)
  )
  tree = sum(x.size * 4 for x in jax.tree.leaves(params))
  counts = costs.read(updates[8].as_text())
  assert counts.unknown_loops == 0
  gathers = [c.bytes for c in counts.collectives if c.kind == 'all-gather']
  assert 0 < max(gathers) < tree / 2


def test_work_of_a_device_stays_flat_as_devices_and_batch_grow(updates):
  two, eight = (weak_scaling.cost(updates[count]) for count in (2, 8))
  assert eight['flops'] == pytest.approx(two['flops'], rel=0.01)
  assert eight['bytes accessed'] == pytest.approx(
    two['bytes accessed'], rel=0.05
  )


@pytest.mark.parametrize(
  ('overrides', 'load', 'message'),
  [
    ({'rl.kl_weight': 0.1}, LOAD, 'rl.kl_weight=0.1'),
    ({'rl.minibatches': 3}, LOAD, 'rl.minibatches=3 does not divide the 8'),
    ({}, abstract.Load(4, 32, 500), r'--slates=4 does not split over the 8'),
  ],
)
def test_an_impossible_step_names_the_wrong_number(overrides, load, message):
  with pytest.raises(ValueError, match=message):
    _programs(_step(_config(**overrides), 1, 8, 1, load=load))


def test_the_table_distinguishes_compiled_cells_from_bounds():
  cells = {
    ('a', 'v5e'): {'topology': 'v5e:2x4', 'memory': 0.5, 'seconds': 1.23},
    ('a', 'v6e'): {'topology': 'v6e:1x1', 'least': 0.314},
    ('b', 'v5e'): {'topology': None},
  }
  lines = [
    [cell.strip() for cell in line.split('|')[1:-1]]
    for line in bench_plan.table(cells).splitlines()
  ]
  assert lines[0] == ['model', 'v5e', 'v6e']
  assert lines[2] == ['a', '2x4, 50%, 1.2 s', '>= 1x1, 31%']
  assert lines[3][:2] == ['b', 'none']


@pytest.mark.parametrize(
  ('message', 'size'),
  [
    ('RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm.', 20.5 * 2**30),
    ('memory required for HLO temporaries (33.65G) exceeds', 33.65 * 2**30),
    ('RESOURCE_EXHAUSTED: no room', math.inf),
  ],
)
def test_the_bytes_of_an_out_of_memory_error_are_read(message, size):
  assert planning.exhausted_bytes(message) == size


needs_libtpu = pytest.mark.skipif(
  not topologies.available(), reason='libtpu (extra tpu) is not installed'
)


@needs_libtpu
def test_every_slice_can_be_described():
  for family in topologies.CHIPS:
    for name in topologies.slices(family):
      assert len(topologies.devices(name)) == topologies.size(name)


@needs_libtpu
def test_a_tiny_step_compiles_for_a_slice_and_the_report_says_how_it_fits():
  config = _config()
  report = planning.plan(config, 'v5p:2x2x1', LOAD)
  assert report.fits
  assert dict(report.step.mesh.shape) == {'data': 1, 'fsdp': 4, 'tensor': 1}
  assert 0 < report.seconds < 1
  update = report.programs[1]
  assert update.counts.largest.bytes > 0
  shown = planning.text(report)
  assert 'act' in shown
  assert 'update: the largest collective is' in shown
  assert 'fits' in planning.summary(report)
  # The smallest of its family, so that nothing more is compiled.
  best = planning.suggest(config, 'v5p', LOAD, report, log=pytest.fail)
  assert best is report
  # The bound that rules slices out holds.
  assert report.step.min_update_bytes() <= update.memory


@needs_libtpu
def test_a_step_that_is_too_large_does_not_fit():
  config = _config(
    **{'model.d_model': 8192, 'model.d_ff': 32768, 'model.num_layers': 2}
  )
  report = planning.plan(config, 'v5e:1x1', LOAD, stop_early=True)
  assert not report.fits
  assert 'does not fit' in planning.text(report)
  first, size = next(planning.candidates(config, 'v5e', LOAD))
  assert first == 'v5e:2x2'
  assert size < topologies.chip(first).hbm < 4 * size
