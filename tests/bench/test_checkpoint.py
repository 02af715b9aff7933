import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_a_tree_is_read_on_another_mesh_as_it_was_written():
  done = subprocess.run(
    [sys.executable, '-m', 'gr2_jax.bench.checkpoint', '--layers=1',
     '--width=128'],
    capture_output=True,
    text=True,
    check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  header, _, *rows = done.stdout.strip().splitlines()
  names = [cell.strip() for cell in header.strip('|').split('|')]
  saved, restored = (
    dict(
      zip(names, (c.strip() for c in row.strip('|').split('|')), strict=True)
    )
    for row in rows
  )
  assert saved['mesh'] == 'data 1 x fsdp 8 x tensor 1'
  assert restored['mesh'] == 'data 1 x fsdp 4 x tensor 2'
  assert saved['parameters'] == restored['parameters'] != '0'
