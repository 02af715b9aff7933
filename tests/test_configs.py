import importlib
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

import gr2_jax
from configs import common
from gr2_jax.models import transformer
from gr2_jax.pipeline import flags, graph

_ROOT = pathlib.Path(__file__).parent.parent


def test_every_stage_has_a_config_file_and_back():
  assert set(common.SECTIONS) | {'backbone'} == set(graph.STAGES)
  files = {p.stem for p in (_ROOT / 'configs').glob('*.py')}
  assert files == set(graph.STAGES) | {'common'}


@pytest.mark.parametrize('name', common.SECTIONS)
def test_each_file_composes_the_whole_config(name):
  module = importlib.import_module(f'configs.{name}')
  config = module.get_config('test,dataset=world,model=small,seeds=3')
  assert config.stage == name
  assert config.seeds == (0, 1, 2)
  assert config.data.source == 'world'
  assert config.model.d_model == common.MODELS['small']['d_model']
  section = common.SECTIONS[name]
  of_presets = {
    'data': {'source': 'world'},
    'prune': {'layers': 4},
    'study_prune': {'layers': (4, 2)},
  }
  own = module.section(test=True).to_dict() | of_presets.get(section, {})
  assert config[section].to_dict() == own
  for stage in graph.STAGES.values():
    assert set(stage.sections) <= set(config)


@pytest.mark.parametrize('path', graph.RENAMED)
def test_a_renamed_field_exists_under_its_new_name_alone(path, monkeypatch):
  monkeypatch.setattr(graph, 'RENAMED', {path: graph.RENAMED[path]})
  config = common.compose('rl').to_dict()
  former = graph.with_former_names(config)
  assert former != config
  assert graph.with_current_names(former) == config
  assert graph.with_current_names(config) == config


def test_the_defaults_are_one_seed_of_the_tiny_model():
  config = common.compose('rl')
  assert config.seeds == (0,)
  assert config.data.source == 'movielens'
  assert config.model.d_model == common.MODELS['tiny']['d_model']


@pytest.mark.parametrize('preset', common.MODELS)
def test_model_presets_are_transformer_configs(preset):
  _decoder(common.model(preset), vocab_size=8)


@pytest.mark.parametrize(
  ('preset', 'rows', 'millions'),
  [
    ('smollm2_135m', 49_152, 134.515),
    ('qwen3_0p6b', 151_936, 596.050),
    ('qwen3_1p7b', 151_936, 1_720.575),
    ('qwen3_4b', 151_936, 4_022.468),
    ('qwen3_8b', 151_936, 8_190.735),
    ('qwen3_14b', 151_936, 14_768.307),
    ('qwen3_32b', 151_936, 32_762.123),
  ],
)
def test_a_preset_has_the_parameters_that_were_published(
  preset, rows, millions
):
  model = _decoder(common.model(preset), rows)
  shapes = jax.eval_shape(
    lambda key: transformer.init_params(model, key), jax.random.key(0)
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  count -= model.d_model  # The read-out is ours.
  assert count / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize('preset', common.RECIPES)
def test_a_pretrained_model_reads_titles_and_is_trained_with_care(preset):
  config = common.compose('rl', f'test,model={preset}')
  plain = common.compose('rl', 'test')
  assert 'title' in config.prompt.fields
  assert 'title' in config.prompt.history_fields
  assert 'title' not in plain.prompt.fields
  for stage in ('midtrain', 'sft', 'rl'):
    assert config[stage].learning_rate < plain[stage].learning_rate
  assert config.model.dtype == 'bfloat16'


def test_the_persona_is_an_analyst_and_not_a_salesman():
  words = common.compose('rl').prompt.system.lower()
  assert 'analyst' in words
  for stem in ('buy', 'purchas', 'persua', 'convinc', 'sell', 'intent', 'want'):
    assert stem not in words


def _decoder(config, vocab_size):
  """Of a section `model`, as policy.load has it."""
  own = config.to_dict()
  for name in ('source', 'new_rows', 'lora_rank', 'lora_targets'):
    own.pop(name)
  return transformer.TransformerConfig(vocab_size=vocab_size, **own)


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    ('tset', "unknown config argument 'tset': did you mean 'test'"),
    ('modle=tiny', "unknown config argument 'modle': did you mean 'model'"),
    ('model=smal', "unknown model 'smal': did you mean 'small'"),
    ('dataset=movielense', "unknown dataset .* did you mean 'movielens'"),
    ('seeds=0', 'seeds=0: must be'),
    ('seeds=two', 'seeds=two: must be'),
    ('test=1', "'test=1': write test"),
    ('model', "'model': write model=VALUE"),
    ('test,test', "'test' is given twice"),
  ],
)
def test_a_wrong_argument_names_the_nearest(arg, message):
  with pytest.raises(common.ConfigError, match=message):
    common.compose('rl', arg)


