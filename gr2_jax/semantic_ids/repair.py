"""Sinkhorn repair: colliding items get another last code, spread evenly.

The remedy of LC-Rec (Zheng et al. 2024, "Adapting large language models by
integrating collaborative semantics for recommendation", section 3.1): where
several items have one tuple, the last level is an optimal transport of their
residuals to the codewords, under which each codeword gets an equal share.

Axis letters: I items, T tuples taken, L levels, C codebook size, D latent
width, G prefixes, N distinct residuals of a prefix.
"""

from collections.abc import Callable, Iterator

import numpy as np

from gr2_jax.semantic_ids import ids

EPSILON = 0.003  # of the entropy, where costs span 2
ITERATIONS = 50
_TIE = 1e-6  # relative difference in mass below which the nearer code is taken
_LEAST = 1e-290  # what sums are taken to be at least, lest factors overflow
_CELLS = 1 << 21  # of a batch of transport plans


def repair(
  codes_IxL: np.ndarray,
  vectors_LxCxD: np.ndarray,
  latents_of: Callable[[np.ndarray], np.ndarray],
  named_T: np.ndarray,
) -> tuple[np.ndarray, int]:
  """Gives items whose tuples collide their last code again.

  In rounds: all colliding items of a prefix of L - 1 codes are transported to
  the last codes that no item with a tuple of its own has there. An item that
  then is alone stays; a prefix is left when none collides or none was freed.
  Items with equal residuals cannot be told apart and go on colliding.

  Args:
    codes_IxL: int32 [I, L].
    vectors_LxCxD: float32 [L, C, D].
    latents_of: from items int64 [n] to latents float32 [n, D].
    named_T: int64 [T] keys of tuples that are taken.

  Returns:
    int32 [I, L], and how many items' last codes were changed.
  """
  size = vectors_LxCxD.shape[1]
  before = codes_IxL
  items = _colliding(before, named_T, size)
  if not len(items):
    return before, 0
  residuals = np.array(latents_of(items), np.float32)
  for level in range(before.shape[1] - 1):
    residuals -= vectors_LxCxD[level, before[items, level]]
  first, kind = _distinct(residuals)
  residuals = residuals[first]
  kind_of = np.full(len(before), -1)
  kind_of[items] = kind
  codes = before.copy()
  while len(items):
    trial = codes.copy()
    trial[items, -1] = _reassign(
      codes, items, residuals, kind_of[items], vectors_LxCxD[-1], named_T
    )
    left = _colliding(trial, named_T, size)
    # A prefix where no item was freed keeps its codes and is not tried again.
    prefixes = ids.prefix_keys(codes[items, :-1], size)
    distinct, group = np.unique(prefixes, return_inverse=True)
    still = np.isin(items, left)
    freed = np.bincount(group[~still], minlength=len(distinct)) > 0
    codes[items[freed[group]], -1] = trial[items[freed[group]], -1]
    items = items[freed[group] & still]
  return codes, int((codes != before).any(1).sum())


def sinkhorn(
  cost_GxNxC: np.ndarray, mass_GxN: np.ndarray, free_GxC: np.ndarray
) -> np.ndarray:
  """The code that gets most of each row under balanced transport.

  Minimises <Q, cost> - epsilon * entropy(Q) over plans Q whose rows sum to the
  mass and whose free columns have equal sums (Cuturi 2013, "Sinkhorn
  distances"), by alternating normalisation. Costs are scaled to span 2; among
  columns with the same share, the cheapest is taken.

  Args:
    cost_GxNxC: float [G, N, C].
    mass_GxN: float [G, N] of the rows; 0 for padding.
    free_GxC: bool [G, C]; at least one in each problem.

  Returns:
    int64 [G, N] columns.
  """
  valid = (mass_GxN > 0)[:, :, None] & free_GxC[:, None, :]
  low = np.where(valid, cost_GxNxC, np.inf).min((1, 2), keepdims=True)
  high = np.where(valid, cost_GxNxC, -np.inf).max((1, 2), keepdims=True)
  plan = (low - cost_GxNxC) / (np.maximum(high - low, 1e-12) / 2 * EPSILON)
  # Every row's largest entry becomes 1, which its scale makes up for.
  plan -= np.where(valid, plan, -np.inf).max(2, keepdims=True, initial=-1e300)
  kernel = np.where(valid, np.exp(np.minimum(plan, 0)), 0)
  rows = mass_GxN / mass_GxN.sum(1, keepdims=True)
  columns = free_GxC / free_GxC.sum(1, keepdims=True)
  by_column = columns[:, :, None]
  for _ in range(ITERATIONS):
    by_row = rows[:, :, None] / np.maximum(kernel @ by_column, _LEAST)
    sums = kernel.swapaxes(1, 2) @ by_row
    by_column = columns[:, :, None] / np.maximum(sums, _LEAST)
  with np.errstate(divide='ignore'):
    plan += np.log(by_column).swapaxes(1, 2)
  best = np.where(valid, plan, -np.inf).max(2, keepdims=True)
  return np.where(plan >= best - _TIE, cost_GxNxC, np.inf).argmin(2)


