"""Artifacts: one folder per run of a stage, named after what it depends on.

`<root>/<stage>-<8 hex digits>/` holds config.json (written first), whatever
the stage writes, and results.json (written last and atomically, so a folder
that has one is finished). Finished folders are skipped, others are resumed.
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

ConfigDict = ml_collections.ConfigDict


class ArtifactError(ValueError):
  """A workdir that cannot be used as it is; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class Artifact:
  """One run of a stage, finished or not.

  Attributes:
    stage: name in the graph.
    seed: None for a stage without one.
    fingerprint: 64 hex digits, a hash of everything that the run depends on.
    inputs: name -> the artifact that the stage reads under this name.
  """

  stage: str
  seed: int | None
  fingerprint: str
  inputs: dict[str, 'Artifact']

  def directory(self, root: pathlib.Path) -> pathlib.Path:
    """The artifact's folder in the workdir `root`."""
    return root / f'{self.stage}-{self.fingerprint[:8]}'


def plan(config: ConfigDict, name: str, seed: int | None = None) -> Artifact:
  """Resolves a stage and everything it needs, without running anything.

  The fingerprint is SHA-256 over the stage's name, its seed, its config
  sections (with their former names, see `graph.RENAMED`), the content of the
  files that they name, and the names and fingerprints of its inputs. The
  section `mesh` is left out, so that a run may continue on other devices.

  Args:
    config: the whole config.
    name: a stage of the graph.
    seed: of a seeded stage; None takes the first of `config.seeds`.
  """
  stage = graph.STAGES[name]
  values: dict[str, Any] = config.to_dict()
  if not stage.seeded:
    seed = None
  elif seed is None:
    seed = values['seeds'][0]
  inputs = {}
  for need in stage.needs:
    base, per_seed, _ = need.partition('@')
    base = _needed_stage(values, base)
    if base is None:
      continue
    for s in values['seeds'] if per_seed else (seed,):
      inputs[f'{base}@{s}' if per_seed else base] = plan(config, base, s)
  sections = graph.with_former_names({x: values[x] for x in stage.sections})
  sections.pop('mesh', None)
  content = {
    'stage': name,
    'seed': seed,
    'config': sections,
    'files': _hash_files(values, stage),
    'inputs': {key: a.fingerprint for key, a in inputs.items()},
  }
  digest = hashlib.sha256(dumps(content).encode()).hexdigest()
  return Artifact(name, seed, digest, inputs)


def run_stage(
  config: ConfigDict,
  name: str,
  root: os.PathLike[str] | str,
  seed: int | None = None,
  log: Callable[[str], None] = print,
) -> pathlib.Path:
  """Runs a stage after all unfinished stages that it needs.

  Args:
    config: the whole config.
    name: a stage of the graph.
    root: the workdir; the caller holds its lock.
    seed: of a seeded stage; None takes the first of `config.seeds`.
    log: receives one line for each stage that is skipped, resumed or run.

  Returns:
    The stage's finished folder.

  Raises:
    ArtifactError: a folder is damaged, or the disk is full.
  """
  root = pathlib.Path(root)
  finished: dict[str, pathlib.Path] = {}

  def visit(artifact: Artifact) -> pathlib.Path:
    if artifact.fingerprint not in finished:
      inputs = {key: visit(a) for key, a in artifact.inputs.items()}
      directory = _finish(config, artifact, inputs, root, log)
      finished[artifact.fingerprint] = directory
    return finished[artifact.fingerprint]

  return visit(plan(config, name, seed))


def _finish(
  config: ConfigDict,
  artifact: Artifact,
  inputs: dict[str, pathlib.Path],
  root: pathlib.Path,
  log: Callable[[str], None],
) -> pathlib.Path:
  """Runs one artifact, whose inputs are finished, unless it is finished too.

  Process 0 decides for all, writes the results and logs.
  """
  directory = artifact.directory(root)
  results = directory / 'results.json'
  together = graph.STAGES[artifact.stage].together
  if not processes.is_main_process():
    is_finished = processes.broadcast_flag(False)  # Process 0's flag.
    if not is_finished and together:
      _call(config, artifact, inputs, directory)
    processes.wait_for(results)
    return directory

  seed = '' if artifact.seed is None else f' seed {artifact.seed}'
  label = f'{artifact.stage}{seed}'.ljust(18)
  resumed = directory.is_dir()
  if resumed:
    _check_fingerprint(directory, artifact)
  if processes.broadcast_flag(results.exists()):
    read_results(directory)
    log(f'{label} finished before: {directory}')
    return directory
  log(f'{label} {"resumes" if resumed else "starts"} in {directory}')
  start = time.monotonic()
  alone = (
    contextlib.nullcontext() if together else processes.main_process_only()
  )
  with alone:
    values = _call(config, artifact, inputs, directory)
  _write_json(results, values)
  log(f'{label} done in {time.monotonic() - start:.1f} s')
  return directory


