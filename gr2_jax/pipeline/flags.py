"""Parses the command line; reports any mistake in one line."""

import difflib
import pathlib
import sys
import types
from collections.abc import Iterable
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

import gr2_jax

# Fields that the command line must not set -> what to write instead.
_RESERVED = {
  'seed': 'is set to each of config.seeds in turn; write --config.seeds=',
  'stage': 'is the name of the config file; write --config=configs/<stage>.py',
}


class UsageError(Exception):
  """An invalid command line."""


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; for `app.run(flags_parser=)`.

  For an invalid command line it prints one line, with the nearest known name,
  and exits with code 2; with `--debug` it shows the traceback.

  Args:
    argv: the program's name, then its arguments.

  Returns:
    The arguments that are no flags: only the program's name.
  """
  try:
    return _parse(argv)
  except Exception as e:
    if '--debug' in argv:
      raise
    lines = str(e).strip().splitlines() or [type(e).__name__]
    # A ValueError of a config file comes with its traceback as text.
    shown = lines[-1:] if 'Traceback (most' in str(e) else lines
    print('error:', ' '.join(shown), file=sys.stderr)
    sys.exit(2)


def nearest(name: str, names: Iterable[str]) -> str:
  """`; did you mean X?` for the nearest of `names`, or nothing."""
  near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
  return f'; did you mean {near[0]}?' if near else ''


def _parse(argv: list[str]) -> list[str]:
  config = _value_of_config(argv)
  if config is None and not any(w in ('--help', '--helpfull') for w in argv):
    raise UsageError('--config is missing, e.g. --config=configs/rl.py')
  if config is not None:
    path, colon, presets = config.partition(':')
    located = f'{locate_config(path)}{colon}{presets}'
    flag = (config, f'-config={config}', f'--config={config}')
    argv = [w.replace(config, located) if w in flag else w for w in argv]
    config = located
  try:
    rest = flags.FLAGS(argv)
  except (AttributeError, KeyError):
    _check_fields(argv, config or '')
    raise
  for field, advice in _RESERVED.items():
    if field in config_flags.get_override_values(flags.FLAGS['config']):
      raise UsageError(f'config.{field} {advice}')
  if rest[1:]:
    raise UsageError(
      f'{rest[1]!r} is no flag; set a field with --config.rl.steps=100'
    )
  return rest


def locate_config(path: str) -> pathlib.Path:
  """Finds a config file and makes `from configs import common` work in it.

  If `configs/NAME.py` does not exist in the working directory, it is the file
  of that name that was installed with the package.

  Raises:
    UsageError: there is no such file.
  """
  file = pathlib.Path(path)
  if file.is_file():
    sys.path.insert(0, str(file.resolve().parent.parent))
    return file
  choices = {*file.parent.glob('*.py')}
  if file.parent == pathlib.Path('configs'):
    package = pathlib.Path(gr2_jax.__file__).parent
    folder = package / 'configs'  # Installed.
    if not folder.is_dir():
      folder = package.parent / 'configs'  # A checkout.
    if (folder / file.name).is_file():
      module = types.ModuleType('configs')
      module.__path__ = [str(folder)]
      sys.modules['configs'] = module
      return folder / file.name
    choices |= {file.parent / f.name for f in folder.glob('*.py')}
  raise UsageError(f'no config file {file}{nearest(path, map(str, choices))}')


def _value_of_config(argv: list[str]) -> str | None:
  """The value of `--config=value` or `--config value`."""
  for i, word in enumerate(argv[1:], 1):
    flag, has_value, value = word.partition('=')
    if flag in ('--config', '-config'):
      return value if has_value else argv[i + 1] if argv[i + 1 :] else None
  return None


def _check_fields(argv: list[str], config_argument: str) -> None:
  """Raises a UsageError for the first `--config.field` that does not exist."""
  config: Any = flags.FLAGS['config'].parser.parse(config_argument)
  known = {name for name, _ in fields(config)}
  for word in argv[1:]:
    field = word.lstrip('-').partition('=')[0]
    if field.startswith('config.') and field not in known:
      raise UsageError(f'no field {field}{nearest(field, known)}')


def fields(
  config: ml_collections.ConfigDict, prefix: str = 'config'
) -> Iterable[tuple[str, Any]]:
  """Yields every field's name, as on the command line, and its value."""
  for name, value in config.items():
    yield f'{prefix}.{name}', value
    if isinstance(value, ml_collections.ConfigDict):
      yield from fields(value, f'{prefix}.{name}')
