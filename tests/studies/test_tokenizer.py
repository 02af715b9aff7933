import json

import pytest
from ml_collections import ConfigDict

from configs import study_tokenizer as recipe
from configs import tokenizer as tokenizer_config
from gr2_jax.pipeline import artifacts
from gr2_jax.semantic_ids import training
from gr2_jax.stages import tokenizer as tokenizer_stage
from gr2_jax.studies import study as study_lib
from gr2_jax.studies import tokenizer

from .. import tiny_world

pytestmark = pytest.mark.slow

FIELDS = {  # technique -> what it changes
  'kmeans': ('init_items', 40),
  'ema': ('codebook', 'ema'),
  'random': ('last_level', 'unused'),
}


def section(techniques=tuple(FIELDS), others=None, ranked=()):
  """A study of three techniques."""
  config = recipe.section(test=True)
  config.techniques = techniques
  config.ranked = ranked
  config.others = ConfigDict(others or {})
  config.changes.kmeans.init_items = 40
  return config


# ------------------------------------------------------------------- Recipes


def test_recipes_are_alone_pairs_all_and_all_but_one():
  techniques = ('kmeans', 'ema', 'random', 'diversity', 'reset', 'contrastive')
  recipes = tokenizer.make_recipes(section(techniques))
  sizes = [0 if name == 'plain' else len(name.split('+')) for name in recipes]
  assert [sizes.count(n) for n in range(7)] == [1, 6, 15, 0, 0, 6, 1]
  assert list(recipes)[0] == 'plain'
  plain = recipe.PLAIN
  assert recipes['plain'] == plain
  changes = recipe.TECHNIQUES | {'kmeans': {'init_items': 40}}
  for name, fields in recipes.items():
    want = dict(plain)
    for part in name.split('+') if name != 'plain' else ():
      want |= changes[part]
    assert fields == want, name


def test_few_techniques_make_no_recipe_twice():
  names = [
    list(tokenizer.make_recipes(section(tuple(FIELDS)[:count])))
    for count in range(4)
  ]
  assert names == [
    ['plain'],
    ['plain', 'kmeans'],
    ['plain', 'kmeans', 'ema', 'kmeans+ema'],
    [
      'plain', 'kmeans', 'ema', 'random', 'kmeans+ema', 'kmeans+random',
      'ema+random', 'kmeans+ema+random',
    ],
  ]  # fmt: skip


def test_others_stand_on_the_plain_recipe_and_ranked_ones_are_added():
  others = {'a k-means': {'codebook': 'kmeans', 'init_items': 9}}
  stage = section(('ema',), others, ('plain', 'kmeans+random', 'nonsense'))
  recipes = tokenizer.make_recipes(stage)
  assert list(recipes) == ['plain', 'ema', 'a k-means', 'kmeans+random']
  assert recipes['a k-means'] == recipe.PLAIN | others['a k-means']
  assert recipes['kmeans+random'] == recipe.PLAIN | {
    'init_items': 40, 'last_level': 'unused',
  }  # fmt: skip


