"""What finished reasoning claims, and whether it is so: a judge for tables.

It reads spans of token ids on the host, against the slate, the catalog and the
answer; no model is asked. Three parts, each in [0, 1]:

* citations. A citation is a chain of code tokens of rising level. Half of the
  part is the share of citations that are the semantic ID of an item of the
  catalog, half the share that are that of an item in the prompt: of the history
  as far as it is shown, or of the candidates.
* categories. A claim is a name of a category in the text: the longest one where
  several fit, on word borders, whatever the case. The last name of a stretch of
  text that leads up to a run of slots, at most `BETWEEN` words before it, is
  said of the run's first candidate, and holds if that has the category. Every
  other name is said of the history, and holds if any of its items has the
  category: the whole history that the slate keeps, since who wrote the trace
  may know more of it than the prompt shows. The part is the share that holds.
* conclusion. Whether the first slot of the span's last run of slots is the
  answer's first pick. 0 without a slot, or a valid answer.

A part without citations or claims does not apply: it is NaN and left out of the
total, the mean of the rest. The conclusion always applies, and a span that is
empty, or that never ends, has 0 everywhere: silence is no merit. How much was
cited and claimed is counted beside, since few words are easily true.

A name that is a common word ("other") is taken for a claim wherever it stands,
and a denial ("no Horror") for a claim like any other.

Worked example, items written A, B for their semantic IDs; A has the categories
Comedy and Drama, B Horror:

  history A, candidates B (slot 0), C (slot 1, Comedy)
  likes comedy as A so horror fits <slot1> <slot0> </think> <slot1> <slot0>

One citation, in the catalog and in the prompt: 1. Two claims: comedy of the
history holds, horror of candidate C does not: 0.5. The conclusion, slot 1, is
the first pick: 1. Total 0.8333.

Axes: n answers, T tokens, K candidates, L levels.
"""

import dataclasses
import functools
import re
import unicodedata
from typing import Any

import numpy as np

from gr2_jax.data import log as log_lib
from gr2_jax.ops import parsing
from gr2_jax.prompts import prompt

# Words, signs too, between a category and the slots that it is said of.
BETWEEN = 3
PARTS = ('citations', 'categories', 'conclusion')

_TEXT, _SLOT, _CODE, _SYMBOL = range(4)


@dataclasses.dataclass(frozen=True)
class Reader:
  """Finds what a span says, and looks it up in one data set.

  Attributes:
    prompter: what a prompt shows, and in which tokens.
    catalog: the items' categories.
  """

  prompter: prompt.Prompter
  catalog: log_lib.Catalog

  def span(
    self,
    ids: np.ndarray,
    slate: dict[str, np.ndarray],
    presented: np.ndarray,
    first: int | None,
  ) -> dict[str, float]:
    """Judges one span of reasoning.

    Args:
      ids: int [T], without the token that ends it.
      slate: one record of `slates.SlateSource`.
      presented: int [K], incoming rank of each slot; of a stored trace, whose
        slots are incoming ranks, `np.arange(K)`.
      first: incoming rank of the answer's first pick; None without an answer.

    Returns:
      As `judge`, one number each.
    """
    ids = np.asarray(ids, int)
    if not len(ids):
      return _empty()
    codes, claims, slots = self._read(ids)
    count = int(slate['count'])

    def candidate(slot):
      """Incoming rank, None where the slot names no candidate."""
      return int(presented[slot]) if slot < count else None

    exists = [sid in self._sids for sid in codes]
    shown = self._shown(slate)
    in_prompt = [not shown.isdisjoint(self._sids.get(sid, ())) for sid in codes]
    history = slate['history'][: int(slate['history_length'])]
    liked = {name for item in history for name in self._categories[item]}
    holds = []
    for name, slot in claims:
      known = liked
      if slot is not None:
        rank = candidate(slot)
        item = None if rank is None else slate['candidates'][rank]
        known = () if item is None else self._categories[item]
      holds.append(name in known)
    concluded = candidate(slots[-1]) if slots else None
    marks = {
      'exists': _share(exists),
      'shown': _share(in_prompt),
      'citations': (_share(exists) + _share(in_prompt)) / 2,
      'categories': _share(holds),
      'conclusion': float(concluded is not None and concluded == first),
    }
    parts = np.array([marks[name] for name in PARTS])
    return marks | {
      'total': float(np.mean(parts[~np.isnan(parts)])),
      'cited': float(len(codes)),
      'claimed': float(len(claims)),
    }

  def _read(self, ids: np.ndarray):
    """What a span says.

    Returns:
      SIDs cited, incomplete chains among them, as tuples of tokens; claims, as
      a category and the slot that it is said of, None for the history; and the
      first slot of every run of slots.
    """
    words = self.prompter.vocabulary
    kind = self._kinds[ids]
    level = (ids - words.sid_base) // words.layout.codebook_size
    starts = kind[1:] != kind[:-1]
    # A chain of codes ends where the level does not go on.
    starts |= (kind[1:] == _CODE) & (level[1:] != level[:-1] + 1)
    edges = [0, *(np.flatnonzero(starts) + 1).tolist(), len(ids)]
    codes, claims, slots = [], [], []
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
      run = ids[begin:end].tolist()
      if kind[begin] == _CODE:
        codes.append(tuple(run))
      elif kind[begin] == _SLOT:
        slots.append(run[0] - words.slot_base)
      elif kind[begin] == _TEXT:
        named, after = self._mentions(words.decode(run))
        claims += [(name, None) for name in named]
        leads = end < len(ids) and kind[end] == _SLOT and after <= BETWEEN
        if named and leads:
          claims[-1] = (named[-1], int(ids[end]) - words.slot_base)
    return codes, claims, slots

  def _mentions(self, text: str) -> tuple[list[str], int]:
    """Categories that a text names in order, and the words after the last."""
    words = _words(text)
    found, at, after = [], 0, 0
    while at < len(words):
      for name in self._names.get(words[at], ()):
        if words[at : at + len(name)] == name:
          found.append(' '.join(name))
          at, after = at + len(name), 0
          break
      else:
        at, after = at + 1, after + 1
    return found, after

  def _shown(self, slate) -> set[int]:
    """Items that the prompt shows."""
    items = set(slate['candidates'][: int(slate['count'])].tolist())
    items |= set(self.prompter.shown(slate).tolist())
    return items

  @functools.cached_property
  def _kinds(self) -> np.ndarray:
    """int8 [V]: text, slot, code, or another symbol."""
    words = self.prompter.vocabulary
    levels, size = words.layout.levels, words.layout.codebook_size
    kinds = np.full(len(words), _TEXT, np.int8)
    kinds[words.by_base : words.sid_base] = _SYMBOL
    kinds[words.slot_base : words.bin_base] = _SLOT
    kinds[words.sid_base : words.sid_base + levels * size] = _CODE
    kinds[[words.pad, words.bos, words.eos, *words.control.values()]] = _SYMBOL
    return kinds

  @functools.cached_property
  def _sids(self) -> dict[tuple[int, ...], set[int]]:
    """Tokens of a semantic ID -> the items that have it."""
    found: dict[tuple[int, ...], set[int]] = {}
    for item, sid in enumerate(self.prompter.items['sid']):
      found.setdefault(sid, set()).add(item)
    return found

  @functools.cached_property
  def _categories(self) -> tuple[frozenset[str], ...]:
    """Names of each item's categories, as `_mentions` finds them."""
    return tuple(
      frozenset(' '.join(_words(name)) for name in path)
      for path in self.catalog.categories
    )

  @functools.cached_property
  def _names(self) -> dict[str, list[list[str]]]:
    """First word -> the names of categories that begin so, longest first."""
    found: dict[str, list[list[str]]] = {}
    for name in sorted({n for path in self._categories for n in path if n}):
      words = name.split(' ')
      found.setdefault(words[0], []).append(words)
    return {word: sorted(n, key=len, reverse=True) for word, n in found.items()}


