"""Forms of a slate's context: all of it, or a shorter one.

A form is written as parts joined by `+`, such as
`last:5+candidates:sid,evidence`:

  full                  everything that the prompt config shows
  last:5                the last five items of the history
  history:sid,grade     these fields of each of them; `history:` for none
  candidates:evidence   these fields of a candidate's line; `candidates:` none
  columns:3             the first three evidence columns
  random:0.2            each token is kept with this chance
  dropped:256           a random reduction to at most 256 tokens, a new one each
                        time; a policy trained on it can read every other form
  memory:16             16 memory tokens encode the history, and later tokens
                        attend only to these
  text                  the compressor's output (stage `compress`)

Every form keeps the marks of the blocks and the slots of the candidates.
"""

import dataclasses
import functools

import numpy as np

HISTORY_FIELDS = ('sid', 'title', 'categories', 'grade', 'age')
CANDIDATE_FIELDS = ('sid', 'title', 'categories', 'evidence')

Line = dict[str, list[int]]  # field -> ids, in the order of the prompt config


@dataclasses.dataclass(frozen=True)
class Lines:
  """A full context."""

  history: list[Line]  # oldest first
  candidates: list[Line]  # by incoming rank; one id of `evidence` a column


@dataclasses.dataclass(frozen=True)
class Ids:
  """A context in a prompt, without its marks."""

  history: list[int]
  candidates: list[list[int]]  # by incoming rank, without the slots

  def __len__(self) -> int:
    return len(self.history) + self.candidate_tokens

  @property
  def candidate_tokens(self) -> int:
    """Tokens of all candidates."""
    return sum(map(len, self.candidates))


@dataclasses.dataclass(frozen=True)
class Context:
  """A form, as `parse` reads it; a part that is left out is None or 0."""

  last: int | None = None
  history: tuple[str, ...] | None = None
  candidates: tuple[str, ...] | None = None
  columns: int | None = None
  random: float | None = None
  dropped: int = 0
  memory: int = 0
  text: bool = False

  def fields(self, block: str, shown: tuple[str, ...]) -> tuple[str, ...]:
    """The fields that are left of those `shown` in a block's lines."""
    kept = getattr(self, block)
    return shown if kept is None else tuple(f for f in shown if f in kept)

  def reduce(self, lines: Lines, rng: np.random.Generator | None) -> Ids:
    """Reduces a full context; only `random` and `dropped` need the `rng`."""
    history = lines.history
    if self.last is not None:
      history = history[max(0, len(history) - self.last) :]
    history = [self._kept(line, 'history') for line in history]
    candidates = [self._kept(line, 'candidates') for line in lines.candidates]
    if self.dropped:
      return _drop(history, candidates, self.dropped, rng)
    ids = Ids(
      [i for line in history for part in line.values() for i in part],
      [[i for part in line.values() for i in part] for line in candidates],
    )
    return ids if self.random is None else _thin(ids, self.random, rng)

  def _kept(self, line: Line, block: str) -> Line:
    kept = {field: line[field] for field in self.fields(block, tuple(line))}
    if self.columns is not None and 'evidence' in kept:
      kept['evidence'] = kept['evidence'][: self.columns]
    return kept


FULL = Context()


@functools.lru_cache
def parse(form: str) -> Context:
  """Reads a form.

  Raises:
    ValueError: a part is unknown or contradicts another.
  """
  parts: dict[str, object] = {}
  for part in form.split('+'):
    name, _, value = part.strip().partition(':')
    try:
      if name in parts:
        raise ValueError('named twice')
      if name == 'full' and form == 'full':
        continue
      parts[name] = _part(name, value)
    except ValueError as e:
      raise ValueError(
        f'context {form!r}, part {part!r}: {e}; write full, or parts like '
        'last:5, history:sid, candidates:sid,evidence, columns:3, random:0.2, '
        'dropped:256, memory:16, text, joined by +'
      ) from e
  context = Context(**parts)
  if context.text and len(parts) > 1:
    raise ValueError(
      f"context {form!r}: the compressor's output is used as it is: text "
      'stands alone'
    )
  if context.dropped and context.random is not None:
    raise ValueError(
      f'context {form!r}: dropped removes tokens at random already; leave '
      'random out'
    )
  return context


def _part(name: str, value: str) -> object:
  """Reads the value of a part; ValueError says what is wrong with it."""
  if name == 'text' and not value:
    return True
  if name in ('last', 'columns', 'dropped', 'memory'):
    least = 0 if name in ('last', 'columns') else 1
    if int(value) < least:
      raise ValueError(f'below {least}')
    return int(value)
  if name == 'random':
    if not 0 <= float(value) <= 1:
      raise ValueError('no chance between 0 and 1')
    return float(value)
  if name not in ('history', 'candidates'):
    raise ValueError('no such part')
  known = HISTORY_FIELDS if name == 'history' else CANDIDATE_FIELDS
  fields = tuple(filter(None, value.split(',')))
  for field in fields:
    if field not in known:
      raise ValueError(f'no field {field!r}; known: {", ".join(known)}')
  return fields


def _thin(ids: Ids, chance: float, rng: np.random.Generator) -> Ids:
  """Keeps each token with this chance."""

  def part(tokens: list[int]) -> list[int]:
    kept = rng.random(len(tokens)) < chance
    return [i for i, keep in zip(tokens, kept, strict=True) if keep]

  return Ids(part(ids.history), [part(line) for line in ids.candidates])


def _drop(
  history: list[Line],
  candidates: list[Line],
  most: int,
  rng: np.random.Generator,
) -> Ids:
  """Reduces a context at random to at most `most` tokens.

  Kept are a number of last items, some fields of these and of the candidates,
  and some evidence columns; in half of the cases single tokens are dropped as
  well. Where the rest is too long, the oldest history is dropped first.
  """
  if rng.random() < 0.5:
    history = history[len(history) - int(rng.integers(len(history) + 1)) :]
  history_fields = {f for f in HISTORY_FIELDS if rng.random() < 0.6}
  candidate_fields = {f for f in CANDIDATE_FIELDS[:-1] if rng.random() < 0.5}
  candidate_fields.add('evidence')
  width = max((len(line.get('evidence', ())) for line in candidates), default=0)
  columns = rng.random(width) < (1.0 if rng.random() < 0.3 else rng.random())

  def kept(line: Line, fields: set[str]) -> list[int]:
    ids: list[int] = []
    for field, part in line.items():
      if field == 'evidence':
        part = [i for i, keep in zip(part, columns, strict=True) if keep]
      ids += part if field in fields else ()
    return ids

  ids = Ids(
    [i for line in history for i in kept(line, history_fields)],
    [kept(line, candidate_fields) for line in candidates],
  )
  if rng.random() < 0.5:
    ids = _thin(ids, 1 - 0.7 * rng.random(), rng)
  if ids.candidate_tokens > most:
    ids = _thin(ids, 0.9 * most / ids.candidate_tokens, rng)
    while ids.candidate_tokens > most:
      max(ids.candidates, key=len).pop()
  room = most - ids.candidate_tokens
  return dataclasses.replace(
    ids, history=ids.history[max(0, len(ids.history) - room) :]
  )
