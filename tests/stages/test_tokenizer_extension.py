import shutil

import pytest

from gr2_jax.pipeline import artifacts
from gr2_jax.semantic_ids import ids as ids_lib
from gr2_jax.semantic_ids import training
from gr2_jax.stages import tokenizer

from .. import tiny_tokenizer


def table(directory):
  """Item id -> tuple."""
  ids = ids_lib.load_item_ids(directory)
  codes = map(tuple, ids_lib.load(directory).codes.tolist())
  return dict(zip(ids, codes, strict=True))


@pytest.fixture(scope='module', params=['unused', 'digit'])
def base(request, tmp_path_factory):
  """An artifact of the first thirty items, ids a0 .. a29."""
  root = tmp_path_factory.mktemp(request.param)
  ids = [f'a{row}' for row in range(30)]
  inputs = tiny_tokenizer.write_catalog(
    root / 'slates', tiny_tokenizer.ITEMS[:30], ids
  )
  tiny_tokenizer.finish(
    tiny_tokenizer.short(last_level=request.param), inputs, root / 'base'
  )
  return root / 'base'


def extend(earlier, root, rows, name='next', **change):
  """Extends an artifact to the catalog of these rows of ITEMS."""
  ids = [f'a{row}' for row in rows]
  items = [
    tiny_tokenizer.ITEMS[row % len(tiny_tokenizer.ITEMS)] for row in rows
  ]
  inputs = tiny_tokenizer.write_catalog(root / f'slates of {name}', items, ids)
  kept = artifacts.read_config(earlier)['tokenizer']['last_level']
  config = tiny_tokenizer.short(
    **{'last_level': kept, 'extends': str(earlier)} | change
  )
  return tiny_tokenizer.finish(config, inputs, root / name)


def test_old_items_keep_their_tuples_and_new_ones_get_their_own(base, tmp_path):
  # Another order; a0 .. a2 have left; a42 and a43 have the text of a0 and a1,
  # a47 that of a5.
  rows = [47, *range(41, 2, -1), 42, 43]
  results = extend(base, tmp_path, rows)
  old, new = table(base), table(tmp_path / 'next')
  assert list(new) == [f'a{row}' for row in rows]
  assert {k: new[k] for k in old if k in new} == {
    k: v for k, v in old.items() if k not in ('a0', 'a1', 'a2')
  }
  assert len(set(new.values()) | set(old.values())) == 30 + 15
  assert results['known'] == 27
  assert results['new'] == 15
  assert results['retired'] == 3
  assert results['uniqueness'] == 1.0
  sids = ids_lib.load(tmp_path / 'next')
  assert sids.generation == 1
  assert {tuple(t) for t in sids.retired.tolist()} == {
    old[name] for name in ('a0', 'a1', 'a2')
  }
  # Items of one text are neighbors, whenever they came.
  for name, like in (('a42', 'a0'), ('a43', 'a1'), ('a47', 'a5')):
    assert new[name][:3] == old[like][:3]


def test_no_tuple_is_ever_given_twice(base, tmp_path):
  """Generations that lose and win items; one of them wins none."""
  generations = [
    [*range(5, 30), *range(42, 46)],  # a0 .. a4 leave, like texts come
    [*range(5, 27), *range(42, 46)],  # nobody comes
    [*range(3, 27), *range(84, 90)],  # a3, a4 are back; twins of a0 .. a5
  ]
  owner = {codes: (name, 0) for name, codes in table(base).items()}
  earlier, before = base, table(base)
  for number, rows in enumerate(generations, 1):
    results = extend(earlier, tmp_path, rows, f'g{number}')
    earlier = tmp_path / f'g{number}'
    assert results['uniqueness'] == 1.0
    now = table(earlier)
    for name, codes in now.items():
      if name in before:
        assert codes == before[name]
      else:
        assert codes not in owner
        owner[codes] = name, number
    assert ids_lib.load(earlier).generation == number
    before = now
  sids = ids_lib.load(earlier)
  assert len(sids) + len(sids.retired) == len(owner)
  # Those that came back are new items, beside their own retired tuples.
  assert {number for name, number in owner.values() if name == 'a3'} == {0, 3}


