import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gr2_jax.models import semantic_ids
from gr2_jax.models.semantic_ids import SemanticIds


@pytest.fixture(autouse=True, scope='module')
def no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield


def tuples(size=4, levels=3, most=30):
  return hnp.arrays(
    np.int32,
    st.tuples(st.integers(1, most), st.just(levels)),
    elements=st.integers(0, size - 1),
  )


@pytest.fixture
def sids():
  return SemanticIds(np.array([[0, 1, 2], [0, 1, 3], [3, 0, 0]]), 4)


@settings(max_examples=50, deadline=None)
@given(tuples())
def test_find_is_the_exact_inverse(codes):
  sids = SemanticIds(codes, 4)
  first = {}
  for item, code in enumerate(codes.tolist()):
    first.setdefault(tuple(code), item)
  every = np.stack(np.indices((4, 4, 4)), -1)
  found = sids.find(every)
  for code in np.ndindex(4, 4, 4):
    assert found[code] == first.get(code, -1)


def test_find_rejects_codes_outside_the_codebook(sids):
  np.testing.assert_array_equal(sids.find([[0, 1, 2], [0, 0, 6]]), [0, -1])
  assert sids.find([-1, 5, 2]) == -1
  with pytest.raises(ValueError, match=r'codes must be \[..., 3\]'):
    sids.find([[0, 1]])


@settings(max_examples=50, deadline=None)
@given(tuples(size=3))
def test_statistics_equal_counting(codes):
  got = SemanticIds(codes, 3).statistics()
  rows = [tuple(row) for row in codes.tolist()]
  assert got['items'] == len(rows)
  assert got['distinct'] == len(set(rows))
  assert got['uniqueness'] == pytest.approx(
    np.mean([rows.count(row) == 1 for row in rows])
  )
  heads = [row[:2] for row in rows]
  assert got['uniqueness_before_last_level'] == pytest.approx(
    np.mean([heads.count(head) == 1 for head in heads])
  )
  for level in range(3):
    share = np.array([np.mean(codes[:, level] == c) for c in range(3)])
    used = share[share > 0]
    assert got['usage'][level] == pytest.approx(len(used) / 3)
    assert got['dead_codes'][level] == 3 - len(used)
    assert got['entropy'][level] == pytest.approx(-(used * np.log2(used)).sum())
    prefixes = [row[: level + 1] for row in rows]
    assert got['prefixes'][level] == len(set(prefixes))
    assert got['largest_prefix'][level] == max(map(prefixes.count, prefixes))


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
@given(tuples(most=12))
def test_trie_allows_exactly_the_catalog(codes):
  sids = SemanticIds(codes, 4)
  trie = padded(semantic_ids.build_trie(sids), 64)
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
  trie = semantic_ids.build_trie(sids)

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


def test_code_outside_the_codebook_leaves_the_trie(sids):
  trie = semantic_ids.build_trie(sids)
  state = trie.advance(jnp.zeros(3, jnp.int32), jnp.array([-1, 4, 0]))
  assert state[:2].tolist() == [-1, -1]
  assert state[2] > 0
  again = trie.advance(state[:2], jnp.array([0, 0]))
  assert again.tolist() == [-1, -1]


def test_save_and_load(tmp_path, sids):
  sids.save(tmp_path)
  again = semantic_ids.load(tmp_path)
  np.testing.assert_array_equal(again.codes, sids.codes)
  assert again.codebook_size == 4
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'sids.json', 'sids.npz',
  ]  # fmt: skip


def test_export(tmp_path, sids):
  path = tmp_path / 'sids.jsonl'
  sids.export(path, ('a', 'é', 'c'))
  rows = [json.loads(line) for line in path.open(encoding='utf-8')]
  assert rows[1] == {'item_id': 'é', 'codes': [0, 1, 3]}
  assert len(rows) == 3
  with pytest.raises(ValueError, match="'a' occurs twice.*items 0 and 2"):
    sids.export(path, ('a', 'b', 'a'))
  with pytest.raises(ValueError, match='2 item ids for 3 items'):
    sids.export(path, ('a', 'b'))


def test_damaged_artifacts_are_named(tmp_path, sids):
  with pytest.raises(FileNotFoundError, match=r'sids\.npz: missing'):
    semantic_ids.load(tmp_path)
  sids.save(tmp_path)
  whole = (tmp_path / 'sids.npz').read_bytes()
  for cut in (0, 20, len(whole) - 30):
    (tmp_path / 'sids.npz').write_bytes(whole[:cut])
    with pytest.raises(ValueError, match='damaged'):
      semantic_ids.load(tmp_path)
  (tmp_path / 'sids.npz').write_bytes(whole)
  facts = json.loads((tmp_path / 'sids.json').read_text())
  for change, message in (
    ({'version': 99}, 'version 99'),
    ({'items': 5}, r'\(3, 3\).*\(5, 3\)'),
  ):
    (tmp_path / 'sids.json').write_text(json.dumps(facts | change))
    with pytest.raises(ValueError, match=message):
      semantic_ids.load(tmp_path)


@pytest.mark.parametrize(
  ('codes', 'size', 'message'),
  [
    (np.zeros((0, 3), int), 4, 'items, levels'),
    (np.zeros(3, int), 4, 'items, levels'),
    (np.zeros((2, 3)), 4, 'integers'),
    (np.array([[0, 1], [0, 4]]), 4, 'item 1: code 4 at level 2'),
    (np.zeros((1, 8), int), 256, 'lower tokenizer.levels'),
  ],
)
def test_bad_codes_are_named(codes, size, message):
  with pytest.raises(ValueError, match=message):
    SemanticIds(codes, size)


def test_frozen(sids):
  with pytest.raises(dataclasses.FrozenInstanceError):
    sids.codebook_size = 8
  with pytest.raises(ValueError, match='read-only'):
    sids.codes[0, 0] = 1
