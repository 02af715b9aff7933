"""Slates that come from outside: one JSON object a line.

  candidates: list of item ids, all different, in the incoming order
  history: list of item ids, oldest first; may be empty. Items that the
    catalog lacks, and that are not described, are dropped and counted
  items: list of descriptions of items that the catalog lacks, see
    `descriptions.py`; optional. They are read and ranked with the others, by
    their text. Of an item that the catalog has, the catalog's own description
    counts, and this one is only checked
  history_grades: list of 1 or 2, one per item of the history, null where it
    is not known; optional
  history_times: list of numbers like `time`, one per item of the history, null
    where it is not known; optional
  scores: list of numbers, the incoming ranker's, one per candidate; optional,
    falling with the rank where missing
  time: number, in the unit of the log; optional, the log's last time where
    missing
  user: text or whole number; optional, no model reads it
  id: text or whole number that the answer carries; optional, the line's
    number where missing

Item ids are text or whole numbers; 7 and "7" are the same item. Blank lines are
no slates. A file is checked as a whole before anything is ranked, and read as a
stream.

Axes: n slates, K candidates, H history, I items of the catalog.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gr2_jax.data import descriptions, preranker
from gr2_jax.data import evidence as evidence_lib
from gr2_jax.data import item_text as content_lib
from gr2_jax.data import log as log_lib
from gr2_jax.data import slates as slates_lib
from gr2_jax.data import splits as splits_lib
from gr2_jax.data import validation as fields_lib


@dataclasses.dataclass(frozen=True)
class Request:
  """One line of the file.

  Attributes:
    id: what the answer is to be called.
    names: the candidates' ids as they are written.
    candidates: catalog indices of them; I, I + 1, .. for `described` ones; -1
      for those that nothing is known of.
    scores: of the incoming ranker, float32 values.
    history: likewise, without unknown ones, oldest first.
    grades: of the history's items, 0 where they are not given.
    times: of the history's items, None where they are not given.
    unknown: items of the history that nothing is known of.
    time: of the slate, or None.
    described: items of the candidates or the history that the catalog lacks.
  """

  id: str | int
  names: tuple[str | int, ...]
  candidates: tuple[int, ...]
  scores: tuple[float, ...]
  history: tuple[int, ...]
  grades: tuple[int, ...]
  times: tuple[int | None, ...]
  unknown: int
  time: int | None
  described: log_lib.Catalog = descriptions.NONE

  @property
  def described_candidates(self) -> list[str | int]:
    """Names of the candidates that are described."""
    return [name for name in self.names if str(name) in self.described.item_ids]


def read(
  path: str | os.PathLike,
  catalog: log_lib.Catalog,
  most: int,
  unreadable: str = '',
) -> Iterator[Request]:
  """Yields a file's requests, each checked.

  Args:
    path: the file.
    catalog: the items there are.
    most: K, candidates that the policy has room for.
    unreadable: see `parse`.

  Yields:
    One request for each line that is not blank.

  Raises:
    DataError: what is wrong, with file, line, field and cure.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise log_lib.DataError(
      f'{path}: no such file: rerank.input is one JSONL file of slates'
    )
  index = {name: i for i, name in enumerate(catalog.item_ids)}
  empty = True
  with path.open('rb') as file:
    for number, text in enumerate(file, start=1):
      if text.strip():
        empty = False
        where = f'{path}, line {number}'
        yield parse(
          _row(text, where),
          where,
          number,
          index,
          most,
          unreadable=unreadable,
        )
  if empty:
    raise log_lib.DataError(
      f'{path}: the file is empty: it needs at least one slate'
    )


