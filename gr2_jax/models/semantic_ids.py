"""Semantic IDs: the tuple of codes of every item, its inverse and its trie.

Axis letters: I items, L levels, C codebook size, N trie nodes.
"""

import dataclasses
import functools
import json
import os
import pathlib
import zipfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

VERSION = 1
_ARRAYS = 'sids.npz'
_FACTS = 'sids.json'


@dataclasses.dataclass(frozen=True)
class SemanticIds:
  """The semantic IDs of a catalog.

  Attributes:
    codes: int32 [I, L], each in [0, C).
    codebook_size: C.

  Raises:
    ValueError: the codes have another shape, type or range, or L and C are
      so large that a tuple does not fit in 63 bits.
  """

  codes: np.ndarray
  codebook_size: int

  def __post_init__(self):
    codes = np.asarray(self.codes)
    if codes.ndim != 2 or not codes.size:
      raise ValueError(f'codes must be [items, levels], got {codes.shape}')
    if not np.issubdtype(codes.dtype, np.integer):
      raise ValueError(f'codes must be integers, got {codes.dtype}')
    outside = (codes < 0) | (codes >= self.codebook_size)
    if outside.any():
      item, level = np.argwhere(outside)[0]
      raise ValueError(
        f'item {item}: code {codes[item, level]} at level {level + 1} is '
        f'outside 0..{self.codebook_size - 1}'
      )
    if self.codebook_size ** codes.shape[1] > 2**63 - 1:
      raise ValueError(
        f'{codes.shape[1]} levels of {self.codebook_size} codes do not fit in '
        '63 bits: lower tokenizer.levels or tokenizer.codebook_size'
      )
    codes = codes.astype(np.int32)
    codes.setflags(write=False)
    object.__setattr__(self, 'codes', codes)

  def __len__(self) -> int:
    """Number of items, I."""
    return len(self.codes)

  @property
  def levels(self) -> int:
    """Number of levels, L."""
    return self.codes.shape[1]

  @functools.cached_property
  def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys int64 [I] and the items in that order, ties by item."""
    keys = prefix_keys(self.codes, self.codebook_size)
    order = np.argsort(keys, kind='stable')
    return keys[order], order.astype(np.int32)

  def find(self, codes: np.ndarray) -> np.ndarray:
    """The items that tuples stand for.

    Args:
      codes: int [..., L]; values outside [0, C) stand for nothing.

    Returns:
      int32 [...], -1 where no item has the tuple; where several have it, the
      first of them.

    Raises:
      ValueError: the last axis is not L.
    """
    codes = np.asarray(codes, np.int64)
    if codes.shape[-1:] != (self.levels,):
      raise ValueError(f'codes must be [..., {self.levels}], got {codes.shape}')
    keys, items = self._sorted
    wanted = prefix_keys(codes, self.codebook_size)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    valid = ((codes >= 0) & (codes < self.codebook_size)).all(-1)
    return np.where(valid & (keys[place] == wanted), items[place], -1)

  def unique(self, depth: int | None = None) -> np.ndarray:
    """Which items have a prefix that is theirs alone.

    Args:
      depth: number of leading codes to look at; all of them by default.

    Returns:
      bool [I].
    """
    keys = prefix_keys(self.codes[:, :depth], self.codebook_size)
    _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[group] == 1

  def statistics(self) -> dict:
    """Figures of merit, ready for JSON.

    Returns:
      items; uniqueness (share of items whose tuple is theirs alone);
      uniqueness_before_last_level; distinct tuples; and one entry per level
      in usage (share of codes used), entropy (bits, of C codes at most log2
      C), dead_codes, prefixes (distinct prefixes that end there) and
      largest_prefix (items under the fullest of them).
    """
    columns = {
      name: []
      for name in (
        'usage', 'entropy', 'dead_codes', 'prefixes', 'largest_prefix'
      )
    }  # fmt: skip
    for level in range(self.levels):
      counts = np.bincount(self.codes[:, level], minlength=self.codebook_size)
      share = counts[counts > 0] / len(self)
      prefixes = np.unique(
        prefix_keys(self.codes[:, : level + 1], self.codebook_size),
        return_counts=True,
      )[1]
      columns['usage'].append(float((counts > 0).mean()))
      columns['entropy'].append(float(-(share * np.log2(share)).sum() + 0.0))
      columns['dead_codes'].append(int((counts == 0).sum()))
      columns['prefixes'].append(len(prefixes))
      columns['largest_prefix'].append(int(prefixes.max()))
    before = self.unique(self.levels - 1) if self.levels > 1 else [False]
    return {
      'items': len(self),
      'uniqueness': float(self.unique().mean()),
      'uniqueness_before_last_level': float(np.mean(before)),
      'distinct': columns['prefixes'][-1],
      **columns,
    }

  def save(self, directory: os.PathLike[str] | str) -> None:
    """Writes sids.npz and sids.json, each whole or not at all."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f'{_ARRAYS}.tmp'
    with temporary.open('wb') as file:
      np.savez(file, codes=self.codes)
    os.replace(temporary, directory / _ARRAYS)
    facts = {
      'version': VERSION,
      'codebook_size': self.codebook_size,
      'items': len(self),
      'levels': self.levels,
    }
    temporary = directory / f'{_FACTS}.tmp'
    temporary.write_text(json.dumps(facts, indent=2) + '\n', encoding='utf-8')
    os.replace(temporary, directory / _FACTS)

  def export(
    self, path: os.PathLike[str] | str, item_ids: Sequence[str]
  ) -> None:
    """Writes one JSON object a line: item_id and codes.

    Args:
      path: the JSONL file; appears whole or not at all.
      item_ids: [I] external ids, in catalog order.

    Raises:
      ValueError: their number is not I, or one occurs twice.
    """
    if len(item_ids) != len(self):
      raise ValueError(f'{len(item_ids)} item ids for {len(self)} items')
    check_item_ids(item_ids)
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + '.tmp')
    with temporary.open('w', encoding='utf-8') as file:
      for item_id, codes in zip(item_ids, self.codes.tolist(), strict=True):
        row = {'item_id': item_id, 'codes': codes}
        file.write(json.dumps(row, ensure_ascii=False) + '\n')
    os.replace(temporary, path)