def _call(
  config: ConfigDict,
  artifact: Artifact,
  inputs: dict[str, pathlib.Path],
  directory: pathlib.Path,
) -> dict[str, Any]:
  """Writes config.json, then calls the stage's `run`."""
  try:
    values = config.to_dict()
    sections = {x: values[x] for x in graph.STAGES[artifact.stage].sections}
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
    stage_config = ConfigDict(sections)
    if artifact.seed is not None:
      stage_config.seed = artifact.seed
    module = importlib.import_module(graph.module(artifact.stage))
    return module.run(stage_config.lock(), inputs, directory)
  except Exception as e:
    if not _is_disk_full(e):
      raise
    free = shutil.disk_usage(directory.parent).free / 2**20
    raise ArtifactError(
      f'{directory}: no space left on the disk ({free:.0f} MiB free); free '
      'some space and run the same command again: it resumes from the last '
      'checkpoint'
    ) from e


def read_results(directory: os.PathLike[str] | str) -> dict[str, Any]:
  """Reads results.json; raises an ArtifactError if it is no JSON object."""
  return _read_json(
    pathlib.Path(directory) / 'results.json',
    'delete that file to run the stage again',
  )


def read_config(directory: pathlib.Path) -> dict[str, Any]:
  """The config sections of an artifact, with the current names of fields.

  Raises:
    ArtifactError: the folder has no config.json, or a damaged one.
  """
  return _read_run(directory, ('config.json',), 'an artifact')['config']


def read_run(directory: pathlib.Path) -> dict[str, Any]:
  """A finished artifact's stage, seed, config, and names of its inputs.

  Raises:
    ArtifactError: the folder is no artifact, or an unfinished one.
  """
  required = ('config.json', 'results.json')
  return _read_run(directory, required, 'a finished artifact')


def _read_run(
  directory: pathlib.Path, required: tuple[str, ...], kind: str
) -> dict[str, Any]:
  for name in required:
    if not (directory / name).is_file():
      raise ArtifactError(
        f'{directory / name}: missing; give the folder of {kind}'
      )
  run = _read_json(directory / 'config.json', f'give the folder of {kind}')
  return run | {'config': graph.with_current_names(run['config'])}


@contextlib.contextmanager
def lock(root: os.PathLike[str] | str) -> Iterator[None]:
  """Locks a workdir; the system releases the lock if the process dies.

  In a run of several processes, process 0 holds it for all.

  Raises:
    ArtifactError: another run holds it.
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

  Accepts JSON types, tuples, paths, ConfigDicts, and scalars and arrays of
  NumPy or JAX; raises a TypeError for others.
  """
  return json.dumps(
    _to_plain(value), indent=indent, sort_keys=True, allow_nan=False
  )


def _needed_stage(config: dict[str, Any], need: str) -> str | None:
  """The stage of a `Stage.needs` entry, read from the config where `{...}`."""
  if not need.startswith('{'):
    return need
  field = need.strip('{}')
  section, _, name = field.partition('.')
  value = config[section][name]
  if name == 'context':
    return 'compress' if context.parse(value).text else None
  if value not in graph.STARTS[field]:
    known = ', '.join(graph.STARTS[field])
    raise ArtifactError(f'{field}={value!r}: must be one of {known}')
  return value


def _hash_files(config: dict[str, Any], stage: graph.Stage) -> dict[str, str]:
  """Path -> content hash of every file that the stage's config names."""
  hashes = {}
  for field in stage.files:
    section, _, name = field.partition('.')
    value = config[section].get(name)
    if not value:
      continue
    path = pathlib.Path(value)
    for file in sorted(path.iterdir()) if path.is_dir() else (path,):
      if file.is_file():
        stat = file.stat()
        hashes[str(file)] = _hash_file(file, stat.st_size, stat.st_mtime_ns)
  return hashes


@functools.cache
def _hash_file(path: pathlib.Path, size: int, mtime_ns: int) -> str:
  """SHA-256 of a file; size and time only distinguish cache entries."""
  del size, mtime_ns
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _check_fingerprint(directory: pathlib.Path, artifact: Artifact) -> None:
  """Raises an ArtifactError if the folder belongs to another artifact."""
  path = directory / 'config.json'
  if not path.exists():
    return  # A process was killed before writing anything.
  advice = f'move {directory} away to run the stage again'
  fingerprint = _read_json(path, advice).get('fingerprint')
  if fingerprint != artifact.fingerprint:
    raise ArtifactError(
      f'{path}: belongs to another config (its fingerprint is {fingerprint}, '
      f'not {artifact.fingerprint}); {advice}'
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
  """Recognizes a full disk; writers of arrays report it as text only."""
  by_number = getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT)
  return by_number or os.strerror(errno.ENOSPC) in str(error)


def _to_plain(value: Any) -> Any:
  """Converts a value to what strict JSON can hold."""
  if isinstance(value, ConfigDict):
    value = value.to_dict()
  if isinstance(value, dict):
    return {str(key): _to_plain(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [_to_plain(v) for v in value]
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, np.generic) or hasattr(value, '__array__'):
    return _to_plain(np.asarray(value).tolist())
  raise TypeError(f'cannot write {type(value).__name__} {value!r} as JSON')
