"""Reports of a run: metrics, progress bars, tables, stops at non-finite."""

import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import tensorboardX
import tqdm

from gr2_jax.data import files
from gr2_jax.distributed import processes

# Seconds between progress lines if the output is not a terminal.
_LINE_INTERVAL = 10.0


class MetricsWriter:
  """Writes scalars to `metrics.jsonl` and to TensorBoard event files.

  Each line is a JSON object whose first field is `step`. Only process 0
  writes.

  Args:
    directory: holds `metrics.jsonl` and the folder `tensorboard`.
    resume_step: the step of the restored checkpoint, 0 for none. Lines of
      later steps are dropped, since they will be written again, and so is an
      incomplete last line.

  Raises:
    ValueError: a line before the last one is no JSON object with a step.
  """

  def __init__(self, directory: os.PathLike[str] | str, resume_step: int = 0):
    self._file = self._tensorboard = None
    if not processes.is_main_process():
      return
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    self._path = directory / 'metrics.jsonl'
    _truncate(self._path, resume_step)
    self._file = self._path.open('a', encoding='utf-8')
    self._tensorboard = tensorboardX.SummaryWriter(
      str(directory / 'tensorboard'),
      purge_step=resume_step + 1 if resume_step else None,
      write_to_disk=True,
    )

  def write(self, step: int, metrics: Mapping[str, object]) -> None:
    """Writes one line of scalars; non-finite values become null."""
    if self._file is None or self._tensorboard is None:
      return
    values = {name: float(np.asarray(v)) for name, v in metrics.items()}
    line = {'step': int(step)} | {
      name: v if math.isfinite(v) else None for name, v in values.items()
    }
    self._file.write(json.dumps(line, allow_nan=False) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._tensorboard.add_scalar(name, value, int(step))

  def close(self) -> None:
    """Flushes and closes both files."""
    if self._file is not None and self._tensorboard is not None:
      self._file.close()
      self._tensorboard.close()

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    self.close()


def read_metrics(path: os.PathLike[str] | str) -> list[dict]:
  """Reads a `metrics.jsonl`, without an incomplete last line.

  Returns:
    One dict a line; none if the file does not exist.

  Raises:
    ValueError: a line before the last one is no JSON object with a step.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  # What follows the last newline is empty or incomplete.
  *lines, _ = path.read_text(encoding='utf-8').split('\n')
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      int(row['step'])
    except (ValueError, TypeError, KeyError) as e:
      raise ValueError(
        f'{path}:{number}: not a metrics line (a JSON object with "step"): '
        f'{line[:60]!r}; delete the line or the file'
      ) from e
    rows.append(row)
  return rows


def _truncate(path: pathlib.Path, step: int) -> None:
  """Keeps the whole lines of `path` whose step is at most `step`."""
  if not path.exists():
    return
  kept = [row for row in read_metrics(path) if row['step'] <= step]
  with files.atomic_write(path) as file:
    file.writelines(json.dumps(row) + '\n' for row in kept)


class _Lines:
  """A text stream on which every redraw of a bar has its own line."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> None:
    text = text.strip()
    if text:
      self._stream.write(text + '\n')

  def flush(self) -> None:
    self._stream.flush()


def progress(
  total: int,
  desc: str,
  initial: int = 0,
  unit: str = 'step',
  quiet: bool = False,
) -> tqdm.tqdm:
  """A progress bar with rate and time left, for `with` and `.update(n)`.

  Without a terminal it prints one line every ten seconds, so that a log stays
  readable. `TQDM_DISABLE=1` in the environment silences it.

  Args:
    total: steps of the whole loop.
    desc: label, e.g. the stage's name.
    initial: steps of earlier runs, which do not count for the rate.
    unit: name of one step.
    quiet: show nothing.
  """
  terminal = sys.stderr.isatty()
  return tqdm.tqdm(
    total=total,
    desc=desc,
    initial=initial,
    unit=unit,
    file=sys.stderr if terminal else _Lines(sys.stderr),
    mininterval=0.5 if terminal else _LINE_INTERVAL,
    maxinterval=_LINE_INTERVAL,
    ncols=None if terminal else 0,
    dynamic_ncols=terminal,
    disable=quiet
    or not processes.is_main_process()
    or os.environ.get('TQDM_DISABLE', '0') not in ('', '0'),
  )


def check_finite(step: int, metrics: Mapping[str, object]) -> None:
  """Raises a FloatingPointError that names the first non-finite metric."""
  for name, value in metrics.items():
    value = np.asarray(value, dtype=np.float64)
    if not np.isfinite(value).all():
      shown = value.item() if value.ndim == 0 else 'an array with NaN or inf'
      raise FloatingPointError(
        f'{name} is {shown} at step {step}: lower the learning rate, or '
        'inspect the batch of that step'
      )


def table(rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> str:
  """An aligned Markdown table.

  Args:
    rows: one mapping a row; missing columns, None and NaN show as `-`.
    columns: names in order; the first column is aligned left.
  """
  cells = [[_cell(row.get(name)) for name in columns] for row in rows]
  widths = [
    max([3, len(name), *(len(line[i]) for line in cells)])
    for i, name in enumerate(columns)
  ]

  def line(values: Sequence[str]) -> str:
    padded = [
      v.ljust(w) if i == 0 else v.rjust(w)
      for i, (v, w) in enumerate(zip(values, widths, strict=True))
    ]
    return '| ' + ' | '.join(padded) + ' |'

  rule = [
    '-' * w if i == 0 else '-' * (w - 1) + ':' for i, w in enumerate(widths)
  ]
  return '\n'.join([line(columns), line(rule), *map(line, cells)])


def interval(
  estimate: float, low: float, high: float, form: str = '+.4f'
) -> str:
  """Formats a difference and its interval for a table."""
  return f'{estimate:{form}} [{low:{form}}, {high:{form}}]'


def _cell(value: object) -> str:
  if value is None:
    return '-'
  if isinstance(value, float | np.floating):
    return f'{value:.4f}' if math.isfinite(value) else '-'
  return str(value)
