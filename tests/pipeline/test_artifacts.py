import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from gr2_jax.pipeline import artifacts
from gr2_jax.pipeline import graph as graph_lib


def _config(**changes):
  sections = 'data tokenizer prompt model mesh midtrain traces sft opd rl'
  sections += ' compress internalize prune baselines evaluate rerank export'
  config = ConfigDict({name: {'x': 1} for name in sections.split()})
  config.seed, config.seeds = 0, (0, 1)
  config.opd.start, config.rl.start = 'sft', 'opd'
  config.internalize.start = config.export.start = config.rerank.start = 'rl'
  config.compress.start = config.prune.start = 'rl'
  for stage in (config.opd, config.rl, config.internalize, config.prune):
    stage.context = 'full'
  config.update_from_flattened_dict(changes)
  return config


AFTER_RL = (
  'evaluate',
  'rerank',
  'export',
  'internalize',
  'prune',
  'compress',
)
STUDIES = {
  'study_compress',
  'study_distill',
  'study_hacking',
  'study_internalize',
  'study_prune',
  'study_tokenizer',
}  # They make runs of their own.


def _fingerprints(config):
  """Label of every artifact that is reached from a last one -> fingerprint."""
  found = {}

  def visit(artifact):
    found[artifact.stage, artifact.seed] = artifact.fingerprint
    for a in artifact.inputs.values():
      visit(a)

  for last in AFTER_RL:
    visit(artifacts.plan(config, last))
  return found


def _changed(**changes):
  old, new = _fingerprints(_config()), _fingerprints(_config(**changes))
  return {
    stage for (stage, seed) in old if old[stage, seed] != new[stage, seed]
  }


def test_every_stage_is_reached_and_seeded_ones_once_per_seed():
  found = _fingerprints(_config())
  assert {stage for stage, _ in found} | STUDIES == set(graph_lib.STAGES)
  assert {seed for stage, seed in found if stage == 'rl'} == {0, 1}
  assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
  ('field', 'want'),
  [
    ('rl.x', {'rl', *AFTER_RL}),
    ('internalize.x', {'internalize'}),
    ('prune.x', {'prune'}),
    ('mesh.x', set()),  # The mesh never changes a fingerprint.
    ('evaluate.x', {'evaluate'}),
    ('rerank.x', {'rerank'}),
    ('export.x', {'export'}),
    ('compress.x', {'compress'}),
    ('baselines.x', {'baselines', 'evaluate'}),
    ('traces.x', {'traces', 'sft', 'opd', 'rl', *AFTER_RL}),
    ('opd.x', {'opd', 'rl', *AFTER_RL}),
    ('tokenizer.x', set(graph_lib.STAGES) - STUDIES - {'slates', 'baselines'}),
    ('data.x', set(graph_lib.STAGES) - STUDIES),
    ('seed', set()),
  ],
)
def test_a_fingerprint_changes_with_what_the_stage_depends_on(field, want):
  assert _changed(**{field: 7}) == want


@pytest.fixture
def renamed(monkeypatch):
  """A graph whose field `rl.nested.new` was called `old` before."""
  monkeypatch.setattr(graph_lib, 'RENAMED', {'*.new': 'old'})


def test_a_renamed_field_keeps_its_fingerprint(renamed):
  before, after = _config(), _config()
  before.rl.nested = ConfigDict({'old': 1, 'other': 2})
  after.rl.nested = ConfigDict({'new': 1, 'other': 2})
  assert _fingerprints(before) == _fingerprints(after)
  after.rl.nested.new = 3
  assert _fingerprints(before) != _fingerprints(after)


def test_an_artifact_from_before_a_renaming_is_read_by_current_names(
  renamed, tmp_path
):
  config = {'rl': {'nested': {'old': 1, 'x': 2}, 'old': 3}, 'old': 4}
  for name, value in (('config', {'config': config}), ('results', {})):
    (tmp_path / f'{name}.json').write_text(json.dumps(value))
  current = {'rl': {'nested': {'new': 1, 'x': 2}, 'new': 3}, 'old': 4}
  assert artifacts.read_config(tmp_path) == current
  assert artifacts.read_run(tmp_path)['config'] == current


def test_another_seed_list_keeps_the_runs_it_shares():
  old, new = _fingerprints(_config()), _fingerprints(_config(seeds=(0, 1, 2)))
  same = {key for key in old if old[key] == new[key]}
  assert set(old) - same == {('evaluate', None)}
  assert ('rl', 2) in new