def load(directory: os.PathLike[str] | str) -> SemanticIds:
  """Reads what `SemanticIds.save` wrote.

  Args:
    directory: the folder of a finished tokenizer.

  Returns:
    The semantic IDs.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, of another version, or they disagree.
  """
  directory = pathlib.Path(directory)
  for name in (_ARRAYS, _FACTS):
    if not (directory / name).is_file():
      raise FileNotFoundError(
        f'{directory / name}: missing; run the tokenizer stage'
      )
  try:
    facts = json.loads((directory / _FACTS).read_text(encoding='utf-8'))
    with np.load(directory / _ARRAYS) as file:
      codes = file['codes']
    version, size = facts['version'], facts['codebook_size']
    shape = (facts['items'], facts['levels'])
  except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(
      f'{directory}: {_ARRAYS} or {_FACTS} is damaged ({e}); delete the folder '
      'and run the tokenizer stage again'
    ) from e
  if version != VERSION:
    raise ValueError(
      f'{directory / _FACTS}: version {version}, but this program reads '
      f'version {VERSION}; run the tokenizer stage again'
    )
  if codes.shape != shape:
    raise ValueError(
      f'{directory / _ARRAYS}: codes are {codes.shape}, but {_FACTS} says '
      f'{shape}; run the tokenizer stage again'
    )
  return SemanticIds(codes, size)


def check_item_ids(item_ids: Sequence[str]) -> None:
  """Raises ValueError naming the first id that occurs twice."""
  first = {}
  for row, item_id in enumerate(item_ids):
    if first.setdefault(item_id, row) != row:
      raise ValueError(
        f'item id {item_id!r} occurs twice in the catalog, at items '
        f'{first[item_id]} and {row}: drop or rename one'
      )


