"""Completes fitted codes to whole semantic IDs, also when a catalog grows.

Residual quantization gives the fitted levels. `LAST_LEVELS` are the ways to
complete the tuple:

- 'unused': the last M codes are drawn among those unused under the prefix;
- 'uniform': they are drawn among all codes, so tuples may collide;
- 'digit': the last code counts the items of a prefix, 0, 1, 2, ...;
- 'sinkhorn': all codes are fitted, and colliding items get a new last code;
- 'fitted': all codes are fitted, and tuples may collide.

'unused' and 'digit' give every item a unique tuple whenever the catalog fits in
the code space, and a later item never changes the tuple of an earlier one.

Axis letters: I items, T taken tuples, D latent width, L levels, F fitted
levels, M = L - F drawn levels, C codebook size, G prefixes, N distinct
residuals of a prefix.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from gr2_jax.semantic_ids import ids

LAST_LEVELS = ('unused', 'uniform', 'digit', 'sinkhorn', 'fitted')

_BLOCK = 1 << 15  # items per call of `latents_of`
_ROUNDS = 8  # of the Feistel network that permutes a prefix's numbers
# Sinkhorn: weight of the entropy, for costs that span 2; iterations.
EPSILON = 0.003
ITERATIONS = 50
_TIE = 1e-6  # difference in log mass below which the nearer code wins
_LEAST = 1e-290  # lower bound of sums, so that factors do not overflow
_CELLS = 1 << 21  # entries of a batch of transport plans


def check_capacity(
  items: int, levels: int, codebook_size: int, taken: int = 0
) -> None:
  """Raises ValueError where items and taken tuples exceed the C^L tuples."""
  if items + taken > codebook_size**levels:
    beside = f' beside {taken} taken tuples' if taken else ''
    raise ValueError(
      f'{items} items{beside} do not fit in {codebook_size}^{levels} = '
      f'{codebook_size**levels} semantic IDs: raise tokenizer.codebook_size or '
      'tokenizer.levels'
    )


def complete(
  fitted_IxF: np.ndarray,
  vectors_FxCxD: np.ndarray,
  latents_of: Callable[[np.ndarray], np.ndarray],
  *,
  levels: int,
  kind: str,
  seed: int,
  taken: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
  """Completes fitted codes to whole tuples.

  Args:
    fitted_IxF: int codes of the items, in catalog order. F = L for 'fitted' and
      'sinkhorn', L - 1 for 'digit', less than L for 'unused' and 'uniform'.
    vectors_FxCxD: float32 codebooks.
    latents_of: from items int64 [n] to their latents float32 [n, D]; called
      only for items that may move.
    levels: L, of the whole tuples.
    kind: one of LAST_LEVELS.
    seed: of the draws; the seed of the taken tuples continues their draws.
    taken: int [T, L] tuples of earlier items. 'unused' and 'digit' never assign
      them again; 'sinkhorn' repairs collisions with them where it can; 'fitted'
      and 'uniform' ignore them.

  Returns:
    int32 [I, L], and the number of items whose fitted codes changed.

  Raises:
    ValueError: the kind is unknown, F does not suit it, or the items and taken
      tuples exceed the code space.
  """
  if kind not in LAST_LEVELS:
    raise ValueError(
      f'tokenizer.last_level is {kind!r}; it must be one of {LAST_LEVELS}'
    )
  fitted = np.array(fitted_IxF, np.int32)
  vectors = np.asarray(vectors_FxCxD, np.float32)
  depth, size = fitted.shape[1], vectors.shape[1]
  suits = {
    'digit': (levels - 1,), 'sinkhorn': (levels,), 'fitted': (levels,),
  }.get(kind, range(1, levels))  # fmt: skip
  if depth not in suits:
    raise ValueError(
      f'{depth} fitted levels of {levels} do not suit last_level={kind!r}'
    )
  if taken is None:
    taken = np.zeros((0, levels), np.int32)
  taken_T = np.unique(ids.prefix_keys(np.asarray(taken), size))
  check_capacity(len(fitted), levels, size, len(taken_T))
  if kind == 'fitted':
    return fitted, 0
  if kind == 'uniform':
    draw = np.random.default_rng([seed, size])
    drawn = draw.integers(
      size, size=(len(taken) + len(fitted), levels - depth)
    )[len(taken) :]
    return np.concatenate([fitted, drawn], 1).astype(np.int32), 0

  def latents_in_blocks(items: np.ndarray) -> np.ndarray:
    blocks = [np.empty((0, vectors.shape[2]), np.float32)]
    for begin in range(0, len(items), _BLOCK):
      blocks.append(latents_of(items[begin : begin + _BLOCK]))
    return np.concatenate(blocks).astype(np.float32, copy=False)

  if kind == 'sinkhorn':
    return repair(fitted, vectors, latents_in_blocks, taken_T)
  codes, spilled = _spill(fitted, vectors, latents_in_blocks, taken_T, levels)
  keys = ids.prefix_keys(codes, size)
  numbers = _deal(
    keys, taken_T, size ** (levels - depth), None if kind == 'digit' else seed
  )
  drawn = [
    numbers // size ** (levels - level - 1) % size
    for level in range(depth, levels)
  ]
  return np.column_stack([codes, *drawn]).astype(np.int32), spilled


def _spill(
  codes_IxF: np.ndarray,
  vectors_FxCxD: np.ndarray,
  latents_of: Callable[[np.ndarray], np.ndarray],
  taken_T: np.ndarray,
  levels: int,
) -> tuple[np.ndarray, int]:
  """Moves items out of prefixes that have more items than free tuples.

  Level by level, in catalog order: a prefix of k codes has room for C^(L - k)
  items minus its taken tuples. An item whose prefix is full moves to the
  nearest sibling with room, and its later codes are quantized again. A parent
  never holds more items than its children have room for, so such a sibling
  exists. An item appended to the catalog never moves an earlier one.

  Returns:
    codes_IxF, which is changed in place, and the number of items moved.
  """
  size = vectors_FxCxD.shape[1]
  moved = np.zeros(len(codes_IxF), bool)
  for level in range(codes_IxF.shape[1]):
    tail = size ** (levels - level - 1)
    prefixes, child, counts = np.unique(
      ids.prefix_keys(codes_IxF[:, : level + 1], size),
      return_inverse=True,
      return_counts=True,
    )
    held = np.searchsorted(taken_T, np.stack([prefixes, prefixes + 1]) * tail)
    room = tail - (held[1] - held[0])
    over = np.maximum(counts - room, 0)
    if not over.any():
      continue
    # A full child holds at most as many moved items as the other children have
    # in excess, so its own items that come early enough stay.
    parents, parent = np.unique(prefixes // size, return_inverse=True)
    excess = np.zeros(len(parents), np.int64)
    np.add.at(excess, parent, over)
    items = np.flatnonzero((excess > 0)[parent][child])
    safe = room - (excess[parent] - over)
    may_move = _ranks(child[items]) >= safe[child[items]]
    latents = latents_of(items[may_move])
    latent = np.cumsum(may_move) - 1  # Row of an item's latents.
    by_parent = np.argsort(parent[child[items]], kind='stable')
    owner = parent[child[items[by_parent]]]
    bounds = np.flatnonzero(np.diff(owner, prepend=-1, append=-1))
    for begin, end in itertools.pairwise(bounds.tolist()):
      rows = by_parent[begin:end]
      first = int(parents[owner[begin]]) * size
      held = np.searchsorted(taken_T, np.arange(first, first + size + 1) * tail)
      moves = _seat(
        codes_IxF[items[rows], level].tolist(),
        (tail - np.diff(held)).tolist(),
        latents,
        latent[rows],
        vectors_FxCxD[level:],
        vectors_FxCxD[np.arange(level), codes_IxF[items[rows[0]], :level]],
      )
      for place, later in moves:
        codes_IxF[items[rows[place]], level:] = later
        moved[items[rows[place]]] = True
  return codes_IxF, int(moved.sum())


def _seat(
  wishes: list[int],  # [n] the child that each item was quantized to
  room: list[int],  # [C] free tuples of each child; used up in place
  latents_MxD: np.ndarray,
  latent: np.ndarray,  # int [n] row of each item's latents
  vectors: np.ndarray,  # float32 [K, C, D] this codebook and the later ones
  words: np.ndarray,  # float32 [., D] codewords of the parent
) -> list[tuple[int, list[int]]]:
  """Assigns the items of one parent to its children, in catalog order.

  Returns:
    (index, K codes) of each item that has to move.
  """
  moves = []
  full = np.array(room) == 0
  chosen = {}  # latents -> codes of the last item that has them and moved
  base = words.sum(0)
  for index, child in enumerate(wishes):
    if not room[child]:
      row = latents_MxD[latent[index]]
      key = row.tobytes()
      codes = chosen.get(key)
      if codes is None or not room[codes[0]]:
        residual, codes = row - base, []
        for codebook in vectors:
          difference = codebook - residual
          distances = np.einsum('cd,cd->c', difference, difference)
          if not codes:
            distances[full] = np.inf
          codes.append(int(distances.argmin()))
          residual = residual - codebook[codes[-1]]
        chosen[key] = codes
      moves.append((index, codes))
      child = codes[0]
    room[child] -= 1
    if not room[child]:
      full[child] = True
  return moves


def _ranks(groups: np.ndarray) -> np.ndarray:
  """Number of equal elements before each element, int64 [I]."""
  order = np.argsort(groups, kind='stable')
  ordered = groups[order]
  ranks = np.empty(len(groups), np.int64)
  ranks[order] = np.arange(len(groups)) - np.searchsorted(ordered, ordered)
  return ranks


def _deal(
  keys_I: np.ndarray, taken_T: np.ndarray, tail: int, seed: int | None
) -> np.ndarray:
  """Gives each item a number 0..tail - 1 that is free under its prefix.

  Each prefix deals out its own pseudo-random permutation of the numbers in
  catalog order and skips the taken ones. So each number is uniform among those
  unused so far, and naming a catalog in two parts equals naming it at once.

  Args:
    keys_I: int64 prefixes; each has room for its items.
    taken_T: int64 sorted keys of the taken tuples.
    tail: numbers per prefix, C^M.
    seed: of the permutations; None deals in ascending order.
  """
  prefixes, held = np.divmod(taken_T, tail)
  if seed is not None:
    held = _permute(prefixes, held, tail, seed, inverse=True)
  order = np.lexsort((held, prefixes))
  prefixes, held = prefixes[order], held[order]
  # The n-th free place is n + i, where i counts the taken places that have at
  # most n free places before them.
  free_before = held - _ranks(prefixes)
  places = _ranks(keys_I)
  places += np.searchsorted(
    prefixes * tail + free_before, keys_I * tail + places, side='right'
  ) - np.searchsorted(prefixes, keys_I)
  if seed is None:
    return places
  return _permute(keys_I, places, tail, seed)


def _permute(
  keys: np.ndarray,
  numbers: np.ndarray,
  tail: int,
  seed: int,
  *,
  inverse: bool = False,
) -> np.ndarray:
  """A pseudo-random permutation of 0..tail - 1 for every key, int64 [n].

  A Feistel network over the smallest rectangle that holds the numbers, repeated
  until its output is below `tail` (cycle walking; Black and Rogaway 2002,
  "Ciphers with arbitrary finite domains").
  """
  width = math.isqrt(tail - 1) + 1
  height = -(-tail // width)
  salts = np.random.SeedSequence([seed, tail]).generate_state(
    _ROUNDS, np.uint64
  )
  numbers = numbers.copy()
  walking = np.arange(len(numbers))
  while len(walking):
    y, x = np.divmod(numbers[walking], width)
    key = keys[walking].astype(np.uint64)
    for number in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
      here, side = (x, width) if number % 2 else (y, height)
      other = y if number % 2 else x
      mixed = _mix(_mix(key ^ salts[number]) + other.astype(np.uint64))
      turn = (mixed % np.uint64(side)).astype(np.int64)
      here += side - turn if inverse else turn
      here %= side
    numbers[walking] = y * width + x
    walking = walking[numbers[walking] >= tail]
  return numbers


def _mix(bits: np.ndarray) -> np.ndarray:
  """Finalizer of splitmix64 (Steele, Lea and Flood 2014), uint64 [n]."""
  bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
  bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return bits ^ bits >> np.uint64(31)


def repair(
  codes_IxL: np.ndarray,
  vectors_LxCxD: np.ndarray,
  latents_of: Callable[[np.ndarray], np.ndarray],
  taken_T: np.ndarray,
) -> tuple[np.ndarray, int]:
  """Gives items with colliding tuples a new last code.

  The remedy of LC-Rec (Zheng et al. 2024, "Adapting large language models by
  integrating collaborative semantics for recommendation", section 3.1): optimal
  transport of the colliding items' residuals to the last codewords, with an
  equal share for each codeword. It runs in rounds over the colliding items of
  each prefix of L - 1 codes and the last codes that no unique item uses there.
  Unique items stay; a prefix is finished when no item collides or a round
  resolves none. Items with equal residuals keep colliding.

  Returns:
    int32 [I, L], and the number of items with a new last code.
  """
  size = vectors_LxCxD.shape[1]
  before = codes_IxL
  items = _colliding(before, taken_T, size)
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
      codes, items, residuals, kind_of[items], vectors_LxCxD[-1], taken_T
    )
    left = _colliding(trial, taken_T, size)
    # A prefix where no item became unique keeps its codes and is finished.
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
  """The code with the largest share of each row under balanced transport.

  Minimizes <Q, cost> - epsilon * entropy(Q) over plans Q whose rows sum to the
  mass and whose free columns have equal sums (Cuturi 2013, "Sinkhorn
  distances"), by alternating normalization. Costs are scaled to span 2. Of
  columns with the same share, the cheapest wins.

  `mass_GxN` is 0 for padding; at least one column of each problem is free.
  Returns columns int64 [G, N].
  """
  valid = (mass_GxN > 0)[:, :, None] & free_GxC[:, None, :]
  low = np.where(valid, cost_GxNxC, np.inf).min((1, 2), keepdims=True)
  high = np.where(valid, cost_GxNxC, -np.inf).max((1, 2), keepdims=True)
  plan = (low - cost_GxNxC) / (np.maximum(high - low, 1e-12) / 2 * EPSILON)
  # The largest entry of every row becomes 1; the row's scale compensates.
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


def _colliding(codes: np.ndarray, taken_T: np.ndarray, size: int) -> np.ndarray:
  """Items whose tuple is another item's or taken, int64 [n]."""
  tuples, group, counts = np.unique(
    ids.prefix_keys(codes, size),
    return_inverse=True,
    return_counts=True,
  )
  return np.flatnonzero(((counts > 1) | np.isin(tuples, taken_T))[group])


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The first of each distinct row, and the group of every row."""
  rows = np.ascontiguousarray(rows + 0.0)  # -0.0 is 0.0
  whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))
  _, first, group = np.unique(
    whole[:, 0], return_index=True, return_inverse=True
  )
  return first, group


def _reassign(
  codes_IxL: np.ndarray,
  items: np.ndarray,
  residuals: np.ndarray,  # float32 [K, D], distinct
  residual_of: np.ndarray,  # int64 [n], row of each item's residual
  vectors_CxD: np.ndarray,
  taken_T: np.ndarray,
) -> np.ndarray:
  """One round of `repair`: new last codes int64 [n] of the colliding items.

  An item keeps its code where no code of its prefix is free.
  """
  size = len(vectors_CxD)
  settled = np.ones(len(codes_IxL), bool)
  settled[items] = False
  prefixes, group = np.unique(
    ids.prefix_keys(codes_IxL[items, :-1], size), return_inverse=True
  )
  held = np.concatenate([ids.prefix_keys(codes_IxL[settled], size), taken_T])
  held = held[np.isin(held // size, prefixes)]
  free_GxC = np.ones((len(prefixes), size), bool)
  free_GxC[np.searchsorted(prefixes, held // size), held % size] = False
  # A row of a plan is a (prefix, distinct residual); its mass counts items.
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
    points = residuals[kind[place]]  # an empty place has no mass
    cost = norms - 2 * (points @ vectors_CxD.T).astype(np.float64)
    got = sinkhorn(cost, mass[place] * real, free_GxC[owner[place[:, 0]]])
    code[place[real]] = got[real]
  return np.where(code[row_of] < 0, codes_IxL[items, -1], code[row_of])


def _batches(
  owner: np.ndarray, usable: np.ndarray, size: int
) -> Iterator[np.ndarray]:
  """Rows of problems of similar size, int64 [G, N], -1 where empty."""
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