def test_inputs_of_evaluate_are_named_by_seed():
  inputs = artifacts.plan(_config(), 'evaluate').inputs
  assert {'rl@0', 'rl@1', 'opd@0', 'opd@1', 'slates', 'baselines'} <= set(
    inputs
  )
  assert inputs['rl@1'].seed == 1
  assert inputs['rl@1'].inputs['opd'] == inputs['opd@1']


@pytest.mark.parametrize('start', ['sft', 'opd', 'midtrain'])
def test_a_field_names_the_stage_to_start_from(start):
  plan = artifacts.plan(_config(**{'rl.start': start}), 'rl')
  assert set(plan.inputs) == {'slates', 'tokenizer', 'backbone', start}
  assert plan.inputs[start].stage == start


def test_a_stage_needs_the_compressor_where_it_reads_what_that_writes():
  changes = {'compress.start': 'sft', 'rl.context': 'text', 'compress.x': 7}
  plan = artifacts.plan(_config(**changes), 'rl')
  assert plan.inputs['compress'].stage == 'compress'
  assert plan.inputs['compress'].inputs['sft'].stage == 'sft'
  inputs = artifacts.plan(_config(**changes), 'evaluate').inputs
  assert {'compress@0', 'compress@1'} <= set(inputs)
  for context in ('full', 'last:5', 'memory:4'):
    config = _config(**changes | {'rl.context': context})
    assert 'compress' not in artifacts.plan(config, 'rl').inputs
  config = _config(**changes | {'rl.context': 'half'})
  with pytest.raises(ValueError, match="context 'half'"):
    artifacts.plan(config, 'rl')


def test_a_stage_that_nothing_can_start_from_is_named():
  with pytest.raises(artifacts.ArtifactError, match="rl.start='slates'.*opd"):
    artifacts.plan(_config(**{'rl.start': 'slates'}), 'rl')


def test_the_content_of_data_files_counts(tmp_path):
  (tmp_path / 'items.jsonl').write_text('a')
  config = _config()
  config.data.path = str(tmp_path)
  before = artifacts.plan(config, 'slates').fingerprint
  assert artifacts.plan(config, 'slates').fingerprint == before
  (tmp_path / 'items.jsonl').write_text('ab')
  assert artifacts.plan(config, 'slates').fingerprint != before


@pytest.fixture
def graph(monkeypatch):
  """A graph first -> second (seeded); returns the list of calls."""
  calls = []

  def first(config, inputs, workdir):
    calls.append('first')
    (workdir / 'data').write_text(str(config.one.x))
    return {'n': np.int64(3), 'bad': float('nan'), 'array': jnp.ones(2)}

  def second(config, inputs, workdir):
    calls.append(f'second {config.seed}')
    return {'read': (inputs['first'] / 'data').read_text()}

  graph = {
    'first': graph_lib.Stage((), ('one',)),
    'second': graph_lib.Stage(('first',), ('two',), seeded=True),
    'last': graph_lib.Stage(('second@*',), ('seeds',)),
  }
  runs = {
    'first': first,
    'second': second,
    'last': lambda c, i, w: {'in': [*i]},
  }
  monkeypatch.setattr(graph_lib, 'STAGES', graph)
  for name, run in runs.items():
    module = types.ModuleType(name)
    module.run = run
    monkeypatch.setitem(sys.modules, f'gr2_jax.stages.{name}', module)
  return calls


def _small():
  return ConfigDict(
    {'one': {'x': 1}, 'two': {'y': 2}, 'seed': 0, 'seeds': (3, 4)}
  )


def test_stages_run_in_order_then_are_skipped(graph, tmp_path):
  lines = []
  directory = artifacts.run_stage(_small(), 'last', tmp_path, log=lines.append)
  assert graph == ['first', 'second 3', 'second 4']
  assert artifacts.read_results(directory) == {'in': ['second@3', 'second@4']}
  artifacts.run_stage(_small(), 'last', tmp_path, log=lines.append)
  assert len(graph) == 3
  assert sum('finished before' in line for line in lines) == 4
  config = _small()
  config.two.y = 5
  artifacts.run_stage(config, 'second', tmp_path, seed=4)
  assert graph[3:] == ['second 4']