def prefix_keys(codes: np.ndarray, codebook_size: int) -> np.ndarray:
  """Tuples of codes [..., depth] as numbers of base C, int64 [...]."""
  keys = np.zeros(codes.shape[:-1], np.int64)
  for level in range(codes.shape[-1]):
    keys = keys * codebook_size + codes[..., level]
  return keys


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('offsets', 'codes', 'items'),
  meta_fields=('codebook_size',),
)
@dataclasses.dataclass(frozen=True)
class Trie:
  """The catalog's tuples as compressed rows, for decoding inside jit.

  Nodes are numbered level by level in lexicographic order; node 0 is the
  root, and the children of node n are nodes offsets[n] .. offsets[n + 1] - 1.
  A state is a node, or -1 once a code has left the catalog.

  Attributes:
    offsets: int32 [N + 1].
    codes: int32 [N], the code that leads into a node; -1 for the root.
    items: int32 [N], the item of a leaf (the first, where several share the
      tuple); -1 for inner nodes.
    codebook_size: C.
  """

  offsets: jax.Array
  codes: jax.Array
  items: jax.Array
  codebook_size: int

  def allowed(self, state: jax.Array) -> jax.Array:
    """Which codes may follow.

    Args:
      state: int32 [...].

    Returns:
      bool [..., C]; nothing may follow a leaf or state -1.
    """
    child, exists = self._children(state)
    code = jnp.where(exists, self.codes[child], self.codebook_size)
    flat = code.reshape(-1, self.codebook_size)
    mask = jnp.zeros(flat.shape, bool)
    rows = jnp.arange(len(flat))[:, None]
    return mask.at[rows, flat].set(True, mode='drop').reshape(code.shape)

  def advance(self, state: jax.Array, code: jax.Array) -> jax.Array:
    """The state after a code.

    Args:
      state: int32 [...].
      code: int32 [...].

    Returns:
      int32 [...], -1 where the code is not allowed.
    """
    child, exists = self._children(state)
    hit = exists & (self.codes[child] == code[..., None])
    return jnp.where(hit, child, -1).max(-1)

  def item(self, state: jax.Array) -> jax.Array:
    """The item at a leaf, int32 [...]; -1 elsewhere."""
    return jnp.where(state >= 0, self.items[jnp.maximum(state, 0)], -1)

  def _children(self, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Node numbers [..., C] and which of them are children of the state."""
    node = jnp.maximum(state, 0)[..., None]
    slots = jnp.arange(self.codebook_size, dtype=jnp.int32)
    slots = slots.reshape((1,) * state.ndim + (-1,))
    child = self.offsets[node] + slots
    exists = (child < self.offsets[node + 1]) & (state >= 0)[..., None]
    return jnp.where(exists, child, 0), exists


def build_trie(sids: SemanticIds) -> Trie:
  """The trie of a catalog's tuples.

  Args:
    sids: the semantic IDs.

  Returns:
    A trie whose paths from the root to a leaf are exactly the tuples.
  """
  codes, items = np.unique(sids.codes, axis=0, return_index=True)
  offsets, into = [], [np.array([-1])]
  begin = 1  # number of the first node of the next level
  parents = np.zeros(len(codes), np.int64)  # of each tuple, in this level
  n_parents = 1
  for level in range(sids.levels):
    new = np.ones(len(codes), bool)
    new[1:] = (codes[1:, : level + 1] != codes[:-1, : level + 1]).any(1)
    children = np.bincount(parents[new], minlength=n_parents)
    offsets.append(begin + np.cumsum(children) - children)
    into.append(codes[new, level])
    parents, n_parents = np.cumsum(new) - 1, int(new.sum())
    begin += n_parents
  offsets.append(np.full(n_parents + 1, begin))  # leaves have no children
  offsets, into = np.concatenate(offsets), np.concatenate(into)
  leaves = np.full(len(into), -1)
  leaves[-n_parents:] = items
  return Trie(
    offsets=jnp.asarray(offsets, jnp.int32),
    codes=jnp.asarray(into, jnp.int32),
    items=jnp.asarray(leaves, jnp.int32),
    codebook_size=sids.codebook_size,
  )
