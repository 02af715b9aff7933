"""After a kill or SIGTERM the same command resumes bit for bit."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gr2_jax.distributed import rendezvous
from gr2_jax.pipeline import artifacts, reporting

from . import tiny, tiny_world

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).parent.parent
_COMMAND = [
  sys.executable, '-m', 'gr2_jax.main',
  '--config=configs/sft.py:test,dataset=world', *tiny_world.OVERRIDES,
]  # fmt: skip


def start(root):
  return subprocess.Popen(
    [*_COMMAND, f'--workdir={root}'],
    cwd=_ROOT,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': '8'},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.parametrize(
  ('number', 'code'),
  [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, rendezvous.EXIT_RETRY)],
)
def test_a_stopped_run_resumes_bit_for_bit(world, tmp_path, number, code):
  name = world['sft'].name
  for stage in tiny_world.NEEDS['sft']:
    (tmp_path / world[stage].name).symlink_to(world[stage])
  workdir, process = tmp_path / name, start(tmp_path)
  while process.poll() is None and not (workdir / 'checkpoints/2').is_dir():
    time.sleep(0.01)
  process.send_signal(number)
  out, _ = process.communicate()
  assert process.returncode == code, out
  assert not (workdir / 'results.json').exists()
  assert not (workdir / 'checkpoints/6').exists()

  process = start(tmp_path)
  out, _ = process.communicate()
  assert process.returncode == 0, out
  assert f'resumes in {workdir}' in out
  assert artifacts.read_results(workdir) == artifacts.read_results(world['sft'])
  found, wanted = (
    tiny_world.left(world, 'sft', path)[0] for path in (workdir, world['sft'])
  )
  tiny.assert_trees_equal(found, wanted)
  one, two = (
    reporting.read_metrics(path / 'metrics.jsonl')
    for path in (workdir, world['sft'])
  )
  for a, b in zip(one, two, strict=True):
    assert a | {'steps_per_second': 0} == b | {'steps_per_second': 0}
