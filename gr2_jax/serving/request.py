"""Slates from outside: a JSON object each, from a file or an HTTP request.

`slate` and `DESCRIPTION` declare the fields. Item ids are text or whole
numbers; 7 and "7" are the same item. Items that the catalog lacks are unknown,
unless the slate describes them. A file holds one slate a line; blank lines are
skipped. It is checked as a whole before anything is ranked, then streamed.

Axes: n slates, K candidates, H history, I items of the catalog.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from gr2_jax.data import descriptions, files, preranker
from gr2_jax.data import evidence as evidence_lib
from gr2_jax.data import log as log_lib
from gr2_jax.data import slates as slates_lib
from gr2_jax.data import splits as splits_lib
from gr2_jax.serving.fields import ID, Field, Kind, List, Object, fail

NO_ITEMS = log_lib.Catalog((), (), (), np.zeros(0, np.int32))

# Every JSON writer keeps whole numbers of this size.
_TIME = {'type': 'number', 'minimum': -(2**53), 'maximum': 2**53}
_LARGEST = float(np.finfo(np.float32).max)
_SCORE = {'type': 'number', 'minimum': -_LARGEST, 'maximum': _LARGEST}
_YEAR = {'type': 'integer', 'minimum': 0, 'maximum': 9999}
_TITLE = {'type': 'string', 'maxLength': 1000, 'pattern': r'\S'}
_NAME = Kind(
  'text of at most 200 characters', {'type': 'string', 'maxLength': 200}
)

DESCRIPTION = Object(
  'description',
  '{"item_id": .., "title": ..}',
  Field('item_id', ID, required=True),
  Field(
    'title',
    Kind('text that is not blank, of at most 1000 characters', _TITLE),
    required=True,
  ),
  Field('categories', List(_NAME, most=32), 'wide to narrow'),
  Field('brand', _NAME, 'is put in front of the title'),
  Field('year', Kind('a whole number from 0 to 9999', _YEAR), '0 if unknown'),
)


@functools.cache
def slate(width: int, longest: int | None = None) -> Object:
  """The fields of a slate; `longest` is the longest history, None for any."""
  grade = Kind('1 or 2, or null', {'enum': [1, 2, None]})
  time_or_null = _TIME | {'type': ['number', 'null']}
  return Object(
    'slate',
    '{"history": [...], "candidates": [...]}',
    Field(
      'candidates',
      List(
        ID,
        1,
        width,
        'cut the list, or train with a larger data.candidates',
        unique=str,
      ),
      'item ids in the incoming order; 7 and "7" are the same item',
      required=True,
    ),
    Field(
      'history',
      List(ID, 0, longest, 'send the last ones'),
      'item ids, oldest first; unknown items are dropped and counted',
      required=True,
    ),
    Field(
      'items',
      List(
        DESCRIPTION,
        0,
        width + evidence_lib.REACH,
        'describe only items that the catalog lacks',
        unique=lambda item: str(item['item_id']),
      ),
      'describes items of both lists that the catalog lacks; for others the '
      "catalog's own description counts",
    ),
    Field(
      'history_grades',
      List(grade),
      'one per item of the history, 2 the better',
      like='history',
    ),
    Field(
      'history_times',
      List(Kind('a number within +-2**53, or null', time_or_null)),
      'one per item of the history, in the unit of the log',
      like='history',
    ),
    Field(
      'scores',
      List(Kind('a finite number (float32)', _SCORE)),
      "the incoming ranker's, one per candidate; default: falling",
      like='candidates',
    ),
    Field(
      'time',
      Kind('a number within +-2**53', _TIME),
      "in the unit of the log; default: the log's last",
    ),
    Field('user', ID, 'no model reads it'),
    Field('id', ID, 'the answer carries it; default: its place, from 1'),
  )


@dataclasses.dataclass(frozen=True)
class Request:
  """A checked slate.

  Attributes:
    id: that the answer carries.
    names: ids of the candidates, as they were given.
    candidates: their catalog indices; from I on for `described` items, -1 for
      unknown ones.
    scores: of the incoming ranker, float32 values.
    history: catalog indices likewise, oldest first, without unknown items.
    grades: of the history's items, 0 where missing.
    times: of the history's items, None where missing.
    unknown: number of unknown items of the history.
    time: of the slate, or None.
    described: items of both lists that the catalog lacks.
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
  described: log_lib.Catalog = NO_ITEMS

  @property
  def known_ranks(self) -> list[int]:
    """Incoming ranks of the candidates that are known or described."""
    return [rank for rank, item in enumerate(self.candidates) if item >= 0]

  @property
  def unknown_candidates(self) -> list[str | int]:
    """Ids of the candidates that are neither known nor described."""
    pairs = zip(self.names, self.candidates, strict=True)
    return [name for name, item in pairs if item < 0]

  @property
  def described_candidates(self) -> list[str | int]:
    """Ids of the candidates that are described."""
    return [name for name in self.names if str(name) in self.described.item_ids]

  def known_part(self) -> 'Request':
    """The request without its unknown candidates."""
    kept = self.known_ranks
    return dataclasses.replace(
      self,
      names=tuple(self.names[rank] for rank in kept),
      candidates=tuple(self.candidates[rank] for rank in kept),
      scores=tuple(self.scores[rank] for rank in kept),
    )


