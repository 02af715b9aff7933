"""Artifacts: one directory a stage, named after what it depends on.

`<root>/<stage>-<8 hex digits>/` holds config.json (written first), whatever
the stage writes, and results.json (written last, by a rename: its presence
means finished). A finished directory is skipped, an unfinished one resumed.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
import numpy as np

from gr2_jax.data import files
from gr2_jax.distributed import processes
from gr2_jax.pipeline import graph
from gr2_jax.prompts import context


class ArtifactError(ValueError):
  """A workdir that cannot be used as it is; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Artifact:
  """One finished or future run of a stage.

  Attributes:
    stage: its name in the graph.
    seed: the seed, or None for a stage that has none.
    fingerprint: 64 hex digits, a hash of all that the run depends on.
    inputs: name -> what it reads.
  """

  stage: str
  seed: int | None
  fingerprint: str
  inputs: dict[str, 'Artifact']

  def directory(self, root: pathlib.Path) -> pathlib.Path:
    """Where the artifact lies under the workdir `root`."""
    return root / f'{self.stage}-{self.fingerprint[:8]}'


def plan(
  config: ml_collections.ConfigDict, name: str, seed: int | None = None
) -> Artifact:
  """Resolves a stage and all that it needs, without running anything.

  Args:
    config: the whole config.
    name: a stage of the graph.
    seed: the seed of a seeded stage; None takes the first of `config.seeds`.

  Returns:
    The artifact. Its fingerprint is SHA-256 over the stage's name, the JSON of
    its config sections, the content of the files they name, its seed, and its
    inputs' names and fingerprints. The section `mesh` is left out: where
    something is computed is no part of what is computed, and a run may go on
    elsewhere.
  """
  stage = graph.STAGES[name]
  seed = (config.seeds[0] if seed is None else seed) if stage.seeded else None
  inputs = {}
  for need in stage.needs:
    base, per_seed, _ = need.partition('@')
    base = _named_stage(config, base)
    if base is None:
      continue
    for s in config.seeds if per_seed else (seed,):
      inputs[f'{base}@{s}' if per_seed else base] = plan(config, base, s)
  sections = graph.with_former_names(_sections(config, stage))
  sections.pop('mesh', None)
  content = {
    'stage': name,
    'seed': seed,
    'config': sections,
    'files': _hash_files(config, stage),
    'inputs': {key: a.fingerprint for key, a in inputs.items()},
  }
  digest = hashlib.sha256(dumps(content).encode()).hexdigest()
  return Artifact(name, seed, digest, inputs)


def run_stage(
  config: ml_collections.ConfigDict,
  name: str,
  root: os.PathLike[str] | str,
  seed: int | None = None,
  say: Callable[[str], None] = print,
) -> pathlib.Path:
  """Runs a stage and, before it, whatever it needs that is not finished.

  Args:
    config: the whole config.
    name: a stage of the graph.
    root: the workdir; the caller holds its lock.
    seed: the seed of a seeded stage; None takes the first of `config.seeds`.
    say: is told what is skipped, resumed or run, and the time it took.

  Returns:
    The stage's finished directory.

  Raises:
    ArtifactError: a directory is damaged, or the disk is full.
  """
  root = pathlib.Path(root)
  finished: dict[str, pathlib.Path] = {}

  def visit(artifact: Artifact) -> pathlib.Path:
    if artifact.fingerprint not in finished:
      inputs = {key: visit(a) for key, a in artifact.inputs.items()}
      finished[artifact.fingerprint] = _run(config, artifact, inputs, root, say)
    return finished[artifact.fingerprint]

  return visit(plan(config, name, seed))


def read_results(directory: os.PathLike[str] | str) -> dict[str, Any]:
  """Reads a finished artifact's results.json.

  Raises:
    ArtifactError: it is no JSON object.
  """
  return _read_json(
    pathlib.Path(directory) / 'results.json',
    'delete that file to run the stage again',
  )


