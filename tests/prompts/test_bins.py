import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.prompts import bins as bins_lib

from .. import tiny_data

K = tiny_data.K


def test_bins_are_quantiles_and_rise_with_the_evidence():
  slates = tiny_data.many(400)
  bins = bins_lib.EvidenceBins.fit(
    slates, tiny_data.EVIDENCE, ('age:raw', 'rank'), 4
  )
  binned = [bins(slates.evidence[i], int(slates.count[i])) for i in range(400)]
  real = np.arange(K) < slates.count[:, None]
  binned = np.stack(binned)
  assert (binned[~real] == 0).all()
  for column in range(2):
    share = np.bincount(binned[real][:, column], minlength=4) / real.sum()
    np.testing.assert_allclose(share, 0.25, atol=0.02)
  raw = slates.evidence[..., 2][real]
  order = np.argsort(raw)
  assert (np.diff(binned[real][order, 0]) >= 0).all()
  for i in range(400):  # A centred column rises within its slate.
    n = slates.count[i]
    order = np.argsort(slates.evidence[i, :n, 0])
    assert (np.diff(binned[i, :n, 1][order]) >= 0).all()


def test_ages_are_binned_by_quantiles():
  slates = tiny_data.many(400)
  bins = bins_lib.EvidenceBins.fit(slates, tiny_data.EVIDENCE, ('rank',), 4)
  known = slates.history_ages[slates.history_ages >= 0]
  binned = bins.ages(known)
  assert binned.dtype == np.int32
  share = np.bincount(binned, minlength=4) / len(known)
  np.testing.assert_allclose(share, 0.25, atol=0.01)
  assert (np.diff(binned[np.argsort(known)]) >= 0).all()
  assert bins.ages(slates.history_ages).shape == slates.history_ages.shape
  assert bins.ages(np.array([0, 10**12])).tolist() == [0, 3]


def test_ages_that_nobody_knows_have_bins_all_the_same():
  slates = tiny_data.many()
  slates.history_ages[:] = -1
  bins = bins_lib.EvidenceBins.fit(slates, tiny_data.EVIDENCE, ('rank',), 4)
  assert np.isfinite(bins.age_edges).all()
  assert bins.ages(np.array([5])).tolist() == [3]


def test_centred_bins_compare_candidates_and_raw_ones_slates():
  bins = tiny_data.bins()  # rank is centred, fame is raw
  evidence = tiny_data.slate(3)['evidence']
  moved = evidence * 4.0 + 100.0
  before, after = bins(evidence, K), bins(moved, K)
  np.testing.assert_array_equal(before[:, 0], after[:, 0])
  assert (after[:, 1] == 3).all()
  assert len(set(before[:, 1])) > 1


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, K), seed=st.integers(0, 99))
def test_padding_does_not_move_the_bins(count, seed):
  bins = tiny_data.bins()
  evidence = tiny_data.slate(seed, count)['evidence']
  other = evidence.copy()
  other[count:] = 1e6
  found = bins(evidence, count)
  np.testing.assert_array_equal(found, bins(other, count))
  np.testing.assert_array_equal(found[:count], bins(evidence[:count], count))


def test_a_constant_column_has_finite_edges():
  slates = tiny_data.many()
  slates.evidence[..., 0] = 3.0
  bins = bins_lib.EvidenceBins.fit(slates, tiny_data.EVIDENCE, ('rank',), 4)
  assert np.isfinite(bins.edges).all()
  assert len(set(bins(slates.evidence[4], 6)[:, 0])) == 1


def test_bins_come_back_from_disk(tmp_path):
  bins = tiny_data.bins()
  bins_lib.save(tmp_path / 'bins.json', bins)
  found = bins_lib.load(tmp_path / 'bins.json')
  assert found.columns == bins.columns
  np.testing.assert_array_equal(found.index, bins.index)
  np.testing.assert_array_equal(found.edges, bins.edges)
  np.testing.assert_array_equal(found.age_edges, bins.age_edges)
  assert [p.name for p in tmp_path.iterdir()] == ['bins.json']


def test_an_unknown_column_is_named():
  error = "no column 'fane:raw'.*rank, fame, age.*another --workdir"
  with pytest.raises(ValueError, match=error):
    bins_lib.EvidenceBins.fit(
      tiny_data.many(), tiny_data.EVIDENCE, ('fane:raw',), 4
    )
