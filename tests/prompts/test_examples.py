import json

import grain
import numpy as np
import pytest

from gr2_jax.prompts import examples

from .. import tiny_data


def render(record, rng):
  return {'index': np.int32(record), 'draw': rng.random(2)}


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def assert_same(one, two):
  assert len(one) == len(two)
  for a, b in zip(one, two, strict=True):
    assert set(a) == set(b)
    for name in a:
      assert a[name].tobytes() == b[name].tobytes(), name


def test_a_restored_iterator_goes_on_bit_for_bit():
  data = examples.dataset(range(10), render, 4, seed=3)
  whole = take(examples.iterate(data), 9)
  for stop in (1, 4):
    first = examples.iterate(data)
    assert_same(take(first, stop), whole[:stop])
    state = json.loads(json.dumps(first.get_state()))
    second = examples.iterate(data)
    second.set_state(state)
    assert_same(take(second, 9 - stop), whole[stop:])


def test_grain_agrees_that_a_checkpoint_changes_nothing():
  data = examples.dataset(range(10), render, 4, seed=3)[:6]
  grain.experimental.assert_equal_output_after_checkpoint(
    data.to_iter_dataset()
  )


def test_every_epoch_has_all_records_in_an_order_of_its_own():
  data = examples.dataset(range(12), render, 4, seed=0)
  rows = take(examples.iterate(data), 9)
  epochs = [np.concatenate([r['index'] for r in rows[i : i + 3]])
            for i in (0, 3, 6)]  # fmt: skip
  for order in epochs:
    assert sorted(order) == list(range(12))
  assert len({tuple(order) for order in epochs}) == 3
  draws = {
    tuple(pair) for row in rows for pair in row['draw'].round(12).tolist()
  }
  assert len(draws) == 36  # Randomness differs by epoch too.


def test_a_seed_decides_the_batches():
  one, same, other = (
    take(examples.iterate(examples.dataset(range(12), render, 4, seed)), 3)
    for seed in (0, 0, 1)
  )
  assert_same(one, same)
  assert any((a['index'] != b['index']).any()
             for a, b in zip(one, other, strict=True))  # fmt: skip


@pytest.mark.parametrize('hosts', [[[0, 1], [2, 3]], [[0, 3], [1, 2]]])
def test_hosts_share_every_batch(hosts):
  whole = examples.dataset(range(12), render, 4, seed=0)
  parts = [
    examples.dataset(range(12), render, 4, seed=0, rows=np.array(rows))
    for rows in hosts
  ]
  for i in (0, 1, 7):  # Of the first epoch and of a later one.
    for rows, part in zip(hosts, parts, strict=True):
      assert_same([part[i]], [{k: v[rows] for k, v in whole[i].items()}])


def test_another_number_of_hosts_goes_on_with_the_same_batches():
  one = examples.iterate(
    examples.dataset(range(12), render, 4, seed=0, rows=np.array([2, 3]))
  )
  take(one, 5)
  whole = examples.iterate(examples.dataset(range(12), render, 4, seed=0))
  whole.set_state(one.get_state())
  (follows,), (next_one,) = take(whole, 1), take(one, 1)
  assert_same([next_one], [{k: v[2:] for k, v in follows.items()}])


def test_too_few_records_are_an_error_that_says_so():
  with pytest.raises(
    ValueError, match='3 examples are fewer than batch_size=4'
  ):
    examples.dataset(range(3), render, 4, seed=0)


def test_first_batches_are_the_same_at_every_call():
  one, two = (
    examples.first_batches(range(10), render, 4, 5, seed=1) for _ in range(2)
  )
  assert len(one) == 2
  assert_same(one, two)
  seen = np.concatenate([row['index'] for row in one])
  assert len(set(seen.tolist())) == 8
  assert len(examples.first_batches(range(3), render, 4, 5, seed=1)) == 1


