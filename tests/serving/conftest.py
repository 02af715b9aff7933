"""A loaded re-ranker of the tiny world, and slates for it."""

import json

import pytest

pytest.importorskip('starlette', reason='needs the extra: gr2_jax[serve]')
pytest.importorskip('uvicorn', reason='needs the extra: gr2_jax[serve]')

from gr2_jax.serving import request as requests_lib  # noqa: E402
from gr2_jax.serving import reranker as reranker_lib  # noqa: E402

from .. import tiny_world  # noqa: E402


@pytest.fixture(scope='session')
def reranker(world):
  return reranker_lib.Reranker.load(world['rl'], largest_batch=8)


@pytest.fixture(scope='session')
def slates(world, reranker, tmp_path_factory):
  """The test slates, as a client would write them."""
  path = tmp_path_factory.mktemp('slates') / 'slates.jsonl'
  known = reranker.knowledge
  requests_lib.write_test(
    path, known.log, tiny_world.config().data, known.facts.statistics
  )
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return [row | {'id': f'slate {i}'} for i, row in enumerate(rows)]
