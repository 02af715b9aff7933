"""What evidence is looked up in: of one data set, not of one policy."""

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping

from gr2_jax.data import evidence as evidence_lib
from gr2_jax.data import log as log_lib
from gr2_jax.serving import request as requests_lib


@dataclasses.dataclass(frozen=True)
class Knowledge:
  """The log that a policy was trained on, and what was fitted to it."""

  source: pathlib.Path  # the slates artifact
  log: log_lib.Log
  facts: evidence_lib.Facts
  index: Mapping[str, int]  # item id -> catalog index


def load(slates: pathlib.Path, catalog: log_lib.Catalog, config) -> Knowledge:
  """Reads the log, and fits the evidence.

  Args:
    slates: artifact of that stage.
    catalog: of it.
    config: section `data`.

  Raises:
    DataError: the data is no longer what the slates were made of.
  """
  module = importlib.import_module(f'gr2_jax.data.sources.{config.source}')
  log = module.load(config)
  if log.catalog.item_ids != catalog.item_ids:
    raise log_lib.DataError(
      f'{config.source}: its items are no longer those of {slates}: give the '
      'data that the policy was trained on'
    )
  return Knowledge(
    source=slates,
    log=log,
    facts=requests_lib.fit(log, config),
    index={name: i for i, name in enumerate(catalog.item_ids)},
  )