# Prints fields of the config that the command line names.
_PRINT_CONFIG = (
  'import sys; from gr2_jax import main;'
  'from gr2_jax.pipeline import flags as flags_lib;'
  'flags_lib.parse(sys.argv); from absl import flags;'
  'print(flags.FLAGS.config.stage, flags.FLAGS.config.rl.to_dict() != {})'
)


def _print_config(config, site, cwd):
  """Runs _PRINT_CONFIG with gr2_jax from the folder `site`."""
  done = subprocess.run(
    [sys.executable, '-c', _PRINT_CONFIG, f'--config={config}'],
    env=os.environ | {'PYTHONPATH': str(site)},
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stdout, done.stderr


def test_a_config_file_loads_by_path_from_another_directory(tmp_path):
  """Even if only gr2_jax can be imported, not configs."""
  (tmp_path / 'site').mkdir()
  (tmp_path / 'site' / 'gr2_jax').symlink_to(_ROOT / 'gr2_jax')
  out, err = _print_config(
    _ROOT / 'configs/rl.py:test', tmp_path / 'site', tmp_path
  )
  assert out == 'rl True\n', err


@pytest.mark.parametrize('installed', [False, True])
def test_a_config_file_that_is_not_here_is_the_packages(
  tmp_path, monkeypatch, installed
):
  """As installed (gr2_jax/configs), and as in a checkout (beside gr2_jax)."""
  package = tmp_path / 'site' / 'gr2_jax'
  folder = (package if installed else tmp_path / 'site') / 'configs'
  folder.mkdir(parents=True)
  (folder / 'rl.py').touch()
  (folder / 'common.py').write_text('packaged = True')
  (tmp_path / 'work' / 'configs').mkdir(parents=True)
  (tmp_path / 'work' / 'configs' / 'mine.py').touch()
  monkeypatch.chdir(tmp_path / 'work')
  monkeypatch.setattr(gr2_jax, '__file__', str(package / '__init__.py'))
  monkeypatch.setattr(sys, 'path', [*sys.path])
  for name in ('configs', 'configs.common'):
    monkeypatch.delitem(sys.modules, name, raising=False)
  assert flags.locate_config('configs/mine.py').samefile('configs/mine.py')
  assert flags.locate_config('configs/rl.py') == folder / 'rl.py'
  assert importlib.import_module('configs.common').packaged
  with pytest.raises(flags.UsageError, match='did you mean configs/rl.py'):
    flags.locate_config('configs/rll.py')
  with pytest.raises(flags.UsageError, match='no config file rl.py'):
    flags.locate_config('rl.py')


@pytest.mark.slow
def test_a_wheel_has_the_configs_and_works_outside_the_checkout(tmp_path):
  source, site, work = (tmp_path / x for x in ('source', 'site', 'work'))
  ignored = shutil.ignore_patterns('__pycache__')
  for name in ('gr2_jax', 'configs'):
    shutil.copytree(_ROOT / name, source / name, ignore=ignored)
  for name in ('setup.py', 'setup.cfg', 'pyproject.toml'):
    shutil.copy(_ROOT / name, source)
  for name in ('README.md', 'LICENSE'):
    shutil.copy(_ROOT / name, source)
  subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps',
     '--no-build-isolation', '--no-compile', f'--target={site}', source],
    check=True,
  )  # fmt: skip
  files = {p.name for p in (site / 'gr2_jax' / 'configs').glob('*.py')}
  assert files == {p.name for p in (_ROOT / 'configs').glob('*.py')}
  assert {p.name for p in site.iterdir() if p.suffix != '.dist-info'} == {
    'gr2_jax'
  }
  (work / 'configs').mkdir(parents=True)  # Someone else's.
  out, err = _print_config('configs/rl.py:test', site, work)
  assert out == 'rl True\n', err
