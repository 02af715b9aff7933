"""Runs one stage and whatever it needs: flags, config, devices, stages.

python -m gr2_jax.main --config=configs/rl.py --workdir=runs
"""

import hashlib
import importlib
import os
import pathlib
import platform
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from gr2_jax import artifacts, command_line, stages

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file; presets after a colon.', lock_config=True
)
_WORKDIR = flags.DEFINE_string('workdir', 'runs', 'Where artifacts go.')
_DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')


def run(config: ConfigDict, root: str) -> None:
  """Runs the config's target and what it needs; prints the table of results.

  Args:
    config: the whole config. Its `stage` is the target, but `rl` is followed
      by `evaluate`; a seeded target is run for each of its `seeds`.
    root: the workdir, locked meanwhile.
  """
  target = 'evaluate' if config.stage == 'rl' else config.stage
  seeds = config.seeds if stages.STAGES[target].seeded else (None,)
  with artifacts.lock(root):
    for seed in seeds:
      directory = artifacts.run_stage(config, target, root, seed)
      print(f'results: {directory / "results.json"}')
  stage = importlib.import_module(f'gr2_jax.stages.{target}')
  if hasattr(stage, 'summary'):  # Evaluation and studies have a table.
    print(stage.summary(artifacts.read_results(directory)))


def _use_compile_cache() -> None:
  """Keeps compiled programs in the user's cache, one folder a kind of CPU."""
  if jax.config.jax_compilation_cache_dir is None:
    info = pathlib.Path('/proc/cpuinfo')
    cpu = info.read_text().partition('\n\n')[0] if info.exists() else ''
    kept = [x for x in cpu.splitlines() if x.startswith(('model', 'flags'))]
    kind = hashlib.sha256('\n'.join(kept).encode()).hexdigest()[:8]
    cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    directory = pathlib.Path(cache, 'gr2_jax', f'{platform.machine()}-{kind}')
    jax.config.update('jax_compilation_cache_dir', str(directory))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def _is_ours(file: str) -> bool:
  return pathlib.Path(__file__).parent in pathlib.Path(file).parents


def _quiet_libraries() -> None:
  """Lets other libraries log warnings and errors only."""
  logging.get_absl_handler().addFilter(
    lambda r: r.levelname not in ('DEBUG', 'INFO') or _is_ours(r.pathname)
  )


def _is_for_the_user(error: Exception) -> bool:
  """Whether the message says it all; a bug keeps its traceback."""
  if not isinstance(error, ValueError):
    return True
  return _is_ours(traceback.extract_tb(error.__traceback__)[-1].filename)


def main(argv: list[str]) -> None:
  """Entry point of `app.run`."""
  del argv
  sys.stdout.reconfigure(line_buffering=True)
  _quiet_libraries()
  _use_compile_cache()
  # Reduced-precision products part a float32 sampler from its learner by 1e-2;
  # for bfloat16 the setting would only give up the tensor cores.
  if _CONFIG.value.model.dtype == 'float32':
    jax.config.update('jax_default_matmul_precision', 'float32')
  print('devices:', ', '.join(map(str, jax.devices())))
  try:
    run(_CONFIG.value, _WORKDIR.value)
  except KeyboardInterrupt:
    sys.exit('interrupted: the same command goes on from here')
  except (OSError, FloatingPointError, ValueError) as e:
    if _DEBUG.value or not _is_for_the_user(e):
      raise
    sys.exit(f'error: {e}')


if __name__ == '__main__':
  app.run(main, flags_parser=command_line.parse)
