"""From latents to semantic IDs for a whole catalog: fitted codes, then room.

The fitted levels come from residual quantisation. `spill` moves the items a
full prefix has no room for; `draw_last_level` draws the last code among those
still unused under the prefix. Together they give every item a tuple of its
own whenever the catalog is no larger than the code space.

Axis letters: I items, D latent width, L levels, C codebook size.
"""

import numpy as np

from gr2_jax.models import semantic_ids

LAST_LEVELS = ('unused', 'uniform', 'fitted')


def check_capacity(items: int, levels: int, codebook_size: int) -> None:
  """Raises ValueError where C^L tuples are too few for the catalog."""
  if items > codebook_size**levels:
    raise ValueError(
      f'{items} items do not fit in {codebook_size}^{levels} = '
      f'{codebook_size**levels} semantic IDs: raise tokenizer.codebook_size or '
      'tokenizer.levels'
    )


def spill(
  latents_IxD: np.ndarray,
  vectors_FxCxD: np.ndarray,
  codes_IxF: np.ndarray,
  *,
  levels: int,
) -> tuple[np.ndarray, int]:
  """Moves items out of prefixes that have more items than tuples.

  From the first level down, in catalog order: a prefix of k codes has room for
  C^(L - k) items; one that finds it full moves to the nearest sibling with
  room, and its later codes are quantised anew. A parent never holds more than
  its children have room for, so there always is one. An item appended to the
  catalog never moves an earlier one.

  Args:
    latents_IxD: float32 [I, D].
    vectors_FxCxD: float32 [F, C, D] codebooks of the F fitted levels.
    codes_IxF: int [I, F] fitted codes.
    levels: L, more than F where later codes are drawn.

  Returns:
    int32 [I, F] codes with room, and the number of items moved.

  Raises:
    ValueError: the catalog is larger than the code space.
  """
  fitted, size = codes_IxF.shape[1], vectors_FxCxD.shape[1]
  check_capacity(len(codes_IxF), levels, size)
  codes = np.array(codes_IxF, np.int32)
  moved = set()
  for level in range(fitted):
    room = size ** (levels - level - 1)
    keys = semantic_ids.prefix_keys(codes[:, : level + 1], size)
    prefixes, counts = np.unique(keys, return_counts=True)
    parents = semantic_ids.prefix_keys(codes[:, :level], size)
    for parent in np.unique(prefixes[counts > room] // size):
      load = np.zeros(size, np.int64)
      for item in np.flatnonzero(parents == parent):
        if load[codes[item, level]] >= room:
          free = load < room
          codes[item] = _requantise(
            latents_IxD[item], vectors_FxCxD, codes[item], level, free
          )
          moved.add(int(item))
        load[codes[item, level]] += 1
  return codes, len(moved)


def _requantise(
  latent_D: np.ndarray,
  vectors_FxCxD: np.ndarray,
  codes_F: np.ndarray,
  level: int,
  free_C: np.ndarray,
) -> np.ndarray:
  """Codes from `level` on anew, the first of them among the free ones."""
  codes = codes_F.copy()
  words = vectors_FxCxD[np.arange(level), codes[:level]]
  residual = latent_D - words.sum(0)
  for current in range(level, len(codes)):
    distance = ((residual[None] - vectors_FxCxD[current]) ** 2).sum(-1)
    if current == level:
      distance = np.where(free_C, distance, np.inf)
    codes[current] = distance.argmin()
    residual = residual - vectors_FxCxD[current, codes[current]]
  return codes


def draw_last_level(
  prefixes: np.ndarray, codebook_size: int, *, seed: int, kind: str = 'unused'
) -> np.ndarray:
  """Appends a drawn code to every item's prefix.

  Args:
    prefixes: int [I, L - 1].
    codebook_size: C.
    seed: of the draws.
    kind: 'unused': each prefix has its own seeded permutation of the codes
      and deals it out in catalog order, so each code is uniform among those
      unused so far and an appended item changes no earlier one; 'uniform':
      over all codes, so tuples may collide.

  Returns:
    int32 [I, L].

  Raises:
    ValueError: the kind is unknown, or, for 'unused', more than C items share
      a prefix.
  """
  if kind == 'uniform':
    rng = np.random.default_rng([seed, codebook_size])
    last = rng.integers(codebook_size, size=len(prefixes))
  elif kind == 'unused':
    keys = semantic_ids.prefix_keys(prefixes, codebook_size)
    distinct, group, counts = np.unique(
      keys, return_inverse=True, return_counts=True
    )
    if counts.max() > codebook_size:
      row = int(np.flatnonzero(group == counts.argmax())[0])
      raise ValueError(
        f'{counts.max()} items share the prefix {prefixes[row].tolist()}, but '
        f'a last level of {codebook_size} codes has room for {codebook_size}: '
        'spill the overflow first, or raise tokenizer.codebook_size'
      )
    last = np.empty(len(prefixes), np.int64)
    by_group = np.argsort(group, kind='stable')
    ends = np.cumsum(counts)
    for key, end, count in zip(distinct, ends, counts, strict=True):
      deal = np.random.default_rng([seed, int(key)]).permutation(codebook_size)
      last[by_group[end - count : end]] = deal[:count]
  else:
    raise ValueError(
      f"the last level is drawn 'unused' or 'uniform', not {kind!r}"
    )
  return np.concatenate([prefixes, last[:, None]], axis=1).astype(np.int32)