def judge(
  prompter: prompt.Prompter,
  catalog: log_lib.Catalog,
  slates: Any,
  *,
  tokens: np.ndarray,
  length: np.ndarray,
  presented: np.ndarray,
  generated: np.ndarray,
  verdict: np.ndarray,
) -> dict[str, np.ndarray]:
  """Judges the reasoning of answers, as `ranker.Ranked` has them.

  Args:
    prompter: what a prompt shows, and in which tokens.
    catalog: the items' categories.
    slates: random access to the answers' slates, in their order.
    tokens: int [n, T], completions; ids beyond the length are not read.
    length: int [n].
    presented: int [n, K], incoming rank of each slot.
    generated: int [n, K], the answer, in incoming ranks.
    verdict: int [n], of `parsing.VERDICTS`.

  Returns:
    float64 [n] each: exists and shown, shares of the citations; citations,
    their mean; categories; conclusion; total; and the counts cited, claimed.
    NaN where a part does not apply.
  """
  reader, words = Reader(prompter, catalog), prompter.vocabulary
  end, eos = words.control['</think>'], words.eos
  marks = {name: np.zeros(len(tokens)) for name in _empty()}
  for i, completion in enumerate(np.asarray(tokens)):
    ids = completion[: length[i]]
    stop = np.flatnonzero((ids == end) | (ids == eos))[:1]
    closed = len(stop) and ids[stop[0]] == end
    span = ids[: stop[0] if closed else 0]
    first = generated[i, 0] if verdict[i] == parsing.VALID else None
    found = reader.span(span, slates[i], presented[i], first)
    for name, value in found.items():
      marks[name][i] = value
  return marks


def summary(marks: dict[str, np.ndarray]) -> dict[str, float | None]:
  """Means over the answers to which a mark applies; None without any."""
  return {
    name: None if np.isnan(values).all() else float(np.nanmean(values))
    for name, values in marks.items()
  }


def _words(text: str) -> list[str]:
  """Words and signs of a text, in one case and one spelling."""
  text = unicodedata.normalize('NFKC', text).casefold()
  return re.findall(r'\w+|[^\w\s]', text)


def _share(hits: list[bool]) -> float:
  """Share of hits; NaN without any attempt."""
  return sum(hits) / len(hits) if hits else float('nan')


def _empty() -> dict[str, float]:
  """Marks of a span that says nothing."""
  names = ('exists', 'shown', *PARTS, 'total', 'cited', 'claimed')
  return dict.fromkeys(names, 0.0)
