import json
import os
import pathlib
import re
import subprocess
import sys
import types

import ml_collections
import pytest

from gr2_jax import main
from gr2_jax.pipeline import artifacts
from gr2_jax.pipeline import graph as graph_lib
from gr2_jax.stages import evaluate

_ROOT = pathlib.Path(__file__).parent.parent

# A config file with everything `slates` depends on, which is the data.
_CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=''):
  if arg not in ('', 'test'):
    raise ValueError(f'unknown preset {arg!r}')
  return ConfigDict(dict(
    stage='slates', seed=0, seeds=(0,),
    data=dict(source='files', path='', group_size=8), rl=dict(steps=3),
    model=dict(dtype='float32'),
  ))
"""


def _main(tmp_path, *words):
  """Runs the command in a process; returns (exit code, stdout, stderr)."""
  (tmp_path / 'rl.py').write_text(_CONFIG)
  done = subprocess.run(
    [sys.executable, '-m', 'gr2_jax.main', *words],
    env=os.environ | {'PYTHONPATH': str(_ROOT)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    stdin=subprocess.DEVNULL,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ([], '--config is missing'),
    (['--config=r1.py'], 'no config file r1.py; did you mean rl.py?'),
    (['--config=rl.py:tst'], "unknown preset 'tst'"),
    (
      ['--config=rl.py', '--config.data.grup_size=3'],
      'no field config.data.grup_size; did you mean config.data.group_size?',
    ),
    (
      ['--config=rl.py', '--config.rk.steps=3'],
      'no field config.rk.steps; did you mean config.rl.steps?',
    ),
    (['--config=rl.py', '--config.rl.steps=many'], 'config.rl.steps=many'),
    (['--config=rl.py', '--wrkdir=x'], 'Did you mean: workdir'),
    (['--config=rl.py', '--config.seed=3'], 'write --config.seeds='),
    (['--config', 'rl.py', 'now'], "'now' is no flag"),
  ],
)
def test_a_wrong_command_line_is_one_clean_line(tmp_path, words, message):
  code, out, err = _main(tmp_path, *words)
  assert code == 2
  assert out == ''
  assert len(err.splitlines()) == 1
  assert err.startswith('error: ')
  assert message in err


def test_a_held_workdir_is_one_clean_line(tmp_path):
  with artifacts.lock(tmp_path / 'runs'):
    code, out, err = _main(tmp_path, '--config=rl.py:test')
  assert code == 1
  assert 'devices:' in out
  assert len(err.splitlines()) == 1
  assert f'process {os.getpid()} is running in this workdir' in err


def test_the_target_rl_ends_with_the_table(tmp_path, monkeypatch, capsys):
  metrics = {name: {'r@1': 0.25} for name in evaluate.RANKERS}
  metrics['policy'] = {'r@1': 0.5, 'auc': 0.75}
  gain = {'n@5': {'delta': 0.125, 'ci': [0.0625, 0.25]}}
  found = {
    'metrics': metrics,
    'paired': {f'{first}-{second}': gain for first, second in evaluate.PAIRS},
    'n_slates': 7,
    'n_users': 3,
    'seeds': 2,
  }
  watches = ('copy_rate', 'top3_unchanged', 'valid_rate', 'order_sensitivity')
  watches += ('valid_rate_unmasked', 'gap_closed')
  found |= dict.fromkeys(watches, 0.5)
  seeds = []

  def rl(config, inputs, workdir):
    seeds.append(config.seed)
    return {}

  runs = {'rl': rl, 'evaluate': lambda *_: found}
  graph = {
    'rl': graph_lib.Stage((), ('rl',), seeded=True),
    'evaluate': graph_lib.Stage(('rl@*',), ('seeds',)),
  }
  monkeypatch.setattr(graph_lib, 'STAGES', graph)
  for name, run in runs.items():
    module = types.ModuleType(name)
    module.run = run
    if name == 'evaluate':
      module.summary = evaluate.summary
    monkeypatch.setitem(sys.modules, f'gr2_jax.stages.{name}', module)
  config = ml_collections.ConfigDict(
    {'stage': 'rl', 'seed': 0, 'seeds': (1, 2), 'rl': {'x': 1}}
  )
  main.run(config, str(tmp_path))
  out = capsys.readouterr().out
  assert seeds == [1, 2]
  rows = [re.sub(' +', ' ', line) for line in out.splitlines()]
  assert '| incoming | 0.2500 | - | - | - | - | - | - |' in rows
  assert '| policy | 0.5000 | - | - | - | - | - | 0.7500 |' in rows
  gains = '| policy-incoming | - | - | +0.1250 [+0.0625, +0.2500] | - |'
  assert gains in rows
  assert '7 slates of 3 users, 2 seed(s)' in out
  results = list(tmp_path.glob('evaluate-*/results.json'))
  assert json.loads(results[0].read_text()) == found


def test_main_is_under_a_hundred_lines():
  assert len(pathlib.Path(main.__file__).read_text().splitlines()) < 100