def test_results_are_strict_json(graph, tmp_path):
  directory = artifacts.run_stage(_small(), 'first', tmp_path)
  text = (directory / 'results.json').read_text()
  assert json.loads(text) == {'n': 3, 'bad': None, 'array': [1.0, 1.0]}
  assert 'NaN' not in text
  assert json.loads((directory / 'config.json').read_text())['config'] == {
    'one': {'x': 1}
  }


def test_a_stage_cannot_read_what_its_fingerprint_does_not_cover(
  graph, tmp_path, monkeypatch
):
  module = sys.modules['gr2_jax.stages.first']
  monkeypatch.setattr(module, 'run', lambda config, *_: {'x': config.two.y})
  with pytest.raises(AttributeError, match='two'):
    artifacts.run_stage(_small(), 'first', tmp_path)


def test_a_failed_stage_resumes_with_what_it_left(graph, tmp_path, monkeypatch):
  def run(config, inputs, workdir):
    if (workdir / 'half').exists():
      return {'resumed': True}
    (workdir / 'half').touch()
    raise RuntimeError('power cut')

  monkeypatch.setattr(sys.modules['gr2_jax.stages.first'], 'run', run)
  with pytest.raises(RuntimeError, match='power cut'):
    artifacts.run_stage(_small(), 'first', tmp_path)
  lines = []
  directory = artifacts.run_stage(_small(), 'first', tmp_path, log=lines.append)
  assert artifacts.read_results(directory) == {'resumed': True}
  assert 'resumes' in lines[0]


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ValueError('write failed: RESOURCE_EXHAUSTED: No space left on device'),
  ],
)
def test_a_full_disk_says_what_to_do(graph, tmp_path, monkeypatch, error):
  def run(config, inputs, workdir):
    raise error

  monkeypatch.setattr(sys.modules['gr2_jax.stages.first'], 'run', run)
  with pytest.raises(artifacts.ArtifactError, match='free some space and run'):
    artifacts.run_stage(_small(), 'first', tmp_path)
  assert not list(tmp_path.glob('*/results.json'))


def test_damaged_files_say_what_to_do(graph, tmp_path):
  directory = artifacts.run_stage(_small(), 'first', tmp_path)
  (directory / 'results.json').write_text('{"n": ')
  with pytest.raises(artifacts.ArtifactError, match='delete that file'):
    artifacts.run_stage(_small(), 'first', tmp_path)
  (directory / 'config.json').write_text('{"fingerprint": "other"}')
  with pytest.raises(artifacts.ArtifactError, match='another config'):
    artifacts.run_stage(_small(), 'first', tmp_path)


_SLOW = """
import pathlib, sys, time, types
from ml_collections import ConfigDict
from gr2_jax.pipeline import artifacts, graph
def run(config, inputs, workdir):
  (workdir / 'step').write_text('5')
  time.sleep(120)
module = types.ModuleType('first')
module.run = run
sys.modules['gr2_jax.stages.first'] = module
graph.STAGES = {'first': graph.Stage((), ('one',))}
config = ConfigDict({'one': {'x': 1}, 'seeds': (0,)})
with artifacts.lock(sys.argv[1]):
  artifacts.run_stage(config, 'first', sys.argv[1])
"""


def test_kill_9_leaves_no_results_frees_the_lock_and_resumes(
  graph, tmp_path, monkeypatch
):
  root = pathlib.Path(__file__).parent.parent.parent
  process = subprocess.Popen(
    [sys.executable, '-c', _SLOW, str(tmp_path)],
    env=os.environ | {'PYTHONPATH': str(root)},
  )
  try:
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob('first-*/step')):
      assert process.poll() is None
      assert time.monotonic() < deadline
      time.sleep(0.02)
    with (
      pytest.raises(artifacts.ArtifactError, match=f'process {process.pid} '),
      artifacts.lock(tmp_path),
    ):
      pass
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert not list(tmp_path.glob('*/results.json'))

  def run(config, inputs, workdir):
    return {'step': (workdir / 'step').read_text()}

  monkeypatch.setattr(sys.modules['gr2_jax.stages.first'], 'run', run)
  with artifacts.lock(tmp_path):
    directory = artifacts.run_stage(_small(), 'first', tmp_path)
  assert artifacts.read_results(directory) == {'step': '5'}


def test_json_of_an_unknown_type_is_an_error():
  with pytest.raises(TypeError, match='object'):
    artifacts.dumps({'a': object()})