def read(
  path: str | os.PathLike,
  catalog: log_lib.Catalog,
  width: int,
  unreadable: str = '',
) -> Iterator[Request]:
  """Yields a file's requests, each checked. See `slate` and `resolve`.

  Raises:
    DataError: with file, line, field, finding and cure. An unknown candidate is
      an error here.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise log_lib.DataError(
      f'{path}: no such file: rerank.input is one JSONL file of slates'
    )
  index = {name: i for i, name in enumerate(catalog.item_ids)}
  empty = True
  with path.open('rb') as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      empty = False
      where = f'{path}, line {number}'
      request = resolve(
        slate(width).check(log_lib.parse_json(line, where), where),
        number,
        index,
        unreadable,
      )
      if unknown := request.unknown_candidates:
        reason = f' (not here: {unreadable})' if unreadable else ''
        fail(
          where,
          'candidates',
          f'{unknown[0]!r} is not in the catalog',
          f'remove it, describe it in the field items{reason}, or train on '
          'items that have it',
        )
      yield request
  if empty:
    raise log_lib.DataError(
      f'{path}: the file is empty: it needs at least one slate'
    )


def resolve(
  fields: Mapping[str, Any],
  default_id: int,
  index: Mapping[str, int],
  unreadable: str = '',
) -> Request:
  """Looks up the items of a slate's checked fields.

  Args:
    fields: as `slate(..).check` returns them.
    default_id: id of a slate that gives none.
    index: item id -> catalog index.
    unreadable: reason why descriptions cannot be read; described items are then
      unknown.
  """
  names, shown = fields['candidates'], fields['history']
  described = NO_ITEMS
  if fields['items'] and not unreadable:
    needed = {*map(str, names), *map(str, shown)} - index.keys()
    described = _described(
      [item for item in fields['items'] if str(item['item_id']) in needed]
    )
  new = {name: len(index) + i for i, name in enumerate(described.item_ids)}

  def find(name: str | int) -> int:
    return index.get(str(name), new.get(str(name), -1))

  items = [find(name) for name in shown]
  kept = [place for place, item in enumerate(items) if item >= 0]
  grades = fields['history_grades'] or [None] * len(items)
  times = fields['history_times'] or [None] * len(items)
  scores = fields['scores']
  if scores is None:
    scores = np.linspace(1, 0, len(names), endpoint=False)
  return Request(
    id=default_id if fields['id'] is None else fields['id'],
    names=tuple(names),
    candidates=tuple(find(name) for name in names),
    scores=tuple(np.asarray(scores, np.float32).tolist()),
    history=tuple(items[place] for place in kept),
    grades=tuple(int(grades[place] or 0) for place in kept),
    times=tuple(_whole(times[place]) for place in kept),
    unknown=len(items) - len(kept),
    time=_whole(fields['time']),
    described=described,
  )


def _whole(time: float | None) -> int | None:
  return None if time is None else int(time)


def _described(items: Sequence[Mapping[str, Any]]) -> log_lib.Catalog:
  """Checked descriptions as a catalog."""
  return log_lib.Catalog(
    tuple(str(item['item_id']) for item in items),
    tuple(
      _plain(descriptions.with_brand(item['title'], item['brand'] or ''))
      for item in items
    ),
    tuple(tuple(map(_plain, item['categories'] or ())) for item in items),
    np.array([item['year'] or 0 for item in items], np.int32),
  )


def _plain(text: str) -> str:
  """The text without halves of surrogate pairs, which no tokenizer reads."""
  return text.encode('utf-8', 'replace').decode()


def described(requests: Sequence[Request]) -> log_lib.Catalog:
  """The described items of all requests; `to_slates` counts them from I on."""
  parts = [request.described for request in requests]
  return log_lib.Catalog(
    tuple(name for part in parts for name in part.item_ids),
    tuple(title for part in parts for title in part.titles),
    tuple(path for part in parts for path in part.categories),
    np.concatenate([NO_ITEMS.years, *(part.years for part in parts)]),
  )


def to_slates(
  requests: Sequence[Request],
  log: log_lib.Log,
  facts: evidence_lib.Facts,
  num_candidates: int,
  history: int,
) -> slates_lib.Slates:
  """Slates with evidence. Grades are 0 and users -1: they are not known.

  Args:
    requests: n of them, one per slate.
    log: that the facts were fitted on.
    facts: of `knowledge.fit`.
    num_candidates: K.
    history: H, last items kept.
  """
  size, described_items = len(log.catalog), described(requests)
  if len(described_items):
    facts = facts.beside(described_items)
  before = np.cumsum([0, *(len(r.described) for r in requests)]).tolist()

  def rows(
    lists: Iterable[Sequence[Any]], width: int, dtype: Any, fill: int = -1
  ) -> np.ndarray:
    """A row of each list, filled up to the width."""
    return np.array(
      [[*row, *[fill] * (width - len(row))] for row in lists], dtype
    ).reshape(-1, width)

  def catalog_indices(items: Sequence[int], row: int) -> list[int]:
    """Places the described items of each request behind those before it."""
    return [i + before[row] if i >= size else i for i in items]

  now = int(log.times.max(initial=0))
  times = np.array(
    [now if r.time is None else r.time for r in requests], np.int64
  )
  histories = [catalog_indices(r.history, i) for i, r in enumerate(requests)]
  candidates = rows(
    [catalog_indices(r.candidates, i) for i, r in enumerate(requests)],
    num_candidates,
    np.int32,
  )
  scores = rows((r.scores for r in requests), num_candidates, np.float32, 0)
  ages = [
    [-1 if t is None else max(time - t, 0) for t in r.times[-history:]]
    for time, r in zip(times.tolist(), requests, strict=True)
  ]
  reach = evidence_lib.REACH
  latest = rows([h[: -reach - 1 : -1] for h in histories], reach, np.int32)
  positions = np.array([len(h) for h in histories], np.int64)
  return slates_lib.Slates(
    user=np.full(len(requests), -1, np.int32),
    candidates=candidates,
    scores=scores,
    grades=np.zeros(candidates.shape, np.int8),
    count=(candidates >= 0).sum(1).astype(np.int32),
    history=rows([h[-history:] for h in histories], history, np.int32),
    history_grades=rows(
      [r.grades[-history:] for r in requests], history, np.int8, 0
    ),
    history_ages=rows(ages, history, np.int64),
    history_length=np.minimum(positions, history).astype(np.int32),
    time=times,
    evidence=evidence_lib.compute_from_histories(
      facts, latest, positions, times, candidates, scores
    ),
    utility=np.full(candidates.shape, np.nan, np.float32),
  )


def of_record(
  slate: dict[str, np.ndarray], names: Sequence[str]
) -> dict[str, Any]:
  """A record of `SlateSource` as a JSON slate; `names` are the item ids."""
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
  config: ml_collections.ConfigDict,
  statistics: preranker.Statistics,
) -> None:
  """Writes the test slates as a file of slates, in the data set's order.

  `config` is section `data`; `statistics` are those of `knowledge.fit`.
  """
  positions = splits_lib.slate_positions(log, config)
  test = splits_lib.SPLITS.index('test')
  kept, slates, _ = slates_lib.retrieve(
    log, config, statistics, splits_lib.take(positions, positions.split == test)
  )
  names = log.catalog.item_ids
  offsets = log.offsets()
  with files.atomic_write(path) as file:
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
