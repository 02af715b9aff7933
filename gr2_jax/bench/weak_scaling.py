"""Work of one device as devices and batch grow together, on virtual devices.

python -m gr2_jax.bench.weak_scaling

The step of stage `rl` is compiled for 1 to 64 virtual CPU devices with a fixed
number of slates each. `cost_analysis()` gives the work of one device; a flat
column is perfect scaling. Nothing runs, nothing is timed.
"""

import math
import sys

import jax
import ml_collections
from absl import app, flags

from configs import common
from gr2_jax.aot import abstract
from gr2_jax.distributed import sharding
from gr2_jax.pipeline import reporting

_DEVICES = flags.DEFINE_list(
  'devices', [str(2**n) for n in range(7)], 'Numbers of devices.'
)
_SLATES = flags.DEFINE_integer('slates_a_device', 4, 'Of a step.', 1)
_MODEL = flags.DEFINE_string('model', 'tiny', 'Preset.')
_AXIS = flags.DEFINE_enum(
  'axis', 'data', ('data', 'fsdp'), 'Mesh axis that grows.'
)

# Costs do not depend on the machine code, so LLVM may skip its optimizations.
QUICK = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
COSTS = ('flops', 'bytes accessed')
PROMPT = 128  # tokens
TEXT_ROWS = 512


def programs(
  config: ml_collections.ConfigDict, slates: int, **sizes: int
) -> dict[str, abstract.Lowered]:
  """Lowers a step for some of this process's devices.

  Args:
    config: of `configs/rl.py`.
    slates: of each device.
    **sizes: of the mesh axes `data` and `fsdp`; 1 where they are left out.
  """
  count = math.prod(sizes.values())
  mesh = sharding.make_mesh(
    **({'data': 1} | sizes), devices=jax.devices()[:count]
  )
  load = abstract.Load(slates * count, PROMPT, TEXT_ROWS)
  lowered = abstract.lower(abstract.make_step(config, mesh, load))
  return {program.name: program for program in lowered}


def cost(compiled: jax.stages.Compiled) -> dict[str, float]:
  """COSTS of one device; XLA counts the body of a loop once."""
  costs = compiled.cost_analysis()
  return {key: costs[key] for key in COSTS}


def main(argv: list[str]) -> None:
  """Prints a row for each number of devices."""
  del argv
  counts = [int(x) for x in _DEVICES.value]
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', max(counts))
  config = common.compose('rl', f'model={_MODEL.value}')
  rows, first = [], None
  for count in counts:
    lowered = programs(config, _SLATES.value, **{_AXIS.value: count})
    costs = {
      name: cost(program.program.compile(QUICK))
      for name, program in lowered.items()
    }
    first = first or costs
    row = {'devices': str(count)}
    for name, values in costs.items():
      for key, unit in zip(COSTS, ('MFLOP', 'MB'), strict=True):
        row[f'{name} {unit}'] = f'{values[key] / 1e6:.1f}'
        row[f'{name} {unit} ratio'] = f'{values[key] / first[name][key]:.3f}'
    rows.append(row)
    print(row, file=sys.stderr, flush=True)
  print(reporting.table(rows, tuple(rows[0])))


if __name__ == '__main__':
  app.run(main)
