"""What a run says: metric files, progress bars, tables, non-finite stops."""

import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorboardX
import tqdm

from gr2_jax.data import files
from gr2_jax.distributed import processes

# Seconds between two lines of progress where the output is not a terminal.
_LINE_INTERVAL = 10.0


class MetricsWriter:
  """Writes scalars to `metrics.jsonl` and to TensorBoard event files.

  One JSON object a line, its first field is `step`. A run that resumes at
  step s keeps the lines up to s, drops those after it (they will be written
  again) and drops a last line that a kill has torn.

  Args:
    directory: where `metrics.jsonl` and the folder `tensorboard` go; of
      several processes the first one writes.
    resume_step: the step of the checkpoint the run goes on from; 0 for none.

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
    """Writes one line; values are scalars, non-finite ones become null."""
    if self._file is None:
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
    if self._file is not None:
      self._file.close()
      self._tensorboard.close()

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()


def read_metrics(path: os.PathLike[str] | str) -> list[dict]:
  """Reads a `metrics.jsonl`, without a torn last line.

  Args:
    path: the file; a missing one reads as empty.

  Returns:
    One dict a line.

  Raises:
    ValueError: a line before the last one is no JSON object with a step.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  *lines, tail = path.read_text(encoding='utf-8').split('\n')
  del tail  # Empty, or torn: a whole line ends in a newline.
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
  """A text stream on which every redraw of a bar is a line of its own."""

  def __init__(self, stream):
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

  On a terminal it is a bar; elsewhere one line every ten seconds, so that a
  log stays readable. `TQDM_DISABLE=1` in the environment silences it.

  Args:
    total: number of steps of the whole loop.
    desc: what the loop does, e.g. the stage's name.
    initial: steps done before (a resumed run), left out of the rate.
    unit: what one step is called.
    quiet: show nothing.

  Returns:
    The bar, at `initial`.
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
  """Stops a run whose numbers have left the reals.

  Args:
    step: the step the metrics belong to.
    metrics: name -> scalar or array.

  Raises:
    FloatingPointError: names the first metric that is NaN or infinite.
  """
  for name, value in metrics.items():
    value = np.asarray(value, dtype=np.float64)
    if not np.isfinite(value).all():
      shown = value.item() if value.ndim == 0 else 'an array with NaN or inf'
      raise FloatingPointError(
        f'{name} is {shown} at step {step}: lower the learning rate, or look '
        'at the batch of that step'
      )


def table(rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> str:
  """An aligned Markdown table.

  Args:
    rows: one mapping a row; a column it lacks, None and NaN show as `-`.
    columns: the columns' names, in order; the first is aligned left.

  Returns:
    Lines joined by newlines: header, rule, rows.
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


def interval(estimate: float, low: float, high: float) -> str:
  """A difference and its interval, as tables show them."""
  return f'{estimate:+.4f} [{low:+.4f}, {high:+.4f}]'


def _cell(value: object) -> str:
  if value is None:
    return '-'
  if isinstance(value, float | np.floating):
    return f'{value:.4f}' if math.isfinite(value) else '-'
  return str(value)
