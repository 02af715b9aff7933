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

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from gr2_jax.data import evidence as evidence_lib
from gr2_jax.data import item_text as content_lib
from gr2_jax.data import log as log_lib
from gr2_jax.data import preranker
from gr2_jax.data import splits as splits_lib


@dataclasses.dataclass(frozen=True)
class Slates:
  """One split, a struct of arrays.

  A padding candidate is -1 with grade, score and evidence 0.

  Attributes:
    user: int32 [n].
    candidates: int32 [n, K] in the incoming order, pads at the end.
    scores: float32 [n, K] of the incoming ranker.
    grades: int8 [n, K] in 0..2.
    count: int32 [n], real candidates.
    history: int32 [n, H], the last H items, oldest first, -1 pads at the end.
    history_grades: int8 [n, H], how the user took to each, 1 or 2; 0 where
      that is not known, and in padding.
    history_ages: int64 [n, H], time from each to the slate, in the unit of the
      log; -1 where that is not known, and in padding.
    history_length: int32 [n], real items in `history`.
    time: int64 [n].
    evidence: float32 [n, K, E], columns of `evidence.EVIDENCE`.
    utility: float32 [n, K], true expected gain, NaN where unknown.
  """

  user: np.ndarray
  candidates: np.ndarray
  scores: np.ndarray
  grades: np.ndarray
  count: np.ndarray
  history: np.ndarray
  history_grades: np.ndarray
  history_ages: np.ndarray
  history_length: np.ndarray
  time: np.ndarray
  evidence: np.ndarray
  utility: np.ndarray

  def __len__(self) -> int:
    """Returns n."""
    return len(self.user)

  def take(self, rows: np.ndarray) -> Slates:
    """Some of the slates, in the order of `rows`, int [m]."""
    return Slates(**{name: getattr(self, name)[rows] for name in NAMES})


NAMES = tuple(field.name for field in dataclasses.fields(Slates))


def build(log: log_lib.Log, config) -> dict[str, Slates]:
  """Builds the splits.

  Args:
    log: the log; where it has impressions, they are the slates.
    config: section `data`.

  Returns:
    {'train', 'validation', 'test'} -> Slates, sorted by user, then time.
  """
  return build_counted(log, config)[0]


def build_counted(
  log: log_lib.Log, config
) -> tuple[dict[str, Slates], dict[str, dict]]:
  """As `build`; returns also, per split, what was kept and what dropped.

  The counts of a split: `requests`, `no_positive`, `no_negative`, `slates`,
  `users`; and, where the pre-ranker made the slates, `recall`, the share of
  requests whose next item is among the candidates.
  """
  requests = splits_lib.requests(log, config)
  known = splits_lib.known_rows(log, config)
  fold = splits_lib.folds(len(log.user_ids), config)
  content = content_lib.fit(log.catalog)
  parts, counts = [], []
  for index in [*range(config.folds), None]:
    if index is None:
      rows, chosen = known, requests.split > 0
    else:
      rows = known & (fold[log.users] != index)
      chosen = (requests.split == 0) & (fold[requests.user] == index)
    here = splits_lib.take(requests, chosen)
    statistics = preranker.fit(
      log, rows, config.knn_decay, config.knn_window, config.knn_neighbours
    )
    kept, slates, dropped = retrieve(log, config, statistics, here)
    facts = evidence_lib.fit(log, statistics, content)
    evidence = evidence_lib.compute(
      log,
      facts,
      kept.user,
      kept.position,
      kept.time,
      slates['candidates'],
      slates['scores'],
    )
    slates = Slates(
      user=kept.user.astype(np.int32),
      count=(slates['candidates'] >= 0).sum(1).astype(np.int32),
      time=kept.time,
      evidence=evidence,
      **_histories(log, kept, config.history),
      **slates,
    )
    parts.append((kept.split, slates))
    counts.append((here.split, dropped))
  return _assemble(parts), _count(counts)


