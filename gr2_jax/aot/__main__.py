"""Compiles a training step for a TPU slice, without the slice.

python -m gr2_jax.aot --config=configs/rl.py:model=qwen3_8b --topology=v5p:4x4x4

No data set is read: the lengths of prompts and vocabulary are flags. If the
config sets no mesh, the batch and the parameters are split over as many chips
as possible, and each layer over the remaining ones. Needs the extra `tpu`.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from gr2_jax.aot import planning, topologies
from gr2_jax.pipeline import flags as flags_lib

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file; presets after a colon.', lock_config=True
)
_TOPOLOGY = flags.DEFINE_string('topology', 'v5e:16x16', 'FAMILY:SHAPE.')
_SUGGEST = flags.DEFINE_bool(
  'suggest', True, 'Look for the smallest slice of that family that fits.'
)
_DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')
planning.define_flags()


def main(argv: list[str]) -> None:
  """Prints the report, and the smallest slice that fits."""
  del argv
  config, topology = _CONFIG.value, _TOPOLOGY.value
  load = planning.load_from_flags(flags.FLAGS)
  try:
    report = planning.plan(config, topology, load)
    print(planning.text(report), flush=True)
    if _SUGGEST.value:
      family = topology.partition(':')[0]
      best = planning.suggest(config, family, load, report)
      print(f'smallest that fits: {best.topology if best else "none"}')
  except ValueError as e:
    if not isinstance(e, topologies.TopologyError) and _DEBUG.value:
      raise
    sys.exit(f'error: {e}')


if __name__ == '__main__':
  app.run(main, flags_parser=flags_lib.parse)
