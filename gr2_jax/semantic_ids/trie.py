"""The trie of a catalog's semantic IDs as arrays, for decoding inside jit.

Axis letters: C codebook size, N trie nodes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.semantic_ids import ids


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('offsets', 'codes', 'items'),
  meta_fields=('codebook_size',),
)
@dataclasses.dataclass(frozen=True)
class Trie:
  """The catalog's tuples as compressed rows.

  Nodes are numbered level by level in lexicographic order. Node 0 is the root;
  the children of node n are nodes offsets[n] .. offsets[n + 1] - 1. A state is
  a node, or -1 once a code has left the catalog.
  """

  offsets: jax.Array  # int32 [N + 1]
  codes: jax.Array  # int32 [N], the code that leads to a node; -1 for the root
  items: jax.Array  # int32 [N], the first item of a leaf; -1 for inner nodes
  codebook_size: int  # C

  def allowed(self, state: jax.Array) -> jax.Array:
    """Codes that may follow states [...]: bool [..., C].

    No code follows a leaf or state -1.
    """
    child, exists = self._children(state)
    code = jnp.where(exists, self.codes[child], self.codebook_size)
    flat = code.reshape(-1, self.codebook_size)
    mask = jnp.zeros(flat.shape, bool)
    rows = jnp.arange(len(flat))[:, None]
    return mask.at[rows, flat].set(True, mode='drop').reshape(code.shape)

  def advance(self, state: jax.Array, code: jax.Array) -> jax.Array:
    """States after a code each, int32 [...]; -1 where it is not allowed."""
    child, exists = self._children(state)
    hit = exists & (self.codes[child] == code[..., None])
    return jnp.where(hit, child, -1).max(-1)

  def item(self, state: jax.Array) -> jax.Array:
    """Items of states, int32 [...]; -1 where a state is no leaf."""
    return jnp.where(state >= 0, self.items[jnp.maximum(state, 0)], -1)

  def _children(self, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nodes [..., C], and whether each is a child of the state."""
    node = jnp.maximum(state, 0)[..., None]
    slots = jnp.arange(self.codebook_size, dtype=jnp.int32)
    slots = slots.reshape((1,) * state.ndim + (-1,))
    child = self.offsets[node] + slots
    exists = (child < self.offsets[node + 1]) & (state >= 0)[..., None]
    return jnp.where(exists, child, 0), exists


def build_trie(sids: ids.SemanticIds) -> Trie:
  """The trie whose paths from root to leaf are exactly the tuples."""
  keys = ids.prefix_keys(sids.codes, sids.codebook_size)
  _, items = np.unique(keys, return_index=True)
  codes = sids.codes[items]
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
