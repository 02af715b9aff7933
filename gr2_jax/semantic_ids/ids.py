"""Semantic IDs: the tuple of codes of every item, and its exact inverse.

Axis letters: I items, R retired tuples, T = I + R, L levels, C codebook size.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from gr2_jax.data import files

VERSION = 2
_ARRAYS = 'sids.npz'
_FACTS = 'sids.json'
EXPORT = 'sids.jsonl'


@dataclasses.dataclass(frozen=True)
class SemanticIds:
  """The semantic IDs of a catalog.

  Attributes:
    codes: int32 [I, L], each in [0, C).
    codebook_size: C.
    retired: int32 [R, L], tuples of items that left the catalog, none of them
      an item's; none by default.
    generation: how often the catalog has been extended.

  Raises:
    ValueError: codes or retired have another shape, type or range, an item
      has a retired tuple, the generation is negative, or L and C are so large
      that a tuple does not fit in 63 bits.
  """

  codes: np.ndarray
  codebook_size: int
  retired: np.ndarray | None = None
  generation: int = 0

  def __post_init__(self):
    codes = np.asarray(self.codes)
    if codes.ndim != 2 or not codes.size:
      raise ValueError(f'codes must be [items, levels], got {codes.shape}')
    retired = self.retired
    if retired is None:
      retired = np.zeros((0, codes.shape[1]), np.int32)
    retired = np.asarray(retired)
    if retired.ndim != 2 or retired.shape[1] != codes.shape[1]:
      raise ValueError(
        f'retired must be [tuples, {codes.shape[1]}], got {retired.shape}'
      )
    if self.codebook_size ** codes.shape[1] > 2**63 - 1:
      raise ValueError(
        f'{codes.shape[1]} levels of {self.codebook_size} codes do not fit in '
        '63 bits: lower tokenizer.levels or tokenizer.codebook_size'
      )
    if self.generation < 0:
      raise ValueError(f'generation is {self.generation}: it counts from 0')
    codes = _checked(codes, self.codebook_size, 'item', 'codes')
    retired = _checked(
      retired, self.codebook_size, 'retired tuple', 'retired tuples'
    )
    object.__setattr__(self, 'codes', codes)
    object.__setattr__(self, 'retired', retired)
    given_again = np.flatnonzero(self.find(retired) >= 0)
    if len(given_again):
      again = retired[given_again[0]]
      raise ValueError(
        f'item {self.find(again)} has the retired tuple {again.tolist()}: name '
        "it with tokenizer.last_level 'unused' or 'digit', which never gives a "
        'tuple again'
      )

  def __len__(self) -> int:
    """Number of items, I."""
    return len(self.codes)

  @property
  def levels(self) -> int:
    """Number of levels, L."""
    return self.codes.shape[1]

  @functools.cached_property
  def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys int64 [I] and the items in that order, ties by item."""
    keys = prefix_keys(self.codes, self.codebook_size)
    order = np.argsort(keys, kind='stable')
    return keys[order], order.astype(np.int32)

  @property
  def taken(self) -> np.ndarray:
    """Tuples that no new item may get, int32 [T, L]: live and retired ones."""
    return np.concatenate([self.codes, self.retired])

  def extend(self, rows: np.ndarray, new_codes: np.ndarray) -> 'SemanticIds':
    """The semantic IDs of the catalog's next generation.

    Args:
      rows: int [I'], for each item of the new catalog its item here, or -1
        where it is new; items that do not occur leave the catalog.
      new_codes: int [n, L] of the new items, in the new catalog's order.

    Returns:
      Items that stay keep their tuples; those of items that leave are retired,
      beside those that were.

    Raises:
      ValueError: the rows are no such thing, or the codes are not fit for the
        new items; see the constructor.
    """
    rows = np.asarray(rows)
    if rows.ndim != 1 or ((rows < -1) | (rows >= len(self))).any():
      raise ValueError(f'rows must be [items], each in -1..{len(self) - 1}')
    stay, counts = np.unique(rows[rows >= 0], return_counts=True)
    if (counts > 1).any():
      raise ValueError(f'rows has item {stay[counts > 1][0]} twice')
    if (rows < 0).sum() != len(new_codes):
      raise ValueError(
        f'{len(new_codes)} new codes for {(rows < 0).sum()} new items'
      )
    codes = self.codes[rows]
    codes[rows < 0] = new_codes
    left = np.delete(self.codes, stay, axis=0)
    # Where two items shared a tuple, the one that stays keeps it.
    shared = np.isin(
      prefix_keys(left, self.codebook_size),
      prefix_keys(self.codes[stay], self.codebook_size),
    )
    return SemanticIds(
      codes,
      self.codebook_size,
      np.concatenate([self.retired, left[~shared]]),
      self.generation + 1,
    )

  def find(self, codes: np.ndarray) -> np.ndarray:
    """The items that tuples stand for.

    Args:
      codes: int [..., L]; values outside [0, C) stand for nothing.

    Returns:
      int32 [...], -1 where no item has the tuple; where several have it, the
      first of them.

    Raises:
      ValueError: the last axis is not L.
    """
    codes = np.asarray(codes, np.int64)
    if codes.shape[-1:] != (self.levels,):
      raise ValueError(f'codes must be [..., {self.levels}], got {codes.shape}')
    keys, items = self._sorted
    wanted = prefix_keys(codes, self.codebook_size)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    valid = ((codes >= 0) & (codes < self.codebook_size)).all(-1)
    return np.where(valid & (keys[place] == wanted), items[place], -1)

  def unique(self, depth: int | None = None) -> np.ndarray:
    """Which items have a prefix that is theirs alone.

    Args:
      depth: number of leading codes to look at; all of them by default.

    Returns:
      bool [I].
    """
    keys = prefix_keys(self.codes[:, :depth], self.codebook_size)
    _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[group] == 1

  def statistics(self) -> dict:
    """Figures of merit, ready for JSON.

    Returns:
      items; uniqueness (share of items whose tuple is theirs alone);
      uniqueness_before_last_level; distinct tuples; and one entry per level
      in usage (share of codes used), entropy (bits, of C codes at most log2
      C), dead_codes, prefixes (distinct prefixes that end there) and
      largest_prefix (items under the fullest of them).
    """
    columns = {'prefixes': [], 'largest_prefix': []}
    for level in range(self.levels):
      prefixes = np.unique(
        prefix_keys(self.codes[:, : level + 1], self.codebook_size),
        return_counts=True,
      )[1]
      columns['prefixes'].append(len(prefixes))
      columns['largest_prefix'].append(int(prefixes.max()))
    before = self.unique(self.levels - 1) if self.levels > 1 else [False]
    return {
      'items': len(self),
      'uniqueness': float(self.unique().mean()),
      'uniqueness_before_last_level': float(np.mean(before)),
      'distinct': columns['prefixes'][-1],
      **self._level_usage(),
      **columns,
    }

  def _level_usage(self) -> dict[str, list]:
    """usage, entropy and dead_codes of every level; see `statistics`."""
    columns = {'usage': [], 'entropy': [], 'dead_codes': []}
    for level in range(self.levels):
      counts = np.bincount(self.codes[:, level], minlength=self.codebook_size)
      share = counts[counts > 0] / len(self)
      columns['usage'].append(float((counts > 0).mean()))
      columns['entropy'].append(float(-(share * np.log2(share)).sum() + 0.0))
      columns['dead_codes'].append(int((counts == 0).sum()))
    return columns

  def save(self, directory: os.PathLike[str] | str) -> None:
    """Writes sids.npz and sids.json, each whole or not at all."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    facts = {
      'version': VERSION,
      'generation': self.generation,
      'codebook_size': self.codebook_size,
      'items': len(self),
      'retired': len(self.retired),
      'levels': self.levels,
      **self._level_usage(),
    }
    with files.atomic_write(directory / _ARRAYS, 'wb') as file:
      np.savez(file, codes=self.codes, retired=self.retired)
    with files.atomic_write(directory / _FACTS) as file:
      file.write(json.dumps(facts, indent=2) + '\n')

  def export(
    self, path: os.PathLike[str] | str, item_ids: Sequence[str]
  ) -> None:
    """Writes item_id and codes of every item, in catalog order.

    Args:
      path: a .jsonl file, one JSON object a line, or a .parquet file, with
        columns of strings and of lists of L int32; it appears whole or not at
        all.
      item_ids: [I] external ids, in catalog order.

    Raises:
      ValueError: the suffix is another, the number of ids is not I, or one is
        empty or occurs twice.
    """
    path = pathlib.Path(path)
    if len(item_ids) != len(self):
      raise ValueError(f'{len(item_ids)} item ids for {len(self)} items')
    check_item_ids(item_ids)
    if path.suffix == '.jsonl':
      with files.atomic_write(path, 'wb') as file:
        self._write_lines(file, item_ids)
    elif path.suffix == '.parquet':
      codes = pa.FixedSizeListArray.from_arrays(
        pa.array(self.codes.ravel()), self.levels
      )
      table = pa.table(
        {'item_id': pa.array(item_ids, pa.string()), 'codes': codes}
      )
      with files.atomic_write(path, 'wb') as file:
        parquet.write_table(table, file)
    else:
      raise ValueError(
        f'{path}: semantic IDs are exported to .jsonl or .parquet, not '
        f'{path.suffix!r}'
      )

  def _write_lines(self, file: BinaryIO, item_ids: Sequence[str]) -> None:
    for item_id, codes in zip(item_ids, self.codes, strict=True):
      row = {'item_id': item_id, 'codes': codes.tolist()}
      file.write(json.dumps(row, ensure_ascii=False).encode() + b'\n')


def load(directory: os.PathLike[str] | str) -> SemanticIds:
  """Reads what `SemanticIds.save` wrote.

  Args:
    directory: the folder of a finished tokenizer.

  Returns:
    The semantic IDs.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, of another version, or they disagree.
  """
  directory = pathlib.Path(directory)
  for name in (_ARRAYS, _FACTS):
    if not (directory / name).is_file():
      raise FileNotFoundError(
        f'{directory / name}: missing; run the tokenizer stage'
      )
  with _damage_named(directory):
    facts = json.loads((directory / _FACTS).read_text(encoding='utf-8'))
    version = facts['version']
  if version != VERSION:
    raise ValueError(
      f'{directory / _FACTS}: version {version}, but this program reads '
      f'version {VERSION}; delete the folder and run the tokenizer stage again'
    )
  with _damage_named(directory):
    with np.load(directory / _ARRAYS) as file:
      codes, retired = file['codes'], file['retired']
    size, generation = facts['codebook_size'], facts['generation']
    rows = (facts['items'], facts['retired'])
    levels = facts['levels']
  for array, count in zip((codes, retired), rows, strict=True):
    if array.shape != (count, levels):
      raise ValueError(
        f'{directory / _ARRAYS}: codes are {array.shape}, but {_FACTS} says '
        f'{(count, levels)}; delete the folder and run the tokenizer stage '
        'again'
      )
  return SemanticIds(codes, size, retired, generation)


@contextlib.contextmanager
def _damage_named(directory: pathlib.Path) -> Iterator[None]:
  """Names the folder and the cure where reading it fails."""
  try:
    yield
  except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(
      f'{directory}: {_ARRAYS} or {_FACTS} is damaged ({e!r}); delete the '
      'folder and run the tokenizer stage again'
    ) from e


def load_item_ids(directory: os.PathLike[str] | str) -> tuple[str, ...]:
  """The item ids of a finished tokenizer, in the order of its codes.

  Args:
    directory: holds what `SemanticIds.save` and, in sids.jsonl, its `export`
      wrote.

  Returns:
    [I] item ids.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a line is damaged, or its codes are not the item's.
  """
  sids = load(directory)
  path = pathlib.Path(directory) / EXPORT
  if not path.is_file():
    raise FileNotFoundError(f'{path}: missing; run the tokenizer stage')
  item_ids = []
  with path.open(encoding='utf-8') as file:
    for number, line in enumerate(file):
      try:
        row = json.loads(line)
        item_id, codes = row['item_id'], row['codes']
      except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
          f'{path}:{number + 1}: no item_id and codes there ({e!r}); export it '
          'again'
        ) from e
      if number >= len(sids) or codes != sids.codes[number].tolist():
        raise ValueError(
          f'{path}:{number + 1}: {item_id!r} has codes {codes}, but {_ARRAYS} '
          'says otherwise; export it again'
        )
      item_ids.append(item_id)
  if len(item_ids) != len(sids):
    raise ValueError(
      f'{path}: {len(item_ids)} lines for {len(sids)} items; export it again'
    )
  check_item_ids(item_ids)
  return tuple(item_ids)


def check_item_ids(item_ids: Sequence[str]) -> None:
  """Raises ValueError naming the first id that is empty or occurs twice."""
  first = {}
  for row, item_id in enumerate(item_ids):
    if not item_id:
      raise ValueError(f'item {row} of the catalog has no id: give it one')
    if first.setdefault(item_id, row) != row:
      raise ValueError(
        f'item id {item_id!r} occurs twice in the catalog, at items '
        f'{first[item_id]} and {row}: drop or rename one'
      )


def prefix_keys(codes: np.ndarray, codebook_size: int) -> np.ndarray:
  """Tuples of codes [..., depth] as numbers of base C, int64 [...]."""
  keys = np.zeros(codes.shape[:-1], np.int64)
  for level in range(codes.shape[-1]):
    keys = keys * codebook_size + codes[..., level]
  return keys


def _checked(
  codes: np.ndarray, codebook_size: int, row_name: str, name: str
) -> np.ndarray:
  """Codes as a read-only int32 array of our own, or a ValueError."""
  if not np.issubdtype(codes.dtype, np.integer):
    raise ValueError(f'{name} must be integers, got {codes.dtype}')
  outside = (codes < 0) | (codes >= codebook_size)
  if outside.any():
    row, level = np.argwhere(outside)[0]
    raise ValueError(
      f'{row_name} {row}: code {codes[row, level]} at level {level + 1} is '
      f'outside 0..{codebook_size - 1}'
    )
  codes = codes.astype(np.int32)
  codes.setflags(write=False)
  return codes
