"""Settings made before JAX starts: memory, compile cache, logs."""

import ctypes
import hashlib
import io
import os
import pathlib
import platform
import sys
import traceback

import jax
from absl import logging

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def set_up(dtype: str) -> None:
  """Sets up memory, logs, the compile cache and the matmul precision.

  Args:
    dtype: of the model's activations.
  """
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(line_buffering=True)
  keep_freed_memory()
  _quiet_libraries()
  _use_compile_cache()
  # With reduced-precision products, log-probabilities of a float32 sampler and
  # its learner differ by 1e-2. With bfloat16 the setting would only disable
  # the tensor cores.
  if dtype == 'float32':
    jax.config.update('jax_default_matmul_precision', 'float32')


def keep_freed_memory() -> bool:
  """Makes glibc reuse freed memory instead of returning it to the system.

  On a CPU, a program allocates its large buffers in every step. By default
  glibc maps each anew, and the kernel clears every page of it, which can take
  as long as the step itself. All threads share one arena, so that one can use
  what another has freed.

  Returns:
    False, and nothing is done, if the libc is not glibc or the environment
    has settings of malloc.
  """
  is_set = any(n.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for n in os.environ)
  if is_set or platform.libc_ver()[0] != 'glibc':
    return False
  settings = (
    (_M_ARENA_MAX, 1),
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, 2**31 - 1),
    (_M_TOP_PAD, 64 << 20),
  )
  mallopt = ctypes.CDLL(None).mallopt
  return all(mallopt(name, value) == 1 for name, value in settings)


def _use_compile_cache() -> None:
  """Caches compiled programs for the user, in one folder per kind of CPU."""
  if jax.config.values['jax_compilation_cache_dir'] is None:
    info = pathlib.Path('/proc/cpuinfo')
    cpu = info.read_text().partition('\n\n')[0] if info.exists() else ''
    lines = [x for x in cpu.splitlines() if x.startswith(('model', 'flags'))]
    kind = hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:8]
    cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    directory = pathlib.Path(cache, 'gr2_jax', f'{platform.machine()}-{kind}')
    jax.config.update('jax_compilation_cache_dir', str(directory))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def _is_in_package(file: str) -> bool:
  return pathlib.Path(__file__).parent.parent in pathlib.Path(file).parents


def _quiet_libraries() -> None:
  """Restricts the logs of other libraries to warnings and errors."""
  logging.get_absl_handler().addFilter(
    lambda r: r.levelname not in ('DEBUG', 'INFO') or _is_in_package(r.pathname)
  )


def is_for_the_user(error: Exception) -> bool:
  """Whether an error's message suffices; a bug needs its traceback."""
  if not isinstance(error, ValueError):
    return True
  return _is_in_package(traceback.extract_tb(error.__traceback__)[-1].filename)
