import os
import platform
import subprocess
import sys

import pytest

from gr2_jax.pipeline import environment

# Prints how many pages the kernel had to clear once a program has run a while.
FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from gr2_jax.pipeline import environment

if sys.argv[1] == 'keep':
  assert environment.keep_freed_memory()

@jax.jit
def step(x):
  return x[:, None] * x

def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x = jnp.arange(3000.0)
for number in range(60):
  if number == 30:
    before = faults()
  step(x).block_until_ready()
print(faults() - before)
"""
PAGES = 3000 * 3000 * 4 // 4096  # of one buffer

glibc = pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc', reason='malloc is not that of glibc'
)


def faults(how):
  env = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))
  }
  found = subprocess.run(
    [sys.executable, '-c', FAULTS, how],
    env=env,
    capture_output=True,
    text=True,
    check=True,
    timeout=300,
  )
  return int(found.stdout)


@glibc
def test_steps_reuse_the_memory_of_the_steps_before_them():
  fresh, kept = faults('leave'), faults('keep')
  assert fresh > 20 * PAGES  # Every step's buffer was cleared.
  assert kept < fresh / 3


@pytest.mark.parametrize('name', ['MALLOC_ARENA_MAX', 'GLIBC_TUNABLES'])
def test_what_a_user_told_malloc_is_left_alone(monkeypatch, name):
  monkeypatch.setenv(name, '')
  assert not environment.keep_freed_memory()


def test_another_libc_is_left_alone(monkeypatch):
  monkeypatch.setattr(platform, 'libc_ver', lambda: ('musl', ''))
  assert not environment.keep_freed_memory()
