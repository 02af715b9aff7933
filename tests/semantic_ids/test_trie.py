import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gr2_jax.semantic_ids import trie as trie_lib
from gr2_jax.semantic_ids.ids import SemanticIds


@pytest.fixture(autouse=True, scope='module')
def no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield


def padded(trie, nodes):
  """The trie with unreachable nodes behind it: one shape, one compilation."""
  more = nodes - len(trie.codes)
  return dataclasses.replace(
    trie,
    offsets=jnp.pad(trie.offsets, (0, more), mode='edge'),
    codes=jnp.pad(trie.codes, (0, more), constant_values=-1),
    items=jnp.pad(trie.items, (0, more), constant_values=-1),
  )


@settings(max_examples=30, deadline=None)
@given(
  hnp.arrays(
    np.int32,
    st.tuples(st.integers(1, 12), st.just(3)),
    elements=st.integers(0, 3),
  )
)
def test_trie_allows_exactly_the_catalog(codes):
  sids = SemanticIds(codes, 4)
  trie = padded(trie_lib.build_trie(sids), 64)
  prefixes = {
    tuple(row[:depth]) for row in codes.tolist() for depth in range(4)
  }
  for depth in range(4):
    paths = np.array(list(itertools.product(range(4), repeat=depth)), np.int32)
    paths = paths.reshape(4**depth, depth)
    state = jnp.zeros(len(paths), jnp.int32)
    for level in range(depth):
      state = trie.advance(state, jnp.asarray(paths[:, level]))
    alive = [tuple(path) in prefixes for path in paths.tolist()]
    np.testing.assert_array_equal(np.asarray(state) >= 0, alive)
    follow = [
      [(*path, code) in prefixes for code in range(4)]
      for path in paths.tolist()
    ]
    np.testing.assert_array_equal(trie.allowed(state), follow)
    if depth == 3:
      np.testing.assert_array_equal(trie.item(state), sids.find(paths))
    else:
      np.testing.assert_array_equal(trie.item(state), -1)


def test_random_walks_in_jit_end_at_items():
  rng = np.random.default_rng(0)
  sids = SemanticIds(rng.integers(16, size=(100, 4)), 16)
  trie = trie_lib.build_trie(sids)

  @jax.jit
  def walk(trie, key):
    def step(state, key):
      mask = trie.allowed(state)
      code = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf))
      return trie.advance(state, code), code

    start = jnp.zeros((8, 32), jnp.int32)
    state, codes = jax.lax.scan(step, start, jax.random.split(key, 4))
    return trie.item(state), jnp.moveaxis(codes, 0, -1)

  items, codes = walk(trie, jax.random.key(0))
  assert items.min() >= 0
  np.testing.assert_array_equal(sids.find(codes), items)
  assert len(np.unique(items)) > 50


def test_code_outside_the_codebook_leaves_the_trie():
  sids = SemanticIds(np.array([[0, 1, 2], [0, 1, 3], [3, 0, 0]]), 4)
  trie = trie_lib.build_trie(sids)
  state = trie.advance(jnp.zeros(3, jnp.int32), jnp.array([-1, 4, 0]))
  assert state[:2].tolist() == [-1, -1]
  assert state[2] > 0
  again = trie.advance(state[:2], jnp.array([0, 0]))
  assert again.tolist() == [-1, -1]


def test_a_retired_tuple_is_not_in_the_trie():
  sids = SemanticIds(np.array([[0, 1], [0, 3]]), 4, np.array([[0, 2], [1, 1]]))
  trie = trie_lib.build_trie(sids)
  root = jnp.zeros((), jnp.int32)
  assert trie.allowed(root).tolist() == [True, False, False, False]
  under = trie.advance(root, jnp.zeros((), jnp.int32))
  assert trie.allowed(under).tolist() == [False, True, False, True]
