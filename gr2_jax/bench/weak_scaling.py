"""Work of one device as devices and batch grow together, on virtual devices.

python -m gr2_jax.bench.weak_scaling

The step of stage `rl` is compiled for 1 to 64 virtual CPU devices with a fixed
number of slates each; `cost_analysis()` says what one device then computes and
moves. Flat is perfect. Nothing runs, nothing is timed.
"""

import math
import sys

import jax
from absl import app, flags

from configs import common
from gr2_jax.aot import abstract
from gr2_jax.distributed import sharding
from gr2_jax.pipeline import reporting

_DEVICES = flags.DEFINE_list(
  'devices', [str(2**n) for n in range(7)], 'Meshes to compare.'
)
_SLATES = flags.DEFINE_integer('slates_a_device', 4, 'Load.', 1)
_MODEL = flags.DEFINE_string('model', 'tiny', 'Preset.')
_AXIS = flags.DEFINE_enum(
  'axis', 'data', ('data', 'fsdp'), 'Mesh axis that grows.'
)

# Costs are of the program, not of the machine code: spare LLVM the effort.
QUICK = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
COSTS = ('flops', 'bytes accessed')
PROMPT = 128  # tokens
TEXT_ROWS = 512


def programs(config, slates: int, **sizes: int) -> dict[str, abstract.Lowered]:
  """A step for some of this process's devices.

  Args:
    config: of `configs/rl.py`.
    slates: of each device.
    **sizes: of the mesh axes `data` and `fsdp`; 1 where they are left out.

  Returns:
    Its programs by name.
  """
  count = math.prod(sizes.values())
  mesh = sharding.make_mesh(
    **({'data': 1} | sizes), devices=jax.devices()[:count]
  )
  setup = abstract.make_setup(config, mesh, TEXT_ROWS)
  load = abstract.Load(slates * count, PROMPT, TEXT_ROWS)
  lowered = abstract.lower(config.rl, setup, load)
  return {one.name: one for one in lowered}


def cost(compiled: jax.stages.Compiled) -> dict[str, float]:
  """COSTS of one device, as XLA counts them: a loop's body once."""
  found = compiled.cost_analysis()
  return {key: found[key] for key in COSTS}


def main(argv: list[str]) -> None:
  """Entry point of `app.run`."""
  del argv
  counts = [int(x) for x in _DEVICES.value]
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', max(counts))
  config = common.compose('rl', f'model={_MODEL.value}')
  rows, first = [], None
  for count in counts:
    lowered = programs(config, _SLATES.value, **{_AXIS.value: count})
    found = {
      name: cost(one.program.compile(QUICK)) for name, one in lowered.items()
    }
    first = first or found
    row = {'devices': str(count)}
    for name, costs in found.items():
      for key, unit in zip(COSTS, ('MFLOP', 'MB'), strict=True):
        row[f'{name} {unit}'] = f'{costs[key] / 1e6:.1f}'
        row[f'{name} {unit} ratio'] = f'{costs[key] / first[name][key]:.3f}'
    rows.append(row)
    print(row, file=sys.stderr, flush=True)
  print(reporting.table(rows, tuple(rows[0])))


if __name__ == '__main__':
  app.run(main)
