"""The launchers of clouds and SLURM, against tools that only pretend."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from unittest import mock

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from launch import commands, skypilot, slices, slurm, tpu_vm, xpk

_ROOT = pathlib.Path(__file__).parent.parent.parent
_LAUNCHERS = {
  'skypilot': skypilot,
  'slurm': slurm,
  'tpu_vm': tpu_vm,
  'xpk': xpk,
}

# A legal command line of each, before `--`.
_FLAGS = {
  'skypilot': ['--gpus=H100:8', '--nodes=2', '--bucket=gs://b'],
  'slurm': ['--nodes=2'],
  'tpu_vm': ['--zone=z', '--topology=v5p:2x2x2'],
  'xpk': ['--cluster=c', '--zone=z', '--topology=v5e:4x4', '--docker-image=i'],
}
_WORDS = ['--config=configs/rl.py', '--workdir=/mnt/runs']

# One program for all tools. It notes its name and words, does what the tool
# would do with the command that it is given, and exits as `answers` says.
_TOOL = r"""#!{python} -IS
import json, os, pathlib, re, subprocess, sys
here = pathlib.Path(__file__).parent.parent
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open(here / 'log', 'a') as f:
  f.write(json.dumps([name, *words]) + '\n')

def answer(key, default):
  path = here / 'answers'
  answers = json.loads(path.read_text()) if path.exists() else {{}}
  value = answers.get(key, []).pop(0) if answers.get(key) else default
  path.write_text(json.dumps(answers))
  return value

def bash(command, **environment):
  done = subprocess.run(['bash', '-c', command], env=os.environ | environment)
  return done.returncode

code = 0
if name == 'python':
  code = answer('python', 0)
elif name == 'gcloud' and 'describe' in words:
  print(answer('state', 'ACTIVE'))
elif name == 'gcloud' and 'create' in words:
  code = answer('create', 0)
elif name == 'gcloud' and 'ssh' in words:
  # ssh joins the words and gives them to the user's shell.
  command = next(w for w in words if w.startswith('--command='))
  code = bash(command.partition('=')[2])
elif name == 'sbatch':
  code = bash(sys.stdin.read(), SLURM_JOB_ID='7')
elif name == 'srun':
  while words[0].startswith('-'):
    words.pop(0)
  os.execvp(words[0], words)
elif name == 'sky':
  run = subprocess.run(
    ['real-python', '-c',
     'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["run"])',
     words[-1]], capture_output=True, text=True, check=True).stdout
  for rank in '01':
    bash(run, SKYPILOT_NODE_IPS='10.0.0.5\n10.0.0.6', SKYPILOT_NUM_NODES='2',
         SKYPILOT_NODE_RANK=rank)
elif name == 'xpk':
  # Kubernetes expands; the container's script has it in a subshell.
  command = next(w for w in words if w.startswith('--command='))
  command = command.partition('=')[2]
  expand = lambda m: '$' if m[0] == '$$' else 'BAD'
  command = re.sub(r'\$\$|\$\((\w+)\)', expand, command)
  code = bash('(' + command + ') & PID=$!; wait $PID; exit $?')
