"""From a slate to token ids: prompts, reasoning, answers.

The prompt is a run of blocks, then one control token that asks for a kind of
answer; nothing in it is an id of the outside world:

  <bos> <history> item item .. <candidates> line line .. | <think> or <answer>

A chat model has its system turn and the opening of the user's in place of
<bos>, and before the last control token the end of the user's turn and the
opening of its own.

A candidate's line is its fields in the configured order (semantic ID, title,
category path, evidence) and, last, its slot token: the candidate's name in
answers and the place of the listwise read-out. Candidates stand in a random
order, so that neither place nor slot tells the incoming rank; that is an
evidence column like the others. The blocks' order is a choice: a decoder's
slot tokens read only what stands before them, so the history comes first
unless the candidates' keys are to be shared between users.

Axes: K candidates, E evidence columns, T tokens, H history.
"""

import copy
import dataclasses
import functools

import numpy as np

from gr2_jax.data.log import Catalog
from gr2_jax.prompts import bins as bins_lib
from gr2_jax.prompts import context as context_lib
from gr2_jax.prompts import vocabulary as vocabulary_lib

TARGET_TOKENS = 2  # of `Prompter.ask` with a target, beside one without
ORDERS = ('shuffled', 'incoming', 'mixed')


@dataclasses.dataclass(frozen=True)
class Prompter:
  """Renders slates of one data set with one vocabulary.

  Attributes:
    vocabulary: token ids.
    bins: evidence to bins.
    items: token ids of each field of each item: field -> tuple of tuples.
    opening: token ids before the blocks.
    closing: token ids after the blocks.
    asks: control token -> the ids that end in it and ask for an answer.
    layout: blocks in order, of 'history' and 'candidates'.
    fields: of a candidate's line, in order, before its slot.
    history: most recent items shown.
    history_fields: of each of them, in order.
    num_candidates: K, candidates that a prompt has room for.
    reasoning: tokens of a reasoning span, at most; longer ones are cut.
    budget: tokens of a prompt, at most; the oldest items of a history are left
      out of one that is longer. 0 for no limit.
    context: what of all this a prompt has.
    written: tokens of the longest context that the compressor wrote.

  Raises:
    ValueError: a field that there is not, or a budget that the candidates alone
      exceed.
  """

  vocabulary: vocabulary_lib.Vocabulary
  bins: bins_lib.EvidenceBins
  items: dict[str, tuple[tuple[int, ...], ...]]
  opening: tuple[int, ...]
  closing: tuple[int, ...]
  asks: dict[str, tuple[int, ...]]
  layout: tuple[str, ...]
  fields: tuple[str, ...]
  history: int
  history_fields: tuple[str, ...]
  num_candidates: int
  reasoning: int
  budget: int = 0
  context: context_lib.Context = context_lib.FULL
  written: int = 0

  def __post_init__(self):
    if self.context.memory > self.vocabulary.layout.num_memory:
      raise ValueError(
        f'a context of {self.context.memory} memory tokens, and '
        f'prompt.num_memory={self.vocabulary.layout.num_memory}: raise it'
      )
    if self.context.memory and self.layout[:1] != ('history',):
      raise ValueError(
        f'prompt.layout={self.layout}: what stands behind memory tokens reads '
        'these alone, so the history must come first'
      )
    if 0 < self.budget < self._least_tokens:
      raise ValueError(
        f'prompt.budget={self.budget}: a prompt without any history may take '
        f'{self._least_tokens} tokens; raise it, or show less of the '
        'candidates (prompt.fields, prompt.title_tokens)'
      )
    for name, known in (
      ('fields', context_lib.CANDIDATE_FIELDS),
      ('history_fields', context_lib.HISTORY_FIELDS),
    ):
      for field in getattr(self, name):
        if field not in known:
          raise ValueError(
            f'prompt.{name}: no field {field!r}; known: {", ".join(known)}'
          )

  def beside(self, items: dict[str, tuple[tuple[int, ...], ...]]) -> 'Prompter':
    """The same, that knows items beside the catalog's.

    Args:
      items: as the attribute, of indices behind the catalog's; no line of them
        is longer than the catalog's longest, so that lengths stay as they are.
    """
    wider = copy.copy(self)  # With the lengths that it has measured.
    own = {field: rows + items[field] for field, rows in self.items.items()}
    object.__setattr__(wider, 'items', own)
    return wider

  @functools.cached_property
  def prompt_tokens(self) -> int:
    """Length that every prompt of this data set fits in."""
    context, marks = self.context, self._mark_tokens + self.context.memory
    if context.text:
      return marks + self.written
    longest = marks + self._history_tokens + self._candidate_tokens
    if self.budget:
      longest = min(longest, self.budget + context.memory)
    return min(longest, marks + (context.dropped or longest))

  @functools.cached_property
  def memory_prompt_tokens(self) -> int:
    """Length that fits what stands before the rest, of `split_memory`."""
    longest = len(self.opening) + 1 + self._history_tokens + self.context.memory
    return min(longest, self.prompt_tokens - self._rest_marks)

  @functools.cached_property
  def rest_tokens(self) -> int:
    """Length that fits the rest behind a memory, of `split_memory`."""
    slots = self.num_candidates * ('candidates' in self.layout)
    longest = self._rest_marks + slots + self._candidate_tokens
    first = len(self.opening) + 1 + self.context.memory
    return min(longest, self.prompt_tokens - first)

  @property
  def _rest_marks(self) -> int:
    """Tokens that stand behind a memory in every prompt, slots apart."""
    return len(self.layout) - 1 + len(self.closing) + self.ask_tokens

  @functools.cached_property
  def _history_tokens(self) -> int:
    """Tokens of the longest history's items."""
    if 'history' not in self.layout:
      return 0
    items = self.history
    if self.context.last is not None:
      items = min(items, self.context.last)
    fields = self.context.fields('history', self.history_fields)
    return items * self._longest(fields)

  @functools.cached_property
  def _candidate_tokens(self) -> int:
    """Tokens of the longest candidates' lines, without their slots."""
    if 'candidates' not in self.layout:
      return 0
    fields = self.context.fields('candidates', self.fields)
    return self.num_candidates * self._longest(fields, self.context.columns)

  @functools.cached_property
  def _least_tokens(self) -> int:
    """Length of the longest whole context whose history is empty."""
    lines = self.num_candidates * self._longest(self.fields)
    return self._mark_tokens + lines * ('candidates' in self.layout)

  @functools.cached_property
  def _mark_tokens(self) -> int:
    """Tokens that stand in a prompt of any form, slots included."""
    ends = len(self.opening) + len(self.closing) + self.ask_tokens
    slots = self.num_candidates * ('candidates' in self.layout)
    return ends + len(self.layout) + slots

  @property
  def ask_tokens(self) -> int:
    """Length of what asks for an answer, of one who is told no target."""
    return max(map(len, self.asks.values()))

  @property
  def answer_tokens(self) -> int:
    """Length of a completion without reasoning: every slot, then <eos>."""
    return self.num_candidates + 1

  @property
  def thinking_tokens(self) -> int:
    """Length of a completion with reasoning."""
    return self.reasoning + 1 + self.answer_tokens

  def _longest(
    self, fields: tuple[str, ...], columns: int | None = None
  ) -> int:
    """Tokens of the longest item's line, of some evidence columns."""
    text = [self.items[field] for field in fields if field in self.items]
    longest = max(
      (sum(map(len, line)) for line in zip(*text, strict=True)), default=0
    )
    return longest + self._own_tokens(fields, columns)

  def _own_tokens(
    self, fields: tuple[str, ...], columns: int | None = None
  ) -> int:
    """Tokens of a line, at most, that are of a slate and of no item."""
    width = len(self.bins.columns[:columns]) * fields.count('evidence')
    return width + fields.count('grade') + fields.count('age')

  def prompt(
    self,
    slate: dict[str, np.ndarray],
    order: np.ndarray,
    rng: np.random.Generator | None = None,
  ) -> dict[str, np.ndarray]:
    """Renders a slate, its candidates in a given order, without the request.

    Args:
      slate: one record of `slates.SlateSource`.
      order: int [count], incoming ranks in the order of presentation.
      rng: of what the form of the context leaves to chance.

    Returns:
      prompt int32 [T] without padding; slots int32 [K], where each slot token
      stands (0 for padding); grades float32 [K] and incoming int32 [K] in the
      order of presentation; count int32.
    """
    count, K = int(slate['count']), self.num_candidates
    ids, slots = list(self.opening), np.zeros(K, np.int32)
    words = self.vocabulary
    if self.context.text:
      told = slate['written']
    else:
      told = self.context.reduce(self.lines(slate), rng)
    for block in self.layout:
      ids.append(words.control[f'<{block}>'])
      if block == 'history':
        ids.extend(told.history)
        ids.extend(words.memory_base + m for m in range(self.context.memory))
        continue
      for place, rank in enumerate(order):
        ids.extend(told.candidates[rank])
        slots[place] = len(ids)
        ids.append(self.vocabulary.slot_base + place)
    ids.extend(self.closing)
    incoming = np.arange(K, dtype=np.int32)
    incoming[:count] = order
    grades = np.zeros(K, np.float32)
    grades[:count] = slate['grades'][order]
    return {
      'prompt': np.array(ids, np.int32),
      'slots': slots,
      'grades': grades,
      'incoming': incoming,
      'count': np.int32(count),
    }

  def split_memory(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits a prompt behind its memory tokens; the form must have some.

    Args:
      ids: int32 [T], of a prompt, without padding.

    Returns:
      What stands up to the last memory token, and the rest. The rest reads of
      it the memory tokens alone, and these depend on nothing behind them.
    """
    last = self.vocabulary.memory_base + self.context.memory - 1
    end = int(np.argmax(ids == last)) + 1
    return ids[:end], ids[end:]

  def shown(self, slate: dict[str, np.ndarray]) -> np.ndarray:
    """Items of the history that the prompt shows, oldest first: int32 [..].

    The most recent `history` of them, or as many of these as the budget has
    room for behind this slate's candidates.
    """
    end = int(slate['history_length'])
    return slate['history'][end - self._num_shown(slate) : end]

  def lines(self, slate: dict[str, np.ndarray]) -> context_lib.Lines:
    """All that a prompt shows of a slate's items, line by line."""
    words, count = self.vocabulary, int(slate['count'])
    end = int(slate['history_length'])
    begin = end - self._num_shown(slate)
    grades, ages = (
      slate[name][begin:end] for name in ('history_grades', 'history_ages')
    )
    bins = words.age_base + self.bins.ages(ages)
    history = []
    for place, item in enumerate(slate['history'][begin:end]):
      own = {
        'grade': [words.grade_base + int(grades[place]) - 1]
        if grades[place]
        else [],
        'age': [int(bins[place])] if ages[place] >= 0 else [],
      }
      history.append(self._line(item, self.history_fields, own))
    bins = words.bins(self.bins(slate['evidence'], count)).tolist()
    candidates = [
      self._line(item, self.fields, {'evidence': bins[rank]})
      for rank, item in enumerate(slate['candidates'][:count])
    ]
    return context_lib.Lines(history, candidates)

  def _num_shown(self, slate: dict[str, np.ndarray]) -> int:
    """How many of the last items a whole context shows."""
    if 'history' not in self.layout:
      return 0
    end = int(slate['history_length'])
    recent = slate['history'][max(0, end - self.history) : end]
    if not self.budget:
      return len(recent)
    room = self.budget - self._least_tokens
    if 'candidates' in self.layout:
      spare = (1 + self._longest(self.fields)) * self.num_candidates
      for item in slate['candidates'][: int(slate['count'])]:
        spare -= 1 + self._length(item, self.fields)
      room += spare
    lengths = [self._length(item, self.history_fields) for item in recent]
    return int((np.cumsum(lengths[::-1]) <= room).sum())

  def _line(
    self, item: int, fields: tuple[str, ...], own: context_lib.Line
  ) -> context_lib.Line:
    """Token ids of an item's fields, some of which are this slate's own."""
    return {
      field: own[field] if field in own else list(self.items[field][item])
      for field in fields
    }

  def _length(self, item: int, fields: tuple[str, ...]) -> int:
    """Tokens of an item's line, at most."""
    text = sum(len(self.items[f][item]) for f in fields if f in self.items)
    return text + self._own_tokens(fields)

  def ask(
    self, control: str, target: int | None = None, keep: float | None = None
  ) -> list[int]:
    """What stands behind the blocks and asks for an answer.

    Args:
      control: '<think>', '<answer>' or '<compress>'.
      target: slot of a positive, for who is to know one; else None.
      keep: share of the context that is to be left, for who compresses it; the
        nearest of `vocabulary.KEEPS` is told.
    """
    told = []
    if keep is not None:
      apart = np.abs(np.array(vocabulary_lib.KEEPS) - 100 * keep)
      told.append(self.vocabulary.keep_base + int(apart.argmin()))
    if target is not None:
      told.append(self.vocabulary.control['<target>'])
      told.append(self.vocabulary.slot_base + int(target))
    return [*told, *self.asks[control]]

  def answer(self, ranking: np.ndarray, order: np.ndarray) -> list[int]:
    """Slot ids and <eos> of a ranking given in incoming ranks."""
    place = np.argsort(order)
    slots = self.vocabulary.slot_base + place[ranking]
    return [*slots.tolist(), self.vocabulary.eos]

  def present(self, ids: np.ndarray, order: np.ndarray) -> list[int]:
    """Renames slots of a stored reasoning span, incoming rank to place."""
    place = np.argsort(order)
    ids = np.asarray(ids, np.int32).copy()
    slot = self.vocabulary.is_slot(ids)
    ids[slot] = (
      self.vocabulary.slot_base + place[ids[slot] - self.vocabulary.slot_base]
    )
    return ids[: self.reasoning].tolist()


def pad(ids: list[int] | np.ndarray, length: int, what: str) -> np.ndarray:
  """int32 [length], zeros at the end: lengths and weights say where it is.

  Raises:
    ValueError: the ids are longer than that.
  """
  if len(ids) > length:
    raise ValueError(f'{what}: {len(ids)} tokens, room for {length}')
  out = np.zeros(length, np.int32)
  out[: len(ids)] = ids
  return out


def presentation(
  count: int, order: str, rng: np.random.Generator
) -> np.ndarray:
  """Incoming ranks in the order in which candidates are shown: int [count].

  Args:
    count: candidates.
    order: of ORDERS; `mixed` is either of the others, by a coin.
    rng: of the coin and of the order.

  Raises:
    ValueError: no such order.
  """
  if order not in ORDERS:
    raise ValueError(
      f'prompt.order={order!r}: must be one of {", ".join(ORDERS)}'
    )
  if order == 'incoming' or (order == 'mixed' and rng.random() < 0.5):
    return np.arange(count)
  return rng.permutation(count)


def item_tokens(
  vocabulary: vocabulary_lib.Vocabulary,
  catalog: Catalog,
  codes_IxL: np.ndarray,
  title_tokens: int,
) -> dict[str, tuple[tuple[int, ...], ...]]:
  """Token ids of every item's fields, made once."""
  sids = vocabulary.sid(codes_IxL)
  return {
    'sid': tuple(tuple(row) for row in sids.tolist()),
    'title': tuple(
      tuple(vocabulary.encode(title)[:title_tokens]) for title in catalog.titles
    ),
    'categories': tuple(
      tuple(vocabulary.encode(' > '.join(path))[:title_tokens])
      for path in catalog.categories
    ),
  }
