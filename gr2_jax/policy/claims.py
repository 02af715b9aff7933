"""Checks the claims of finished reasoning against the data.

It reads spans of token ids on the host, against the slate, the catalog and the
answer; no model is involved. Three parts, each in [0, 1]:

* citations. A citation is a chain of code tokens of rising level. Half of the
  part is the share of citations that are the semantic ID of an item of the
  catalog. The other half is the share whose item the prompt shows, in its
  history or among the candidates.
* categories. A claim is the name of a category in the text: the longest one
  where several fit, on word borders, in any case. The last name of a stretch of
  text is a claim about the first candidate of a run of slots that follows it
  after at most `BETWEEN` words, and holds if the candidate has the category.
  Every other name is a claim about the history, and holds if any of its items
  has the category. The history is the whole one of the slate: the author of the
  trace may know more of it than the prompt shows. The part is the share of
  claims that hold.
* conclusion. Whether the first slot of the span's last run of slots is the
  answer's first pick. 0 without a slot or a valid answer.

A part without citations or claims is NaN and left out of the total, which is
the mean of the others. The conclusion always applies. An empty span, or one
that never ends, has 0 everywhere. The numbers of citations and claims are
returned too, since few words are easily true. A category with a common name
("other") counts as a claim wherever the word appears, and so does a denial
("no Horror").

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

# Words and signs between a category and the slots of its claim, at most.
BETWEEN = 3
PARTS = ('citations', 'categories', 'conclusion')

_TEXT, _SLOT, _CODE, _SYMBOL = range(4)


@dataclasses.dataclass(frozen=True)
class Reader:
  """Extracts the claims of a span and looks them up in one data set."""

  prompter: prompt.Prompter
  catalog: log_lib.Catalog

  def span(
    self,
    ids: np.ndarray,
    slate: dict[str, np.ndarray],
    presented: np.ndarray,
    first: int | None,
  ) -> dict[str, float]:
    """Marks of one span of reasoning, named as in `judge`.

    Args:
      ids: int [T], without the token that ends the span.
      slate: one record of `slates.SlateSource`.
      presented: int [K], incoming rank of each slot; `np.arange(K)` for a
        stored trace.
      first: incoming rank of the answer's first pick; None without an answer.
    """
    ids = np.asarray(ids, int)
    if not len(ids):
      return _empty()
    codes, claims, slots = self._read(ids)
    count = int(slate['count'])

    def rank_of(slot: int) -> int | None:
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
        rank = rank_of(slot)
        known = ()
        if rank is not None:
          known = self._categories[slate['candidates'][rank]]
      holds.append(name in known)
    concluded = rank_of(slots[-1]) if slots else None
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

  def _read(
    self, ids: np.ndarray
  ) -> tuple[list[tuple[int, ...]], list[tuple[str, int | None]], list[int]]:
    """Citations, claims and slots of a span.

    Returns:
      Chains of codes, as tuples of tokens; claims, as a category and the slot
      of the candidate, None for the history; and the first slot of each run.
    """
    words = self.prompter.vocabulary
    kind = self._kinds[ids]
    level = (ids - words.sid_base) // words.layout.codebook_size
    starts = kind[1:] != kind[:-1]
    # A chain of codes ends where the next level does not follow.
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
    mentions, at, after = [], 0, 0
    while at < len(words):
      for name in self._names.get(words[at], ()):
        if words[at : at + len(name)] == name:
          mentions.append(' '.join(name))
          at, after = at + len(name), 0
          break
      else:
        at, after = at + 1, after + 1
    return mentions, after

  def _shown(self, slate: dict[str, np.ndarray]) -> set[int]:
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
    items: dict[tuple[int, ...], set[int]] = {}
    for item, sid in enumerate(self.prompter.items['sid']):
      items.setdefault(sid, set()).add(item)
    return items

  @functools.cached_property
  def _categories(self) -> tuple[frozenset[str], ...]:
    """Names of each item's categories, as `_mentions` finds them."""
    return tuple(
      frozenset(' '.join(_words(name)) for name in path)
      for path in self.catalog.categories
    )

  @functools.cached_property
  def _names(self) -> dict[str, list[list[str]]]:
    """First word -> category names that begin with it, longest first."""
    names: dict[str, list[list[str]]] = {}
    for name in sorted({n for path in self._categories for n in path if n}):
      words = name.split(' ')
      names.setdefault(words[0], []).append(words)
    return {word: sorted(n, key=len, reverse=True) for word, n in names.items()}


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
  """Judges the reasoning of answers, given as fields of `ranking.Ranked`.

  Args:
    prompter: of the answers' prompts.
    catalog: the items' categories.
    slates: random access to the answers' slates, in their order.
    tokens: int [n, T].
    length: int [n].
    presented: int [n, K].
    generated: int [n, K].
    verdict: int [n].

  Returns:
    float64 [n] each: `exists` and `shown`, shares of the citations;
    `citations`, their mean; `categories`; `conclusion`; `total`; and the counts
    `cited` and `claimed`. NaN where a part does not apply.
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
    for name, value in reader.span(
      span, slates[i], presented[i], first
    ).items():
      marks[name][i] = value
  return marks


def summary(marks: dict[str, np.ndarray]) -> dict[str, float | None]:
  """Mean of each mark over the answers that have it; None if none has."""
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
