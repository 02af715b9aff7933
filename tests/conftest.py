"""Eight virtual CPU devices, of which a mesh of open size takes one.

Compiles are quick and cached, progress bars silent, and one trained world is
shared by all workers.
"""

import fcntl
import hashlib
import os
import pathlib
import shutil
import zlib

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


_ROOT = pathlib.Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
  """Adds `--third`, which runs the slow tier a part at a time."""
  parser.addoption(
    '--third', type=int, choices=(0, 1, 2), help='Of the slow tests, a third.'
  )


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  """Puts slow files first, so that no worker ends with one alone.

  With `--third=N`, a slow test is kept if its file is in that third.
  """
  slow = {x.path for x in items if x.get_closest_marker('slow')}
  items.sort(key=lambda item: item.path not in slow)
  third = config.getoption('--third')
  if third is None:
    return
  kept, dropped = [], []
  for item in items:
    name = item.path.relative_to(_ROOT).as_posix().encode()
    other = item.get_closest_marker('slow') and zlib.crc32(name) % 3 != third
    (dropped if other else kept).append(item)
  items[:] = kept
  config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope='session')
def world(tmp_path_factory, _one_device):
  """Stage -> finished artifact of a tiny world.

  All workers and later runs share one world, which is trained again where the
  source has changed. Each worker reads a copy of its own.
  """
  from . import tiny_world

  sources = [
    *(_ROOT / 'gr2_jax').rglob('*.py'),
    *(_ROOT / 'configs').glob('*.py'),
    *(_ROOT / 'tests').glob('tiny*.py'),
  ]
  content = b''.join(path.read_bytes() for path in sorted(sources))
  worlds = _ROOT / '.test_worlds'
  worlds.mkdir(exist_ok=True)
  home = worlds / hashlib.sha256(content).hexdigest()[:16]
  with (worlds / '.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    tiny_world.build(home)
    homes = [path for path in worlds.iterdir() if path.is_dir()]
    for old in sorted(homes, key=os.path.getmtime)[:-3]:
      shutil.rmtree(old)
    own = tmp_path_factory.mktemp('world') / 'runs'
    shutil.copytree(home, own)
  return tiny_world.folders(own)


@pytest.fixture(scope='session', autouse=True)
def _one_device():
  """Gives a mesh whose size is left open one device: it compiles faster."""
  from . import tiny_world

  with pytest.MonkeyPatch.context() as patch:
    tiny_world.on_one_device(patch)
    yield