sys.exit(code)
"""


class _Machine:
  """A directory with the tools; runs scripts with them."""

  def __init__(self, root):
    self.root = root
    tools = root / 'bin'
    tools.mkdir()
    names = 'gcloud git python sbatch scontrol sky sleep srun tar uv xpk'
    for name in names.split():
      (tools / name).write_text(_TOOL.format(python=sys.executable))
      (tools / name).chmod(0o755)
    (tools / 'real-python').symlink_to(sys.executable)
    # Where a TPU host, and SkyPilot in the working directory, have it.
    for project in (root / 'gr2_jax', root):
      (project / '.venv/bin').mkdir(parents=True)
      (project / '.venv/bin/python').write_text(
        f'#!/bin/bash\nexec {shlex.quote(str(tools / "python"))} "$@"\n'
      )
      (project / '.venv/bin/python').chmod(0o755)

  def run(self, script, answers=None, **environment):
    """Returns (exit code, what the tools were called with)."""
    (self.root / 'log').write_text('')
    (self.root / 'answers').write_text(json.dumps(answers or {}))
    bare = {k: v for k, v in os.environ.items() if 'SLURM' not in k}
    done = subprocess.run(
      ['bash', '-c', script],
      env=bare
      | {
        'PATH': f'{self.root}/bin:{os.environ["PATH"]}',
        'HOME': str(self.root),
        'TMPDIR': str(self.root),
      }
      | environment,
      cwd=self.root,
      stdout=subprocess.DEVNULL,
    )
    log = (self.root / 'log').read_text()
    return done.returncode, [json.loads(x) for x in log.splitlines()]


@pytest.fixture(scope='module')
def machine(tmp_path_factory):
  return _Machine(tmp_path_factory.mktemp('machine'))


def _dry_run(launcher, flags, words):
  """What `--dry-run` prints."""
  with mock.patch('builtins.print') as printed:
    code = _LAUNCHERS[launcher].launch([*flags, '--dry-run'], words)
  assert code == 0
  return printed.call_args.args[0]


def _trained(log):
  """The words that gr2_jax.main was given, once for every process."""
  return [x[3:] for x in log if x[:3] == ['python', '-m', 'gr2_jax.main']]


_NASTY = [
  "--config.study_distill.datasets=('world',)",
  '--config.a=a  b',
  '--config.b=$HOME $(echo no) `echo no` $$ $$(HOME) $(HOME)',
  """--config.c='"\\'""",
  '--config.d=a;b&c|d>e<f*?[x]~!#{y}%',
  '--config.e=',
  '--config.f=é\t: - {{x}}',
  '--config.g=\\\\$\\n',
]


@pytest.mark.parametrize('launcher', _LAUNCHERS)
@hypothesis.settings(max_examples=3)
@hypothesis.given(
  more=st.lists(
    st.text(
      st.sampled_from('\'"\\$`(){}[]<>|&;!#*?~=,: %@^-\taé0'), max_size=12
    ).map('--config.x={}'.format),
    max_size=30,
  )
)
def test_every_word_arrives_as_it_was_given(machine, launcher, more):
  words = [*_WORDS, *_NASTY, *more]
  _, log = machine.run(_dry_run(launcher, _FLAGS[launcher], words))
  trained = _trained(log)
  assert trained
  for found in trained:
    assert found[: len(words)] == words


@pytest.mark.parametrize('launcher', ['slurm', 'tpu_vm', 'xpk'])
def test_jax_finds_out_who_it_is(machine, launcher):
  code, log = machine.run(_dry_run(launcher, _FLAGS[launcher], _WORDS))
  assert code == 0
  assert _trained(log) == [[*_WORDS, '--cluster=auto']]


def test_sky_nodes_are_told_who_they_are(machine):
  script = _dry_run('skypilot', _FLAGS['skypilot'], _WORDS)
  code, log = machine.run(script)
  assert code == 0
  assert log[0][:5] == ['sky', 'jobs', 'launch', '--name', 'gr2']
  cluster = ['--coordinator=10.0.0.5:8476', '--num_processes=2']
  assert _trained(log) == [
    [*_WORDS, *cluster, f'--process_id={i}'] for i in range(2)
  ]
  text = (machine.root / 'gr2_jax-gr2.yaml').read_text()
  task = yaml.safe_load(text)
  assert task['num_nodes'] == 2
  assert task['resources'] == {
    'use_spot': False,
    'job_recovery': {'recover_on_exit_codes': [75]},
    'accelerators': 'H100:8',
  }
  assert task['file_mounts'] == {
    '/mnt/runs': {'source': 'gs://b', 'mode': 'MOUNT'}
  }
  assert ".[demo,gpu]'" in task['setup']


def test_sky_takes_a_tpu_slice_a_volume_and_its_own_cluster(machine):
  flags = ['--topology=v5p:4x4x4', '--volume=v', '--infra=gcp/us-east5']
  flags += ['--spot', '--sky-cluster=mine', '--env=A=it is']
  code, log = machine.run(_dry_run('skypilot', flags, _WORDS))
  assert code == 0
  assert log[0][:4] == ['sky', 'launch', '--cluster', 'mine']
  assert _trained(log)[0] == [*_WORDS, '--cluster=auto']
  task = yaml.safe_load((machine.root / 'gr2_jax-gr2.yaml').read_text())
  assert task['resources']['accelerators'] == 'tpu-v5p-128'
  assert task['resources']['accelerator_args'] == {
    'runtime_version': 'v2-alpha-tpuv5'
  }
  assert task['resources']['use_spot'] is True
  assert task['volumes'] == {'/mnt/runs': 'v'}
  assert task['run'].startswith("export A='it is'\n")


def test_xpk_is_given_the_slice_and_when_to_restart(machine):
  flags = [*_FLAGS['xpk'], '--slices=2', '--storage=s', '--storage=t', '--spot']
  code, log = machine.run(_dry_run('xpk', flags, _WORDS), {'python': [75]})
  assert code == 75  # What JobSet sees.
  words = log[0]
  assert words[:3] == ['xpk', 'workload', 'create']
  for word in (
    '--workload=gr2',
    '--cluster=c',
    '--zone=z',
    '--tpu-type=v5litepod-16',
    '--num-slices=2',
    '--docker-image=i',
    '--storage=s',
    '--storage=t',
    '--spot',
    '--max-restarts=50',
    '--restart-on-exit-codes=75',
  ):
    assert word in words


@pytest.mark.parametrize(
  ('code', 'restarted', 'requeued'),
  [
    (0, 0, False),
    (1, 0, False),
    (2, 0, False),
    (75, 0, True),
    (137, 0, True),
    (75, 49, True),
    (75, 50, False),
  ],
)
def test_slurm_requeues_a_preempted_run(machine, code, restarted, requeued):
  found, log = machine.run(
    _dry_run('slurm', _FLAGS['slurm'], _WORDS),
    {'python': [code]},
    SLURM_RESTART_COUNT=str(restarted),
  )
  assert found == code
  assert (['scontrol', 'requeue', '7'] in log) is requeued


def test_slurm_starts_one_process_a_gpu(machine):
  flags = ['--nodes=3', '--gpus-per-node=4', '--cpus-per-gpu=6', '--time=1:00']
  flags += ['--sbatch=--constraint=h100', '--setup=echo "a  b" >$HOME/out']
  flags += ['--env=NCCL_DEBUG=WARN']
  script = _dry_run('slurm', flags, _WORDS)
  options = re.findall('^#SBATCH (.*)$', script, re.MULTILINE)
  assert '--nodes=3' in options
  assert '--ntasks-per-node=4' in options
  assert '--gpus-per-node=4' in options
  assert '--time=1:00' in options
  assert '--signal=TERM@120' in options
  assert '--requeue' in options
  assert '--constraint=h100' in options
  assert 'export NCCL_DEBUG=WARN\n' in script
  _, log = machine.run(script)
  srun = next(x for x in log if x[0] == 'srun')
  assert '--gpu-bind=none' in srun  # JAX picks the process's GPU itself.
  assert '--cpus-per-task=6' in srun
  assert (machine.root / 'out').read_text() == 'a  b\n'


def test_a_tpu_slice_is_created_used_and_deleted(machine):
  flags = [*_FLAGS['tpu_vm'], '--spot', '--project=p', '--delete']
  flags += ['--setup=echo mounted >~/mounted']
  code, log = machine.run(
    _dry_run('tpu_vm', flags, _WORDS),
    {'state': ['', 'WAITING_FOR_RESOURCES', 'ACTIVE']},
  )
  assert code == 0
  assert (machine.root / 'mounted').exists()
  kinds = [
    next(k for k in ('describe', 'create', 'delete', 'scp', 'ssh') if k in x)
    for x in log
    if x[0] == 'gcloud'
  ]
  assert kinds == ['describe', 'create', *['describe'] * 2, 'scp'] + [
    'ssh',
    'ssh',
    'delete',
  ]
  create = next(x for x in log if 'create' in x)
  assert create[1:] == [
    *('compute', 'tpus', 'queued-resources', 'create', 'gr2'),
    *('--zone=z', '--project=p', '--node-id=gr2', '--accelerator-type=v5p-16'),
    *('--runtime-version=v2-alpha-tpuv5', '--spot'),
  ]
  for call in log:
    if call[0] == 'gcloud':
      assert '--zone=z' in call
      assert '--project=p' in call
    if 'ssh' in call or 'scp' in call:
      assert '--worker=all' in call
  tools = [x[0] for x in log]
  assert tools.index('git') < tools.index('tar') < tools.index('uv')
  assert tools.index('uv') < tools.index('python')


@pytest.mark.parametrize(
  ('answers', 'code', 'runs', 'created'),
  [
    ({'python': [75, 75, 0]}, 0, 3, 0),
    ({'python': [255]}, 0, 2, 0),  # The connection was lost.
    ({'python': [1]}, 1, 1, 0),
    ({'python': [75] * 9}, 75, 3, 0),
    # Taken away during the run, which gcloud calls an error.
    (
      {'python': [1], 'state': ['ACTIVE', 'SUSPENDING', 'SUSPENDED', '']},
      0,
      2,
      1,
    ),
    ({'state': [''], 'create': [1]}, 1, 0, 1),
  ],
)
def test_a_tpu_run_goes_on_after_a_loss(machine, answers, code, runs, created):
  script = _dry_run('tpu_vm', [*_FLAGS['tpu_vm'], '--restarts=2'], _WORDS)
  found, log = machine.run(script, answers)
  assert found == code
  assert len(_trained(log)) == runs
  assert sum('create' in x for x in log) == created


@pytest.mark.parametrize(
  ('topology', 'accelerator', 'runtime'),
  [
    ('v5e:1x1', 'v5litepod-1', 'v2-alpha-tpuv5-lite'),
    ('v5e:16x16', 'v5litepod-256', 'v2-alpha-tpuv5-lite'),
    ('v5p:2x2x1', 'v5p-8', 'v2-alpha-tpuv5'),
    ('v5p:4x4x4', 'v5p-128', 'v2-alpha-tpuv5'),
    ('v6e:8x8', 'v6e-64', 'v2-alpha-tpuv6e'),
  ],
)
def test_slices_have_the_names_of_google_cloud(topology, accelerator, runtime):
  found = slices.find(topology)
  assert (found.accelerator, found.runtime) == (accelerator, runtime)


def _main(launcher, words):
  with (
    mock.patch.object(sys, 'argv', ['launch', *words]),
    pytest.raises(SystemExit) as end,
  ):
    commands.main(_LAUNCHERS[launcher].launch)
  return end.value.code


@pytest.mark.parametrize(
  ('launcher', 'flags', 'words', 'message'),
  [
    ('slurm', ['--nodes=0'], _WORDS, '--nodes: must be a whole number, 1 or'),
    ('slurm', [], _WORDS, 'the following arguments are required: --nodes'),
    (
      'slurm',
      ['--nodes=1', '--config=x'],
      _WORDS,
      'gr2_jax.main come after --',
    ),
    (
      'slurm',
      ['--nodes=1', '--time=1 day'],
      _WORDS,
      "'--time=1 day' is not one",
    ),
    (
      'slurm',
      ['--nodes=1', '--env=A-B=1'],
      _WORDS,
      '--env: must be NAME=VALUE',
    ),
    ('slurm', ['--nodes=1'], [], 'no --config for gr2_jax.main'),
    ('slurm', ['--nodes=1'], [*_WORDS, '--cluster=auto'], 'leave it out'),
    ('slurm', ['--nodes=1'], [*_WORDS, '--config.a=1\n2'], 'has a line break'),
    ('tpu_vm', _FLAGS['tpu_vm'], ['--config=x'], 'no --workdir=/... after --'),
    (
      *('tpu_vm', ['--zone=z', '--topology=v5p:3x3x3'], _WORDS),
      "--topology: unknown topology 'v5p:3x3x3': write FAMILY:SHAPE, of v5p:",
    ),
    ('tpu_vm', [*_FLAGS['tpu_vm'], '--name=A b'], _WORDS, '--name: must be at'),
    ('xpk', [*_FLAGS['xpk'], '--topology=v5e:2x2'], _WORDS, 'under v5e:2x4'),
    ('xpk', [*_FLAGS['xpk'], '--cluster=a_b'], _WORDS, '--cluster: must be at'),
    ('skypilot', ['--bucket=b'], _WORDS, 'one of the arguments --gpus --topol'),
    (
      *('skypilot', ['--topology=v5e:4x4', '--nodes=2', '--bucket=b'], _WORDS),
      '--nodes: a TPU slice is one node',
    ),
    (
      *('skypilot', [*_FLAGS['skypilot'], '--mount=/data'], _WORDS),
      'no --workdir=/data... after --',
    ),
  ],
)
def test_bad_input_is_one_line(capsys, launcher, flags, words, message):
  assert _main(launcher, [*flags, '--dry-run', '--', *words]) == 2
  out, err = capsys.readouterr()
  assert out == ''
  assert len(err.splitlines()) == 1
  assert err.startswith('error: ')
  assert message in err


@pytest.mark.parametrize(
  ('launcher', 'tool'),
  [
    ('skypilot', 'sky'),
    ('slurm', 'sbatch'),
    ('tpu_vm', 'gcloud'),
    ('xpk', 'xpk'),
  ],
)
def test_a_missing_tool_is_named(capsys, monkeypatch, tmp_path, launcher, tool):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert _main(launcher, [*_FLAGS[launcher], '--', *_WORDS]) == 2
  err = capsys.readouterr().err
  assert err.startswith(f'error: {tool} is not on the PATH: ')
  assert len(err.splitlines()) == 1


def test_without_a_dry_run_it_is_done(machine, monkeypatch):
  monkeypatch.setenv('PATH', f'{machine.root}/bin:{os.environ["PATH"]}')
  (machine.root / 'log').write_text('')
  (machine.root / 'answers').write_text('{"python": [1]}')
  assert slurm.launch(_FLAGS['slurm'], _WORDS) == 1
  log = (machine.root / 'log').read_text().splitlines()
  assert _trained(map(json.loads, log)) == [[*_WORDS, '--cluster=auto']]


def _examples(text):
  """Command lines of launchers in a text."""
  for command in re.findall(r'python -m launch\.(?:.*\\\n)*.*', text):
    words = shlex.split(command.replace('\\\n', ' '))[2:]
    yield words[0].removeprefix('launch.'), words[1:]


def test_examples_in_the_documents_are_legal():
  found = {}
  texts = [m.__doc__ for m in _LAUNCHERS.values()]
  for text in [(_ROOT / 'launch/README.md').read_text(), *texts]:
    for launcher, words in _examples(text):
      if launcher in _LAUNCHERS:
        cut = words.index('--')
        _dry_run(launcher, words[:cut], words[cut + 1 :])
        found[launcher] = found.get(launcher, 0) + 1
  assert {k: v >= 2 for k, v in found.items()} == dict.fromkeys(
    _LAUNCHERS, True
  )


def test_what_the_image_copies_is_there():
  for line in (_ROOT / 'launch/Dockerfile').read_text().splitlines():
    if line.startswith('COPY'):
      for source in line.split()[1:-1]:
        assert (_ROOT / source).exists()