def parse(
  row: object,
  where: str,
  default_id: int,
  index: dict[str, int],
  most: int,
  strict: bool = True,
  unreadable: str = '',
) -> Request:
  """Checks one slate.

  Args:
    row: what JSON holds.
    where: it stands, for messages.
    default_id: of a slate that gives none.
    index: item id -> catalog index.
    most: K, candidates that the policy has room for.
    strict: a candidate that nothing is known of is an error; otherwise its
      catalog index is -1.
    unreadable: why descriptions cannot be read, if so: of items that they
      describe nothing is known.

  Raises:
    DataError: what is wrong, with place, field and cure.
  """
  fields = fields_lib.Fields(where)
  if not isinstance(row, dict):
    raise log_lib.DataError(
      f'{where}: not a JSON object: write {{"history": [...], "candidates": '
      '[...]}'
    )
  names = fields.names(row, 'candidates')
  if not names:
    fields.fail('candidates', 'an empty list', 'give one candidate or more')
  if len(names) > most:
    fields.fail(
      'candidates',
      f'{len(names)} of them, the policy has room for {most}',
      'cut the list, or train with a larger data.candidates',
    )
  shown = fields.names(row, 'history')
  described = descriptions.NONE
  if row.get('items') is not None:
    room = most + evidence_lib.REACH
    items = descriptions.read(row['items'], where, room)
    described = _needed(
      items, {*map(str, names), *map(str, shown)} - index.keys()
    )
  if unreadable:
    described = descriptions.NONE
  new = {name: len(index) + i for i, name in enumerate(described.item_ids)}

  def find(name: str | int) -> int:
    return index.get(str(name), new.get(str(name), -1))

  candidates = [find(name) for name in names]
  if strict and -1 in candidates:
    found = names[candidates.index(-1)]
    fields.fail(
      'candidates',
      f'{found!r} is not in the catalog',
      'remove it, describe it in the field items'
      f'{unreadable and f" (not here: {unreadable})"}, or train on items that '
      'have it',
    )
  for place, name in enumerate(names):
    if str(name) in map(str, names[:place]):
      fields.fail(
        'candidates', f'{fields_lib.short(name)} again', 'each item once'
      )
  known = [find(name) for name in shown]
  kept = [place for place, item in enumerate(known) if item >= 0]
  grades = fields.grades(row, len(known))
  times = fields.times(row, len(known))
  fields.name(row, 'user')
  return Request(
    id=fields.name(row, 'id', default_id),
    names=tuple(names),
    candidates=tuple(candidates),
    scores=fields.scores(row, len(names)),
    history=tuple(known[place] for place in kept),
    grades=tuple(grades[place] for place in kept),
    times=tuple(times[place] for place in kept),
    unknown=len(known) - len(kept),
    time=fields.time(row),
    described=described,
  )


def _needed(items: log_lib.Catalog, names: set[str]) -> log_lib.Catalog:
  """Those items that are asked for, in their order."""
  rows = [row for row, name in enumerate(items.item_ids) if name in names]
  return items.take(np.array(rows, int))


def _row(text: bytes, where: str) -> object:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise log_lib.DataError(
      f'{where}: not valid JSON ({error}): the file may be cut off here; write '
      'it again'
    ) from error


def fit(log: log_lib.Log, config) -> evidence_lib.Facts:
  """Fits what slates of validation, of test and from outside may know.

  Args:
    log: the log that the policy's slates were built from.
    config: section `data`.

  Returns:
    The facts of `slates.build` for these slates.
  """
  statistics = preranker.fit(
    log,
    splits_lib.known_rows(log, config),
    config.knn_decay,
    config.knn_window,
    config.knn_neighbours,
  )
  return evidence_lib.fit(
    log,
    statistics,
    content_lib.fit(log.catalog),
  )


def described(requests: Sequence[Request]) -> log_lib.Catalog:
  """What the requests describe, one after the other.

  In the slates of `to_slates` their indices are I, I + 1, .., in this order.
  """
  return descriptions.join([request.described for request in requests])


