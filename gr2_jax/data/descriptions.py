"""Items that are described: one JSON object or row each.

  item_id: text or whole number
  title: text
  categories: list of texts, wide to narrow; optional
  brand: text or null, put in front of the title; optional
  year: whole number, 0 or null where unknown; optional

So are the items of a catalog (`sources/files.py`), and so may be those of a
slate from outside that the catalog lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from gr2_jax.data import log as log_lib
from gr2_jax.data import validation as fields_lib

# Of an item from outside, in characters.
TITLE = 1000
NAME = 200  # of a brand, and of a category
CATEGORIES = 32

NONE = log_lib.Catalog((), (), (), np.zeros(0, np.int32))


def text_of(
  row: dict, fail: Callable[[str, str, str], NoReturn]
) -> tuple[str, tuple[str, ...], int]:
  """Title, categories and year of an item.

  Args:
    row: has at least a title.
    fail: called with field, finding and cure; raises.

  Returns:
    The title with its brand, the categories, the year or 0.
  """

  def given(field, default):
    value = row.get(field)
    return default if value is None else value

  title, brand = row['title'], given('brand', '')
  for field, value in (('title', title), ('brand', brand)):
    if not isinstance(value, str):
      fail(field, fields_lib.short(value), 'it must be text')
  path = given('categories', [])
  if not isinstance(path, list) or not all(isinstance(x, str) for x in path):
    fail('categories', fields_lib.short(path), 'it must be a list of texts')
  year = given('year', 0)
  if type(year) is not int or not 0 <= year < 10_000:
    cure = 'it must be a whole number below 10000, 0 where unknown'
    fail('year', fields_lib.short(year), cure)
  known = brand and brand != 'Unknown' and brand.lower() not in title.lower()
  title = f'{brand} {title}' if known and title else title
  return title, tuple(path), year


def read(value: object, where: str, most: int) -> log_lib.Catalog:
  """Checks the items that a slate describes.

  Args:
    value: what JSON holds.
    where: it stands, for messages.
    most: items that there may be.

  Raises:
    DataError: what is wrong, with place, field and cure.
  """
  whole = fields_lib.Fields(where)
  if not isinstance(value, list):
    cure = 'it must be a list of descriptions'
    whole.fail('items', fields_lib.short(value), cure)
  if len(value) > most:
    found = f'{len(value)} of them, room for {most}'
    whole.fail('items', found, 'describe those that the catalog lacks alone')
  found = {}
  for place, row in enumerate(value):
    fields = fields_lib.Fields(f'{where}, items[{place}]')
    if not isinstance(row, dict):
      whole.fail(
        'items',
        f'{fields_lib.short(row)} at place {place}',
        'write {"item_id": .., "title": ..}',
      )
    name = fields.name(row, 'item_id')
    for field in ('item_id', 'title'):
      if row.get(field) is None:
        fields.fail(field, 'missing', 'every description needs it')
    if str(name) in found:
      shown = f'{fields_lib.short(name)} again'
      fields.fail('item_id', shown, 'describe each item once')
    title, path, year = text_of(row, fields.fail)
    _check_lengths(row, path, fields)
    found[str(name)] = _plain(title), tuple(map(_plain, path)), year
  if not found:
    return NONE
  titles, paths, years = zip(*found.values(), strict=True)
  return log_lib.Catalog(tuple(found), titles, paths, np.array(years, np.int32))


def join(parts: Sequence[log_lib.Catalog]) -> log_lib.Catalog:
  """The items of several catalogs, one after the other."""
  return log_lib.Catalog(
    tuple(name for part in parts for name in part.item_ids),
    tuple(title for part in parts for title in part.titles),
    tuple(path for part in parts for path in part.categories),
    np.concatenate([NONE.years, *(part.years for part in parts)]),
  )


def _check_lengths(row: dict, path: tuple, fields: fields_lib.Fields) -> None:
  if not row['title'].strip():
    fields.fail('title', fields_lib.short(row['title']), 'say what it is')
  if len(path) > CATEGORIES:
    found = f'{len(path)} of them, room for {CATEGORIES}'
    fields.fail('categories', found, 'give the most telling ones')
  texts = [('title', row['title'], TITLE), ('brand', row.get('brand'), NAME)]
  for field, text, most in texts + [('categories', x, NAME) for x in path]:
    if text and len(text) > most:
      found = f'{len(text)} characters, room for {most}'
      fields.fail(field, found, 'cut the text')


def _plain(text: str) -> str:
  """The text without halves of surrogate pairs, which no tokenizer reads."""
  return text.encode('utf-8', 'replace').decode()