def test_examples_pad_and_say_what_the_read_out_ranks():
  prompt = {
    'prompt': np.int32([1, 7]),
    'slots': np.int32([1, 0]),
    'grades': np.float32([1, 0]),
    'count': np.int32(2),
  }
  rows = [
    examples.Completion([5, 6, 2], [0.0, 0.5, 1.0], 1),
    examples.Completion([5, 2], [0.0, 1.0]),
    examples.Completion([6, 2], [1.0, 1.0], 0),
  ]
  found = examples.examples(prompt, rows, 4, 5)
  assert found['prompt'].tolist() == [1, 7, 0, 0]
  assert found['prompt_length'] == 2
  assert found['completion'].tolist() == [
    [5, 6, 2, 0, 0],
    [5, 2, 0, 0, 0],
    [6, 2, 0, 0, 0],
  ]
  assert found['weights'].tolist() == [
    [0, 0.5, 1, 0, 0],
    [0, 1, 0, 0, 0],
    [1, 1, 0, 0, 0],
  ]
  assert found['answer_at'].tolist() == [1, 0, 0]
  assert found['rank_by_readout'].tolist() == [True, False, True]
  with pytest.raises(ValueError, match='completion: 3 tokens, room for 2'):
    examples.examples(prompt, rows, 4, 2)


def test_a_request_ends_in_its_control_token(tmp_path):
  prompter = tiny_data.prompter(tmp_path)
  slate = tiny_data.slate(count=4)
  for control in ('<think>', '<answer>'):
    row = examples.generation_rows(prompter, control, 'shuffled')(
      slate, np.random.default_rng(0)
    )
    n = int(row['prompt_length'])
    assert row['prompt'].shape == (prompter.prompt_tokens,)
    assert row['prompt'][n - 1] == prompter.vocabulary.control[control]
    assert (row['prompt'][n:] == prompter.vocabulary.pad).all()
    assert (row['prompt'][: n - 1] != prompter.vocabulary.pad).all()
    order = row['incoming'][:4]
    assert order.tolist() != [0, 1, 2, 3]
    np.testing.assert_array_equal(row['grades'][:4], slate['grades'][order])
  plain = examples.generation_rows(prompter, '<answer>', 'incoming')
  row = plain(slate, np.random.default_rng(0))
  assert row['incoming'].tolist() == list(range(6))


def test_the_order_of_presentation_is_a_choice(tmp_path):
  prompter = tiny_data.prompter(tmp_path)
  slate = tiny_data.slate(count=4)
  kept = {}
  for order in ('shuffled', 'incoming', 'mixed'):
    render = examples.generation_rows(prompter, '<answer>', order)
    rows = [render(slate, np.random.default_rng(i)) for i in range(200)]
    shown = np.stack([row['incoming'] for row in rows])
    assert (np.sort(shown) == np.arange(6)).all()
    kept[order] = (shown == np.arange(6)).all(axis=1).mean()
  assert kept['incoming'] == 1.0
  assert kept['shuffled'] < 0.12  # One order of 24.
  assert 0.4 < kept['mixed'] < 0.65  # The coin's half, and half of the 24th.
  render = examples.generation_rows(prompter, '<answer>', 'random')
  with pytest.raises(ValueError, match="prompt.order='random'.*mixed"):
    render(slate, np.random.default_rng(0))


def test_several_views_of_a_record_have_randomness_of_their_own(tmp_path):
  prompter = tiny_data.prompter(tmp_path)
  slate = tiny_data.slate(count=4)
  once = examples.generation_rows(prompter, '<answer>', 'shuffled')
  twice = examples.several(once, 2)
  orders = set()
  for seed in range(8):
    row = twice(slate, np.random.default_rng(seed))
    assert row['prompt'].shape == (2, prompter.prompt_tokens)
    assert row['prompt_length'].shape == row['count'].shape == (2,)
    for shown, grades in zip(row['incoming'], row['grades'], strict=True):
      np.testing.assert_array_equal(grades[:4], slate['grades'][shown[:4]])
    orders.add(tuple(map(tuple, row['incoming'].tolist())))
  assert any(first != second for first, second in orders)
  whole = examples.several(once, 1)(slate, np.random.default_rng(3))
  alone = once(slate, np.random.default_rng(3))
  assert_same([{k: v[0] for k, v in whole.items()}], [alone])


def test_a_split_in_order_does_not_depend_on_the_batch_size():
  slates = list(range(100, 107))
  whole = {}
  for size in (3, 7, 10):
    parts = list(examples.in_order(slates, render, size, seed=5))
    assert all(batch['index'].shape == (size,) for _, batch in parts)
    assert sum(n for n, _ in parts) == 7
    whole[size] = {
      k: np.concatenate([batch[k][:n] for n, batch in parts])
      for k in ('index', 'draw')
    }
  assert whole[3]['index'].tolist() == slates
  for size in (7, 10):
    assert_same([whole[size]], [whole[3]])
