"""Items by id and test slates of the data set, for the page."""

import functools
import pathlib
from collections.abc import Iterable
from typing import Any

from gr2_jax.data import slates as slates_lib
from gr2_jax.serving import fields
from gr2_jax.serving import request as requests_lib
from gr2_jax.serving import reranker as reranker_lib

NAMES = fields.List(fields.TEXT, most=256)
PLACE = fields.Kind(
  'a whole number from 0 to 999999999',
  {'type': 'integer', 'minimum': 0, 'maximum': 999_999_999},
)


def items(
  policy: reranker_lib.Reranker, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
  """Title, categories and year of each item id that the catalog has."""
  index, catalog = policy.knowledge.index, policy.knowledge.log.catalog
  return {
    name: {
      'title': catalog.titles[item],
      'categories': list(catalog.categories[item]),
      'year': int(catalog.years[item]) or None,
    }
    for name in names
    if (item := index.get(name)) is not None
  }


def example(policy: reranker_lib.Reranker, place: int) -> dict[str, Any]:
  """A test slate; `place` counts modulo the number of test slates.

  Returns:
    slate, to be sent to /rank; relevant, item ids of the positives; slates, the
    number of test slates.
  """
  records = _records(policy.knowledge.source)
  record = records[place % len(records)]
  slate = requests_lib.of_record(record, policy.knowledge.log.catalog.item_ids)
  grades = zip(slate['candidates'], record['grades'], strict=False)
  return {
    'slate': slate,
    'relevant': [name for name, grade in grades if grade > 0],
    'slates': len(records),
  }


@functools.lru_cache(maxsize=1)
def _records(source: pathlib.Path) -> slates_lib.SlateSource:
  return slates_lib.SlateSource(source, 'test')