def test_a_catalog_that_stays_the_same_stays_the_same(base, tmp_path):
  results = extend(base, tmp_path, range(30))
  assert table(tmp_path / 'next') == table(base)
  assert results['new'] == results['retired'] == 0
  assert results['known'] == 30


def test_an_extension_that_was_killed_goes_on(base, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(training, 'load', tiny_tokenizer.die)
    with pytest.raises(KeyboardInterrupt):
      extend(base, tmp_path, range(35))
  extend(base, tmp_path, range(35))
  extend(base, tmp_path, range(35), 'whole')
  assert table(tmp_path / 'next') == table(tmp_path / 'whole')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'latent': 4}, r'tokenizer\.latent is 4, but .*base was made with 8'),
    ({'hidden': (8,)}, r'tokenizer\.hidden is \(8,\).*made with \[16\]'),
    ({'seed': 1}, r'tokenizer\.seed is 1, but .* was made with 0'),
    (
      {'last_level': 'uniform'},
      "tokenizer.extends: last_level='uniform' may give.*'unused' and 'digit'",
    ),
  ],
)
def test_an_extension_is_by_the_same_tokenizer(base, tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    extend(base, tmp_path, range(35), **change)


def test_fields_that_name_nothing_may_differ(base, tmp_path):
  extend(base, tmp_path, range(35), log_every=7, text_batch_size=3)
  old, new = table(base), table(tmp_path / 'next')
  assert {name: new[name] for name in old} == old


def test_what_cannot_be_extended_is_named(base, tmp_path):
  shutil.copytree(base, tmp_path / 'partly')
  (tmp_path / 'partly' / 'results.json').unlink()
  shutil.copytree(base, tmp_path / 'stranger')
  (tmp_path / 'stranger' / 'sids.jsonl').unlink()
  shutil.copytree(base, tmp_path / 'nameless')
  (tmp_path / 'nameless' / 'config.json').unlink()
  shutil.copytree(base, tmp_path / 'torn')
  (tmp_path / 'torn' / 'config.json').write_text('{"config": {"to')
  for name, message in (
    ('partly', r'tokenizer\.extends: .*partly is not a finished artifact'),
    ('nowhere', r'tokenizer\.extends: .*nowhere is not a finished artifact'),
    ('nameless', r'nameless/config\.json: missing; give the folder of an'),
    ('torn', r'torn/config\.json: not valid JSON'),
    ('stranger', r'stranger/sids\.jsonl: missing'),
  ):
    inputs = tiny_tokenizer.write_catalog(
      tmp_path / 'slates', tiny_tokenizer.ITEMS
    )
    kind = artifacts.read_config(base)['tokenizer']['last_level']
    config = tiny_tokenizer.short(extends=str(tmp_path / name), last_level=kind)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      tokenizer.run(config, inputs, tmp_path / 'run')


def test_the_capacity_counts_retired_tuples(tmp_path):
  """Of 2^4 tuples twelve are taken: four are left, whoever left."""
  change = dict(codebook_size=2, batch_size=8)
  ids = [f'a{row}' for row in range(12)]
  inputs = tiny_tokenizer.write_catalog(
    tmp_path / 'slates', tiny_tokenizer.ITEMS[:12], ids
  )
  tiny_tokenizer.finish(
    tiny_tokenizer.short(**change), inputs, tmp_path / 'base'
  )
  extend(tmp_path / 'base', tmp_path, [*range(6), 20, 21, 22, 23], **change)
  with pytest.raises(ValueError, match='do not fit in 2\\^4 = 16'):
    extend(
      tmp_path / 'base', tmp_path, [*range(6), *range(20, 25)], 'over', **change
    )
