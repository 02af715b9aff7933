import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pyarrow import parquet

from gr2_jax.semantic_ids import ids
from gr2_jax.semantic_ids.ids import SemanticIds


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


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_extending_keeps_tuples_and_retires_those_of_items_that_leave(data):
  space = data.draw(st.permutations(range(27)))
  every = np.stack(np.unravel_index(space, (3, 3, 3)), -1)
  sids = SemanticIds(every[:4], 3)
  given_out = 4
  dead = set()
  for generation in (1, 2):
    stay = data.draw(st.lists(st.sampled_from(range(len(sids))), unique=True))
    new = data.draw(st.integers(0 if stay else 1, 5))
    rows = np.array(data.draw(st.permutations([*stay, *[-1] * new])))
    fresh = every[given_out : given_out + new]
    given_out += new
    after = sids.extend(rows, fresh)
    np.testing.assert_array_equal(
      after.codes[rows >= 0], sids.codes[rows[rows >= 0]]
    )
    np.testing.assert_array_equal(after.codes[rows < 0], fresh)
    gone = np.delete(sids.codes, stay, axis=0).tolist()
    dead |= {tuple(x) for x in gone}
    assert {tuple(x) for x in after.retired.tolist()} == dead
    assert after.generation == generation
    np.testing.assert_array_equal(
      after.taken, np.concatenate([after.codes, after.retired])
    )
    assert (after.find(after.retired) == -1).all()
    sids = after


def test_a_retired_tuple_is_never_given_again(sids):
  after = sids.extend([2, -1], [[1, 1, 1]])
  assert after.retired.tolist() == [[0, 1, 2], [0, 1, 3]]
  message = r'item 2 has the retired tuple \[0, 1, 3\]: .*last_level'
  with pytest.raises(ValueError, match=message):
    after.extend([0, 1, -1], [[0, 1, 3]])


def test_a_shared_tuple_stays_with_the_item_that_stays():
  sids = SemanticIds(np.array([[0, 1], [0, 1], [2, 2]]), 4)
  after = sids.extend([1], np.zeros((0, 2), int))
  assert after.codes.tolist() == [[0, 1]]
  assert after.retired.tolist() == [[2, 2]]


@pytest.mark.parametrize(
  ('rows', 'codes', 'message'),
  [
    ([0, 3], np.zeros((0, 3), int), r'-1\.\.2'),
    ([0, -2], np.zeros((0, 3), int), r'-1\.\.2'),
    ([1, 0, 1], np.zeros((0, 3), int), 'item 1 twice'),
    ([0, -1], np.zeros((2, 3), int), '2 new codes for 1 new items'),
  ],
)
def test_a_wrong_extension_is_named(sids, rows, codes, message):
  with pytest.raises(ValueError, match=message):
    sids.extend(rows, codes)


def test_save_and_load(tmp_path, sids):
  sids = sids.extend([2, -1, 0], [[1, 1, 1]])
  sids.save(tmp_path)
  again = ids.load(tmp_path)
  np.testing.assert_array_equal(again.codes, sids.codes)
  np.testing.assert_array_equal(again.retired, [[0, 1, 3]])
  assert again.codebook_size == 4
  assert again.generation == 1
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'sids.json', 'sids.npz',
  ]  # fmt: skip
  facts = json.loads((tmp_path / 'sids.json').read_text())
  statistics = sids.statistics()
  for name in ('usage', 'entropy', 'dead_codes'):
    assert facts[name] == statistics[name]


def test_exports_hold_ids_and_codes_in_catalog_order(tmp_path, sids):
  item_ids = ('a', 'é"\n', 'c')
  sids.export(tmp_path / 'sids.jsonl', item_ids)
  lines = (tmp_path / 'sids.jsonl').read_text(encoding='utf-8').splitlines()
  assert json.loads(lines[1]) == {'item_id': 'é"\n', 'codes': [0, 1, 3]}
  sids.export(tmp_path / 'sids.parquet', item_ids)
  table = parquet.read_table(tmp_path / 'sids.parquet')
  assert table['item_id'].to_pylist() == list(item_ids)
  assert table['codes'].to_pylist() == sids.codes.tolist()
  assert table.schema.field('codes').type == pa.list_(pa.int32(), 3)
  assert len(list(tmp_path.iterdir())) == 2


