import os
import sys

import numpy as np
import pytest
from absl.testing import flagsaver

from gr2_jax.bench import tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def flags():
  tokenizer.flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(
    items=['400'], dim=8, levels=2, bits=4, iterations=3, trainings=1, rounds=1
  ):
    yield


def other_codes(x, vectors, beam):
  """Codes of the farthest codewords: the work of a wrong search."""
  del beam
  far = [((x[:, None] - level) ** 2).sum(-1).argmax(1) for level in vectors]
  return np.stack(far, axis=1)


def test_vectors_are_unit_clustered_and_seeded():
  x = tokenizer.draw(3000, 16)
  assert x.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, atol=1e-5)
  np.testing.assert_array_equal(x, tokenizer.draw(3000, 16))
  assert not np.array_equal(x, tokenizer.draw(3000, 16, seed=1))
  # Nearest neighbors are far nearer than in no clusters at all.
  near = np.sort(x[:200] @ x.T, axis=1)[:, -2].mean()
  flat = np.random.default_rng(0).normal(size=x.shape)
  flat /= np.linalg.norm(flat, axis=1, keepdims=True)
  assert near > np.sort(flat[:200] @ flat.T, axis=1)[:, -2].mean() + 0.1


def test_squared_error_equals_loops():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(9, 3)).astype(np.float32)
  vectors = rng.normal(size=(2, 4, 3)).astype(np.float32)
  codes = rng.integers(4, size=(9, 2))
  wanted = np.mean(
    [
      ((x[i] - vectors[0, a] - vectors[1, b]) ** 2).sum()
      for i, (a, b) in enumerate(codes)
    ]
  )
  found = tokenizer.squared_error(x, vectors, codes)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_faiss_decodes_to_its_codewords():
  faiss = pytest.importorskip('faiss')
  x = tokenizer.draw(500, 8)
  for side in tokenizer.their_sides(8, 3, 5).values():
    vectors = side.train(x)
    assert vectors.shape == (3, 32, 8)
    codes = side.encode(x, 5)
    assert codes.shape == (500, 3)
    tokenizer.check_same_search(x, vectors, side)
    # The library's own decoder gives the error that the codewords give.
    quantizer = faiss.ResidualQuantizer(8, 3, 5)
    quantizer.train(x)
    decoded = quantizer.decode(quantizer.compute_codes(x))
    np.testing.assert_allclose(
      tokenizer.squared_error(x, vectors, codes),
      ((decoded - x) ** 2).sum(1).mean(),
      rtol=1e-3,
    )


def test_searches_that_differ_are_not_compared():
  x = tokenizer.draw(300, 8)
  ours = tokenizer.our_side(2, 4, 3)
  vectors = ours.train(x)
  tokenizer.check_same_search(x, vectors, ours)
  wrong = tokenizer.Side(
    ours.train, lambda x, beam: other_codes(x, vectors, beam)
  )
  with pytest.raises(RuntimeError, match='differ by a factor of 0'):
    tokenizer.check_same_search(x, vectors, wrong)


def test_sides_take_turns_and_the_first_round_does_not_count(
  flags, monkeypatch
):
  calls = []
  seconds = {}

  def fake_timed(function, *args):
    result = function(*args)
    count = seconds[calls[-1]] = seconds.get(calls[-1], 0) + 1
    return result, 100.0 if count == 1 else 2.0

  def side(name):
    real = tokenizer.our_side(2, 4, 3)

    def train(x):
      calls.append((name, 'train'))
      return real.train(x)

    def encode(x, beam):
      calls.append((name, beam))
      return real.encode(x, beam)

    return real, tokenizer.Side(train, encode)

  monkeypatch.setattr(tokenizer, 'timed', fake_timed)
  x = tokenizer.draw(400, 8)
  _, ours = side('ours')
  real, theirs = side('theirs')
  tables = tokenizer.Side(
    ours.train, lambda x, b: calls.append(('tables', b)) or real.encode(x, b)
  )
  found = tokenizer.measure(x, ours, theirs, tables)
  assert calls[:4] == [('ours', 'train'), ('theirs', 'train')] * 2
  one = [(s, b) for s in ('ours', 'theirs', 'tables') for b in (1, 5)]
  assert calls[4:16] == one * 2
  for each in found.values():
    assert each.training == 2.0
    assert each.rate == {1: 200.0, 5: 200.0}
    assert each.error == found['gr2_jax'].error  # The same codebooks.
    assert 0 < each.error[5] <= each.error[1]
    np.testing.assert_allclose(
      each.relative[1] * x.var(0).sum(), each.error[1], rtol=1e-4
    )


def test_the_ratios_are_the_worst_of_the_sizes_to_the_better_of_faiss():
  def found(error, rate):
    return tokenizer.Result(
      training=1.0,
      error={1: 2 * error, 5: error},
      relative={1: 0.2, 5: 0.1},
      rate={1: rate, 5: rate / 2},
    )

  small = {'gr2_jax': found(1.0, 30), 'faiss': found(2.0, 10)}
  small['faiss, tables'] = found(1.6, 20)
  large = {'gr2_jax': found(0.9, 11), 'faiss': found(1.0, 10)}
  large['faiss, tables'] = found(1.0, 5)
  assert tokenizer.ratio_lines([small, large]) == [
    'error ratio beam 1: 0.90',
    'error ratio beam 5: 0.90',
    'throughput ratio beam 1: 1.10',
    'throughput ratio beam 5: 1.10',
  ]


def test_main_on_both_sides(flags, monkeypatch, capsys):
  pytest.importorskip('faiss')
  monkeypatch.setattr(tokenizer, 'pin', lambda: None)
  tokenizer.main([])
  lines = capsys.readouterr().out.splitlines()
  assert sum('have the same codes, error ratio 1.0000' in x for x in lines) == 2
  table = [x for x in lines if x.startswith('| 400')]
  assert [x.split('|')[2].strip() for x in table] == [
    'gr2_jax', 'faiss', 'faiss, tables',
  ]  # fmt: skip
  names, values = zip(*(x.split(': ') for x in lines[-4:]), strict=True)
  assert names == (
    'error ratio beam 1', 'error ratio beam 5',
    'throughput ratio beam 1', 'throughput ratio beam 5',
  )  # fmt: skip
  assert min(map(float, values)) > 0
  assert float(values[1]) < 1.5


def test_a_process_on_many_cores_starts_again_on_one(monkeypatch):
  done = []
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 3})
  monkeypatch.setattr(os, 'sched_setaffinity', lambda *args: done.append(args))
  monkeypatch.setattr(os, 'execv', lambda *args: done.append(args))
  monkeypatch.setattr(sys, 'orig_argv', ['python', '-m', 'bench', '--dim=8'])
  tokenizer.pin()
  assert done == [
    (0, {3}),
    (sys.executable, [sys.executable, '-m', 'bench', '--dim=8']),
  ]
  done.clear()
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {3})
  tokenizer.pin()
  assert done == []


def test_without_faiss_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'faiss', None)
  with pytest.raises(ImportError, match=r'gr2_jax\[bench\]'):
    tokenizer.their_sides(8, 2, 4)
