"""The interface of teachers, and a teacher without a model.

The heuristic teacher reasons and ranks from metadata and co-engagement. It
replaces a large language model offline and makes errors like one: its score of
a candidate is the sum of a few evidence columns and noise.
"""

import dataclasses
from collections import Counter
from collections.abc import Generator, Iterable
from typing import Any, Protocol

import numpy as np

from gr2_jax.data import log as log_lib
from gr2_jax.ops import parsing
from gr2_jax.prompts import prompt

KEPT = ('accepted', 'targeted')
VERDICTS = (
  *KEPT,
  'rejected',  # a valid answer with a wrong first choice
  *parsing.VERDICTS[1:],  # no permutation of the candidates
  'empty',  # no text
  'refused',  # the model refused
  'cut',  # the answer reached the limit on its length
  'declined',  # the server rejected the request
  'unanswered',  # the server failed in every attempt
)


@dataclasses.dataclass(frozen=True)
class Trace:
  """A teacher's reasoning and ranking of one slate."""

  reasoning: list[int]  # token ids; slots are incoming ranks
  ranking: np.ndarray  # int32 [count], incoming ranks; [0] without an answer
  tries: int
  verdict: str  # one of VERDICTS
  unknown: int = 0  # tokens of the reasoning that the student lacks
  clipped: int = 0  # tokens beyond the student's longest reasoning


# Index and trace of each slate.
Traces = Generator[tuple[int, Trace], None, None]


class Teacher(Protocol):
  """An author of traces."""

  def traces(
    self, slates: Any, indices: Iterable[int], kind: str, tries: int, seed: int
  ) -> Traces:
    """Yields index and trace of each indexed slate, in any order.

    Args:
      slates: random access to records.
      indices: of the slates.
      kind: targeted (Eq. 1: the target is shown) or rejection (Eq. 2).
      tries: largest number of answers per slate.
      seed: all draws are functions of it and the index.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Heuristic:
  """A teacher that scores candidates by evidence and noise."""

  prompter: prompt.Prompter
  catalog: log_lib.Catalog
  columns: tuple[int, ...]  # positions in the slates' evidence
  noise: float  # standard deviation, in units of a standardized column

  def traces(
    self, slates: Any, indices: Iterable[int], kind: str, tries: int, seed: int
  ) -> Traces:
    """See `Teacher`; keeps the order of the indices."""
    for index in indices:
      rng = np.random.default_rng((seed, index))
      if kind == 'targeted':
        yield index, self.targeted(slates[index], rng)
      else:
        yield index, self.rejection(slates[index], rng, tries)

  def rejection(
    self, slate: dict[str, Any], rng: np.random.Generator, tries: int
  ) -> Trace:
    """Eq. 2: draws rankings until the first candidate is a positive."""
    for attempt in range(1, tries + 1):
      ranking = self._rank(slate, rng)
      if slate['grades'][ranking[0]] > 0:
        return self._trace(slate, ranking, attempt, 'accepted')
    return self._trace(slate, ranking, tries, 'rejected')

  def targeted(self, slate: dict[str, Any], rng: np.random.Generator) -> Trace:
    """Eq. 1: draws a ranking and moves a random positive to the front."""
    ranking = self._rank(slate, rng)
    positives = np.flatnonzero(slate['grades'][: len(ranking)] > 0)
    target = rng.choice(positives)
    rest = ranking[ranking != target]
    ranking = np.concatenate([[target], rest]).astype(np.int32)
    return self._trace(slate, ranking, 1, 'targeted')

  def _rank(
    self, slate: dict[str, Any], rng: np.random.Generator
  ) -> np.ndarray:
    count = int(slate['count'])
    values = slate['evidence'][:count, self.columns].astype(np.float64)
    standardized = (values - values.mean(0)) / (values.std(0) + 1e-6)
    score = standardized.mean(1) * len(self.columns) ** 0.5
    score += self.noise * rng.standard_normal(count)
    order = rng.permutation(count)  # breaks ties at random
    best = np.argsort(-score[order], kind='stable')
    return order[best].astype(np.int32)

  def _trace(
    self,
    slate: dict[str, Any],
    ranking: np.ndarray,
    tries: int,
    verdict: str,
  ) -> Trace:
    """Reasons from the history's categories to the first three slots."""
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
    first = self.catalog.categories[slate['candidates'][ranking[0]]]
    category = next((c for c in pattern if c in first), (*first, 'other')[0])
    ids = vocabulary.encode(f'likes {" and ".join(pattern) or "anything"}')
    for item in cited:
      ids += vocabulary.encode('as') + list(self.prompter.items['sid'][item])
    ids += vocabulary.encode(f'so {category} fits')
    ids += [vocabulary.slot_base + int(rank) for rank in ranking[:3]]
    room = self.prompter.reasoning
    clipped = max(0, len(ids) - room)
    return Trace(ids[:room], ranking, tries, verdict, clipped=clipped)


# The words of the reasoning, which become text pieces of the vocabulary.
PHRASES = ('likes and as so fits anything other',)
