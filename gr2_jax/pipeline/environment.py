"""What a command sets up before JAX starts: memory, compile cache, logs."""

import ctypes
import hashlib
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
  """Sets up memory, logs, the compile cache and the precision of products.

  Args:
    dtype: of the model's activations.
  """
  sys.stdout.reconfigure(line_buffering=True)
  keep_freed_memory()
  _quiet_libraries()
  _use_compile_cache()
  # Reduced-precision products part a float32 sampler from its learner by 1e-2;
  # for bfloat16 the setting would only give up the tensor cores.
  if dtype == 'float32':
    jax.config.update('jax_default_matmul_precision', 'float32')


def keep_freed_memory() -> bool:
  """Has glibc keep what is freed, and give it out again.

  On a CPU a program's large buffers are allocated anew in every step. glibc
  maps each afresh, and the kernel clears each page that is touched, which can
  take as long as the step itself. One arena for all threads, so that what one
  frees another finds. Settings of malloc in the environment are left alone.

  Returns:
    Whether it was done: the libc is glibc, and nothing was set.
  """
  told = any(n.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for n in os.environ)
  if told or platform.libc_ver()[0] != 'glibc':
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
  return pathlib.Path(__file__).parent.parent in pathlib.Path(file).parents


def _quiet_libraries() -> None:
  """Lets other libraries log warnings and errors only."""
  logging.get_absl_handler().addFilter(
    lambda r: r.levelname not in ('DEBUG', 'INFO') or _is_ours(r.pathname)
  )


def is_for_the_user(error: Exception) -> bool:
  """Whether the message says it all; a bug keeps its traceback."""
  if not isinstance(error, ValueError):
    return True
  return _is_ours(traceback.extract_tb(error.__traceback__)[-1].filename)
