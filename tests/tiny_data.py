"""A catalog of twelve items, its prompter, and random slates of it."""

import numpy as np

from gr2_jax.data import log, slates
from gr2_jax.prompts import bins as bins_lib
from gr2_jax.prompts import chat, prompt, vocabulary

COLOURS = ('red', 'blue', 'green', 'pink')
THINGS = ('soap', 'brush', 'cream')
EVIDENCE = ['rank', 'fame', 'age']  # columns of the slates
LAYOUT = vocabulary.Layout(
  evidence=('rank', 'fame:raw'),
  bins=4,
  num_slots=8,
  levels=3,
  codebook_size=5,
  num_memory=3,
)
K = 6  # the longest slate
H = 5  # history that a slate keeps


def catalog(prefix='item'):
  items = [(c, t) for t in THINGS for c in COLOURS]
  return log.Catalog(
    tuple(f'{prefix}-{i}' for i in range(len(items))),
    tuple(f'{colour} {thing} for you' for colour, thing in items),
    tuple(('beauty', thing) for _, thing in items),
    np.zeros(len(items), np.int32),
  )


def codes():
  return np.stack(np.unravel_index(np.arange(12) * 7, (5, 5, 5)), -1)


def words(directory):
  own = catalog()
  return vocabulary.train(
    directory / 'vocabulary.model',
    [*own.titles, 'beauty > soap', 'likes and as so fits'],
    LAYOUT,
    60,
  )


def slate(seed=0, count=K, length=H):
  """One record, as `slates.SlateSource` gives it."""
  rng = np.random.default_rng(seed)

  def pad(x, size):
    return np.pad(x, (0, size - len(x)), constant_values=-1)

  evidence = rng.normal(size=(K, len(EVIDENCE))).astype(np.float32)
  evidence[count:] = 0
  grades = rng.integers(0, 3, K).astype(np.int8)
  grades[count:] = 0
  grades[count - 1] = 1
  # Of some items of a history it is not known how or when.
  other = np.random.default_rng([seed, 1])
  history_grades = other.integers(0, 3, H).astype(np.int8)
  history_grades[length:] = 0
  history_ages = np.sort(other.integers(0, 10**6, H))[::-1].astype(np.int64)
  history_ages[other.random(H) < 0.2] = -1
  history_ages[length:] = -1
  return {
    'candidates': pad(rng.permutation(12)[:count], K).astype(np.int32),
    'grades': grades,
    'count': np.int32(count),
    'history': pad(rng.permutation(12)[:length], H).astype(np.int32),
    'history_grades': history_grades,
    'history_ages': history_ages,
    'history_length': np.int32(length),
    'evidence': evidence,
  }


def many(size=40):
  """Slates of every count, with the fields that bins are fitted on."""
  rows = [slate(seed, 2 + seed % (K - 1)) for seed in range(size)]
  fields = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
  return slates.Slates(
    user=np.arange(size, dtype=np.int32),
    scores=np.zeros((size, K), np.float32),
    time=np.zeros(size, np.int64),
    utility=np.zeros((size, K), np.float32),
    **fields,
  )


def bins():
  return bins_lib.EvidenceBins.fit(
    many(), EVIDENCE, LAYOUT.evidence, LAYOUT.bins
  )


def prompter(directory, own=None, **kwargs):
  vocabulary_ = words(directory)
  turns = chat.turns(vocabulary_, '')
  fields = dict(
    vocabulary=vocabulary_,
    bins=bins(),
    items=prompt.item_tokens(vocabulary_, own or catalog(), codes(), 30),
    opening=turns.opening,
    closing=turns.closing,
    asks=turns.asks,
    layout=('history', 'candidates'),
    fields=('sid', 'title', 'evidence'),
    history=3,
    history_fields=('sid',),
    num_candidates=K,
    reasoning=20,
  )
  return prompt.Prompter(**(fields | kwargs))
