"""What the launchers share: their command line, quoting, and the dry run.

A launcher is `python -m launch.NAME [its flags] -- [flags of gr2_jax.main]`. It
makes one bash script, which `--dry-run` prints and a real run gives to bash: so
what is printed can be pasted.
"""

import argparse
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

# gr2_jax.main: everything is saved, the same command goes on from there.
RESTART = 75

# What a shell script does not see as an error: a process that was asked to
# stop, or that was lost (killed by a signal, or with its connection).
IS_LOST = f'[ "$code" -eq {RESTART} ] || [ "$code" -gt 128 ]'

# Makes `.venv` of the project in the working directory, whatever Python the
# host has; EXTRAS stands for the extras to install.
_INSTALL = (
  'export PATH="$HOME/.local/bin:$PATH" && '
  '{ command -v uv >/dev/null || '
  'curl -LsSf https://astral.sh/uv/install.sh | sh; } && '
  'uv venv --quiet --python 3.11 --allow-existing .venv && '
  "uv pip install --quiet --python .venv/bin/python -e '.[EXTRAS]'"
)

# Flags of gr2_jax.main which say who a process is: launchers set them.
_CLUSTER_FLAGS = ('cluster', 'coordinator', 'num_processes', 'process_id')


class LaunchError(Exception):
  """Something that keeps a launcher from starting; one line."""


class Parser(argparse.ArgumentParser):
  """Flags of a launcher; a mistake in them is one line and exit code 2."""

  def __init__(self, doc: str):
    """Takes the help text from a module's docstring."""
    super().__init__(
      description=doc,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    self.add_argument(
      '--dry-run',
      action='store_true',
      help='Print what would be done, ready to be pasted; do nothing.',
    )

  def error(self, message: str) -> None:
    """Raises a LaunchError instead of printing the usage."""
    if message.startswith('unrecognized'):
      message += '; flags of gr2_jax.main come after --'
    raise LaunchError(message.removeprefix('argument '))


def whole(least: int) -> Callable[[str], int]:
  """The type of a flag: a whole number, `least` or more."""

  def parse(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
      raise argparse.ArgumentTypeError(
        f'must be a whole number, {least} or more, not {text!r}'
      )
    return int(text)

  return parse


def name(text: str) -> str:
  """The type of a flag: a name that every one of the services accepts."""
  if not re.fullmatch(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?', text):
    raise argparse.ArgumentTypeError(
      'must be at most 40 lower-case letters, digits and hyphens, and start '
      f'with a letter, not {text!r}'
    )
  return text


def assignment(text: str) -> str:
  """The type of a flag: NAME=VALUE, quoted for a shell."""
  variable, equals, value = text.partition('=')
  if not equals or not re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', variable):
    raise argparse.ArgumentTypeError(f'must be NAME=VALUE, not {text!r}')
  return f'{variable}={shlex.quote(value)}'


def main(launcher: Callable[[list[str], list[str]], int]) -> None:
  """Runs a launcher on the command line and exits with its code.

  Args:
    launcher: takes the words before `--`, and those after it.
  """
  words = sys.argv[1:]
  cut = words.index('--') if '--' in words else len(words)
  # A flag may be written with underscores, as those of gr2_jax.main are.
  flags = [re.sub('^--[a-z_]+', _dashes, x) for x in words[:cut]]
  try:
    sys.exit(launcher(flags, words[cut + 1 :]))
  except LaunchError as e:
    print('error:', e, file=sys.stderr)
    sys.exit(2)


def check(words: Sequence[str], shared: bool, mount: str = '/') -> None:
  """Raises a LaunchError unless `words` are flags that main can be given.

  Args:
    words: what stands after `--`.
    shared: whether the hosts see each other's files only under `--workdir`,
      which then must be absolute.
    mount: where that storage is.
  """
  flags = {w.lstrip('-').partition('=')[0]: w for w in words}
  if 'config' not in flags:
    raise LaunchError(
      'no --config for gr2_jax.main: end with -- --config=configs/rl.py ...'
    )
  for flag in _CLUSTER_FLAGS:
    if flag in flags:
      raise LaunchError(f'{flags[flag]} is set by the launcher; leave it out')
  workdir = flags.get('workdir', '').partition('=')[2]
  if shared and not pathlib.PurePath(workdir).is_relative_to(mount):
    raise LaunchError(
      f'no --workdir={mount}... after --: name a directory, from the root, on '
      'storage that all hosts share'
    )
  if any('\n' in w for w in words):
    raise LaunchError('a flag of gr2_jax.main has a line break; take it out')


def train(words: Sequence[str], python: str, cluster: str = '') -> str:
  """The command of every host, for a shell.

  Args:
    words: the user's flags of gr2_jax.main.
    python: the interpreter.
    cluster: shell text with the flags that say who the process is; by default
      JAX finds out.
  """
  command = shlex.join([python, '-m', 'gr2_jax.main', *words])
  return f'{command} {cluster or "--cluster=auto"}'


def install(extras: str) -> str:
  """Shell commands that install the project of the working directory."""
  return _INSTALL.replace('EXTRAS', extras)


def heredoc(command: str, text: str) -> str:
  """A shell command that reads `text` as it is."""
  end = 'END'
  while end in text.splitlines():
    end += '_'
  return f"{command} <<'{end}'\n{text.rstrip()}\n{end}\n"


def run(script: str, dry_run: bool, tool: str, advice: str) -> int:
  """Prints a bash script, or runs it.

  Args:
    script: all that the launcher does.
    dry_run: whether to print it only.
    tool: the program that it needs.
    advice: how to install that.

  Returns:
    The exit code.
  """
  if dry_run:
    print(script.rstrip())
    return 0
  if shutil.which(tool) is None:
    raise LaunchError(f'{tool} is not on the PATH: {advice}')
  try:
    return subprocess.run(['bash', '-c', script], cwd=_ROOT).returncode
  except KeyboardInterrupt:
    return 130


_ROOT = pathlib.Path(__file__).parent.parent


def _dashes(found: re.Match) -> str:
  return found.group().replace('_', '-')
