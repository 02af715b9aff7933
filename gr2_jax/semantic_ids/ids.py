"""Semantic IDs: the tuple of codes of every item, and its exact inverse.

Axis letters: I items, R retired tuples, L levels, C codebook size.
"""

import dataclasses
import functools
import json
import os
import pathlib
import zipfile
from collections.abc import Sequence

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
    retired: int32 [R, L], tuples of items that left the catalog; none of them
      is an item's. None: no tuples.
    generation: number of times that the catalog has been extended.

  Raises:
    ValueError: a shape, type or range is wrong, an item has a retired tuple, or
      a tuple of L codes does not fit in 63 bits.
  """

  codes: np.ndarray
  codebook_size: int
  retired: np.ndarray | None = None
  generation: int = 0

  def __post_init__(self):
    codes = np.asarray(self.codes)
    if codes.ndim != 2 or not codes.size:
      raise ValueError(f'codes must be [items, levels], got {codes.shape}')
    levels = codes.shape[1]
    retired = self.retired
    if retired is None:
      retired = np.zeros((0, levels), np.int32)
    retired = np.asarray(retired)
    if retired.ndim != 2 or retired.shape[1] != levels:
      raise ValueError(
        f'retired must be [tuples, {levels}], got {retired.shape}'
      )
    if self.codebook_size**levels > 2**63 - 1:
      raise ValueError(
        f'{levels} levels of {self.codebook_size} codes do not fit in 63 bits: '
        'lower tokenizer.levels or tokenizer.codebook_size'
      )
    if self.generation < 0:
      raise ValueError(f'generation is {self.generation}: it counts from 0')
    codes = _checked(codes, self.codebook_size, 'item', 'codes')
    retired = _checked(
      retired, self.codebook_size, 'retired tuple', 'retired tuples'
    )
    object.__setattr__(self, 'codes', codes)
    object.__setattr__(self, 'retired', retired)
    reused = np.flatnonzero(self.find(retired) >= 0)
    if len(reused):
      again = retired[reused[0]]
      raise ValueError(
        f'item {self.find(again)} has the retired tuple {again.tolist()}: use '
        "tokenizer.last_level 'unused' or 'digit', which never reuse a tuple"
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
    """Tuples that no new item may get, int32 [I + R, L]."""
    return np.concatenate([self.codes, self.retired])

  def extend(self, rows: np.ndarray, new_codes: np.ndarray) -> 'SemanticIds':
    """The semantic IDs of the catalog's next generation.

    Items that stay keep their tuples; the tuples of items that leave are
    retired.

    Args:
      rows: int [I'], for each item of the new catalog its item here, or -1
        for a new item; the other items leave the catalog.
      new_codes: int [n, L] of the new items, in the new catalog's order.

    Raises:
      ValueError: rows are out of range or repeat an item, the number of codes
        is wrong, or the constructor rejects the codes.
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
    # A tuple that an item which leaves shared with one that stays stays in use.
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
    """The first item that has each tuple.

    Args:
      codes: int [..., L]; values outside [0, C) match no item.

    Returns:
      int32 [...], -1 where no item has the tuple.

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
    """Whether no other item has an item's first `depth` codes, bool [I]."""
    keys = prefix_keys(self.codes[:, :depth], self.codebook_size)
    _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[group] == 1

  def statistics(self) -> dict:
    """Quality of the IDs, ready for JSON.

    Returns:
      items; uniqueness (share of items with a unique tuple);
      uniqueness_before_last_level; distinct tuples; and one entry per level
      in usage (share of codes used), entropy (bits, at most log2 C),
      dead_codes, prefixes (distinct ones) and largest_prefix (its items).
    """
    counts = [
      np.unique(
        prefix_keys(self.codes[:, : level + 1], self.codebook_size),
        return_counts=True,
      )[1]
      for level in range(self.levels)
    ]
    before = self.unique(self.levels - 1) if self.levels > 1 else [False]
    return {
      'items': len(self),
      'uniqueness': float(self.unique().mean()),
      'uniqueness_before_last_level': float(np.mean(before)),
      'distinct': len(counts[-1]),
      **self._level_usage(),
      'prefixes': [len(items) for items in counts],
      'largest_prefix': [int(items.max()) for items in counts],
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
    """Writes sids.npz and sids.json atomically."""
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
    """Writes item_id and codes of every item, in catalog order, atomically.

    Args:
      path: a .jsonl file, one object a line, or a .parquet file.
      item_ids: [I] external ids.

    Raises:
      ValueError: the suffix is another, the number of ids is not I, or an id is
        empty or occurs twice.
    """
    path = pathlib.Path(path)
    if len(item_ids) != len(self):
      raise ValueError(f'{len(item_ids)} item ids for {len(self)} items')
    check_item_ids(item_ids)
    if path.suffix == '.jsonl':
      with files.atomic_write(path) as file:
        for item_id, codes in zip(item_ids, self.codes, strict=True):
          row = {'item_id': item_id, 'codes': codes.tolist()}
          file.write(json.dumps(row, ensure_ascii=False) + '\n')
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


def load(directory: os.PathLike[str] | str) -> SemanticIds:
  """Reads the files of `SemanticIds.save`.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged or of another version, or the two disagree.
  """
  directory = pathlib.Path(directory)
  for name in (_ARRAYS, _FACTS):
    if not (directory / name).is_file():
      raise FileNotFoundError(
        f'{directory / name}: missing; run the tokenizer stage'
      )
  cure = 'delete the folder and run the tokenizer stage again'
  try:
    facts = json.loads((directory / _FACTS).read_text(encoding='utf-8'))
    version = facts['version']
    if version == VERSION:
      with np.load(directory / _ARRAYS) as file:
        codes, retired = file['codes'], file['retired']
      size, generation = facts['codebook_size'], facts['generation']
      shapes = [(facts[rows], facts['levels']) for rows in ('items', 'retired')]
  except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(
      f'{directory}: {_ARRAYS} or {_FACTS} is damaged ({e!r}); {cure}'
    ) from e
  if version != VERSION:
    raise ValueError(
      f'{directory / _FACTS}: version {version}, but this program reads '
      f'version {VERSION}; {cure}'
    )
  for array, shape in zip((codes, retired), shapes, strict=True):
    if array.shape != shape:
      raise ValueError(
        f'{directory / _ARRAYS}: codes are {array.shape}, but {shape} in '
        f'{_FACTS}; {cure}'
      )
  return SemanticIds(codes, size, retired, generation)


def load_item_ids(directory: os.PathLike[str] | str) -> tuple[str, ...]:
  """The item ids [I] of a finished tokenizer, in the order of its codes.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a line of sids.jsonl is damaged, or disagrees with the codes.
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
          'has others; export it again'
        )
      item_ids.append(item_id)
  if len(item_ids) != len(sids):
    raise ValueError(
      f'{path}: {len(item_ids)} lines for {len(sids)} items; export it again'
    )
  check_item_ids(item_ids)
  return tuple(item_ids)


def check_item_ids(item_ids: Sequence[str]) -> None:
  """Raises ValueError at the first id that is empty or occurs twice."""
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
  """A read-only int32 copy of valid codes; raises ValueError for others."""
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
