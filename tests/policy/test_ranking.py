import functools

import jax
import numpy as np
import pytest

from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.ops import parsing
from gr2_jax.policy import policy
from gr2_jax.policy import ranking as ranking_lib
from gr2_jax.prompts import examples

from .. import tiny_world


@pytest.fixture(scope='module')
def spec(world):
  return tiny_world.spec(world)


@pytest.fixture(scope='module')
def params(world, spec):
  """Trained ones, with noise: the answers differ from slate to slate."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32),
    spec.load_params(world['sft'], tiny_world.mesh()),
  )


@pytest.fixture(scope='module')
def slates(world):
  source = slates_lib.SlateSource(world['slates'], 'test')
  return [source[i] for i in range(min(len(source), 11))]


@pytest.fixture(scope='module')
def rank(spec, params):
  settings = dict(thinking=False, order='shuffled', batch_size=8, seed=0)
  ranker = policy.Policy(spec, params, tiny_world.mesh())
  return lambda slates, **kwargs: ranking_lib.rank(
    ranker, slates, **(settings | kwargs)
  )


@pytest.fixture(scope='module')
def ranked(rank, slates):
  return rank(slates)


def test_every_slate_is_ranked_once_and_validly(ranked, slates):
  n = len(slates)
  for found in (ranked.generated, ranked.readout):
    assert found.shape == (n, 5)
    assert (np.sort(found, -1) == np.arange(5)).all()
  assert (ranked.verdict == parsing.VALID).all()
  assert ranked.count.tolist() == [int(s['count']) for s in slates]
  assert len({tuple(row) for row in ranked.generated}) > 2


def test_rankings_are_in_incoming_ranks(ranked, spec):
  for row in range(len(ranked.generated)):
    ids = ranked.tokens[row, : ranked.length[row]]
    assert ids[-1] == spec.grammar.eos
    places = ids[:-1] - spec.grammar.slot_base
    np.testing.assert_array_equal(
      ranked.presented[row, places], ranked.generated[row]
    )


def test_the_read_out_is_the_order_of_the_slot_scores(
  ranked, spec, params, slates
):
  render = examples.generation_rows(spec.prompter, '<answer>', 'shuffled')
  score = jax.jit(functools.partial(transformer.encode_prompt, spec.model))
  for i, slate in enumerate(slates[:4]):
    row = render(slate, np.random.default_rng((0, i)))
    hidden, _ = score(params, row['prompt'][None], row['prompt_length'][None])
    scores = np.asarray(hidden[0, row['slots']] @ params['readout'])
    order = row['incoming'][np.argsort(-scores)]
    np.testing.assert_array_equal(ranked.readout[i], order)


def test_the_batch_size_changes_no_answer(rank, ranked, slates):
  other = rank(slates, batch_size=16)
  for name in ('generated', 'readout', 'tokens', 'presented'):
    np.testing.assert_array_equal(getattr(ranked, name), getattr(other, name))


def test_labels_change_no_answer(rank, ranked, slates):
  blind = [s | {'grades': np.zeros_like(s['grades'])} for s in slates]
  np.testing.assert_array_equal(ranked.generated, rank(blind).generated)


def test_unshuffled_candidates_stand_in_the_incoming_order(rank, slates):
  found = rank(slates, order='incoming')
  assert (found.presented == np.arange(5)).all()


def test_short_slates_rank_their_own_candidates(rank, slates):
  short = []
  for i, slate in enumerate(slates):
    count = 1 + i % 5
    evidence = slate['evidence'].copy()
    evidence[count:] = 0
    candidates = slate['candidates'].copy()
    candidates[count:] = -1
    short.append(
      slate
      | {'count': np.int32(count), 'evidence': evidence,
         'candidates': candidates}
    )  # fmt: skip
  for thinking in (False, True):
    found = rank(short, thinking=thinking)
    assert (found.verdict == parsing.VALID).all()
    for ranking in (found.generated, found.readout):
      for row, count in zip(ranking, found.count, strict=True):
        assert sorted(row[:count]) == list(range(count))


def test_metrics_of_a_known_slate():
  found = ranking_lib.slate_metrics(
    np.int32([[0, 1, 2], [2, 0, 1], [1, 0, 2]]),
    np.int8([[0, 0, 1], [0, 0, 1], [1, 0, 0]]),
    np.int32([3, 3, 2]),
  )
  assert found['copied'].tolist() == [1, 0, 0]
  assert found['top3_unchanged'].tolist() == [1, 0, 0]
  assert found['first_pick'].tolist() == [0, 2, 1]
  assert found['r@1'].tolist() == [0, 1, 0]
  np.testing.assert_allclose(found['kendall_tau'], [1, -1 / 3, -1], atol=1e-6)


def test_validation_reads_a_fixed_draw_of_held_out_slates(
  world, spec, params, monkeypatch
):
  asked = []
  rank = ranking_lib.rank

  def spy(ranker, slates, **kwargs):
    asked.append([slates[i] for i in range(len(slates))])
    return rank(ranker, slates, **kwargs)

  monkeypatch.setattr(ranking_lib, 'rank', spy)
  mesh = tiny_world.mesh()
  validate = ranking_lib.validator(
    spec,
    mesh,
    tiny_world.source(world, 'validation'),
    slates_lib.read(world['slates'], 'validation'),
    thinking=False,
    order=tiny_world.config().prompt.order,
    num_slates=5,
    batch_size=8,
  )
  with sharding.activate(mesh):
    one, two = validate(params), validate(params)
  assert one == two
  assert {'n@5', 'r@1', 'copied', 'readout_n@5'} <= set(one)
  held_out = slates_lib.read(world['slates'], 'validation')
  users = [int(s['user']) for s in asked[0]]
  assert len(users) == 5
  assert users == [int(s['user']) for s in asked[1]]
  assert set(users) <= set(held_out.user.tolist())