def to_slates(
  requests: Sequence[Request],
  log: log_lib.Log,
  facts: evidence_lib.Facts,
  num_candidates: int,
  history: int,
) -> slates_lib.Slates:
  """Slates with evidence; grade 0 and user -1, for nobody knows them.

  Args:
    requests: n of them.
    log: what the facts were fitted on.
    facts: of `fit`.
    num_candidates: K, width of the slates.
    history: H, last items kept.

  Returns:
    The slates, in the order of the requests.
  """
  n, size = len(requests), len(log.catalog)
  beside = described(requests)
  if len(beside):
    facts = facts.beside(beside)
  candidates = np.full((n, num_candidates), -1, np.int32)
  scores = np.zeros((n, num_candidates), np.float32)
  shown = np.full((n, history), -1, np.int32)
  grades = np.zeros((n, history), np.int8)
  ages = np.full((n, history), -1, np.int64)
  latest = np.full((n, evidence_lib.REACH), -1, np.int32)
  now = int(log.times.max(initial=0))
  times = np.array(
    [now if r.time is None else r.time for r in requests], np.int64
  )
  before = 0  # Items that earlier requests describe.
  for row, request in enumerate(requests):
    count, all_read = len(request.candidates), np.array(request.history, int)
    candidates[row, :count] = request.candidates
    candidates[row, :count] += before * (candidates[row, :count] >= size)
    all_read += before * (all_read >= size)
    before += len(request.described)
    scores[row, : len(request.scores)] = request.scores
    recent = all_read[-history:]
    shown[row, : len(recent)] = recent
    grades[row, : len(recent)] = request.grades[-history:]
    for place, time in enumerate(request.times[-history:]):
      if time is not None:
        ages[row, place] = max(int(times[row]) - time, 0)
    recent = all_read[: -evidence_lib.REACH - 1 : -1]
    latest[row, : len(recent)] = recent
  positions = np.array([len(r.history) for r in requests], np.int64)
  return slates_lib.Slates(
    user=np.full(n, -1, np.int32),
    candidates=candidates,
    scores=scores,
    grades=np.zeros(candidates.shape, np.int8),
    count=(candidates >= 0).sum(1).astype(np.int32),
    history=shown,
    history_grades=grades,
    history_ages=ages,
    history_length=np.minimum(positions, history).astype(np.int32),
    time=times,
    evidence=evidence_lib.of_histories(
      log, facts, latest, positions, times, candidates, scores
    ),
    utility=np.full(candidates.shape, np.nan, np.float32),
  )


def of_record(
  slate: dict[str, np.ndarray], names: Sequence[str]
) -> dict[str, Any]:
  """A slate of a data set as a request.

  Args:
    slate: one record of `slates.source`.
    names: item ids by catalog index.
  """
  count, length = int(slate['count']), int(slate['history_length'])
  now, ages = int(slate['time']), slate['history_ages'][:length].tolist()
  grades = slate['history_grades'][:length].tolist()
  return {
    'history': [names[item] for item in slate['history'][:length]],
    'history_grades': [grade or None for grade in grades],
    'history_times': [now - age if age >= 0 else None for age in ages],
    'candidates': [names[item] for item in slate['candidates'][:count]],
    'scores': slate['scores'][:count].tolist(),
    'time': now,
  }


def write_test(
  path: str | os.PathLike,
  log: log_lib.Log,
  config,
  statistics: preranker.Statistics,
) -> None:
  """Writes the test slates as requests, in their order in the data set.

  Args:
    path: the file; appears whole or not at all.
    log: the log that the data set was built from.
    config: section `data`.
    statistics: of `fit`.
  """
  requests = splits_lib.requests(log, config)
  test = splits_lib.SPLITS.index('test')
  kept, slates, _ = slates_lib.retrieve(
    log, config, statistics, splits_lib.take(requests, requests.split == test)
  )
  names = log.catalog.item_ids
  offsets = log.offsets()
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open('w', encoding='utf-8') as file:
    for row in np.lexsort((kept.time, kept.user)):
      user = kept.user[row]
      begin = offsets[user]
      rows = slice(begin, begin + kept.position[row])
      candidates = slates['candidates'][row]
      candidates = candidates[candidates >= 0]
      line = {
        'user': log.user_ids[user],
        'history': [names[i] for i in log.items[rows]],
        'history_grades': log.grades[rows].tolist(),
        'history_times': log.times[rows].tolist(),
        'candidates': [names[i] for i in candidates],
        'scores': slates['scores'][row, : len(candidates)].tolist(),
        'time': int(kept.time[row]),
      }
      file.write(json.dumps(line, ensure_ascii=False) + '\n')
  os.replace(temporary, path)
