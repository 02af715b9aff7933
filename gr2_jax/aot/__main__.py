"""Compiles a training step for a TPU slice that nobody has, and reads it.

python -m gr2_jax.aot --config=configs/rl.py:model=qwen3_8b --topology=v5p:4x4x4

Nothing is read from a disk: the length of prompts and the rows of the
vocabulary are flags. Where the config leaves the mesh open, the batch is split
over as many chips as it can be, parameters with it, and the chips that are left
split every layer. Needs the extra `tpu`.
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
  """Entry point of `app.run`."""
  del argv
  config, topology = _CONFIG.value, _TOPOLOGY.value
  load = planning.load_of(flags.FLAGS)
  try:
    report = planning.plan(config, topology, load)
    print(planning.text(report), flush=True)
    if _SUGGEST.value:
      family = topology.partition(':')[0]
      found = planning.suggest(config, family, load, report)
      print(f'smallest that fits: {found.topology if found else "none"}')
  except ValueError as e:
    if not isinstance(e, topologies.TopologyError) and _DEBUG.value:
      raise
    sys.exit(f'error: {e}')


if __name__ == '__main__':
  app.run(main, flags_parser=flags_lib.parse)
