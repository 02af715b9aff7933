"""From fitted codes to whole semantic IDs for a catalog, and for its growth.

The fitted levels come from residual quantisation. What makes whole tuples of
them is a choice, `LAST_LEVELS`:

- 'unused': the last M codes are drawn among those unused under the prefix;
- 'uniform': they are drawn among all codes, so tuples may collide;
- 'digit': the last code counts the items of a prefix, 0, 1, 2, ...;
- 'sinkhorn': all codes are fitted, colliding items get their last one again;
- 'fitted': all codes are fitted, and tuples may collide.

'unused' and 'digit' give every item a tuple of its own whenever the catalog is
no larger than the code space, and no item named later changes an earlier one.

Axis letters: I items, T tuples taken, D latent width, L levels, F fitted
levels, M = L - F drawn levels, C codebook size.
"""

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np

from gr2_jax.semantic_ids import ids, repair

LAST_LEVELS = ('unused', 'uniform', 'digit', 'sinkhorn', 'fitted')

# Items whose latents are asked for at a time.
_BLOCK = 1 << 15
# Of the Feistel network that permutes a prefix's numbers.
_ROUNDS = 8


def check_capacity(
  items: int, levels: int, codebook_size: int, taken: int = 0
) -> None:
  """Raises ValueError where C^L tuples are too few for the catalog.

  Args:
    items: I.
    levels: L.
    codebook_size: C.
    taken: tuples that are not to be had.
  """
  if items + taken > codebook_size**levels:
    beside = f' beside {taken} tuples taken' if taken else ''
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
  """Makes whole tuples of fitted codes.

  Args:
    fitted_IxF: int [I, F] codes of the items to name, in catalog order.
      F = L for 'fitted' and 'sinkhorn', L - 1 for 'digit', less than L for
      'unused' and 'uniform'.
    vectors_FxCxD: float32 [F, C, D] codebooks.
    latents_of: from items int64 [n] to their latents float32 [n, D]; asked
      for those that may move, and for nobody where nobody does.
    levels: L.
    kind: one of LAST_LEVELS.
    seed: of the draws; the seed that named the taken tuples continues them.
    taken: int [T, L] tuples of items named earlier. 'unused' and 'digit'
      never give them again; 'sinkhorn' repairs collisions with them as those
      among the items, so far as it can; the others do not look.

  Returns:
    int32 [I, L], and the number of items whose fitted codes were changed.

  Raises:
    ValueError: the kind is unknown, F does not suit it, or the catalog and
      the taken tuples are more than the code space.
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
  named = np.unique(ids.prefix_keys(np.asarray(taken), size))
  check_capacity(len(fitted), levels, size, len(named))
  if kind == 'fitted':
    return fitted, 0
  if kind == 'uniform':
    draw = np.random.default_rng([seed, size])
    drawn = draw.integers(
      size, size=(len(taken) + len(fitted), levels - depth)
    )[len(taken) :]
    return np.concatenate([fitted, drawn], 1).astype(np.int32), 0
  ask = functools.partial(_latents, latents_of, vectors.shape[2])
  if kind == 'sinkhorn':
    return repair.repair(fitted, vectors, ask, named)
  codes, spilled = _spill(fitted, vectors, ask, named, levels)
  keys = ids.prefix_keys(codes, size)
  numbers = _deal(
    keys, named, size ** (levels - depth), None if kind == 'digit' else seed
  )
  drawn = [
    numbers // size ** (levels - level - 1) % size
    for level in range(depth, levels)
  ]
  return np.column_stack([codes, *drawn]).astype(np.int32), spilled


# ------------------------------------------------------------------- Spill


def _spill(
  codes_IxF: np.ndarray,
  vectors_FxCxD: np.ndarray,
  latents_of: Callable[[np.ndarray], np.ndarray],
  named_T: np.ndarray,
  levels: int,
) -> tuple[np.ndarray, int]:
  """Moves items out of prefixes that have more items than free tuples.

  From the first level down, in catalog order: a prefix of k codes has room for
  C^(L - k) items less the tuples taken there; an item that finds it full moves
  to the nearest sibling with room, and its later codes are quantised anew. A
  parent never holds more than its children have room for, so there always is
  one. An item appended to the catalog never moves an earlier one.

  Args:
    codes_IxF: int32 [I, F], changed in place.
    vectors_FxCxD: float32 [F, C, D].
    latents_of: see `complete`.
    named_T: int64 [T] keys of the tuples taken, sorted.
    levels: L.

  Returns:
    The codes, and the number of items moved.
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
    held = np.searchsorted(named_T, np.stack([prefixes, prefixes + 1]) * tail)
    room = tail - (held[1] - held[0])
    over = np.maximum(counts - room, 0)
    if not over.any():
      continue
    # By the time a child is full it has at most as many guests as the others
    # have too many items; those of its own that come early enough stay.
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
      held = np.searchsorted(named_T, np.arange(first, first + size + 1) * tail)
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
  wishes: list[int],
  room: list[int],
  latents: np.ndarray,
  latent: np.ndarray,
  vectors: np.ndarray,
  words: np.ndarray,
) -> list[tuple[int, list[int]]]:
  """Seats the items of one parent among its children, first come first served.

  Args:
    wishes: [n] the child each item was quantised to.
    room: [C] free places; used up in place.
    latents: float32 [m, D].
    latent: int [n] row of each item's latents, where it may have to move.
    vectors: float32 [K, C, D] codebooks of this level and the later ones.
    words: float32 [., D] the parent's codewords.

  Returns:
    (index, K codes) of each item that has to move.
  """
  moves = []
  full = np.array(room) == 0
  chosen = {}  # latents -> what the last item that has them moved to
  base = words.sum(0)
  for index, child in enumerate(wishes):
    if not room[child]:
      row = latents[latent[index]]
      alike = row.tobytes()
      codes = chosen.get(alike)
      if codes is None or not room[codes[0]]:
        residual = row - base
        distances = _distances(residual, vectors[0])
        distances[full] = np.inf
        codes = [int(distances.argmin())]
        for current in range(1, len(vectors)):
          residual = residual - vectors[current - 1, codes[-1]]
          distances = _distances(residual, vectors[current])
          codes.append(int(distances.argmin()))
        chosen[alike] = codes
      moves.append((index, codes))
      child = codes[0]
    room[child] -= 1
    if not room[child]:
      full[child] = True
  return moves


