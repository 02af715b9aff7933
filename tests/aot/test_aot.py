"""Planning for TPU slices; what needs `libtpu` is skipped without it."""

import math
import subprocess
import sys

import jax
import pytest

from configs import common
from gr2_jax.aot import abstract, hlo, planning, topologies
from gr2_jax.bench import plan as bench_plan
from gr2_jax.bench import weak_scaling
from gr2_jax.distributed import sharding

LOAD = abstract.Load(slates=8, prompt_tokens=32, text_rows=500)


def _config(**overrides):
  config = common.compose('rl', 'test')
  config.update_from_flattened_dict({'model.num_layers': 2} | overrides)
  return config


def _programs(config, mesh, load=LOAD):
  setup = abstract.make_setup(config, mesh, load.text_rows)
  return {one.name: one for one in abstract.lower(config.rl, setup, load)}


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


def test_the_command_says_it_in_a_line():
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
  mesh = sharding.make_mesh(1, 4, 2)
  config = _config(**{'rl.epochs': 2, 'rl.minibatches': 2})
  found = _programs(config, mesh)
  assert list(found) == ['act', 'update']
  assert found['act'].unknown_trips == 16 + 1 + 10 + 1 - 1
  assert found['update'].runs == 4
  state, frozen, batch = found['update'].program.args_info[0]
  assert all(leaf.donated for leaf in jax.tree.leaves(state))
  assert not frozen
  assert batch.prompt.shape == (4, 32)


def test_what_stays_beside_the_rollouts_counts():
  mesh = sharding.make_mesh(1, 8, 1)
  config = _config()
  setup = abstract.make_setup(config, mesh, LOAD.text_rows)
  size = abstract.state_bytes(config.rl, setup)
  params = abstract.held(setup.abstract_params())
  beside = _programs(config, mesh)['act'].beside
  # The moments of AdamW are two more copies of the parameters.
  assert 2 * params <= beside <= 2 * params + 100
  assert 3 * params <= size <= 3 * params + 100
  # An update has gradients, too.
  assert abstract.least_bytes(config.rl, setup, LOAD) >= size + params
  whole = abstract.make_setup(
    config, sharding.make_mesh(8, 1, 1), LOAD.text_rows
  )
  assert params < abstract.held(whole.abstract_params()) / 7


def test_adapters_have_a_small_state():
  config = _config(**{'model.lora_rank': 4})
  mesh = sharding.make_mesh(1, 8, 1)
  found = _programs(config, mesh)
  state, frozen, _ = found['update'].program.args_info[0]
  assert set(state.params) == {'down', 'up', 'rows', 'readout'}
  setup = abstract.make_setup(config, mesh, LOAD.text_rows)
  assert frozen.keys() == setup.abstract_params().keys()
  assert not any(leaf.donated for leaf in jax.tree.leaves(frozen))
  # The joined copy of the rollouts is still there when the update runs.
  assert found['update'].beside == abstract.held(setup.abstract_params())


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
  setup = abstract.make_setup(
    _config(), sharding.make_mesh(4, 2, 1), weak_scaling.TEXT_ROWS
  )
  tree = sum(x.size * 4 for x in jax.tree.leaves(setup.abstract_params()))
  account = hlo.account(updates[8].as_text())
  assert account.unknown_loops == 0
  assert account.largest_gather().kind == 'all-gather'
  assert 0 < account.largest_gather().gathered < tree / 2


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
def test_a_step_that_cannot_be_says_which_number(overrides, load, message):
  with pytest.raises(ValueError, match=message):
    _programs(_config(**overrides), sharding.make_mesh(1, 8, 1), load)


def test_the_table_tells_what_was_compiled_from_what_is_only_bounded():
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
def test_what_a_compiler_asked_for_in_vain_is_read(message, size):
  assert planning.wanted(message) == size


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
  assert report.mesh == {'data': 1, 'fsdp': 4, 'tensor': 1}
  assert 0 < report.seconds < 1
  update = report.programs[1]
  assert 0 < update.account.largest_gather().gathered < report.parameter_bytes
  shown = planning.text(report)
  assert 'act' in shown
  assert 'update: gathers at most' in shown
  assert 'fits' in planning.summary(report)
  # The smallest of its family, so that nothing more is compiled.
  found = planning.suggest(config, 'v5p', LOAD, report, say=pytest.fail)
  assert found is report
  # The bound that rules slices out is one.
  mesh = abstract.open_mesh(config, report.topology, LOAD.slates)
  setup = abstract.make_setup(config, mesh, LOAD.text_rows)
  assert abstract.least_bytes(config.rl, setup, LOAD) <= update.memory


@needs_libtpu
def test_a_step_that_is_too_large_does_not_fit():
  config = _config(
    **{'model.d_model': 8192, 'model.d_ff': 32768, 'model.num_layers': 2}
  )
  report = planning.plan(config, 'v5e:1x1', LOAD, stop_early=True)
  assert not report.fits
  assert 'does not fit' in planning.text(report)
  first, size = next(planning.roomy(config, 'v5e', LOAD))
  assert first == 'v5e:2x2'
  assert size < topologies.chip(first).hbm < 4 * size
