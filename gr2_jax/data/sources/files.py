"""Your own logs, from a folder.

  items.jsonl | items.parquet: one item a line or row, unique item_id, title may
    be empty; fields as in `descriptions.py`
  interactions.csv | interactions.parquet: one engagement a row
    user_id, item_id: text or whole number; the item is in items
    timestamp: number; larger is later, the seed orders ties
    grade: 1 or 2; optional, 1 where the column is missing
  impressions.jsonl | impressions.parquet: optional; one shown slate a row
    user_id, timestamp: as above; a user without interactions is legal
    candidates: list of item ids, all different
    scores: list of numbers, the incoming ranker's, as long as candidates
    grades: list of 0, 1, 2, as long as candidates

The two files of the Amazon Beauty benchmark have this form. Without
impressions, the pre-ranker makes the slates.

Axes: n rows, K candidates.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from ml_collections import ConfigDict

from gr2_jax.data import descriptions
from gr2_jax.data import log as log_lib

DataError = log_lib.DataError


def load(config: ConfigDict) -> log_lib.Log:
  """Reads and checks the folder `config.path`.

  Args:
    config: section `data`; reads `path`, `min_core` and `split_seed`.

  Raises:
    DataError: bad input; names file, line, field and cure.
  """
  folder = pathlib.Path(config.path)
  if not config.path or not folder.is_dir():
    raise DataError(
      f'data.path={config.path!r} is not a folder: give the one that holds '
      'items.jsonl and interactions.csv'
    )
  catalog = _items(_find(folder, 'items', ('jsonl', 'parquet')))
  index = {name: i for i, name in enumerate(catalog.item_ids)}
  path = _find(folder, 'interactions', ('csv', 'parquet'))
  rows = _interactions(path, index)
  shown_path = _find(folder, 'impressions', ('jsonl', 'parquet'), needed=False)
  impressions = None
  if shown_path is None:
    users = np.unique(rows[0], return_inverse=True)[1]
    keep = log_lib.core(users, rows[1], config.min_core)
    if not keep.any():
      raise DataError(
        f'{path}: no user and item has data.min_core={config.min_core} '
        'interactions: lower data.min_core'
      )
    rows = [column[keep] for column in rows]
    user_ids = np.unique(rows[0])
  else:
    names, shown = _impressions(shown_path, index)
    user_ids = np.union1d(rows[0], names)
    shown['users'] = np.searchsorted(user_ids, names).astype(np.int32)
    order = np.lexsort((shown['times'], shown['users']))
    impressions = log_lib.Impressions(**{k: x[order] for k, x in shown.items()})
  return log_lib.make_log(
    catalog,
    tuple(user_ids.tolist()),
    np.searchsorted(user_ids, rows[0]),
    *rows[1:],
    config.split_seed,
    impressions,
  )


def _find(
  folder: pathlib.Path, stem: str, kinds: tuple[str, ...], needed: bool = True
) -> pathlib.Path | None:
  paths = [p for k in kinds if (p := folder / f'{stem}.{k}').exists()]
  if len(paths) > 1:
    raise DataError(
      f'{folder}: both {paths[0].name} and {paths[1].name} exist: remove one'
    )
  if not paths and needed:
    raise DataError(f'{folder}: {stem}.{" or .".join(kinds)} is missing')
  return paths[0] if paths else None


def _fail(
  path: pathlib.Path, line: int, field: str, finding: str, cure: str
) -> NoReturn:
  unit = 'row' if path.suffix == '.parquet' else 'line'
  raise DataError(f'{path}, {unit} {line}, field {field!r}: {finding}: {cure}')


def _records(
  path: pathlib.Path, needed: tuple[str, ...]
) -> list[tuple[int, dict[str, Any]]]:
  """Returns (line number, fields) for each line or row."""
  if path.suffix == '.parquet':
    rows = list(enumerate(_parquet(path, needed).to_pylist(), start=1))
  else:
    rows = []
    with path.open('rb') as file:
      for line, text in enumerate(file, start=1):
        if not text.strip():
          continue
        row = log_lib.parse_json(text, f'{path}, line {line}')
        if not isinstance(row, dict):
          raise DataError(f'{path}, line {line}: not a JSON object')
        rows.append((line, row))
  if not rows:
    raise DataError(f'{path}: the file is empty: it needs at least one row')
  for line, row in rows:
    for field in needed:
      if row.get(field) is None:
        _fail(path, line, field, 'missing', 'every row needs it')
  return rows


def _parquet(path: pathlib.Path, needed: tuple[str, ...]) -> pa.Table:
  try:
    table = pyarrow.parquet.read_table(path)
  except (pa.ArrowInvalid, OSError) as error:
    raise DataError(
      f'{path}: not a whole parquet file ({error}): it may be cut off; '
      'write it again'
    ) from error
  _columns(path, table, needed)
  return table


def _columns(
  path: pathlib.Path, table: pa.Table, needed: tuple[str, ...]
) -> None:
  for name in needed:
    if name not in table.column_names:
      raise DataError(
        f'{path}, line 1, field {name!r}: missing column (found: '
        f'{", ".join(table.column_names)}): add it or rename one'
      )


def _items(path: pathlib.Path) -> log_lib.Catalog:
  seen, titles, categories, years = {}, [], [], []
  for line, row in _records(path, ('item_id', 'title')):
    name = str(row['item_id'])
    if name in seen:
      first = seen[name]
      cure = f'it is that of line {first} already; item ids are unique'
      _fail(path, line, 'item_id', f'{name!r} again', cure)
    seen[name] = line
    fail = functools.partial(_fail, path, line)
    title, names, year = descriptions.text_of(row, fail)
    titles.append(title)
    categories.append(names)
    years.append(year)
  return log_lib.Catalog(
    tuple(seen), tuple(titles), tuple(categories), np.array(years, np.int32)
  )


def _interactions(
  path: pathlib.Path, index: dict[str, int]
) -> tuple[np.ndarray, ...]:
  """Returns user names [n], items, times and grades, int64 [n]."""
  needed = ('user_id', 'item_id', 'timestamp')
  if path.suffix == '.parquet':
    table, first = _parquet(path, needed), 1
  else:
    table, first = _csv(path, needed), 2
  if not len(table):
    raise DataError(f'{path}: no interactions: it needs at least one row')

  def check(bad: np.ndarray, field: str, cure: str) -> None:
    if bad.any():
      row = int(np.argmax(bad))
      value = repr(table.column(field)[row].as_py())
      _fail(path, row + first, field, value, cure)

  for name in needed:
    column = table.column(name)
    empty = column.is_null().to_numpy()
    if column.type == pa.string():
      empty = empty | pc.equal(column, '').to_numpy()
    check(empty, name, 'every row needs it')
  users, names = (
    table.column(name).cast(pa.string()).to_numpy(zero_copy_only=False)
    for name in needed[:2]
  )
  items = np.array([index.get(name, -1) for name in names], np.int64)
  check(items < 0, 'item_id', 'it is not in the items file; add or remove it')
  times = _numbers(table.column('timestamp'))
  check(~np.isfinite(times), 'timestamp', 'it must be a number')
  grades = np.ones(len(table))
  if 'grade' in table.column_names:
    grades = _numbers(table.column('grade'))
  check(~np.isin(grades, (1, 2)), 'grade', 'it must be 1 or 2')
  return (
    users.astype(str),
    items,
    times.astype(np.int64),
    grades.astype(np.int64),
  )


def _csv(path: pathlib.Path, needed: tuple[str, ...]) -> pa.Table:
  """Reads all columns as text, so that errors can quote bad values."""
  with path.open(encoding='utf-8') as file:
    names = file.readline().strip().split(',')
  try:
    table = pyarrow.csv.read_csv(
      path,
      parse_options=pyarrow.csv.ParseOptions(ignore_empty_lines=False),
      convert_options=pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in names}
      ),
      read_options=pyarrow.csv.ReadOptions(use_threads=False),
    )
  except (pa.ArrowInvalid, OSError) as error:
    # The message names the row: 'CSV parse error: Row #3: Expected ...'.
    raise DataError(
      f'{path}: {str(error).replace("Row #", "line ")}: the file may be cut '
      'off there; every line needs the columns of the first'
    ) from error
  _columns(path, table, needed)
  return table


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
  """Returns float64 [n], NaN where the value is no number."""
  try:
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
  except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
    values = np.array([_number(x) for x in column.to_pylist()])
  return np.nan_to_num(values, nan=np.nan, posinf=np.nan, neginf=np.nan)


def _number(value: Any) -> float:
  try:
    return float(value)
  except (TypeError, ValueError):
    return float('nan')


def _impressions(
  path: pathlib.Path, index: dict[str, int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns user names [n] and the arrays of Impressions but the users."""
  needed = ('user_id', 'timestamp', 'candidates', 'scores', 'grades')
  rows = _records(path, needed)
  for line, row in rows:
    for field in needed[2:]:
      if not isinstance(row[field], list) or not row[field]:
        _fail(path, line, field, repr(row[field]), 'it must be a list')
    size = len(row['candidates'])
    for field in ('scores', 'grades'):
      if len(row[field]) != size:
        finding = f'{len(row[field])} values for {size} candidates'
        _fail(path, line, field, finding, 'give one per candidate')
    unknown = [x for x in row['candidates'] if str(x) not in index]
    if unknown:
      cure = 'it is not in the items file; add or remove it'
      _fail(path, line, 'candidates', repr(unknown[0]), cure)
    if len({str(x) for x in row['candidates']}) < size:
      _fail(path, line, 'candidates', 'an item stands twice', 'each item once')
    if not np.isfinite([_number(x) for x in row['scores']]).all():
      _fail(path, line, 'scores', repr(row['scores']), 'they must be numbers')
    if not all(x in (0, 1, 2) for x in row['grades']):
      _fail(path, line, 'grades', repr(row['grades']), 'each is 0, 1 or 2')
    time = row['timestamp']
    if not np.isfinite(_number(time)):
      _fail(path, line, 'timestamp', repr(time), 'it must be a number')
  widest = max(len(row['candidates']) for _, row in rows)

  def fill(
    field: str, pad: int, dtype: type, convert: Callable[[Any], float]
  ) -> np.ndarray:
    out = np.full((len(rows), widest), pad, dtype)
    for place, (_, row) in enumerate(rows):
      out[place, : len(row[field])] = [convert(x) for x in row[field]]
    return out

  names = np.array([str(row['user_id']) for _, row in rows])
  return names, {
    'times': np.array([int(float(row['timestamp'])) for _, row in rows]),
    'candidates': fill('candidates', -1, np.int32, lambda x: index[str(x)]),
    'scores': fill('scores', 0, np.float32, float),
    'grades': fill('grades', 0, np.int8, int),
  }