@contextlib.contextmanager
def lock(root: os.PathLike[str] | str) -> Iterator[None]:
  """Holds a workdir for this process; the system frees it if we are killed.

  Of several processes the first one holds it for all.

  Raises:
    ArtifactError: another process holds it.
  """
  root = pathlib.Path(root)
  if not processes.is_main_process():
    yield
    return
  root.mkdir(parents=True, exist_ok=True)
  with (root / '.lock').open('a+', encoding='ascii') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      file.seek(0)
      raise ArtifactError(
        f'{root}: process {file.read().strip() or "(unknown)"} is running in '
        'this workdir; wait for it, stop it, or choose another --workdir'
      ) from e
    file.truncate(0)
    file.write(f'{os.getpid()}\n')
    file.flush()
    yield


def dumps(value: Any, indent: int | None = None) -> str:
  """Strict JSON with sorted keys; NaN and infinities become null.

  Args:
    value: JSON types, NumPy or JAX scalars and arrays, tuples, paths,
      ConfigDicts.
    indent: spaces per level; None for one line.

  Raises:
    TypeError: a value of another type.
  """
  return json.dumps(
    _plain(value), indent=indent, sort_keys=True, allow_nan=False
  )


def _run(
  config: ml_collections.ConfigDict,
  artifact: Artifact,
  inputs: dict[str, pathlib.Path],
  root: pathlib.Path,
  say: Callable[[str], None],
) -> pathlib.Path:
  """Brings one artifact, whose inputs are finished, to its end.

  Process 0 decides, writes and speaks; the others help where all are needed.
  """
  directory = artifact.directory(root)
  results = directory / 'results.json'
  together = graph.STAGES[artifact.stage].together
  if not processes.is_main_process():
    if not processes.broadcast_flag(False) and together:
      _call(config, artifact, inputs, directory)
    processes.wait_for(results)
    return directory
  seed = '' if artifact.seed is None else f' seed {artifact.seed}'
  label = f'{artifact.stage}{seed}'.ljust(18)
  resumed = directory.is_dir()
  if resumed:
    _check_config(directory, artifact)
  if processes.broadcast_flag(results.exists()):
    read_results(directory)
    say(f'{label} finished before: {directory}')
    return directory
  say(f'{label} {"resumes" if resumed else "starts"} in {directory}')
  start = time.monotonic()
  with contextlib.nullcontext() if together else processes.main_process_only():
    found = _call(config, artifact, inputs, directory)
  _write_json(results, found)
  say(f'{label} done in {time.monotonic() - start:.1f} s')
  return directory


def _call(
  config: ml_collections.ConfigDict,
  artifact: Artifact,
  inputs: dict[str, pathlib.Path],
  directory: pathlib.Path,
) -> dict[str, Any]:
  """Runs the stage's function, with its config written beforehand."""
  try:
    sections = _sections(config, graph.STAGES[artifact.stage])
    if processes.is_main_process():
      directory.mkdir(parents=True, exist_ok=True)
      _write_json(
        directory / 'config.json',
        {
          'stage': artifact.stage,
          'seed': artifact.seed,
          'fingerprint': artifact.fingerprint,
          'inputs': {key: path.name for key, path in inputs.items()},
          'config': sections,
        },
      )
    own = ml_collections.ConfigDict(sections)
    if artifact.seed is not None:
      own.seed = artifact.seed
    module = importlib.import_module(graph.module(artifact.stage))
    return module.run(own.lock(), inputs, directory)
  except Exception as e:
    if not _is_disk_full(e):
      raise
    free = shutil.disk_usage(directory.parent).free / 2**20
    raise ArtifactError(
      f'{directory}: no space left on the disk ({free:.0f} MiB free); make '
      'room and give the same command again: it goes on from the last '
      'checkpoint'
    ) from e


