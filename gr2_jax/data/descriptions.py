"""The fields that describe an item, in `items.jsonl` and beside a slate.

  item_id: text or whole number
  title: text
  categories: list of texts, wide to narrow; optional
  brand: text or null, put in front of the title; optional
  year: whole number, 0 or null where unknown; optional

`items.jsonl` may have further fields, which are ignored.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def text_of(
  row: dict[str, Any], fail: Callable[[str, str, str], NoReturn]
) -> tuple[str, tuple[str, ...], int]:
  """Checks the fields of an item that has a title.

  Args:
    row: parsed JSON.
    fail: called with field, finding and cure; raises.

  Returns:
    The title with its brand, the categories, the year or 0.
  """

  def given(field: str, default: Any) -> Any:
    value = row.get(field)
    return default if value is None else value

  title, brand = row['title'], given('brand', '')
  for field, value in (('title', title), ('brand', brand)):
    if not isinstance(value, str):
      fail(field, short(value), 'it must be text')
  path = given('categories', [])
  if not isinstance(path, list) or not all(isinstance(x, str) for x in path):
    fail('categories', short(path), 'it must be a list of texts')
  year = given('year', 0)
  if type(year) is not int or not 0 <= year < 10_000:
    cure = 'it must be a whole number below 10000, 0 where unknown'
    fail('year', short(year), cure)
  return with_brand(title, brand), tuple(path), year


def with_brand(title: str, brand: str) -> str:
  """The title, behind its brand unless the title names it already."""
  known = brand and brand != 'Unknown' and brand.lower() not in title.lower()
  return f'{brand} {title}' if known and title else title


def short(value: Any) -> str:
  """A value as an error shows it."""
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