def test_a_ranked_name_without_recipe_is_named_before_any_run(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(artifacts, 'run_stage', lambda *_: pytest.fail('runs'))
  config = ConfigDict({'study_tokenizer': section(ranked=('plain', 'emma'))})
  with pytest.raises(ValueError, match=r"ranked: 'emma' is no recipe.*plain"):
    tokenizer.run(config, {}, tmp_path)


def test_the_published_recipes_change_fields_that_exist():
  config = recipe.get_config('dataset=world,seeds=3')
  assert config.stage == 'study_tokenizer'
  assert list(config.seeds) == [0, 1, 2]
  known = tokenizer_config.section()
  recipes = tokenizer.make_recipes(config.study_tokenizer)
  assert len(recipes) >= 16
  for name, fields in recipes.items():
    for field, value in fields.items():
      assert isinstance(value, type(known[field])), (name, field)
    training.check(ConfigDict(known.to_dict() | fields))
  assert set(config.study_tokenizer.ranked) <= set(recipes)
  assert set(tokenizer.PUBLISHED) <= set(recipe.TECHNIQUES)
  by_hand = tokenizer_config.get_config('sweep,dataset=world,seeds=3')
  assert by_hand.to_json() == config.to_json()


# ------------------------------------------------------------------- Effects


def row(uniqueness, before):
  return {'uniqueness': uniqueness, 'uniqueness_before_last_level': before}


def test_effects_by_hand():
  rows = {
    'plain': row(0.1, 0.05),
    'ema': row(0.5, 0.4),
    'random': row(0.3, 0.1),
    'ema+random': row(1.0, 0.45),
    'a k-means': row(0.9, 0.9),
    'kmeans+ema+random': row(0.0, 0.0),  # of another technique: no pair
  }
  found = tokenizer.effects(rows, ('ema', 'random'))
  want = {
    # (.5 - .1, 1 - .3), (.4 - .05, .45 - .1)
    'ema': {'alone': 40, 'mean': 55, 'before_last': 35, 'pairs': 2},
    # (.3 - .1, 1 - .5), (.1 - .05, .45 - .4)
    'random': {'alone': 20, 'mean': 35, 'before_last': 5, 'pairs': 2},
  }
  assert set(found) == set(want)
  for name, values in want.items():
    assert found[name] == pytest.approx(values), name


def test_a_row_is_the_mean_over_seeds():
  runs = [
    {
      'uniqueness': u, 'uniqueness_before_last_level': u / 2,
      'reconstruction_r2': 0.5, 'usage': [u, 1.0],
      'largest_prefix': [n, 1],
    }
    for u, n in ((0.2, 4), (0.6, 7))
  ]  # fmt: skip
  found = tokenizer._row(runs)
  assert found == {
    'uniqueness': pytest.approx(0.4),
    'uniqueness_deviation': pytest.approx(0.2),
    'uniqueness_before_last_level': pytest.approx(0.2),
    'uniqueness_before_last_level_deviation': pytest.approx(0.1),
    'reconstruction_r2': 0.5,
    'reconstruction_r2_deviation': 0.0,
    'usage': pytest.approx([0.4, 1.0]),
    'largest_prefix': 5.5,
  }


# ----------------------------------------------------------------- The study


CONFIG = dict(
  study_tokenizer__techniques=('ema', 'random'),
  study_tokenizer__ranked=('plain', 'ema+random'),
  study_tokenizer__test_slates=8,
  sft__steps=2,
  midtrain__steps=2,
)
GRID = CONFIG | dict(study_tokenizer__ranked=(), seeds=(0, 1))
RECIPES = ('plain', 'ema', 'random', 'ema+random')


def run(root, changes, name='study_tokenizer'):
  directory = artifacts.run_stage(
    tiny_world.config(**changes), name, root, log=lambda _: None
  )
  return directory, artifacts.read_results(directory)


@pytest.fixture(scope='module')
def studies(tmp_path_factory):
  """The grid with two seeds, and a study that ranks with one of them."""
  root = tmp_path_factory.mktemp('study')
  with pytest.MonkeyPatch.context() as patch, artifacts.lock(root):
    grid = run(root, GRID)
    patch.setattr(
      tokenizer_stage, 'run', lambda *_: pytest.fail('a run is made again')
    )
    return grid, run(root, CONFIG)


@pytest.fixture(scope='module')
def grid(studies):
  return studies[0]


@pytest.fixture(scope='module')
def study(studies):
  return studies[1]


def tokenizers(directory):
  return [
    (artifacts.read_config(path)['tokenizer'], artifacts.read_results(path))
    for path in sorted(directory.parent.glob('tokenizer-*'))
  ]


def test_every_recipe_is_run_with_every_seed_once(grid):
  directory, results = grid
  assert tuple(results['rows']) == tuple(sorted(RECIPES))
  config = tiny_world.config(**CONFIG)
  recipes = tokenizer.make_recipes(config.study_tokenizer)
  assert tuple(recipes) == RECIPES
  runs = tokenizers(directory)
  assert len(runs) == 2 * len(RECIPES)
  for name, fields in recipes.items():
    own = [
      result for section_, result in runs
      if {k: section_[k] for k in fields} == fields
    ]  # fmt: skip
    assert len(own) == 2
    want = tokenizer._row(own)
    found = dict(results['rows'][name])
    assert found.pop('usage') == pytest.approx(want.pop('usage'))
    assert found == pytest.approx(want)
  assert {section_['seed'] for section_, _ in runs} == {0, 1}
  assert results['seeds'] == 2
  assert results['rows']['ema+random']['uniqueness'] == 1.0


def test_effects_are_of_the_rows(grid):
  _, results = grid
  assert results['effects'] == tokenizer.effects(
    results['rows'], ('ema', 'random')
  )


def test_policies_of_two_recipes_are_compared(study):
  directory, results = study
  ranking = results['ranking']
  assert set(ranking) == {'plain', 'ema+random'}
  assert ranking['plain']['gain'] == 0.0
  assert ranking['plain']['gain_ci'] == [0.0, 0.0]
  other = ranking['ema+random']
  assert other['gain'] == pytest.approx(
    other['n@5'] - ranking['plain']['n@5'], abs=1e-6
  )
  assert other['gain_ci'][0] <= other['gain'] <= other['gain_ci'][1]
  assert other['incoming_n@5'] == ranking['plain']['incoming_n@5']
  # Each was tried once, and reads the IDs of its own recipe.
  policies = list(directory.parent.glob('sft-*'))
  assert len(policies) == 2
  assert {p.stem for p in directory.glob('*.npz')} == {p.name for p in policies}
  read = {
    json.loads((p / 'config.json').read_text())['inputs']['tokenizer']
    for p in policies
  }
  assert len(read) == 2
  kinds = [
    artifacts.read_config(directory.parent / name)['tokenizer']['last_level']
    for name in read
  ]
  assert sorted(kinds) == ['fitted', 'unused']


def test_table_and_figure_are_written(study):
  directory, results = study
  table = (directory / tokenizer.TABLE).read_text()
  lines = [line for line in table.splitlines() if line.strip()]
  for name in RECIPES:
    value = 100 * results['rows'][name]['uniqueness']
    assert any(name in line and f'{value:.1f}' in line for line in lines), name
  published = [line for line in lines if '+66.2' in line]
  assert len(published) == 1
  assert f'{results["effects"]["ema"]["mean"]:+.1f}' in published[0]
  assert table.count('\n\n') == 2  # three tables
  picture = (directory / tokenizer.FIGURE).read_bytes()
  assert picture[:4] == b'\x89PNG'


def test_a_study_that_was_killed_makes_nothing_twice(study, monkeypatch):
  directory, results = study
  text = (directory / tokenizer.TABLE).read_text()
  (directory / 'results.json').unlink()
  monkeypatch.setattr(
    tokenizer_stage, 'run', lambda *_: pytest.fail('a run is made again')
  )
  monkeypatch.setattr(
    study_lib.ranking_lib, 'rank',
    lambda *_, **__: pytest.fail('slates are ranked again'),
  )  # fmt: skip
  with artifacts.lock(directory.parent):
    again = artifacts.run_stage(
      tiny_world.config(**CONFIG), 'study_tokenizer', directory.parent,
      log=lambda _: None,
    )  # fmt: skip
  assert again == directory
  assert artifacts.read_results(directory) == results
  assert (directory / tokenizer.TABLE).read_text() == text


def test_nothing_ranked_needs_no_policy(grid):
  directory, results = grid
  assert results['ranking'] == {}
  assert not list(directory.glob('*.npz'))
  table = (directory / tokenizer.TABLE).read_text()
  assert table.count('\n\n') == 1  # two tables
