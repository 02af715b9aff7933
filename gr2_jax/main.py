"""Runs one stage after the stages that it needs.

python -m gr2_jax.main --config=configs/rl.py --workdir=runs
"""

import importlib
import sys

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from gr2_jax import __version__
from gr2_jax.distributed import processes, rendezvous
from gr2_jax.pipeline import artifacts, environment, graph
from gr2_jax.pipeline import flags as flags_lib

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, with presets after a colon.', lock_config=True
)
_WORKDIR = flags.DEFINE_string('workdir', 'runs', 'Folder of the artifacts.')
# Trained stage -> stage or study that measures its policy.
_FOLLOWED_BY = {
  'rl': 'evaluate',
  'internalize': 'study_internalize',
  'prune': 'study_prune',
  'compress': 'study_compress',
}
_DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')
processes.define_flags()


def run(config: ConfigDict, root: str) -> None:
  """Runs the config's stage, and what measures it; prints the results table.

  Args:
    config: the whole config; a seeded stage runs for each of its `seeds`.
    root: the workdir.
  """
  target = _FOLLOWED_BY.get(config.stage, config.stage)
  seeds = config.seeds if graph.STAGES[target].seeded else (None,)
  with artifacts.lock(root):
    for seed in seeds:
      directory = artifacts.run_stage(config, target, root, seed)
      _print(f'results: {directory / "results.json"}')
  stage = importlib.import_module(graph.module(target))
  if hasattr(stage, 'summary'):  # Evaluation and studies.
    _print(stage.summary(artifacts.read_results(directory)))


def _print(text: str) -> None:
  """Prints on process 0 alone."""
  if processes.is_main_process():
    print(text)


def main(argv: list[str]) -> None:
  """The command, after its flags are parsed."""
  del argv
  config = _CONFIG.value
  environment.set_up(config.model.dtype)
  # These must be the same on all processes.
  settings = {'gr2_jax': __version__, 'jax': jax.__version__}
  settings |= {name: str(value) for name, value in flags_lib.fields(config)}
  try:
    place = processes.find_place(flags.FLAGS)
    with processes.initialize(place, settings, flags.FLAGS.meeting_timeout):
      _print(f'devices: {", ".join(map(str, jax.devices()))}')
      run(config, _WORKDIR.value)
  except KeyboardInterrupt:
    print('interrupted: run the same command again to resume', file=sys.stderr)
    sys.exit(130)
  except processes.Preempted as e:
    print(f'{e}: run the same command again to resume', file=sys.stderr)
    sys.exit(rendezvous.EXIT_RETRY)
  except (OSError, FloatingPointError, ValueError) as e:
    if _DEBUG.value or not environment.is_for_the_user(e):
      raise
    sys.exit(f'error: {e}')


if __name__ == '__main__':
  app.run(main, flags_parser=flags_lib.parse)
