"""Items from outside the catalog get IDs and lines as the catalog's have."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from gr2_jax.data import log as log_lib
from gr2_jax.semantic_ids import ids, tfidf, tokenizer
from gr2_jax.serving import described_items

from .. import tiny_world

TITLE_TOKENS = tiny_world.config().prompt.title_tokens


@pytest.fixture(scope='module')
def spec(world):
  return tiny_world.spec(world)


@pytest.fixture(scope='module')
def reader(world, spec):
  found, why = described_items.load(
    spec, tiny_world.mesh(), world['tokenizer'], TITLE_TOKENS
  )
  assert why == ''
  return found


@pytest.fixture(scope='module')
def sids(world):
  return ids.load(world['tokenizer'])


def test_nothing_is_compiled_before_it_is_asked_for_or_an_item_comes(
  world, spec
):
  tokenizer._codes.clear_cache()
  found, _ = described_items.load(
    spec, tiny_world.mesh(), world['tokenizer'], TITLE_TOKENS
  )
  assert tokenizer._codes._cache_size() == 0
  found.compile()
  assert tokenizer._codes._cache_size() == 1
  found.prompts_of(new_items(spec.catalog))
  assert tokenizer._codes._cache_size() == 1


def new_items(catalog, count=12):
  """Items whose titles nobody has, though their words are known."""
  return log_lib.Catalog(
    tuple(f'new-{i}' for i in range(count)),
    tuple(f'{catalog.titles[i]} {catalog.titles[-i]} II' for i in range(count)),
    catalog.categories[:count],
    catalog.years[:count],
  )


def test_a_copy_has_the_codes_of_the_item(spec, reader, sids):
  texts, of_item = tfidf.distinct(
    spec.catalog.titles, spec.catalog.categories, spec.catalog.years
  )
  first = np.unique(of_item, return_index=True)[1]
  rows = first[[3, 0, 11]]
  copies = spec.catalog.take(rows)
  np.testing.assert_array_equal(reader.name(copies), sids.codes[rows])
  lines = reader.prompts_of(copies).items
  size = len(spec.catalog)
  for field, own in spec.prompter.items.items():
    assert [lines[field][size + i] for i in range(3)] == [own[r] for r in rows]
    assert lines[field][:size] == own


def test_a_new_item_has_the_codes_of_its_text_and_a_tuple_of_its_own(
  spec, reader, sids
):
  items = new_items(spec.catalog)
  codes = reader.name(items)
  vectors = tfidf.embed(
    reader.space, items.titles, items.categories, items.years
  )
  fitted = reader.tokenizer.fitted_codes(vectors)
  np.testing.assert_array_equal(codes[:, : fitted.shape[1]], fitted)
  assert codes.shape == (12, sids.levels)
  free = sids.find(codes) < 0
  room = sids.codebook_size ** (sids.levels - fitted.shape[1])
  keys = ids.prefix_keys(sids.codes[:, : fitted.shape[1]], 8)
  for row, key in enumerate(ids.prefix_keys(fitted, 8)):
    assert free[row] == ((keys == key).sum() < room)
  assert free.any()


def test_an_item_is_read_by_itself(spec, reader):
  items = new_items(spec.catalog)
  together = reader.name(items)
  # Twice the same, and in another order.
  order = np.array([4, 4, 0, *range(11, 0, -1)])
  np.testing.assert_array_equal(reader.name(items.take(order)), together[order])
  for row in range(3):
    alone = reader.name(items.take(np.array([row])))
    np.testing.assert_array_equal(alone, together[row : row + 1])


def test_where_no_tuple_is_free_the_fitted_codes_stay(spec, reader, sids):
  everything = np.arange(sids.codebook_size**sids.levels)
  full = dataclasses.replace(reader, keys=everything)
  items = new_items(spec.catalog)
  fitted = reader.name(items)[:, :-1]
  np.testing.assert_array_equal(full.name(items)[:, :-1], fitted)


@pytest.mark.parametrize('kind', ['uniform', 'digit'])
def test_other_last_levels_do_not_depend_on_other_items(spec, reader, kind):
  config = reader.tokenizer.config.copy_and_resolve_references()
  config.last_level = kind
  other = dataclasses.replace(
    reader, tokenizer=dataclasses.replace(reader.tokenizer, config=config)
  )
  items = new_items(spec.catalog)
  together = other.name(items)
  np.testing.assert_array_equal(together[:, :-1], reader.name(items)[:, :-1])
  for row in (0, 5):
    alone = other.name(items.take(np.array([row])))
    np.testing.assert_array_equal(alone, together[row : row + 1])


def test_no_line_is_longer_than_the_catalogs_longest(spec, reader):
  words = ' '.join(f'{a}{b}' for a in 'abcdefgh' for b in 'qwxyz')
  endless = log_lib.Catalog(
    ('x',), (words,), (tuple(words.split()),), np.array([0])
  )
  line = {
    field: rows[-1] for field, rows in reader.prompts_of(endless).items.items()
  }
  prompter = spec.prompter
  for fields in (prompter.fields, prompter.history_fields):
    shown = [field for field in fields if field in line]
    lines = zip(*(prompter.items[field] for field in shown), strict=True)
    longest = max(sum(map(len, parts)) for parts in lines)
    assert sum(len(line[field]) for field in shown) <= longest
  cut = described_items._cut(
    {'sid': (1, 2), 'title': (3, 4, 5), 'categories': (6, 7)},
    {('sid', 'title', 'categories'): 6, ('title',): 2},
  )
  assert cut == {'sid': (1, 2), 'title': (3, 4), 'categories': (6,)}


def test_without_a_reader_the_reason_is_returned(world, spec, tmp_path):
  home = tmp_path / 'tokenizer-1'
  shutil.copytree(world['tokenizer'], home)

  def why():
    found, reason = described_items.load(
      spec, tiny_world.mesh(), home, TITLE_TOKENS
    )
    assert found is None
    return reason

  (home / 'text.npz').rename(home / 'away.npz')
  assert 'tokenizer-1: no whole tokenizer in it' in why()
  (home / 'text.npz').write_bytes(b'PK torn')
  assert 'text.npz: not a whole text space' in why()
  (home / 'text.npz').unlink()
  (home / 'away.npz').rename(home / 'text.npz')
  shutil.rmtree(home / 'params')
  assert 'no checkpoint there' in why()
  run = json.loads((home / 'config.json').read_text())
  run['config']['tokenizer']['text_encoder'] = 'minilm'
  (home / 'config.json').write_text(json.dumps(run))
  assert "text_encoder='minilm' is a language model" in why()
  (home / 'config.json').unlink()
  assert 'config.json: missing' in why()
