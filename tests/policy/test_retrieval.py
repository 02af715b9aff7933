import functools
import itertools

import jax
import numpy as np
import pytest

from gr2_jax.policy import retrieval
from gr2_jax.semantic_ids import ids as ids_lib
from gr2_jax.semantic_ids import trie

from .. import tiny, tiny_data

pytestmark = pytest.mark.slow

C, L, BASE = 4, 3, 20  # ids 20..31 of the forty
P, H = 5, 6

search = jax.jit(
  retrieval.search, static_argnums=0, static_argnames=('sid_base', 'beams')
)


@pytest.fixture(scope='module')
def sids():
  rng = np.random.default_rng(0)
  every = np.array(list(itertools.product(range(C), repeat=L)))
  return ids_lib.SemanticIds(rng.permutation(every)[:17], C)


@pytest.fixture(scope='module')
def excluded(sids):
  """Up to H tuples of each history: none, and more and more."""
  rng = np.random.default_rng(1)
  out = np.full((P, H, L), -1, np.int32)
  for row in range(P):
    out[row, :row] = sids.codes[rng.permutation(len(sids))[:row]]
  return out


@functools.cache
def brute_force():
  """Log-probability of every one of the C ** L tuples: [P, C, C, C]."""
  prompt, length = tiny.prompts(P)
  every = np.array(list(itertools.product(range(C), repeat=L)))
  tokens = (BASE + C * np.arange(L) + every).astype(np.int32)
  completion = np.broadcast_to(tokens, (P, *tokens.shape))
  logp = tiny.plain_logp(tiny.params(), prompt, length, completion)
  each = np.take_along_axis(logp, completion[..., None], -1)[..., 0]
  return each.sum(-1).reshape(P, C, C, C)


def run(sids, excluded, beams):
  prompt, length = tiny.prompts(P)
  found = search(
    tiny.MODEL, tiny.params(), trie.build_trie(sids), prompt, length,
    excluded, sid_base=BASE, beams=beams,
  )  # fmt: skip
  return np.asarray(found.items), np.asarray(found.score)


def test_with_a_beam_for_every_prefix_it_scores_every_item(sids, excluded):
  items, score = run(sids, excluded, C**L)
  for row in range(P):
    own = brute_force()[row][tuple(sids.codes.T)]
    barred = {tuple(t) for t in excluded[row].tolist()}
    left = [i for i in range(len(sids)) if tuple(sids.codes[i]) not in barred]
    wanted = sorted(left, key=lambda i: -own[i])
    assert len(wanted) == len(sids) - row
    assert items[row, : len(wanted)].tolist() == wanted
    np.testing.assert_allclose(
      score[row, : len(wanted)], own[wanted], atol=1e-4, rtol=0
    )
    assert (items[row, len(wanted) :] == -1).all()
    assert (score[row, len(wanted) :] == -np.inf).all()


@pytest.mark.parametrize('beams', [1, 3, 6])
def test_a_narrow_beam_keeps_the_best_prefixes(sids, excluded, beams):
  """The oracle: the same search, prefix by prefix, in numpy."""
  items, _ = run(sids, excluded, beams)
  prompt, length = tiny.prompts(P)
  tokens = BASE + C * np.arange(L) + sids.codes
  completion = np.broadcast_to(tokens, (P, *tokens.shape)).astype(np.int32)
  logp = tiny.plain_logp(tiny.params(), prompt, length, completion)
  each = np.take_along_axis(logp, completion[..., None], -1)[..., 0]
  for row in range(P):
    barred = {tuple(t) for t in excluded[row].tolist()}
    kept = {()}
    for level in range(1, L + 1):
      score = {
        tuple(codes[:level]): each[row, item, :level].sum()
        for item, codes in enumerate(sids.codes.tolist())
        if tuple(codes[: level - 1]) in kept
        and (level < L or tuple(codes) not in barred)
      }
      kept = sorted(score, key=lambda path: -score[path])[:beams]
    wanted = [int(sids.find(np.array(path))) for path in kept]
    assert items[row, : len(wanted)].tolist() == wanted
    assert (items[row, len(wanted) :] == -1).all()


def test_no_item_is_found_twice_or_from_outside(sids, excluded):
  for beams in (1, 3, C**L):
    items, score = run(sids, excluded, beams)
    for row, values in zip(items, score, strict=True):
      real = row[row >= 0].tolist()
      assert len(set(real)) == len(real)
      assert set(real) <= set(range(len(sids)))
      assert (np.diff(values[: len(real)]) <= 0).all()


