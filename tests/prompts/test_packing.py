import collections
import dataclasses
import itertools

import grain
import jax
import numpy as np
import pytest

from gr2_jax.data import records
from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.prompts import examples, packing
from gr2_jax.train import learner

from .. import tiny, tiny_data

pytestmark = pytest.mark.slow

T = 24
SHARES = {'sequence': 0.6, 'persona': 0.3, 'caption': 0.1}


def render(record, rng):
  """A document of 2 to 9 tokens, some of them drawn; every sixth has none."""
  if record % 6 == 5:
    return []
  size = 2 + record % 8
  return [[record, *rng.integers(5, 40, size - 1).tolist()]]


def rows(seed=0, shares=None, source=range(40)):
  shares = shares or SHARES
  return packing.rows(
    shares, dict.fromkeys(shares, source), dict.fromkeys(shares, render), T,
    seed,
  )  # fmt: skip


def stream(sizes):
  return (packing.Document('text', list(range(size))) for size in sizes)


def test_every_epoch_has_each_document_once_in_an_order_of_its_own():
  found = packing.documents('caption', range(12), render, 3)
  epochs = [[d.ids for d in itertools.islice(found, 10)] for _ in range(2)]
  firsts = [[ids[0] for ids in epoch] for epoch in epochs]
  assert (
    sorted(firsts[0])
    == sorted(firsts[1])
    == [r for r in range(12) if r % 6 != 5]
  )
  assert firsts[0] != firsts[1]
  by_record = [{ids[0]: ids for ids in epoch} for epoch in epochs]
  assert by_record[0] != by_record[1]
  again = packing.documents('caption', range(12), render, 3)
  assert [d.ids for d in itertools.islice(again, 10)] == epochs[0]
  other = packing.documents('persona', range(12), render, 3)
  assert [d.ids for d in itertools.islice(other, 10)] != epochs[0]


def test_a_task_without_documents_is_named():
  found = packing.documents('persona', [5, 11], render, 0)
  with pytest.raises(ValueError, match=r'midtrain\.mixture\.persona'):
    next(found)


def test_tokens_are_in_the_shares():
  streams = {
    task: packing.documents(task, range(40), render, 0) for task in SHARES
  }
  counts, total = collections.Counter(), 0
  for document in itertools.islice(packing.mixture(streams, SHARES), 900):
    counts[document.task] += len(document.ids)
    total += len(document.ids)
    for task, share in SHARES.items():
      assert abs(counts[task] - share * total) < 2 * 9


def test_rows_hold_every_document_once_and_never_too_much():
  sizes = np.random.default_rng(0).integers(1, T + 1, 500).tolist()
  given = list(stream(sizes))
  found = list(packing.pack(given, T))
  assert all(sum(len(d.ids) for d in row) <= T for row in found)
  # All but the rows that still wait have left.
  left = collections.Counter(id(d) for row in found for d in row)
  assert set(left.values()) == {1}
  waiting = sum(sizes) - sum(len(d.ids) for row in found for d in row)
  assert waiting <= 64 * T
  filled = np.mean([sum(len(d.ids) for d in row) for row in found]) / T
  assert filled > 0.96


def test_a_document_goes_where_it_leaves_the_least_room():
  # 10 fits behind 11 too, but fills up what stands behind it.
  found = list(packing.pack(stream([11, 14, 10, 12, *[24] * 64]), T))
  by_size = [[len(d.ids) for d in row] for row in found]
  assert by_size == [[11, 12], [14, 10]]


def test_the_first_rows_do_not_depend_on_how_many_are_drawn(tmp_path):
  few = list(itertools.islice(rows(), 5))
  assert few == list(itertools.islice(rows(), 50))[:5]
  assert few != list(itertools.islice(rows(seed=1), 5))


def test_written_rows_are_whole_or_not_at_all(tmp_path, monkeypatch):
  def dying():
    yield from itertools.islice(rows(), 3)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    packing.write(tmp_path, dying(), T, 10)
  assert not (tmp_path / packing.ROWS).exists()
  facts = packing.write(tmp_path, rows(), T, 10)
  wanted = list(itertools.islice(rows(), 10))
  found = records.Records(tmp_path / packing.ROWS)
  assert len(found) == facts['rows'] == 10
  for row, documents in zip(found, wanted, strict=True):
    tokens, segments = row['tokens'], row['segments']
    assert tokens.dtype == segments.dtype == np.int32
    assert len(tokens) == len(segments) == T
    for place, document in enumerate(documents, 1):
      assert tokens[segments == place].tolist() == document.ids
    assert (np.diff(segments[segments > 0]) >= 0).all()
    assert (tokens[segments == 0] == 0).all()
  real = sum(len(d.ids) for row in wanted for d in row)
  assert facts['fill'] == real / (10 * T)
  assert facts['documents'] == sum(map(len, wanted))
  assert sum(facts['tokens'].values()) == real
  # A second time nothing is made again.
  assert packing.write(tmp_path, dying(), T, 10) == facts


