"""The documents: links, commands, settings, lengths and the reading order."""

import importlib
import importlib.util
import pathlib
import re
import shlex

import pytest

from gr2_jax.pipeline import flags

_ROOT = pathlib.Path(__file__).parent.parent
_FOLDERS = ('.', 'docs', 'configs', 'launch', 'gr2_jax', '.github')
DOCUMENTS = sorted(
  {
    path.relative_to(_ROOT).as_posix()
    for folder in _FOLDERS
    for path in (_ROOT / folder).glob('*.md' if folder == '.' else '**/*.md')
  }
)
LIMITS = {'README.md': 180, 'CONTRIBUTING.md': 80, 'configs/README.md': 200}
READING_LINES = 7000


def read(document):
  return (_ROOT / document).read_text(encoding='utf-8')


def anchors(path):
  """The anchors of a document's headings, as GitHub makes them."""
  for heading in re.findall(r'^#+ (.*)$', path.read_text(), re.MULTILINE):
    yield re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


def commands(document):
  """The words of each command in a document's shell blocks."""
  for block in re.findall(r'```sh\n(.*?)```', read(document), re.DOTALL):
    for line in block.replace('\\\n', ' ').splitlines():
      if 'python' in line and "'{" not in line:
        yield shlex.split(line, comments=True)


def config_of(argument):
  """The config of a `--config=FILE:PRESETS` argument."""
  name, _, presets = argument.partition(':')
  module = importlib.import_module(name.removesuffix('.py').replace('/', '.'))
  return module.get_config(presets)


def test_there_are_documents():
  assert {'README.md', 'CONTRIBUTING.md', 'docs/data.md'} <= set(DOCUMENTS)


@pytest.mark.parametrize('document', DOCUMENTS)
def test_links_lead_somewhere(document):
  home = (_ROOT / document).parent
  for target in re.findall(r'\]\(([^)\s]+)\)', read(document)):
    if re.match(r'[a-z]+:', target):
      continue
    path, _, anchor = target.partition('#')
    file = home / path if path else _ROOT / document
    assert file.exists(), target
    if anchor:
      assert anchor in anchors(file), target


@pytest.mark.parametrize('document', DOCUMENTS)
def test_commands_name_configs_and_fields_that_exist(document):
  for words in commands(document):
    config = None
    for word in words:
      if word.startswith('--config='):
        argument = word.removeprefix('--config=')
        assert (_ROOT / argument.partition(':')[0]).is_file(), word
        config = config_of(argument)
    known = {name for name, _ in flags.fields(config)} if config else set()
    fields = [word[2:] for word in words if word.startswith('--config.')]
    for field in fields:
      assert field.partition('=')[0] in known, field


@pytest.mark.parametrize('document', DOCUMENTS)
def test_commands_run_modules_that_exist(document):
  for words in commands(document):
    for flag, module in zip(words, words[1:], strict=False):
      if flag == '-m' and module.startswith(('gr2_jax', 'launch')):
        if module == 'launch.NAME':
          continue
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize('document', DOCUMENTS)
def test_files_that_are_named_exist(document):
  pattern = r'`((?:gr2_jax|configs|tests|launch|docs|colab)/[\w./]*)`'
  for name in re.findall(pattern, read(document)):
    assert 'NAME' in name or (_ROOT / name).exists(), name


@pytest.mark.parametrize('document', DOCUMENTS)
def test_settings_that_are_named_exist(document):
  known = {
    name.removeprefix('config.')
    for stage in ('rl', 'study_distill')
    for name, _ in flags.fields(config_of(f'configs/{stage}.py'))
  }
  sections = {name.partition('.')[0] for name in known} - {'seeds', 'stage'}
  for name in re.findall(r'`(\w+\.\w[\w.]*)(?:=[^`]*)?`', read(document)):
    section, _, field = name.partition('.')
    is_file = field in ('py', 'md', 'jsonl', 'array_record')
    if section in sections and not is_file:
      assert name in known, name


def test_the_map_has_every_room():
  section = read('README.md').partition('## The map')[2].partition('\n## ')[0]
  for init in (_ROOT / 'gr2_jax').glob('*/__init__.py'):
    assert re.search(rf'  {init.parent.name}/ ', section), init.parent.name


@pytest.mark.parametrize('document', LIMITS)
def test_documents_are_short(document):
  assert len(read(document).splitlines()) <= LIMITS[document]


def reading_order():
  section = read('README.md').partition('## Reading order')[2]
  section = section.partition('\n## ')[0]
  return section, re.findall(r'`([\w/]+\.py)`', section)


def test_the_reading_order_is_short_and_leaves_no_file_out():
  section, files = reading_order()
  assert len(files) == len(set(files))
  lengths = [
    len((_ROOT / 'gr2_jax' / file).read_text().splitlines()) for file in files
  ]
  stated = re.search(r'these (\d+) files .*?, ([\d,]+) lines', section)
  assert stated, 'the README states the number of files and of lines'
  assert int(stated[1]) == len(files)
  total = sum(lengths)
  assert total <= READING_LINES, total
  assert int(stated[2].replace(',', '')) == pytest.approx(total, abs=200), total
