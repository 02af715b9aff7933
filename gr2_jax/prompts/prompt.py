"""From a slate to token ids: prompts, reasoning, answers.

A prompt is a run of blocks, then one control token that selects the kind of
answer. It holds no id of the outside world:

  <bos> <history> item item .. <candidates> line line .. | <think> or <answer>

For a chat model, its system turn and the opening of the user's turn replace
<bos>; the end of the user's turn and the opening of the model's come before the
control token.

A candidate's line is its fields in the configured order (semantic ID, title,
category path, evidence) and, last, its slot token: the candidate's name in
answers and the place of the listwise read-out. Candidates stand in a random
order, so that neither place nor slot reveals the incoming rank, which is an
evidence column like the others. The history comes first, since a decoder's slot
tokens attend only to earlier tokens; the candidates come first where users are
to share their keys.

Axes: K candidates, I items, L levels, T tokens.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from gr2_jax.data.log import Catalog
from gr2_jax.prompts import bins as bins_lib
from gr2_jax.prompts import context as context_lib
from gr2_jax.prompts import vocabulary as vocabulary_lib

TARGET_TOKENS = 2  # that a target adds to `Prompter.ask`
ORDERS = ('shuffled', 'incoming', 'mixed')

Fields = tuple[str, ...]
ItemTokens = dict[str, tuple[tuple[int, ...], ...]]  # field -> ids of each item


@dataclasses.dataclass(frozen=True)
class Prompter:
  """Renders slates of one data set with one vocabulary.

  Raises:
    ValueError: an unknown field, or a budget that the candidates alone exceed.
  """

  vocabulary: vocabulary_lib.Vocabulary
  bins: bins_lib.EvidenceBins
  items: ItemTokens
  opening: tuple[int, ...]  # token ids before the blocks
  closing: tuple[int, ...]  # token ids after the blocks
  asks: dict[str, tuple[int, ...]]  # control token -> the ids that end in it
  layout: Fields  # 'history' and 'candidates' in the blocks' order
  fields: Fields  # of a candidate's line, before its slot
  history: int  # most recent items shown
  history_fields: Fields  # of each of them
  num_candidates: int  # K
  reasoning: int  # most tokens of a reasoning span; longer ones are cut
  budget: int = 0  # most tokens; the oldest items go first; 0 for no limit
  context: context_lib.Context = context_lib.FULL
  written: int = 0  # tokens of the longest context of the compressor

  def __post_init__(self):
    if self.context.memory > self.vocabulary.layout.num_memory:
      raise ValueError(
        f'the context has {self.context.memory} memory tokens, more than '
        f'prompt.num_memory={self.vocabulary.layout.num_memory}: raise it'
      )
    if self.context.memory and self.layout[:1] != ('history',):
      raise ValueError(
        f'prompt.layout={self.layout}: tokens behind the memory read only the '
        'memory, so the history must come first'
      )
    if 0 < self.budget < self._least_tokens:
      raise ValueError(
        f'prompt.budget={self.budget}: a prompt without any history may take '
        f'{self._least_tokens} tokens; raise it, or shorten the candidates '
        '(prompt.fields, prompt.title_tokens)'
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

  def beside(self, items: ItemTokens) -> 'Prompter':
    """Adds items with indices behind the catalog's.

    Their lines must not be longer than the catalog's longest: the lengths stay
    as they are.
    """
    wider = copy.copy(self)  # Keeps the lengths that are cached.
    joined = {field: rows + items[field] for field, rows in self.items.items()}
    object.__setattr__(wider, 'items', joined)
    return wider

  @functools.cached_property
  def prompt_tokens(self) -> int:
    """Most tokens of a prompt of this data set."""
    context, marks = self.context, self._mark_tokens + self.context.memory
    if context.text:
      return marks + self.written
    longest = marks + self._history_tokens + self._candidate_tokens
    if self.budget:
      longest = min(longest, self.budget + context.memory)
    return min(longest, marks + (context.dropped or longest))

  @functools.cached_property
  def memory_prompt_tokens(self) -> int:
    """Most tokens of the first part of `split_memory`."""
    longest = len(self.opening) + 1 + self._history_tokens + self.context.memory
    return min(longest, self.prompt_tokens - self._rest_marks)

  @functools.cached_property
  def rest_tokens(self) -> int:
    """Most tokens of the second part of `split_memory`."""
    longest = self._rest_marks + self._slots + self._candidate_tokens
    first = len(self.opening) + 1 + self.context.memory
    return min(longest, self.prompt_tokens - first)

  @property
  def _rest_marks(self) -> int:
    """Tokens behind the memory in every prompt, without slots."""
    return len(self.layout) - 1 + len(self.closing) + self.ask_tokens

  @functools.cached_property
  def _history_tokens(self) -> int:
    """Most tokens of a history's items."""
    if 'history' not in self.layout:
      return 0
    items = self.history
    if self.context.last is not None:
      items = min(items, self.context.last)
    fields = self.context.fields('history', self.history_fields)
    return items * self._longest(fields)

  @functools.cached_property
  def _candidate_tokens(self) -> int:
    """Most tokens of the candidates' lines, without slots."""
    fields = self.context.fields('candidates', self.fields)
    return self._slots * self._longest(fields, self.context.columns)

  @functools.cached_property
  def _least_tokens(self) -> int:
    """Most tokens of a full prompt whose history is empty."""
    return self._mark_tokens + self._slots * self._longest(self.fields)

  @functools.cached_property
  def _mark_tokens(self) -> int:
    """Tokens in a prompt of any form, slots included."""
    ends = len(self.opening) + len(self.closing) + self.ask_tokens
    return ends + len(self.layout) + self._slots

  @property
  def _slots(self) -> int:
    return self.num_candidates * ('candidates' in self.layout)

  @property
  def ask_tokens(self) -> int:
    """Most tokens of `ask` without a target."""
    return max(map(len, self.asks.values()))

  @property
  def answer_tokens(self) -> int:
    """Length of a completion without reasoning: every slot, then <eos>."""
    return self.num_candidates + 1

  @property
  def thinking_tokens(self) -> int:
    """Length of a completion with reasoning."""
    return self.reasoning + 1 + self.answer_tokens

  def _longest(self, fields: Fields, columns: int | None = None) -> int:
    """Tokens of the longest line of an item."""
    text = [self.items[field] for field in fields if field in self.items]
    longest = max(
      (sum(map(len, line)) for line in zip(*text, strict=True)), default=0
    )
    return longest + self._own_tokens(fields, columns)

  def _own_tokens(self, fields: Fields, columns: int | None = None) -> int:
    """Most tokens of a line that belong to the slate, not to the item."""
    width = len(self.bins.columns[:columns]) * fields.count('evidence')
    return width + fields.count('grade') + fields.count('age')

  def prompt(
    self,
    slate: dict[str, np.ndarray],
    order: np.ndarray,
    rng: np.random.Generator | None = None,
  ) -> dict[str, np.ndarray]:
    """Renders a slate up to the control token.

    Args:
      slate: one record of `slates.SlateSource`.
      order: int [count], incoming ranks in the order of presentation.
      rng: of a context that leaves tokens out by chance.

    Returns:
      prompt int32 [T] without padding; slots int32 [K], the place of each slot
      token (0 for padding); grades float32 [K] and incoming int32 [K], in the
      order of presentation; count int32.
    """
    count, K = int(slate['count']), self.num_candidates
    ids, slots = list(self.opening), np.zeros(K, np.int32)
    words = self.vocabulary
    if self.context.text:
      context = slate['written']
    else:
      context = self.context.reduce(self.lines(slate), rng)
    for block in self.layout:
      ids.append(words.control[f'<{block}>'])
      if block == 'history':
        ids.extend(context.history)
        ids.extend(words.memory_base + m for m in range(self.context.memory))
        continue
      for place, rank in enumerate(order):
        ids.extend(context.candidates[rank])
        slots[place] = len(ids)
        ids.append(words.slot_base + place)
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
    """Splits a prompt, without padding, behind its last memory token.

    Of the first part, the second attends only to the memory tokens, and these
    depend on nothing behind them.
    """
    last = self.vocabulary.memory_base + self.context.memory - 1
    end = int(np.argmax(ids == last)) + 1
    return ids[:end], ids[end:]

  def shown(self, slate: dict[str, np.ndarray]) -> np.ndarray:
    """Items of the history that the prompt shows, oldest first: int32 [..].

    They are the most recent `history` items, or fewer where the budget is spent
    on this slate's candidates.
    """
    end = int(slate['history_length'])
    return slate['history'][end - self._num_shown(slate) : end]

  def lines(self, slate: dict[str, np.ndarray]) -> context_lib.Lines:
    """The full context, line by line."""
    words, count = self.vocabulary, int(slate['count'])
    end = int(slate['history_length'])
    part = slice(end - self._num_shown(slate), end)
    history = []
    for item, grade, age, age_bin in zip(
      slate['history'][part],
      slate['history_grades'][part].tolist(),
      slate['history_ages'][part].tolist(),
      self.bins.ages(slate['history_ages'][part]).tolist(),
      strict=True,
    ):
      known = {
        'grade': [words.grade_base + grade - 1] if grade else [],
        'age': [words.age_base + age_bin] if age >= 0 else [],
      }
      history.append(self._line(item, self.history_fields, known))
    bins = words.bins(self.bins(slate['evidence'], count)).tolist()
    candidates = [
      self._line(item, self.fields, {'evidence': bins[rank]})
      for rank, item in enumerate(slate['candidates'][:count])
    ]
    return context_lib.Lines(history, candidates)

  def _num_shown(self, slate: dict[str, np.ndarray]) -> int:
    """Number of last items in a full context."""
    if 'history' not in self.layout:
      return 0
    end = int(slate['history_length'])
    recent = slate['history'][max(0, end - self.history) : end]
    if not self.budget:
      return len(recent)
    room = self.budget - self._mark_tokens + self._slots
    if 'candidates' in self.layout:
      candidates = slate['candidates'][: int(slate['count'])]
      room -= sum(1 + self._length(item, self.fields) for item in candidates)
    lengths = [self._length(item, self.history_fields) for item in recent]
    return int((np.cumsum(lengths[::-1]) <= room).sum())

  def _line(
    self, item: int, fields: Fields, of_slate: context_lib.Line
  ) -> context_lib.Line:
    return {
      field: of_slate[field]
      if field in of_slate
      else list(self.items[field][item])
      for field in fields
    }

  def _length(self, item: int, fields: Fields) -> int:
    """Most tokens of an item's line."""
    text = sum(len(self.items[f][item]) for f in fields if f in self.items)
    return text + self._own_tokens(fields)

  def ask(
    self, control: str, target: int | None = None, ratio: float | None = None
  ) -> list[int]:
    """The end of a prompt, up to the control token of the answer.

    Args:
      control: '<think>', '<answer>' or '<compress>'.
      target: slot of a positive, for a privileged teacher.
      ratio: share of the context that a compression keeps; the nearest of
        `vocabulary.RATIOS` is written.
    """
    words, ids = self.vocabulary, []
    if ratio is not None:
      distance = np.abs(np.array(vocabulary_lib.RATIOS) - 100 * ratio)
      ids.append(words.ratio_base + int(distance.argmin()))
    if target is not None:
      ids += [words.control['<target>'], words.slot_base + int(target)]
    return [*ids, *self.asks[control]]

  def answer(self, ranking: np.ndarray, order: np.ndarray) -> list[int]:
    """Slot ids and <eos> of a ranking given in incoming ranks."""
    place = np.argsort(order)
    slots = self.vocabulary.slot_base + place[ranking]
    return [*slots.tolist(), self.vocabulary.eos]

  def present(self, ids: np.ndarray, order: np.ndarray) -> list[int]:
    """Renames the slots of a stored reasoning span from rank to place."""
    place, words = np.argsort(order), self.vocabulary
    ids = np.asarray(ids, np.int32).copy()
    slot = words.is_slot(ids)
    ids[slot] = words.slot_base + place[ids[slot] - words.slot_base]
    return ids[: self.reasoning].tolist()


def pad(ids: list[int] | np.ndarray, length: int, what: str) -> np.ndarray:
  """Pads ids with zeros: int32 [length].

  Raises:
    ValueError: there are more than `length`; the message names `what`.
  """
  if len(ids) > length:
    raise ValueError(f'{what}: {len(ids)} tokens, room for {length}')
  out = np.zeros(length, np.int32)
  out[: len(ids)] = ids
  return out


def presentation(
  count: int, order: str, rng: np.random.Generator
) -> np.ndarray:
  """Incoming ranks in the order of presentation: int [count].

  `mixed` draws one of the other ORDERS for each slate.

  Raises:
    ValueError: an unknown order.
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
) -> ItemTokens:
  """Token ids of every item's fields, texts cut to `title_tokens`."""

  def texts(strings: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(vocabulary.encode(s)[:title_tokens]) for s in strings)

  return {
    'sid': tuple(map(tuple, vocabulary.sid(codes_IxL).tolist())),
    'title': texts(catalog.titles),
    'categories': texts(' > '.join(path) for path in catalog.categories),
  }
