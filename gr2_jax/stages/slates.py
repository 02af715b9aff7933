"""Stage `slates`: source -> pre-ranker -> slates with evidence, on disk."""

import importlib
import logging
import pathlib
from typing import Any

from ml_collections import ConfigDict

from gr2_jax.data import slates as slates_lib

SOURCES = ('movielens', 'files', 'world')


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Writes a data set into the workdir; a killed run starts again.

  Returns:
    Sizes of the log, and `splits`: the counts of `slates.build` and the share
    of users in each.

  Raises:
    ValueError: the source is unknown.
    DataError: the log is invalid.
  """
  del inputs
  data = config.data
  if data.source not in SOURCES:
    raise ValueError(
      f'data.source is {data.source!r}: must be one of {SOURCES}'
    )
  source = importlib.import_module(f'gr2_jax.data.sources.{data.source}')
  log = source.load(data)
  logging.info(
    'slates: %d users, %d items, %d interactions from %s',
    len(log.user_ids),
    len(log.catalog),
    len(log.users),
    data.source,
  )
  splits, counts = slates_lib.build(log, data)
  for name, count in counts.items():
    count['user_share'] = count['users'] / len(log.user_ids)
    logging.info('slates: %s %s', name, count)
  pathlib.Path(workdir, 'meta.json').unlink(missing_ok=True)
  slates_lib.write(workdir, splits, log.catalog, {'counts': counts})
  return {
    'users': len(log.user_ids),
    'items': len(log.catalog),
    'interactions': len(log.users),
    'empty_titles': sum(not title for title in log.catalog.titles),
    'splits': counts,
  }
