"""The log that evidence is looked up in; policies of one data set share it."""

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping

import ml_collections

from gr2_jax.data import evidence as evidence_lib
from gr2_jax.data import item_text, preranker
from gr2_jax.data import log as log_lib
from gr2_jax.data import splits as splits_lib


@dataclasses.dataclass(frozen=True)
class Knowledge:
  """The log that a policy was trained on, and the facts fitted to it."""

  source: pathlib.Path  # the slates artifact
  log: log_lib.Log
  facts: evidence_lib.Facts
  index: Mapping[str, int]  # item id -> catalog index


def load(
  slates: pathlib.Path,
  catalog: log_lib.Catalog,
  config: ml_collections.ConfigDict,
) -> Knowledge:
  """Reads the log and fits the evidence; `config` is section `data`.

  Raises:
    DataError: the data has changed since the slates artifact was made.
  """
  module = importlib.import_module(f'gr2_jax.data.sources.{config.source}')
  log = module.load(config)
  if log.catalog.item_ids != catalog.item_ids:
    raise log_lib.DataError(
      f'{config.source}: its items are no longer those of {slates}: give the '
      'data that the policy was trained on'
    )
  index = {name: i for i, name in enumerate(catalog.item_ids)}
  return Knowledge(slates, log, fit(log, config), index)


def fit(
  log: log_lib.Log, config: ml_collections.ConfigDict
) -> evidence_lib.Facts:
  """Fits what slates of validation, of test and from outside may know."""
  statistics = preranker.fit(
    log,
    splits_lib.known_rows(log, config),
    config.knn_decay,
    config.knn_window,
    config.knn_neighbours,
  )
  return evidence_lib.fit(log, statistics, item_text.fit(log.catalog))
