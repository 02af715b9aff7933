"""Items that the same users engaged with, close together.

Axis letters: n slates, H history length, I items, B batch.
"""

import dataclasses

import numpy as np

from gr2_jax.data import slates as slates_lib


@dataclasses.dataclass(frozen=True)
class Neighbors:
  """The neighbors of every item as compressed rows.

  Attributes:
    offsets: int64 [I + 1]; those of item i are items[offsets[i]:offsets[i+1]].
    items: int32, one entry per user who engaged with both close together.
  """

  offsets: np.ndarray
  items: np.ndarray

  def draw(self, anchors_B: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random neighbor of each item, int32 [B]; an item without one itself."""
    begin = self.offsets[anchors_B]
    degree = self.offsets[anchors_B + 1] - begin
    pick = begin + (rng.random(len(anchors_B)) * degree).astype(np.int64)
    if not len(self.items):
      return anchors_B.astype(np.int32)
    drawn = self.items[np.minimum(pick, len(self.items) - 1)]
    return np.where(degree > 0, drawn, anchors_B).astype(np.int32)


def neighbors(
  slates: slates_lib.Slates, items: int, *, window: int
) -> Neighbors:
  """Neighbors, in both directions, in the histories of slates.

  The histories of one user's slates overlap; a pair counts once per user.

  Args:
    slates: of the training split only, so that no test history leaks.
    items: number of items, I.
    window: largest distance of two neighbors in a history, in places.
  """
  length = slates.history.shape[1]
  users, first, second = [], [], []
  for gap in range(1, min(window, length - 1) + 1):
    real = slates.history[:, gap:] >= 0
    row, column = np.nonzero(real)
    users.append(slates.user[row])
    first.append(slates.history[row, column])
    second.append(slates.history[row, column + gap])
  if not users:
    return Neighbors(np.zeros(items + 1, np.int64), np.zeros(0, np.int32))
  triples = np.stack([np.concatenate(x) for x in (users, first, second)], 1)
  triples = triples[triples[:, 1] != triples[:, 2]]
  triples[:, 1:].sort(axis=1)  # a pair has no order
  triples = np.unique(triples, axis=0)
  source = np.concatenate([triples[:, 1], triples[:, 2]])
  target = np.concatenate([triples[:, 2], triples[:, 1]])
  order = np.lexsort((target, source))
  offsets = np.zeros(items + 1, np.int64)
  np.cumsum(np.bincount(source, minlength=items), out=offsets[1:])
  return Neighbors(offsets, target[order].astype(np.int32))