@pytest.fixture(scope='module')
def prompter(tmp_path_factory):
  return tiny_data.prompter(tmp_path_factory.mktemp('words'))


def test_weights_are_of_all_but_openings_and_padding(prompter):
  row = packing.encode(list(stream([3, 1, 4])), 10)
  found = packing.example(row, prompter)
  weights = found['weights'][0].tolist()
  assert weights == [0, 1, 1, 0, 0, 1, 1, 1, 0, 0]
  assert found['segments'][0].tolist() == [1, 1, 1, 2, 3, 3, 3, 3, 0, 0]
  assert found['prompt'].tolist() == [prompter.vocabulary.bos]


def test_batches_come_in_order_and_go_on_bit_for_bit(prompter):
  encoded = [packing.encode(r, T) for r in itertools.islice(rows(), 7)]
  data = packing.dataset(encoded, prompter, 2)
  completions = [data[i]['completion'][:, 0] for i in range(4)]
  wanted = [row['tokens'] for row in encoded]
  np.testing.assert_array_equal(
    np.concatenate(completions), [*wanted, wanted[0]]
  )
  grain.experimental.assert_equal_output_after_checkpoint(
    data[:6].to_iter_dataset(examples._READ)
  )


@pytest.mark.parametrize('tied', [True, False])
def test_a_packed_row_scores_each_document_as_if_alone(tied):
  model = dataclasses.replace(tiny.MODEL, tie_embeddings=tied)
  params = tiny.params(model)
  ids, lengths = tiny.prompts(size=3, length=5)
  rng = np.random.default_rng(0)
  sizes = [[6, 1, 9, 5], [24], [2, 3]]
  tokens = np.zeros((3, 1, T), np.int32)
  segments = np.zeros((3, 1, T), np.int32)
  for row, own in enumerate(sizes):
    tokens[row, 0, : sum(own)] = rng.integers(5, 40, sum(own))
    segments[row, 0, : sum(own)] = np.repeat(1 + np.arange(len(own)), own)

  @jax.jit
  def score(ids, lengths, tokens, segments):
    hidden, prefix = transformer.encode_prompt(model, params, ids, lengths)
    hidden = transformer.completion_hidden(
      model, params, hidden, prefix, tokens, segments
    )
    return learner.score_tokens(params, hidden, tokens, tiny.GRAMMAR).logp

  packed = np.asarray(score(ids, lengths, tokens, segments))
  for row, own in enumerate(sizes):
    for end, size in zip(np.cumsum(own), own, strict=True):
      alone = np.zeros((1, 1, T), np.int32)
      alone[..., :size] = tokens[row, 0, end - size : end]
      wanted = score(ids[row : row + 1], lengths[row : row + 1], alone, None)
      np.testing.assert_allclose(
        packed[row, 0, end - size : end], wanted[0, 0, :size], atol=1e-5, rtol=0
      )


def test_the_loss_of_packed_rows_is_the_mean_over_their_documents(prompter):
  """And its gradient is that of the documents, one to a row."""
  model = dataclasses.replace(tiny.MODEL, vocab_size=len(prompter.vocabulary))
  params = tiny.params(model)
  few = list(itertools.islice(rows(), 4))
  loss_fn = learner.supervised_loss(model, tiny.GRAMMAR, listwise_weight=0.0)
  grad = jax.jit(jax.value_and_grad(lambda p, b: loss_fn(p, b)[0]))

  def of(rows):
    each = [packing.example(packing.encode(row, T), prompter) for row in rows]
    batch = {k: np.stack([row[k] for row in each]) for k in each[0]}
    return grad(params, learner.Examples(**batch))

  with sharding.activate(tiny.one_device()):
    loss, gradient = of(few)
    wanted, other = of([[d] for row in few for d in row])
  np.testing.assert_allclose(loss, wanted, atol=1e-6)
  tiny.assert_trees_close(gradient, other, 1e-5)