def read_config(directory: pathlib.Path) -> dict[str, Any]:
  """The config sections that an artifact was made with.

  Raises:
    ArtifactError: the folder has no config.json, or a damaged one.
  """
  path = directory / 'config.json'
  if not path.is_file():
    raise ArtifactError(f'{path}: missing; give the folder of an artifact')
  run = _read_json(path, 'give the folder of an artifact')
  return graph.with_current_names(run['config'])


def read_run(directory: pathlib.Path) -> dict[str, Any]:
  """What made a finished artifact: stage, seed, config, names of its inputs.

  Raises:
    ArtifactError: it is no artifact, or an unfinished one.
  """
  path = directory / 'config.json'
  for file in (path, directory / 'results.json'):
    if not file.is_file():
      raise ArtifactError(
        f'{file}: missing; give the folder of a finished artifact'
      )
  run = _read_json(path, 'give the folder of an artifact')
  return run | {'config': graph.with_current_names(run['config'])}


def _named_stage(config: ml_collections.ConfigDict, need: str) -> str | None:
  """The stage that a need stands for, where a config field names it."""
  if not need.startswith('{'):
    return need
  field = need.strip('{}')
  section, _, name = field.partition('.')
  if name == 'context':
    written = context.parse(config[section][name]).text
    return 'compress' if written else None
  named, known = config[section][name], graph.STARTS[field]
  if named not in known:
    raise ArtifactError(f'{field}={named!r}: must be one of {", ".join(known)}')
  return named


def _sections(
  config: ml_collections.ConfigDict, stage: graph.Stage
) -> dict[str, Any]:
  """The part of the config that a stage reads, as plain Python."""
  return {name: config.to_dict()[name] for name in stage.sections}


def _hash_files(
  config: ml_collections.ConfigDict, stage: graph.Stage
) -> dict[str, str]:
  """Path -> content hash of every file that the stage's config names."""
  hashes = {}
  for field in stage.files:
    section, _, name = field.partition('.')
    given = config[section].get(name)
    if not given:
      continue
    path = pathlib.Path(given)
    for file in sorted(path.iterdir()) if path.is_dir() else (path,):
      if file.is_file():
        stat = file.stat()
        hashes[str(file)] = _hash_file(file, stat.st_size, stat.st_mtime_ns)
  return hashes


@functools.cache
def _hash_file(path: pathlib.Path, size: int, mtime_ns: int) -> str:
  """SHA-256 of a file; size and time are the memory's key."""
  del size, mtime_ns
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _check_config(directory: pathlib.Path, artifact: Artifact) -> None:
  """Verifies that an existing directory is this very artifact's."""
  path = directory / 'config.json'
  if not path.exists():
    return  # Killed before it was written: nothing else is there either.
  advice = f'move {directory} away to run the stage again'
  found = _read_json(path, advice).get('fingerprint')
  if found != artifact.fingerprint:
    raise ArtifactError(
      f'{path}: belongs to another config (fingerprint {found}, wanted '
      f'{artifact.fingerprint}); {advice}'
    )


def _read_json(path: pathlib.Path, advice: str) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:
    raise ArtifactError(f'{path}: not valid JSON ({e}); {advice}') from e
  if not isinstance(value, dict):
    raise ArtifactError(f'{path}: not a JSON object; {advice}')
  return value


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  with files.atomic_write(path) as file:
    file.write(dumps(value, indent=2) + '\n')


def _is_disk_full(error: BaseException) -> bool:
  """Whether an error says so; array writers only say it in words."""
  if isinstance(error, OSError) and error.errno in (
    errno.ENOSPC,
    errno.EDQUOT,
  ):
    return True
  return os.strerror(errno.ENOSPC) in str(error)


def _plain(value: Any) -> Any:
  """Maps a value to what strict JSON can hold."""
  if isinstance(value, ml_collections.ConfigDict):
    value = value.to_dict()
  if isinstance(value, dict):
    return {str(key): _plain(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, np.generic) or hasattr(value, '__array__'):
    return _plain(np.asarray(value).tolist())
  raise TypeError(f'cannot write {type(value).__name__} {value!r} as JSON')
