"""What people look at: items by name, and slates that the data set has."""

import functools
import pathlib
from collections.abc import Iterable
from typing import Any

from gr2_jax.data import slates as slates_lib
from gr2_jax.serving import request as requests_lib
from gr2_jax.serving import reranker as reranker_lib

MOST = 256  # items of one look-up


def items(
  policy: reranker_lib.Reranker, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
  """Title, categories and year of each item that the catalog has.

  Args:
    policy: whose catalog it is.
    names: item ids.
  """
  known = policy.knowledge
  catalog = known.log.catalog
  found = {}
  for name in names:
    item = known.index.get(name)
    if item is not None:
      found[name] = {
        'title': catalog.titles[item],
        'categories': list(catalog.categories[item]),
        'year': int(catalog.years[item]) or None,
      }
  return found


def example(policy: reranker_lib.Reranker, place: int) -> dict[str, Any]:
  """A test slate, with what its user did next.

  Args:
    policy: whose data set it is of.
    place: of the slate; counted around.

  Returns:
    slate, to be sent to /rank; relevant, item ids of the positives; slates, how
    many there are.
  """
  records = _records(policy.knowledge.source)
  record = records[place % len(records)]
  names = policy.knowledge.log.catalog.item_ids
  slate = requests_lib.of_record(record, names)
  return {
    'slate': slate,
    'relevant': [
      name
      for name, grade in zip(
        slate['candidates'], record['grades'], strict=False
      )
      if grade > 0
    ],
    'slates': len(records),
  }


@functools.lru_cache(maxsize=1)
def _records(source: pathlib.Path):
  """Random access to the test slates."""
  return slates_lib.source(source, 'test')