def test_items_that_share_a_tuple_are_found_as_the_first(sids, excluded):
  twice = ids_lib.SemanticIds(sids.codes[[3, 5, 3, 7]], C)
  items, _ = run(twice, excluded[:, :0], 8)
  for row in items:
    assert sorted(row[row >= 0].tolist()) == [0, 1, 3]


def test_questions_ask_for_the_last_item_from_those_before(tmp_path):
  slates = tiny_data.many(12)
  slates.history[3] = [4, 5, 6, 7, 5]  # Ends in an item seen before.
  slates.history[5] = [9, -1, -1, -1, -1]
  slates.history_length[5] = 1
  sid_tokens = tuple((100 + i, 200 + i) for i in range(12))
  asked = retrieval.questions(slates, [1, 7], sid_tokens, 3, 100)
  assert len(asked) == 10
  order = np.random.default_rng(0).permutation(12)
  order = [i for i in order if i not in (3, 5)]
  for row, index in enumerate(order):
    history = slates.history[index]
    assert asked.target[row] == history[-1]
    assert asked.seen[row].tolist() == [*history[:-1], -1]
    ids = [1, 7]
    for item in history[1:4]:
      ids += sid_tokens[item]
    assert asked.prompt[row].tolist() == ids
    assert asked.length[row] == 8
  few = retrieval.questions(slates, [1, 7], sid_tokens, 9, 4)
  np.testing.assert_array_equal(few.target, asked.target[:4])
  assert few.prompt.shape == (4, 2 + 2 * 9)
  assert (few.length == 10).all()


def test_without_a_history_that_goes_on_there_is_no_question():
  slates = tiny_data.many(3)
  slates.history[:] = 4
  asked = retrieval.questions(slates, [1], ((5, 6),) * 12, 3, 100)
  assert len(asked) == 0


def test_popularity_counts_users_and_leaves_out_what_was_seen():
  slates = tiny_data.many(4)
  slates.user[:] = [0, 0, 1, 2]
  slates.history[:] = [
    [3, 1, 1, -1, -1], [3, 1, 1, -1, -1], [3, 2, 9, 9, 9], [3, 2, -1, -1, -1]
  ]  # fmt: skip
  slates.history_length[:] = [3, 3, 3, 2]  # The nines past it do not count.
  slates.history[2, 3:] = 8
  seen = np.array([[-1, -1], [3, -1], [9, 2]], np.int32)
  found = retrieval.popular(slates, seen, 4)
  assert found.tolist() == [[3, 2, 1, 9], [2, 1, 9, -1], [3, 1, -1, -1]]


def test_a_summary_is_of_the_targets_places():
  items = np.tile(np.arange(12), (4, 1))
  found = retrieval.summary(items, np.array([0, 4, 9, 50]))
  assert found == {
    'r@5': 0.5, 'r@10': 0.75, 'mrr': pytest.approx((1 + 1 / 5 + 1 / 10) / 4)
  }  # fmt: skip


def test_a_retriever_goes_through_all_questions_in_equal_batches(
  world, monkeypatch
):
  from gr2_jax.data import slates as slates_lib

  from .. import tiny_world

  monkeypatch.setattr(retrieval, 'search', counted := Counting())
  spec = tiny_world.spec(world)
  sids = ids_lib.load(world['tokenizer'])
  asked = retrieval.questions(
    slates_lib.read(world['slates'], 'validation'),
    [1, spec.vocabulary.control['<next>']],
    spec.prompter.items['sid'],
    2,
    19,
  )
  params = spec.load_params(world['midtrain'], tiny_world.mesh())
  everything = retrieval.Retriever(spec, tiny_world.mesh(), sids, asked, 8, 60)
  found = everything(params)
  assert 0 <= found['r@5'] <= found['r@10'] <= 1
  # Every item is somewhere in a beam of sixty.
  assert found['mrr'] >= 1 / 60
  assert everything(params) == found
  assert (
    retrieval.Retriever(spec, tiny_world.mesh(), sids, asked, 24, 60)(params)
    == found
  )
  assert counted.traces == 2


class Counting:
  """`search`, and how often it was traced."""

  def __init__(self):
    self.traces, self._search = 0, retrieval.search

  def __call__(self, *arguments, **named):
    self.traces += 1
    return self._search(*arguments, **named)
