"""Fields of a JSON object from outside: right, or an error that names them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from gr2_jax.data import log as log_lib

_LATEST = 2**53  # Whole numbers up to it survive every JSON writer.


@dataclasses.dataclass(frozen=True)
class Fields:
  """Reads the fields of a slate, and says where errors are.

  Every method raises DataError with place, field and cure.
  """

  where: str

  def fail(self, field: str, found: str, cure: str):
    """Raises what says it."""
    raise log_lib.DataError(f'{self.where}, field {field!r}: {found}: {cure}')

  def names(self, row: dict, field: str) -> list[str | int]:
    """A list of item ids; the row must have it."""
    if field not in row:
      self.fail(field, 'missing', 'every slate needs it')
    value = row[field]
    if not isinstance(value, list):
      self.fail(field, short(value), 'it must be a list of item ids')
    for name in value:
      if not _is_name(name):
        self.fail(field, short(name), 'an item id is text or a whole number')
    return value

  def name(self, row: dict, field: str, default=None):
    """Text or a whole number."""
    value = row.get(field)
    if value is None:
      return default
    if not _is_name(value):
      self.fail(field, short(value), 'it must be text or a whole number')
    return value

  def scores(self, row: dict, count: int) -> tuple[float, ...]:
    """One per candidate, float32 values; falling where there are none."""
    value = row.get('scores')
    if value is None:
      return tuple(np.linspace(1, 0, count, False, dtype=np.float32).tolist())
    if not isinstance(value, list):
      self.fail('scores', short(value), 'it must be a list of numbers')
    if len(value) != count:
      found = f'{len(value)} values for {count} candidates'
      self.fail('scores', found, 'give one per candidate, or none at all')
    largest = float(np.finfo(np.float32).max)
    for score in value:
      if not _is_number(score) or not abs(score) <= largest:
        self.fail('scores', short(score), 'each must be a finite number')
    return tuple(np.array(value, np.float32).tolist())

  def time(self, row: dict) -> int | None:
    """When it is, or None."""
    value = row.get('time')
    return None if value is None else self._moment('time', value)

  def times(self, row: dict, count: int) -> list[int | None]:
    """When each item of the history was, None where that is not told."""
    field = 'history_times'
    return [
      None if value is None else self._moment(field, value)
      for value in self._per_item(row, field, count)
    ]

  def grades(self, row: dict, count: int) -> list[int]:
    """Of each item of the history, 0 where that is not told."""
    field = 'history_grades'
    found = self._per_item(row, field, count)
    for value in found:
      if value is not None and (isinstance(value, bool) or value not in (1, 2)):
        self.fail(field, short(value), 'each must be 1 or 2, or null')
    return [int(value or 0) for value in found]

  def _moment(self, field: str, value) -> int:
    if not _is_number(value) or not abs(value) <= _LATEST:
      self.fail(field, short(value), 'it must be a finite number')
    return int(value)

  def _per_item(self, row: dict, field: str, count: int) -> list:
    value = row.get(field)
    if value is None:
      return [None] * count
    if not isinstance(value, list):
      self.fail(field, short(value), 'it must be a list')
    if len(value) != count:
      found = f'{len(value)} values for {count} items of the history'
      self.fail(field, found, 'give one per item, or none at all')
    return value


def _is_name(value) -> bool:
  return isinstance(value, str | int) and not isinstance(value, bool)


def _is_number(value) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and not (isinstance(value, float) and math.isnan(value))
  )


def short(value) -> str:
  """A value as a message shows it."""
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
