import jax
import pytest


@pytest.fixture(autouse=True)
def no_rank_promotion():
  """Every op must say how it broadcasts."""
  with jax.numpy_rank_promotion('raise'):
    yield
