"""Eight virtual CPU devices, quick compiles and their cache, silent bars."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['TQDM_DISABLE'] = '1'
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(__file__).parent.parent / '.jax_cache'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

# Programs here run a few times: compiling them well takes longer than they do.
os.environ['XLA_FLAGS'] = ' '.join(
  (
    os.environ.get('XLA_FLAGS', ''),
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
  )
)

import jax  # noqa: E402 (reads the environment)

from gr2_jax.pipeline import environment  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
environment.keep_freed_memory()

import hypothesis  # noqa: E402 (after the devices are set)
import pytest  # noqa: E402

# The same examples in every run, and no limit on a loaded machine's time.
hypothesis.settings.register_profile('fixed', derandomize=True, deadline=None)
hypothesis.settings.load_profile('fixed')


# Files of a minute and more, the longest first: no worker is to end with one.
_LONG = (
  'test_cluster.py',
  'test_compress.py',
  'test_prune.py',
  'test_study_distill.py',
  'test_kill.py',
  'test_export.py',
  'test_opd.py',
  'test_colab.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the long files first, in which order workers take them."""
  place = {name: i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: place.get(item.path.name, len(_LONG)))


@pytest.fixture(scope='session')
def world(tmp_path_factory):
  """Stage -> finished artifact of a tiny world, built once."""
  from . import tiny_world

  return tiny_world.build(tmp_path_factory.mktemp('world'))


@pytest.fixture(scope='module')
def one_device(world):
  """What a module runs is on one device; the world's own runs were on all."""
  from . import tiny_world

  with pytest.MonkeyPatch.context() as patch:
    tiny_world.on_one_device(patch)
    yield
