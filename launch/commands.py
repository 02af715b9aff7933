"""Shared parts of the launchers: command line, quoting, dry run.

A launcher is `python -m launch.NAME [its flags] -- [flags of gr2_jax.main]`. It
writes one bash script, which `--dry-run` prints and a real run passes to bash,
so the printed script can be pasted.
"""

import argparse
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

# Exit code of gr2_jax.main if the same command resumes the run.
RESTART = 75

# Shell condition: the process was preempted, or lost (killed by a signal, or
# with its connection). Neither is an error.
IS_LOST = f'[ "$code" -eq {RESTART} ] || [ "$code" -gt 128 ]'

# Installs the project of the working directory into `.venv`, whatever Python
# the host has.
_INSTALL = (
  'export PATH="$HOME/.local/bin:$PATH" && '
  '{ command -v uv >/dev/null || '
  'curl -LsSf https://astral.sh/uv/install.sh | sh; } && '
  'uv venv --quiet --python 3.11 --allow-existing .venv && '
  "uv pip install --quiet --python .venv/bin/python -e '.[EXTRAS]'"
)

# Flags of gr2_jax.main that launchers set for each process.
_CLUSTER_FLAGS = ('cluster', 'coordinator', 'num_processes', 'process_id')


class LaunchError(Exception):
  """The launcher cannot start; the message is one line."""


class Parser(argparse.ArgumentParser):
  """Parses a launcher's flags; a mistake is one line and exit code 2.

  Args:
    doc: the launcher's docstring, which becomes the help text.
  """

  def __init__(self, doc: str):
    super().__init__(
      description=doc,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    self.add_argument(
      '--dry-run',
      action='store_true',
      help='Print the script, ready to be pasted; do nothing.',
    )

  def error(self, message: str) -> None:
    """Raises a LaunchError instead of printing the usage."""
    if message.startswith('unrecognized'):
      message += '; flags of gr2_jax.main come after --'
    raise LaunchError(message.removeprefix('argument '))


def whole(least: int) -> Callable[[str], int]:
  """Flag type: a whole number, `least` or more."""

  def parse(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
      raise argparse.ArgumentTypeError(
        f'must be a whole number, {least} or more, not {text!r}'
      )
    return int(text)

  return parse


def name(text: str) -> str:
  """Flag type: a name that all services accept."""
  if not re.fullmatch(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?', text):
    raise argparse.ArgumentTypeError(
      'must be at most 40 lower-case letters, digits and hyphens, and start '
      f'with a letter, not {text!r}'
    )
  return text


def assignment(text: str) -> str:
  """Flag type: NAME=VALUE, quoted for a shell."""
  variable, equals, value = text.partition('=')
  if not equals or not re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', variable):
    raise argparse.ArgumentTypeError(f'must be NAME=VALUE, not {text!r}')
  return f'{variable}={shlex.quote(value)}'


def main(launcher: Callable[[list[str], list[str]], int]) -> None:
  """Calls a launcher with the words before `--` and after it, and exits."""
  words = sys.argv[1:]
  cut = words.index('--') if '--' in words else len(words)
  # Underscores are accepted in flags, as in those of gr2_jax.main.
  flags = [
    re.sub('^--[a-z_]+', lambda m: m[0].replace('_', '-'), word)
    for word in words[:cut]
  ]
  try:
    sys.exit(launcher(flags, words[cut + 1 :]))
  except LaunchError as e:
    print('error:', e, file=sys.stderr)
    sys.exit(2)


def check(words: Sequence[str], shared: bool, mount: str = '/') -> None:
  """Raises a LaunchError unless `words` are valid flags of gr2_jax.main.

  Args:
    words: the words after `--`.
    shared: whether `--workdir` must be an absolute path on shared storage.
    mount: where that storage is mounted.
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
      f'no --workdir={mount}... after --: give an absolute path on storage '
      'that all hosts share'
    )
  if any('\n' in w for w in words):
    raise LaunchError('a flag of gr2_jax.main has a line break; take it out')


def train(words: Sequence[str], python: str, cluster: str = '') -> str:
  """The shell command of every host.

  Args:
    words: flags of gr2_jax.main, quoted here.
    python: the interpreter.
    cluster: shell text of the flags that identify the process; by default JAX
      detects the cluster.
  """
  command = shlex.join([python, '-m', 'gr2_jax.main', *words])
  return f'{command} {cluster or "--cluster=auto"}'


def install(extras: str) -> str:
  """Shell commands that install the working directory with these extras."""
  return _INSTALL.replace('EXTRAS', extras)


def heredoc(command: str, text: str) -> str:
  """A shell command that reads `text`, without any expansion."""
  end = 'END'
  while end in text.splitlines():
    end += '_'
  return f"{command} <<'{end}'\n{text.rstrip()}\n{end}\n"


def run(script: str, dry_run: bool, tool: str, advice: str) -> int:
  """Prints a bash script or runs it; returns the exit code.

  Args:
    script: everything that the launcher does.
    dry_run: whether to print it only.
    tool: a program that the script calls.
    advice: how to install that program.
  """
  if dry_run:
    print(script.rstrip())
    return 0
  if shutil.which(tool) is None:
    raise LaunchError(f'{tool} is not on the PATH: {advice}')
  try:
    root = pathlib.Path(__file__).parent.parent
    return subprocess.run(['bash', '-c', script], cwd=root).returncode
  except KeyboardInterrupt:
    return 130
