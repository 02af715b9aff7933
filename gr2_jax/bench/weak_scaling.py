"""Work of one device as devices and batch grow together, on virtual devices.

python -m gr2_jax.bench.weak_scaling

The step of stage `rl` is compiled for 1 to 64 virtual CPU devices with a fixed
number of slates each; `cost_analysis()` says what one device then computes and
moves. Flat is perfect. Nothing runs, nothing is timed.
"""

import jax
from absl import app, flags

from configs import common
from gr2_jax import abstract, reporting, sharding

_DEVICES = flags.DEFINE_list('devices', ['1', '8', '64'], 'Meshes to compare.')
_SLATES = flags.DEFINE_integer('slates', 4, 'Slates a device.', 1)
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


def measure(
  config, count: int, slates: int, axis: str = 'data'
) -> dict[str, dict[str, float]]:
  """Compiles a step for some of this process's devices.

  Args:
    config: of `configs/rl.py`.
    count: devices.
    slates: of each device.
    axis: of the mesh that has all of them.

  Returns:
    Program -> `flops` and `bytes accessed` of one device.
  """
  sizes = {'data': 1, 'fsdp': 1, axis: count}
  mesh = sharding.make_mesh(**sizes, devices=jax.devices()[:count])
  setup = abstract.make_setup(config, mesh, TEXT_ROWS)
  load = abstract.Load(slates * count, PROMPT, TEXT_ROWS)
  found = {}
  for lowered in abstract.lower(config.rl, setup, load):
    cost = lowered.program.compile(QUICK).cost_analysis()
    found[lowered.name] = {key: cost[key] for key in COSTS}
  return found


def main(argv: list[str]) -> None:
  """Entry point of `app.run`."""
  del argv
  counts = [int(x) for x in _DEVICES.value]
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', max(counts))
  config = common.compose('rl', f'model={_MODEL.value}')
  rows, first = [], None
  for count in counts:
    found = measure(config, count, _SLATES.value, _AXIS.value)
    first = first or found
    row = {'devices': str(count)}
    for name, cost in found.items():
      for key, unit in zip(COSTS, ('MFLOP', 'MB'), strict=True):
        row[f'{name} {unit}'] = f'{cost[key] / 1e6:.1f}'
        row[f'{name} {unit} ratio'] = f'{cost[key] / first[name][key]:.3f}'
    rows.append(row)
  print(reporting.table(rows, tuple(rows[0])))


if __name__ == '__main__':
  app.run(main)