def test_exports_name_what_is_wrong(tmp_path, sids):
  for item_ids, message in (
    (('a', 'b', 'a'), "'a' occurs twice.*items 0 and 2"),
    (('a', '', 'b'), 'item 1 of the catalog has no id'),
    (('a', 'b'), '2 item ids for 3 items'),
  ):
    with pytest.raises(ValueError, match=message):
      sids.export(tmp_path / 'sids.jsonl', item_ids)
  with pytest.raises(ValueError, match=r"\.jsonl or \.parquet, not '\.csv'"):
    sids.export(tmp_path / 'sids.csv', ('a', 'b', 'c'))
  assert not list(tmp_path.iterdir())


def test_item_ids_come_back_and_fit_the_codes(tmp_path, sids):
  sids.save(tmp_path)
  with pytest.raises(FileNotFoundError, match=r'sids\.jsonl: missing'):
    ids.load_item_ids(tmp_path)
  path = tmp_path / 'sids.jsonl'
  sids.export(path, ('a', 'é', 'c'))
  assert ids.load_item_ids(tmp_path) == ('a', 'é', 'c')
  lines = path.read_text(encoding='utf-8').splitlines()
  for change, message in (
    (lines[:2], '2 lines for 3 items'),
    ([*lines, lines[0]], ":4: 'a' has codes"),
    ([lines[1], lines[0], lines[2]], ":1: 'é' has codes.*has others"),
    ([lines[0], lines[1][:9]], ':2: no item_id and codes there'),
    ([lines[0], '[1]'], ':2: no item_id and codes there'),
    ([lines[0], lines[1].replace('é', 'a'), lines[2]], "'a' occurs twice"),
  ):
    path.write_text('\n'.join(change), encoding='utf-8')
    with pytest.raises(ValueError, match=message):
      ids.load_item_ids(tmp_path)


def test_damaged_artifacts_are_named(tmp_path, sids):
  with pytest.raises(FileNotFoundError, match=r'sids\.npz: missing'):
    ids.load(tmp_path)
  sids.save(tmp_path)
  whole = (tmp_path / 'sids.npz').read_bytes()
  for cut in (0, 20, len(whole) - 30):
    (tmp_path / 'sids.npz').write_bytes(whole[:cut])
    with pytest.raises(ValueError, match='damaged'):
      ids.load(tmp_path)
  (tmp_path / 'sids.npz').write_bytes(whole)
  facts = json.loads((tmp_path / 'sids.json').read_text())
  for change, message in (
    ({'version': 1}, 'version 1.*reads version 2.*delete the folder'),
    ({'items': 5}, r'\(3, 3\).*\(5, 3\)'),
    ({'retired': 1}, r'\(0, 3\).*\(1, 3\)'),
  ):
    (tmp_path / 'sids.json').write_text(json.dumps(facts | change))
    with pytest.raises(ValueError, match=message):
      ids.load(tmp_path)
  del facts['generation']
  (tmp_path / 'sids.json').write_text(json.dumps(facts))
  with pytest.raises(ValueError, match=r'damaged.*generation'):
    ids.load(tmp_path)


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


def test_bad_retired_tuples_and_generations_are_named(sids):
  for fields, message in (
    ({'retired': [[0, 1]]}, r'retired must be \[tuples, 3\], got \(1, 2\)'),
    ({'retired': [[0, 1, 4]]}, 'retired tuple 0: code 4 at level 3'),
    ({'retired': [[0.0, 1.0, 1.0]]}, 'retired tuples must be integers'),
    ({'generation': -1}, 'generation is -1'),
  ):
    with pytest.raises(ValueError, match=message):
      SemanticIds(sids.codes, 4, **fields)
