"""The rewards beside those of rax, a library of ranking metrics in JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rax

from gr2_jax.ops import rewards

from . import oracles

SIZE = 12


@pytest.fixture(autouse=True)
def rank_promotion():
  """The library promotes ranks inside; the ops are held to more elsewhere."""
  with jax.numpy_rank_promotion('allow'):
    yield


@pytest.fixture(scope='module', params=[0, 1, 2])
def slates(request):
  """Ragged slates with several positives of two grades; some have none."""
  ranking, grades, count, _ = oracles.random_slates(request.param, 1000, SIZE)
  # A score for each candidate that puts them in the order of the ranking.
  scores = np.empty(ranking.shape, np.float32)
  np.put_along_axis(scores, ranking, -np.arange(SIZE, dtype=np.float32), -1)
  real = np.arange(SIZE) < count[:, None]
  positives = (real & (grades > 0)).sum(-1)
  assert (positives == 0).any()
  assert (positives > 3).any()
  assert (positives == count).any()
  return ranking, grades, count, scores, real, positives


def peer(metric, slates, labels=None, **options):
  _, grades, _, scores, real, _ = slates
  labels = jnp.asarray(grades if labels is None else labels, jnp.float32)
  return np.asarray(
    metric(scores, labels, where=real, reduce_fn=None, **options)
  )


@pytest.mark.parametrize('k', [1, 3, 5, 10, SIZE])
def test_ndcg_of_graded_labels(slates, k):
  wanted = peer(rax.ndcg_metric, slates, topn=k)
  got = jax.jit(functools.partial(rewards.ndcg, k=k))(*slates[:3])
  np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
  assert wanted.std() > 0.05


def test_auc_is_ordered_pair_accuracy_of_binary_labels(slates):
  ranking, grades, count, _, _, positives = slates
  wanted = peer(rax.opa_metric, slates, labels=grades > 0)
  got = np.asarray(rewards.auc(ranking, grades, count))
  pairs = (positives > 0) & (positives < count)
  np.testing.assert_allclose(got[pairs], wanted[pairs], rtol=0, atol=1e-6)
  # Without a pair: a coin's 0.5 here, 0 there.
  assert (got[~pairs] == 0.5).all()
  assert (wanted[~pairs] == 0).all()


def test_reciprocal_rank(slates):
  wanted = peer(rax.mrr_metric, slates)
  got = rewards.reciprocal_rank(*slates[:3])
  np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize('k', [1, 3, 5, SIZE])
def test_recall_divides_the_hits_by_what_fits(slates, k):
  # The peer divides by all positives, so that 3 of them have recall@1 1/3 at
  # most; here by min(k, positives), so that the best order has 1. The hits are
  # the same, and over k they are the peer's precision.
  positives = slates[-1]
  got = np.asarray(rewards.recall(*slates[:3], k))
  hits = got * np.minimum(positives, k)
  recall = peer(rax.recall_metric, slates, topn=k)
  np.testing.assert_allclose(hits, recall * positives, rtol=0, atol=1e-5)
  fits = positives <= k
  np.testing.assert_allclose(got[fits], recall[fits], rtol=0, atol=1e-6)
  precision = peer(rax.precision_metric, slates, topn=k)
  whole = slates[2] >= k  # The peer divides a shorter slate by its count.
  np.testing.assert_allclose(
    hits[whole] / k, precision[whole], rtol=0, atol=1e-6
  )


# Worked by hand: grades in ranked order, then NDCG@3, AUC, RR, recall@3.
BY_HAND = [
  # 3 + 1 / log2(3) over itself.
  ([2, 1, 0, 0], 1, 1, 1, 1),
  # (1 + 3 / log2(3)) / (3 + 1 / log2(3)) = 2.892789 / 3.630930.
  ([1, 2, 0, 0], 0.796708, 1, 1, 1),
  # (3 / 2) / (3 + 1 / log2(3)); right pairs: none of 4.
  ([0, 0, 2, 1], 0.413117, 0, 1 / 3, 0.5),
  # (1 / log2(3)) / (1 + 1 / log2(3)); wrong: (0, 1), (0, 1'), (0', 1').
  ([0, 1, 0, 1], 0.386853, 0.25, 0.5, 0.5),
  ([0, 0, 0, 1], 0, 0, 0.25, 0),
]


@pytest.mark.parametrize(('grades', 'ndcg', 'auc', 'rr', 'recall'), BY_HAND)
def test_worked_cases(grades, ndcg, auc, rr, recall):
  # The order 3 1 0 2 of the presented candidates, and one of padding.
  ranking = np.array([3, 1, 0, 2, 4])
  presented = np.full(5, 2)
  presented[ranking[:4]] = grades
  slate = (ranking, presented, np.int32(4))
  np.testing.assert_allclose(
    [
      rewards.ndcg(*slate, 3),
      rewards.auc(*slate),
      rewards.reciprocal_rank(*slate),
      rewards.recall(*slate, 3),
    ],
    [ndcg, auc, rr, recall],
    atol=1e-6,
  )
  scores = np.empty(5, np.float32)
  scores[ranking] = -np.arange(5)
  theirs = rax.ndcg_metric(
    scores, presented.astype(np.float32), where=np.arange(5) < 4, topn=3
  )
  np.testing.assert_allclose(theirs, ndcg, atol=1e-6)