def _distances(residual_D: np.ndarray, vectors_CxD: np.ndarray) -> np.ndarray:
  """Squared distances [C]; their bits depend on this residual alone."""
  difference = vectors_CxD - residual_D
  return np.einsum('cd,cd->c', difference, difference)


def _latents(
  latents_of: Callable[[np.ndarray], np.ndarray],
  width: int,
  items: np.ndarray,
) -> np.ndarray:
  """Latents float32 [n, D] of items int64 [n], asked for block by block."""
  latents = np.empty((len(items), width), np.float32)
  for begin in range(0, len(items), _BLOCK):
    block = items[begin : begin + _BLOCK]
    latents[begin : begin + _BLOCK] = latents_of(block)
  return latents


def _ranks(groups: np.ndarray) -> np.ndarray:
  """How many equal elements come before each, int64 [I]."""
  order = np.argsort(groups, kind='stable')
  ordered = groups[order]
  ranks = np.empty(len(groups), np.int64)
  ranks[order] = np.arange(len(groups)) - np.searchsorted(ordered, ordered)
  return ranks


# -------------------------------------------------------------------- Deal


def _deal(
  keys_I: np.ndarray, named_T: np.ndarray, tail: int, seed: int | None
) -> np.ndarray:
  """Numbers the items of each prefix with what is free there.

  Each prefix has a pseudo-random permutation of 0..tail - 1 of its own and
  deals it out in catalog order, passing over the numbers that are taken. So
  each number is uniform among those unused so far, and a catalog named in two
  parts gets what it gets in one.

  Args:
    keys_I: int64 [I] prefixes; each has room for its items.
    named_T: int64 [T] keys of the tuples taken, sorted.
    tail: C^M.
    seed: of the permutations; None deals in order.

  Returns:
    int64 [I].
  """
  prefixes, held = np.divmod(named_T, tail)
  if seed is not None:
    held = _permute(prefixes, held, tail, seed, inverse=True)
  order = np.lexsort((held, prefixes))
  prefixes, held = prefixes[order], held[order]
  # The n-th free place is n + i, where i places are held before it: those with
  # at most n free places before them.
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
  """A pseudo-random permutation of 0..tail - 1 for every key.

  A Feistel network over a rectangle that just holds the numbers, repeated
  until it ends among them (Black and Rogaway 2002, "Ciphers with arbitrary
  finite domains", cycle walking).

  Args:
    keys: int64 [n].
    numbers: int64 [n], each in 0..tail - 1.
    tail: size of the domain.
    seed: of all permutations.
    inverse: from images back to numbers.

  Returns:
    int64 [n].
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
  """Finaliser of splitmix64 (Steele, Lea and Flood 2014), uint64 [n]."""
  bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
  bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return bits ^ bits >> np.uint64(31)
