"""Slates: a history, K candidates in the incoming order, graded labels.

A slate reads its user's items before its position, and statistics fitted on
other users (or, for evaluation by time, on rows before the validation part).
On disk a data set is a folder of

  train | validation | test: array_record files that tensorflow-datasets
    reads; a record has the fields of `Slates` without the axis n
  catalog.jsonl: one item a line, in the order of the catalog indices
  meta.json: evidence names, sizes, counts

Axes: n slates, K candidates, H history, E evidence columns, U users.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from tensorflow_datasets.proto import tf_example_pb2

from gr2_jax.data import evidence as evidence_lib
from gr2_jax.data import item_text, preranker
from gr2_jax.data import log as log_lib
from gr2_jax.data import splits as splits_lib


@dataclasses.dataclass(frozen=True)
class Slates:
  """One split. A padding candidate is -1 with grade, score and evidence 0."""

  user: np.ndarray  # int32 [n]
  candidates: np.ndarray  # int32 [n, K], incoming order, pads at the end
  scores: np.ndarray  # float32 [n, K], of the incoming ranker
  grades: np.ndarray  # int8 [n, K] in 0..2
  count: np.ndarray  # int32 [n], real candidates
  history: np.ndarray  # int32 [n, H], oldest first, -1 pads at the end
  history_grades: (
    np.ndarray
  )  # int8 [n, H], 1 or 2; 0 where unknown, and in pads
  # int64 [n, H], from the item to the slate, in the log's unit; -1 likewise.
  history_ages: np.ndarray
  history_length: np.ndarray  # int32 [n], real items in `history`
  time: np.ndarray  # int64 [n]
  evidence: np.ndarray  # float32 [n, K, E], columns of `evidence.NAMES`
  utility: np.ndarray  # float32 [n, K], true expected gain, NaN where unknown

  def __len__(self) -> int:
    return len(self.user)

  def take(self, rows: np.ndarray) -> Slates:
    """The slates of `rows`, indices or a mask."""
    return splits_lib.take(self, rows)


NAMES = tuple(field.name for field in dataclasses.fields(Slates))


def build(
  log: log_lib.Log, config: ConfigDict
) -> tuple[dict[str, Slates], dict[str, dict[str, Any]]]:
  """Builds the splits.

  Args:
    log: the log; where it has impressions, they are the slates.
    config: section `data`.

  Returns:
    Split -> Slates, sorted by user, then time. Split -> counts: all positions
    (`requests`), their `users`, those dropped for `no_positive` or
    `no_negative`, the `slates` kept, and, where the pre-ranker made the slates,
    `recall`, the share of positions whose next item is a candidate.
  """
  positions = splits_lib.slate_positions(log, config)
  known = splits_lib.known_rows(log, config)
  fold = splits_lib.folds(len(log.user_ids), config)
  content = item_text.fit(log.catalog)
  slates = {name: [] for name in splits_lib.SPLITS}
  outcomes = {name: [] for name in splits_lib.SPLITS}
  for index in [*range(config.folds), None]:
    if index is None:
      rows, chosen = known, positions.split > 0
    else:
      rows = known & (fold[log.users] != index)
      chosen = (positions.split == 0) & (fold[positions.user] == index)
    here = splits_lib.take(positions, chosen)
    statistics = preranker.fit(
      log, rows, config.knn_decay, config.knn_window, config.knn_neighbours
    )
    kept, arrays, outcome = retrieve(log, config, statistics, here)
    part = Slates(
      user=kept.user.astype(np.int32),
      count=(arrays['candidates'] >= 0).sum(1).astype(np.int32),
      time=kept.time,
      evidence=evidence_lib.compute(
        log,
        evidence_lib.fit(log, statistics, content),
        kept.user,
        kept.position,
        kept.time,
        arrays['candidates'],
        arrays['scores'],
      ),
      **_histories(log, kept, config.history),
      **arrays,
    )
    for number, name in enumerate(splits_lib.SPLITS):
      slates[name].append(part.take(kept.split == number))
      inside = here.split == number
      outcomes[name].append({key: x[inside] for key, x in outcome.items()})
  return (
    {name: _join(parts) for name, parts in slates.items()},
    {name: _count(parts) for name, parts in outcomes.items()},
  )


def _join(parts: list[Slates]) -> Slates:
  columns = zip(*(vars(part).values() for part in parts), strict=True)
  slates = Slates(*map(np.concatenate, columns))
  return slates.take(np.lexsort((slates.time, slates.user)))


def _count(parts: list[dict[str, np.ndarray]]) -> dict[str, Any]:
  outcome = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
  users = outcome.pop('user')
  counts = {'requests': len(users), 'users': len(np.unique(users))}
  if 'recall' in outcome:
    recall = outcome.pop('recall')
    counts['recall'] = float(recall.mean()) if len(users) else 0.0
  return counts | {key: int(value.sum()) for key, value in outcome.items()}


def retrieve(
  log: log_lib.Log,
  config: ConfigDict,
  statistics: preranker.Statistics,
  positions: splits_lib.SlatePositions,
) -> tuple[
  splits_lib.SlatePositions, dict[str, np.ndarray], dict[str, np.ndarray]
]:
  """Finds candidates and labels; drops slates without a contrast to learn.

  Args:
    log: the log.
    config: section `data`.
    statistics: of the pre-ranker; not read where the log has impressions.
    positions: where slates stand.

  Returns:
    The positions kept; their `candidates`, `scores`, `grades`, `utility`, each
    [n, K]; and the outcome of every position given, as masks, see `_count`.
  """
  shown = log.impressions
  outcome = {}
  if shown is None:
    candidates, scores = preranker.score(
      log,
      statistics,
      positions.user,
      positions.position,
      config.candidates,
      config.history_decay,
      config.prerank_history,
    )
    grades = _labels(log, positions, candidates)
    utility = np.full(candidates.shape, np.nan)
    following = log.items[log.offsets()[positions.user] + positions.position]
    outcome['recall'] = (candidates == following[:, None]).any(axis=1)
  else:
    rows = positions.shown
    candidates, grades = shown.candidates[rows], shown.grades[rows]
    utility = (
      np.full(candidates.shape, np.nan)
      if shown.utility is None
      else shown.utility[rows]
    )
    scores = np.where(candidates < 0, -np.inf, shown.scores[rows])
    order = np.argsort(-scores, axis=1, kind='stable')[:, : config.candidates]
    candidates, scores, grades, utility = (
      np.take_along_axis(x, order, axis=1)
      for x in (candidates, scores, grades, utility)
    )
    scores = np.where(candidates < 0, 0, scores)
  positive = (grades > 0).any(axis=1)
  negative = ((grades == 0) & (candidates >= 0)).any(axis=1)
  kept = positive & negative
  outcome |= {
    'user': positions.user,
    'no_positive': ~positive,
    'no_negative': positive & ~negative,
    'slates': kept,
  }
  arrays = {
    'candidates': candidates[kept],
    'scores': scores[kept].astype(np.float32),
    'grades': grades[kept].astype(np.int8),
    'utility': utility[kept].astype(np.float32),
  }
  return splits_lib.take(positions, kept), arrays, outcome


def _labels(
  log: log_lib.Log,
  positions: splits_lib.SlatePositions,
  candidates: np.ndarray,
) -> np.ndarray:
  """Returns int8 [n, K]: the best grade among the rows up to the limit."""
  start = log.offsets()[positions.user] + positions.position
  span = positions.limit - positions.position
  grades = np.zeros(candidates.shape, np.int8)
  for step in range(int(span.max(initial=0))):
    inside = step < span
    row = np.where(inside, start + step, 0)
    hit = inside[:, None] & (candidates == log.items[row][:, None])
    grades = np.maximum(grades, hit * log.grades[row][:, None])
  return grades


def _histories(
  log: log_lib.Log, positions: splits_lib.SlatePositions, most: int
) -> dict[str, np.ndarray]:
  """Returns the fields of `Slates` that describe the last `most` items."""
  length = np.minimum(positions.position, most)
  first = log.offsets()[positions.user] + positions.position - length
  step = np.arange(most)
  real = step < length[:, None]
  row = np.where(real, first[:, None] + step, 0)
  age = np.maximum(positions.time[:, None] - log.times[row], 0)
  return {
    'history': np.where(real, log.items[row], -1).astype(np.int32),
    'history_grades': np.where(real, log.grades[row], 0).astype(np.int8),
    'history_ages': np.where(real, age, -1).astype(np.int64),
    'history_length': length.astype(np.int32),
  }


class SlateDataset(tfds.core.GeneratorBasedBuilder):
  """Writes splits of slates; `SlateSource` and `read` read them."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, splits: dict[str, Slates], data_dir: str):
    self._slates = splits
    super().__init__(data_dir=data_dir, file_format='array_record')

  def _info(self) -> tfds.core.DatasetInfo:
    arrays = vars(next(iter(self._slates.values())))
    features = {
      name: tfds.features.Tensor(
        shape=array.shape[1:] or (1,),
        dtype=array.dtype,
        encoding=tfds.features.Encoding.BYTES,
      )
      for name, array in arrays.items()
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description='Slates of a recommender: history, candidates, labels.',
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
    del dl_manager  # Nothing is downloaded.
    return {
      name: self._generate_examples(slates)
      for name, slates in self._slates.items()
    }

  def _generate_examples(self, slates: Slates) -> Iterator:
    for row in range(len(slates)):
      yield row, {k: np.atleast_1d(x[row]) for k, x in vars(slates).items()}


def write(
  directory: str | os.PathLike,
  splits: dict[str, Slates],
  catalog: log_lib.Catalog,
  meta: dict[str, Any],
) -> None:
  """Writes a data set; meta.json appears last, when everything else is there.

  Args:
    directory: made if it does not exist.
    splits: 'train', 'validation', 'test'.
    catalog: written to catalog.jsonl.
    meta: further fields of meta.json.

  Raises:
    FileExistsError: `directory` holds a complete data set already.
    DataError: a split is empty.
  """
  directory = pathlib.Path(directory)
  if (directory / 'meta.json').exists():
    raise FileExistsError(
      f'{directory} holds a data set, which is not overwritten: remove it, or '
      'name another folder'
    )
  for name, slates in splits.items():
    if not len(slates):
      raise log_lib.DataError(
        f'split {name!r} has no slate with both a positive and a negative: '
        'bring more users, or raise data.horizon or data.candidates'
      )
  partial = directory / '.partial'
  shutil.rmtree(partial, ignore_errors=True)  # Of a run that was killed.
  partial.mkdir(parents=True)
  try:
    _write_parts(partial, splits, catalog, meta)
    shutil.rmtree(directory / SlateDataset.name, ignore_errors=True)
    for name in (SlateDataset.name, 'catalog.jsonl', 'meta.json'):
      os.replace(partial / name, directory / name)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _write_parts(
  directory: pathlib.Path,
  splits: dict[str, Slates],
  catalog: log_lib.Catalog,
  meta: dict[str, Any],
) -> None:
  builder = SlateDataset(splits=splits, data_dir=str(directory))
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare()
  with (directory / 'catalog.jsonl').open('w', encoding='utf-8') as file:
    for item in range(len(catalog)):
      line = {
        'item_id': catalog.item_ids[item],
        'title': catalog.titles[item],
        'categories': catalog.categories[item],
        'year': int(catalog.years[item]),
      }
      file.write(json.dumps(line, ensure_ascii=False) + '\n')
  train = splits['train']
  fields = {
    'evidence': evidence_lib.NAMES,
    'candidates': train.candidates.shape[1],
    'history': train.history.shape[1],
    'items': len(catalog),
    'empty_titles': sum(not title for title in catalog.titles),
    'slates': {name: len(slates) for name, slates in splits.items()},
  }
  (directory / 'meta.json').write_text(json.dumps(fields | meta, indent=2))


class SlateSource:
  """Random access to the records of a split, as Grain requires it.

  A record is a dict of numpy arrays, the fields of `Slates` without the axis n.
  """

  def __init__(self, directory: str | os.PathLike, split: str):
    folder = pathlib.Path(directory) / SlateDataset.name
    builder = tfds.builder_from_directory(folder / str(SlateDataset.VERSION))
    records = builder.as_data_source(split=split)
    self._raw = records.data_source
    self._specs = {
      name: (feature.np_dtype, () if feature.shape == (1,) else feature.shape)
      for name, feature in records.dataset_info.features.items()
    }

  def __len__(self) -> int:
    return len(self._raw)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    record = {}
    for name, blob in _blobs(self._raw[index]):
      dtype, shape = self._specs[name]
      record[name] = np.frombuffer(blob, dtype).reshape(shape)
    return record

  def slates(self) -> Slates:
    """Reads the whole split."""
    values = {name: [] for name in NAMES}
    for record in self._raw.__getitems__(range(len(self))):
      for name, blob in _blobs(record):
        values[name].append(blob)
    arrays = {}
    for name, (dtype, shape) in self._specs.items():
      array = np.frombuffer(bytearray().join(values[name]), dtype)
      arrays[name] = array.reshape(len(self), *shape)
    return Slates(**arrays)


def _blobs(record: bytes) -> list[tuple[str, bytes]]:
  fields = tf_example_pb2.Example.FromString(record).features.feature
  return [(name, fields[name].bytes_list.value[0]) for name in NAMES]


def read(directory: str | os.PathLike, split: str) -> Slates:
  """Reads one whole split, exactly as it was written."""
  return SlateSource(directory, split).slates()


def read_catalog(directory: str | os.PathLike) -> log_lib.Catalog:
  """Reads the catalog of a data set."""
  with (pathlib.Path(directory) / 'catalog.jsonl').open() as file:
    lines = [json.loads(line) for line in file]
  return log_lib.Catalog(
    tuple(line['item_id'] for line in lines),
    tuple(line['title'] for line in lines),
    tuple(tuple(line['categories']) for line in lines),
    np.array([line['year'] for line in lines], np.int32),
  )


def read_meta(directory: str | os.PathLike) -> dict[str, Any]:
  """Reads meta.json: evidence names, K, H, counts."""
  return json.loads((pathlib.Path(directory) / 'meta.json').read_text())
