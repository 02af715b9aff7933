"""How much of a slate's context a prompt has: all of it, or a shorter form.

A form is written as parts joined by `+`:

  full                  all that the prompt config shows
  last:5                the last five items of the history
  history:sid,grade     these fields of each of them; `history:` for none
  candidates:evidence   these fields of a candidate's line; `candidates:` none
  columns:3             the first three evidence columns
  random:0.2            each token with this chance
  dropped:256           another reduction every time, to so many tokens at most
  memory:16             the history is read by so many memory tokens, and what
                        stands behind reads these alone
  text                  what the compressor wrote (stage `compress`)

so `last:5+candidates:sid,evidence`. What marks the blocks and names the
candidates stands in every form. `dropped` is for training: who has read
contexts with any part left out can read what any other form leaves.

Axes: K candidates, H history.
"""

import dataclasses
import functools

import numpy as np

HISTORY_FIELDS = ('sid', 'title', 'categories', 'grade', 'age')
CANDIDATE_FIELDS = ('sid', 'title', 'categories', 'evidence')

Line = dict[str, list[int]]  # field -> ids, in the order of the prompt config


@dataclasses.dataclass(frozen=True)
class Lines:
  """A context, before anything of it is left out."""

  history: list[Line]  # oldest first
  candidates: list[Line]  # by incoming rank; one id of `evidence` a column


@dataclasses.dataclass(frozen=True)
class Ids:
  """A context as a prompt shows it, without its marks."""

  history: list[int]
  candidates: list[list[int]]  # by incoming rank, without the slots

  def __len__(self) -> int:
    """Tokens."""
    return len(self.history) + sum(map(len, self.candidates))


@dataclasses.dataclass(frozen=True)
class Context:
  """A form, as `parse` reads it; None and 0 where it says nothing."""

  last: int | None = None
  history: tuple[str, ...] | None = None
  candidates: tuple[str, ...] | None = None
  columns: int | None = None
  random: float | None = None
  dropped: int = 0
  memory: int = 0
  text: bool = False

  def fields(self, block: str, shown: tuple[str, ...]) -> tuple[str, ...]:
    """Which of the fields that a block's lines have are left."""
    kept = getattr(self, block)
    return shown if kept is None else tuple(f for f in shown if f in kept)

  def reduce(self, lines: Lines, rng: np.random.Generator | None) -> Ids:
    """Leaves out what the form does without.

    Args:
      lines: the whole context.
      rng: of what is left out by chance; other forms do without.
    """
    history = lines.history
    if self.last is not None:
      history = history[max(0, len(history) - self.last) :]
    told = [self._kept(line, 'history') for line in history]
    shown = [self._kept(line, 'candidates') for line in lines.candidates]
    if self.dropped:
      return _drop(told, shown, self.dropped, rng)
    ids = Ids(
      [i for line in told for part in line.values() for i in part],
      [[i for part in line.values() for i in part] for line in shown],
    )
    if self.random is None:
      return ids
    return _thin(ids, self.random, rng)

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
    ValueError: it has a part that means nothing; says which.
  """
  found: dict[str, object] = {}
  for part in form.split('+'):
    name, _, value = part.strip().partition(':')
    try:
      if name in found:
        raise ValueError('named twice')
      if name == 'full' and form == 'full':
        continue
      if name == 'text' and not value:
        found['text'] = True
      elif name in ('last', 'columns', 'dropped', 'memory'):
        found[name] = int(value)
        least = 0 if name in ('last', 'columns') else 1
        if found[name] < least:
          raise ValueError(f'below {least}')
      elif name == 'random':
        found[name] = float(value)
        if not 0 <= found[name] <= 1:
          raise ValueError('no chance between 0 and 1')
      elif name in ('history', 'candidates'):
        known = HISTORY_FIELDS if name == 'history' else CANDIDATE_FIELDS
        found[name] = tuple(filter(None, value.split(',')))
        for field in found[name]:
          if field not in known:
            raise ValueError(f'no field {field!r}; known: {", ".join(known)}')
      else:
        raise ValueError('no such part')
    except ValueError as e:
      raise ValueError(
        f'context {form!r}, part {part!r}: {e}; write full, or parts like '
        'last:5, history:sid, candidates:sid,evidence, columns:3, random:0.2, '
        'dropped:256, memory:16, text, joined by +'
      ) from e
  context = Context(**found)
  if context.text and len(found) > 1:
    raise ValueError(
      f'context {form!r}: what the compressor wrote is read as it is: text '
      'stands alone'
    )
  if context.dropped and context.random is not None:
    raise ValueError(
      f'context {form!r}: dropped leaves tokens to chance as it is; leave '
      'random out'
    )
  return context


def _thin(ids: Ids, chance: float, rng: np.random.Generator) -> Ids:
  """Each token with this chance."""

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
  """A reduction by chance, of `most` tokens at most.

  A number of last items, some fields of these and of the candidates, some
  evidence columns, the same for all; in half of the cases some tokens besides.
  Where that is too long, the oldest history goes first.
  """
  if rng.random() < 0.5:
    history = history[len(history) - int(rng.integers(len(history) + 1)) :]
  told = {f for f in HISTORY_FIELDS if rng.random() < 0.6}
  shown = {f for f in CANDIDATE_FIELDS[:-1] if rng.random() < 0.5} | {
    'evidence'
  }
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
    [i for line in history for i in kept(line, told)],
    [kept(line, shown) for line in candidates],
  )
  if rng.random() < 0.5:
    ids = _thin(ids, 1 - 0.7 * rng.random(), rng)
  of_candidates = sum(map(len, ids.candidates))
  room = most - of_candidates
  if room < 0:
    ids = _thin(ids, 0.9 * most / of_candidates, rng)
    while (room := most - sum(map(len, ids.candidates))) < 0:
      max(ids.candidates, key=len).pop()
  return dataclasses.replace(
    ids, history=ids.history[max(0, len(ids.history) - room) :]
  )