def retrieve(
  log: log_lib.Log,
  config,
  statistics: preranker.Statistics,
  requests: splits_lib.Requests,
) -> tuple[splits_lib.Requests, dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Finds candidates and labels; drops slates that teach nothing.

  Args:
    log: the log.
    config: section `data`.
    statistics: of the pre-ranker; not read where the log has impressions.
    requests: where slates stand.

  Returns:
    The requests kept; their `candidates`, `scores`, `grades`, `utility`, each
    [n, K]; and what became of every request given.
  """
  shown = log.impressions
  if shown is None:
    candidates, scores = preranker.score(
      log,
      statistics,
      requests.user,
      requests.position,
      config.candidates,
      config.history_decay,
      config.prerank_history,
    )
    grades = _labels(log, requests, candidates)
    utility = np.full(candidates.shape, np.nan, np.float32)
    following = log.items[log.offsets()[requests.user] + requests.position]
    found = (candidates == following[:, None]).any(axis=1)
  else:
    rows = requests.shown
    candidates, scores = shown.candidates[rows], shown.scores[rows]
    grades = shown.grades[rows]
    utility = shown.utility
    if utility is None:
      utility = np.full(candidates.shape, np.nan, np.float32)
    else:
      utility = utility[rows]
    scores = np.where(candidates < 0, -np.inf, scores)
    order = np.argsort(-scores, axis=1, kind='stable')[:, : config.candidates]
    candidates, scores, grades, utility = (
      np.take_along_axis(x, order, axis=1)
      for x in (candidates, scores, grades, utility)
    )
    scores = np.where(candidates < 0, 0, scores)
    found = None
  positive = (grades > 0).any(axis=1)
  negative = ((grades == 0) & (candidates >= 0)).any(axis=1)
  kept = positive & negative
  arrays = {
    'candidates': candidates,
    'scores': scores.astype(np.float32),
    'grades': grades.astype(np.int8),
    'utility': utility.astype(np.float32),
  }
  arrays = {name: array[kept] for name, array in arrays.items()}
  outcome = {
    'user': requests.user,
    'no_positive': ~positive,
    'no_negative': positive & ~negative,
    'slates': kept,
  }
  if found is not None:
    outcome['recall'] = found
  return splits_lib.take(requests, kept), arrays, outcome


def _labels(log, requests, candidates) -> np.ndarray:
  """Returns int8 [n, K]: the best grade among the rows up to the limit."""
  start = log.offsets()[requests.user]
  span = requests.limit - requests.position
  grades = np.zeros(candidates.shape, np.int8)
  for step in range(int(span.max(initial=0))):
    inside = step < span
    row = np.where(inside, start + requests.position + step, 0)
    hit = inside[:, None] & (candidates == log.items[row][:, None])
    grades = np.maximum(grades, hit * log.grades[row][:, None])
  return grades


def _histories(log, requests, keep) -> dict[str, np.ndarray]:
  """Returns the fields of `Slates` that tell of the last items."""
  length = np.minimum(requests.position, keep)
  first = log.offsets()[requests.user] + requests.position - length
  step = np.arange(keep)
  real = step < length[:, None]
  row = np.where(real, first[:, None] + step, 0)
  age = np.maximum(requests.time[:, None] - log.times[row], 0)
  return {
    'history': np.where(real, log.items[row], -1).astype(np.int32),
    'history_grades': np.where(real, log.grades[row], 0).astype(np.int8),
    'history_ages': np.where(real, age, -1).astype(np.int64),
    'history_length': length.astype(np.int32),
  }


def _assemble(parts) -> dict[str, Slates]:
  out = {}
  for number, name in enumerate(splits_lib.SPLITS):
    pieces = [
      splits_lib.take(slates, split == number) for split, slates in parts
    ]
    names = [field.name for field in dataclasses.fields(Slates)]
    whole = Slates(
      *(np.concatenate([getattr(p, n) for p in pieces]) for n in names)
    )
    out[name] = splits_lib.take(whole, np.lexsort((whole.time, whole.user)))
  return out


def _count(parts) -> dict[str, dict]:
  out = {}
  for number, name in enumerate(splits_lib.SPLITS):
    here = {
      key: np.concatenate(
        [outcome[key][split == number] for split, outcome in parts]
      )
      for key in parts[0][1]
    }
    users = here.pop('user')
    out[name] = {'requests': len(users), 'users': len(np.unique(users))}
    if 'recall' in here:
      out[name]['recall'] = (
        float(here.pop('recall').mean()) if len(users) else 0.0
      )
    out[name] |= {key: int(value.sum()) for key, value in here.items()}
  return out


class SlateDataset(tfds.core.GeneratorBasedBuilder):
  """Writes splits of slates; `source` and `read` read them."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, splits: dict[str, Slates], data_dir: str):
    self._slates = splits
    super().__init__(data_dir=data_dir, file_format='array_record')

  def _info(self) -> tfds.core.DatasetInfo:
    slates = next(iter(self._slates.values()))
    features = {}
    for name in NAMES:
      array = getattr(slates, name)
      features[name] = tfds.features.Tensor(
        shape=array.shape[1:] or (1,),
        dtype=array.dtype,
        encoding=tfds.features.Encoding.BYTES,
      )
    return tfds.core.DatasetInfo(
      builder=self,
      description='Slates of a recommender: history, candidates, labels.',
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    return {
      name: self._generate_examples(slates)
      for name, slates in self._slates.items()
    }

  def _generate_examples(self, slates: Slates):
    for row in range(len(slates)):
      yield (
        row,
        {name: np.atleast_1d(getattr(slates, name)[row]) for name in NAMES},
      )


def write(
  directory: str | os.PathLike,
  splits: dict[str, Slates],
  catalog: log_lib.Catalog,
  meta: dict,
) -> None:
  """Writes a data set; meta.json comes last, and says that it is whole.

  Args:
    directory: made if it is not there.
    splits: 'train', 'validation', 'test'.
    catalog: written to catalog.jsonl.
    meta: added to what meta.json says of itself.

  Raises:
    FileExistsError: `directory` holds a whole data set already.
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


def _write_parts(directory, splits, catalog, meta):
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
  own = {
    'evidence': evidence_lib.EVIDENCE,
    'candidates': train.candidates.shape[1],
    'history': train.history.shape[1],
    'items': len(catalog),
    'empty_titles': sum(not title for title in catalog.titles),
    'slates': {name: len(slates) for name, slates in splits.items()},
  }
  (directory / 'meta.json').write_text(json.dumps(own | meta, indent=2))


class Records:
  """A split by random access, as Grain wants it.

  A record is a dict of numpy arrays, the fields of `Slates` without the axis n.
  """

  def __init__(self, directory: str | os.PathLike, split: str):
    place = pathlib.Path(directory) / SlateDataset.name
    builder = tfds.builder_from_directory(place / str(SlateDataset.VERSION))
    records = builder.as_data_source(split=split)
    self._raw = records.data_source
    self._specs = {
      name: (feature.np_dtype, () if feature.shape == (1,) else feature.shape)
      for name, feature in records.dataset_info.features.items()
    }

  def __len__(self) -> int:
    return len(self._raw)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {
      name: np.frombuffer(blob, self._specs[name][0]).reshape(
        self._specs[name][1]
      )
      for name, blob in _blobs(self._raw[index])
    }

  def slates(self) -> Slates:
    """Returns the whole split."""
    values = {name: [] for name in NAMES}
    for record in self._raw.__getitems__(range(len(self))):
      for name, blob in _blobs(record):
        values[name].append(blob)
    arrays = {}
    for name, (dtype, shape) in self._specs.items():
      array = np.frombuffer(bytearray().join(values[name]), dtype)
      arrays[name] = array.reshape(len(self), *shape)
    return Slates(**arrays)


def _blobs(record: bytes):
  fields = tf_example_pb2.Example.FromString(record).features.feature
  return [(name, fields[name].bytes_list.value[0]) for name in NAMES]


def source(directory: str | os.PathLike, split: str) -> Records:
  """Returns a split's records by random access."""
  return Records(directory, split)


def read(directory: str | os.PathLike, split: str) -> Slates:
  """Returns one whole split, exactly as it was written."""
  return Records(directory, split).slates()


def read_catalog(directory: str | os.PathLike) -> log_lib.Catalog:
  """Returns the catalog of a data set."""
  with (pathlib.Path(directory) / 'catalog.jsonl').open() as file:
    lines = [json.loads(line) for line in file]
  return log_lib.Catalog(
    tuple(line['item_id'] for line in lines),
    tuple(line['title'] for line in lines),
    tuple(tuple(line['categories']) for line in lines),
    np.array([line['year'] for line in lines], np.int32),
  )


def read_meta(directory: str | os.PathLike) -> dict:
  """Returns meta.json: evidence names, K, H, counts."""
  return json.loads((pathlib.Path(directory) / 'meta.json').read_text())
