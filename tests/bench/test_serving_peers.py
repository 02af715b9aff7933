"""The peers of the service: the same answers, or those of trees."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('starlette', reason='needs the extra: gr2_jax[serve]')
pytest.importorskip('lightgbm', reason='needs the extra: gr2_jax[report]')
torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from gr2_jax.baselines import gbdt  # noqa: E402
from gr2_jax.bench import serving_torch, serving_trees  # noqa: E402
from gr2_jax.data import slates as slates_lib  # noqa: E402
from gr2_jax.policy import ranking  # noqa: E402
from gr2_jax.stages import baselines  # noqa: E402

from .. import tiny  # noqa: E402
from ..serving.conftest import reranker, slates  # noqa: E402, F401

pytestmark = pytest.mark.slow

GRAMMAR = tiny.GRAMMAR
VOCABULARY = tiny.MODEL.vocab_size


@pytest.fixture(scope='module')
def theirs(reranker):  # noqa: F811
  return serving_torch.beside(reranker, ranking.MODES, 8)


def of_several_sizes(slates):  # noqa: F811
  """Slates whose prompts differ in length."""
  found = []
  for place, slate in enumerate(slates):
    n = 1 + place % len(slate['candidates'])
    few = {name: slate[name][:n] for name in ('candidates', 'scores')}
    kept = 3 * (place % 3)
    few |= {
      name: slate[name][:kept]
      for name in ('history', 'history_grades', 'history_times')
      if name in slate
    }
    found.append(slate | few)
  return found


@pytest.mark.parametrize('mode', ranking.MODES)
def test_transformers_answers_as_the_policy(reranker, theirs, slates, mode):  # noqa: F811
  rows = of_several_sizes(slates[:16])
  assert len({len(slate['candidates']) for slate in rows}) > 3
  asked = [
    (reranker.parse(row, 'here', place), place)
    for place, row in enumerate(rows)
  ]
  orders = set()
  for batch in (asked[:8], asked[8:]):
    ours, found = reranker.answer(batch, mode), theirs.answer(batch, mode)
    assert (found.prompts, found.decoded) == (ours.prompts, ours.decoded)
    for line, wanted in zip(found.lines, ours.lines, strict=True):
      scores = wanted.pop('scores')
      np.testing.assert_allclose(line.pop('scores'), scores, atol=3e-5)
      assert line == wanted
      orders.add(tuple(wanted['order']))
  assert len(orders) > 4


def test_transformers_refuses_memory_tokens(reranker):  # noqa: F811
  own = reranker.policy
  spec = own.spec.with_context('memory:2+candidates:evidence')
  other = dataclasses.replace(
    reranker, policy=dataclasses.replace(own, spec=spec)
  )
  with pytest.raises(ValueError, match='through memory tokens'):
    serving_torch.beside(other, ('score',), 8)


@pytest.mark.parametrize('thinking', [False, True])
def test_the_mask_equals_the_grammar(thinking):
  rng = np.random.default_rng(0)
  count, begin, budget = np.array([5, 1, 3, 5]), 2, 10
  facts, shape = jnp.asarray(count), count.shape
  mask = serving_torch.PermutationMask(
    GRAMMAR, torch.tensor(count), begin, budget, thinking
  )
  ids = np.full((len(count), begin), GRAMMAR.slot_base)  # Not an answer's.
  progress = GRAMMAR.start(facts, shape, thinking)
  closed = set()
  for t in range(budget):
    wanted = np.asarray(
      GRAMMAR.allowed(facts, progress, jnp.full(shape, budget - t), VOCABULARY)
    )
    logits = torch.tensor(rng.normal(size=wanted.shape))
    found = mask(torch.tensor(ids), logits).numpy()
    going = ~np.asarray(progress.done)
    np.testing.assert_array_equal(np.isfinite(found)[going], wanted[going])
    np.testing.assert_array_equal(found[wanted], logits.numpy()[wanted])
    # One ends its reasoning early, and slots are named within it.
    token = np.array([rng.choice(np.flatnonzero(row)) for row in wanted])
    if thinking and t == 1:
      token[0] = GRAMMAR.think_end
    if thinking and t == 0:
      token[:] = GRAMMAR.slot_base
    closed |= {t for row in token if row == GRAMMAR.think_end}
    ids = np.concatenate([ids, token[:, None]], 1)
    progress = GRAMMAR.advance(facts, progress, jnp.asarray(token))
  assert np.asarray(progress.done).all()
  assert len(closed) > 1 or not thinking


@pytest.fixture(scope='module')
def booster(world):
  """Trees that split the few slates of the tiny world."""
  config = serving_trees.baselines_config.gbdt(test=True)
  config.min_data_in_leaf = 2
  train = slates_lib.read(world['slates'], 'train')
  columns = tuple(slates_lib.read_meta(world['slates'])['evidence'])
  return gbdt.fit(config, train, train, columns, 0)


def test_trees_order_as_their_scores(world, reranker, slates, booster):  # noqa: F811
  test = slates_lib.read(world['slates'], 'test')
  scores = gbdt.score(booster, test)
  wanted = baselines.rankings(scores, test.count)
  found = serving_trees.beside(reranker, booster, 8).rank(slates, 'score')
  assert len(found) == len(test) > 16
  changed = 0
  for row, line in enumerate(found):
    n = test.count[row]
    assert line['order'] == wanted[row, :n].tolist()
    names = slates[row]['candidates']
    assert line['ranking'] == [names[rank] for rank in line['order']]
    np.testing.assert_allclose(line['scores'], scores[row, :n], rtol=1e-6)
    assert (line['id'], line['verdict']) == (slates[row]['id'], 'valid')
    changed += line['order'] != list(range(n))
  assert changed > len(found) / 2


def test_trees_rank_unknown_items_last(reranker, slates, booster):  # noqa: F811
  asked = dict(slates[0], candidates=['nobody', *slates[0]['candidates'][1:]])
  (line,) = serving_trees.beside(reranker, booster, 8).rank([asked], 'score')
  assert line['ranking'][-1] == 'nobody'
  assert line['scores'][0] is None
  assert None not in line['scores'][1:]
  assert line['unknown_candidates'] == ['nobody']


def test_trees_are_those_of_the_baselines(world, reranker):  # noqa: F811
  found = serving_trees.fit(reranker)
  splits = {
    name: slates_lib.read(world['slates'], name) for name in baselines.SPLITS
  }
  wanted = baselines._fit_gbdt(
    serving_trees.baselines_config.section().gbdt,
    slates_lib.read(world['slates'], 'train'),
    splits,
    tuple(slates_lib.read_meta(world['slates'])['evidence']),
    0,
  )
  scores = gbdt.score(found, splits['test'])
  np.testing.assert_array_equal(scores, wanted['test'])
