"""Teachers: what they are asked and say, and one that needs no model.

The heuristic teacher reasons and ranks from metadata and co-engagement. It
stands in for a large language model where none is at hand, and errs as one
does: its score of a candidate is a few honest evidence columns plus noise.

Axes: K candidates, n slates.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from gr2_jax.data import log as log_lib
from gr2_jax.ops import parsing
from gr2_jax.prompts import prompt

KEPT = ('accepted', 'targeted')
VERDICTS = (
  *KEPT,
  'rejected',  # a valid answer whose first choice is not the right one
  *parsing.VERDICTS[1:],  # no permutation of the candidates
  'empty',  # no text
  'refused',  # the model would not
  'cut',  # longer than an answer may be
  'declined',  # the server would not
  'unanswered',  # the server could not, however often it was asked
)


@dataclasses.dataclass(frozen=True)
class Trace:
  """What the teacher said about one slate; slots are incoming ranks."""

  reasoning: list[int]  # token ids
  ranking: np.ndarray  # int32 [count], incoming ranks; [0] without an answer
  tries: int
  verdict: str  # of VERDICTS
  unknown: int = 0  # tokens of the reasoning that the reader has no name for
  clipped: int = 0  # tokens that it has no room for


class Teacher(Protocol):
  """Whoever can be asked about slates."""

  def traces(
    self, slates: Any, indices: Iterable[int], kind: str, tries: int, seed: int
  ) -> Iterator[tuple[int, Trace]]:
    """Asks about slates.

    Args:
      slates: random access to records.
      indices: of the slates in question.
      kind: targeted (Eq. 1: it sees a target) or rejection (Eq. 2).
      tries: answers per slate, at most.
      seed: of all that is drawn; what is drawn is a function of it and index.

    Yields:
      Index and trace of each slate once, in any order.
    """


@dataclasses.dataclass(frozen=True)
class Heuristic:
  """The teacher's knowledge and its calibrated error.

  Attributes:
    prompter: renders tokens.
    catalog: the items' categories.
    columns: places in the evidence of the columns it believes in.
    noise: standard deviation of its error, in units of a centred column.
  """

  prompter: prompt.Prompter
  catalog: log_lib.Catalog
  columns: tuple[int, ...]
  noise: float

  def traces(
    self, slates: Any, indices: Iterable[int], kind: str, tries: int, seed: int
  ) -> Iterator[tuple[int, Trace]]:
    """See `Teacher`; in the order of the indices."""
    for index in indices:
      rng = np.random.default_rng((seed, index))
      if kind == 'targeted':
        yield index, self.targeted(slates[index], rng)
      else:
        yield index, self.rejection(slates[index], rng, tries)

  def rejection(self, slate, rng: np.random.Generator, tries: int) -> Trace:
    """Eq. 2: does not see the target; resampled until it puts one first."""
    for attempt in range(1, tries + 1):
      ranking = self._rank(slate, rng)
      if slate['grades'][ranking[0]] > 0:
        return self._trace(slate, ranking, attempt, 'accepted')
    return self._trace(slate, ranking, tries, 'rejected')

  def targeted(self, slate, rng: np.random.Generator) -> Trace:
    """Eq. 1: sees a target, and puts it first whatever it believes."""
    ranking = self._rank(slate, rng)
    positives = np.flatnonzero(slate['grades'][: len(ranking)] > 0)
    target = rng.choice(positives)
    rest = ranking[ranking != target]
    ranking = np.concatenate([[target], rest]).astype(np.int32)
    return self._trace(slate, ranking, 1, 'targeted')

  def _rank(self, slate, rng: np.random.Generator) -> np.ndarray:
    count = int(slate['count'])
    values = slate['evidence'][:count, self.columns].astype(np.float64)
    centred = (values - values.mean(0)) / (values.std(0) + 1e-6)
    score = centred.mean(1) * len(self.columns) ** 0.5
    score += self.noise * rng.standard_normal(count)
    drawn = rng.permutation(count)  # Ties say nothing of the incoming order.
    best = np.argsort(-score[drawn], kind='stable')
    return drawn[best].astype(np.int32)

  def _trace(self, slate, ranking, tries: int, verdict: str) -> Trace:
    """Pattern in the history -> category that follows -> matches by slot."""
    vocabulary = self.prompter.vocabulary
    history = slate['history'][: int(slate['history_length'])]
    liked = Counter(
      c for item in history for c in self.catalog.categories[item]
    )
    pattern = [name for name, _ in liked.most_common(2)]
    cited = [
      item
      for item in self.prompter.shown(slate)
      if set(self.catalog.categories[item]) & set(pattern)
    ][-1:]
    target = self.catalog.categories[slate['candidates'][ranking[0]]]
    follows = next((c for c in pattern if c in target), (*target, 'other')[0])
    ids = vocabulary.encode(f'likes {" and ".join(pattern) or "anything"}')
    for item in cited:
      ids += vocabulary.encode('as') + list(self.prompter.items['sid'][item])
    ids += vocabulary.encode(f'so {follows} fits')
    ids += [vocabulary.slot_base + int(rank) for rank in ranking[:3]]
    room = self.prompter.reasoning
    clipped = max(0, len(ids) - room)
    return Trace(ids[:room], ranking, tries, verdict, clipped=clipped)


# Phrases of the reasoning, for the vocabulary to learn whole.
PHRASES = ('likes and as so fits anything other',)