def _colliding(codes: np.ndarray, named: np.ndarray, size: int) -> np.ndarray:
  """Items whose tuple another item has, or is taken; int64 [n]."""
  tuples, group, counts = np.unique(
    ids.prefix_keys(codes, size),
    return_inverse=True,
    return_counts=True,
  )
  return np.flatnonzero(((counts > 1) | np.isin(tuples, named))[group])


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """First of each distinct row, and for each row which of them it equals."""
  rows = np.ascontiguousarray(rows + 0.0)  # -0.0 is 0.0
  whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))
  _, first, group = np.unique(
    whole[:, 0], return_index=True, return_inverse=True
  )
  return first, group


def _reassign(
  codes_IxL: np.ndarray,
  items: np.ndarray,
  residuals: np.ndarray,
  residual_of: np.ndarray,
  vectors_CxD: np.ndarray,
  named_T: np.ndarray,
) -> np.ndarray:
  """One round of `repair`.

  Args:
    codes_IxL: int32 [I, L].
    items: int64 [n] that collide.
    residuals: float32 [K, D], distinct.
    residual_of: int64 [n] row of each item's residual.
    vectors_CxD: float32 [C, D] last codebook.
    named_T: int64 [T].

  Returns:
    int64 [n] last codes; the old one where no code of a prefix is free.
  """
  size = len(vectors_CxD)
  settled = np.ones(len(codes_IxL), bool)
  settled[items] = False
  prefixes, group = np.unique(
    ids.prefix_keys(codes_IxL[items, :-1], size), return_inverse=True
  )
  held = np.concatenate([ids.prefix_keys(codes_IxL[settled], size), named_T])
  held = held[np.isin(held // size, prefixes)]
  free_GxC = np.ones((len(prefixes), size), bool)
  free_GxC[np.searchsorted(prefixes, held // size), held % size] = False
  # Rows of the plans: (prefix, distinct residual), as many items as its mass.
  rows, row_of, mass = np.unique(
    group * len(residuals) + residual_of,
    return_inverse=True,
    return_counts=True,
  )
  owner, kind = np.divmod(rows, len(residuals))
  code = np.full(len(rows), -1)
  # |r|^2 is the same for every code and is left out.
  norms = (vectors_CxD**2).sum(-1)
  for place in _batches(owner, free_GxC.any(1), size):
    real = place >= 0
    points = residuals[kind[place]]  # what stands in an empty place has no mass
    cost = norms - 2 * (points @ vectors_CxD.T).astype(np.float64)
    got = sinkhorn(cost, mass[place] * real, free_GxC[owner[place[:, 0]]])
    code[place[real]] = got[real]
  return np.where(code[row_of] < 0, codes_IxL[items, -1], code[row_of])


def _batches(
  owner: np.ndarray, usable: np.ndarray, size: int
) -> Iterator[np.ndarray]:
  """Rows of problems of like size together, int64 [G, N], -1 where empty."""
  begins = np.searchsorted(owner, np.arange(len(usable)))
  counts = np.bincount(owner, minlength=len(usable))
  widths = 1 << np.ceil(np.log2(counts)).astype(np.int64)
  for width in np.unique(widths[usable]):
    problems = np.flatnonzero(usable & (widths == width))
    step = max(1, _CELLS // int(width * size))
    for begin in range(0, len(problems), step):
      some = problems[begin : begin + step]
      place = begins[some, None] + np.arange(width)
      yield np.where(np.arange(width) < counts[some, None], place, -1)
