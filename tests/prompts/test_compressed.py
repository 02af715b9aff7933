"""Written contexts: from tokens to blocks, to disk, beside their slates."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.data import records
from gr2_jax.prompts import compressed, context, examples

from .. import tiny_data

K = tiny_data.K


@pytest.fixture(scope='module')
def prompter(tmp_path_factory):
  return tiny_data.prompter(
    tmp_path_factory.mktemp('compressions'), history_fields=('sid', 'grade')
  )


def blocks(prompter, row):
  """What a prompt has between <history> and its last slot, then <eos>."""
  words, ids = prompter.vocabulary, row['prompt'].tolist()
  begin = ids.index(words.control['<history>']) + 1
  last = int(row['slots'][int(row['count']) - 1])
  return np.array([*ids[begin : last + 1], words.eos])


@settings(max_examples=50, deadline=None)
@given(
  slate=st.builds(
    tiny_data.slate, seed=st.integers(0, 500), count=st.integers(1, K),
    length=st.integers(0, tiny_data.H),
  ),
  seed=st.integers(0, 2**32),
)  # fmt: skip
def test_a_written_context_reads_as_it_was_written(prompter, slate, seed):
  """The whole context, as if it had been written, in another order."""
  rng, count = np.random.default_rng(seed), int(slate['count'])
  order = rng.permutation(count)
  tokens = blocks(prompter, prompter.prompt(slate, order))
  found = compressed.split_up(tokens, prompter, order)
  assert found == prompter.context.reduce(prompter.lines(slate), None)
  own = dataclasses.replace(
    prompter,
    context=context.parse('text'),
    written=len(found),
  )
  other = rng.permutation(count)
  row = own.prompt(slate | {'written': found}, other)
  wanted = prompter.prompt(slate, other)
  np.testing.assert_array_equal(row['prompt'], wanted['prompt'])
  np.testing.assert_array_equal(row['slots'], wanted['slots'])
  slots_left = K - count
  assert len(row['prompt']) + 1 + slots_left == own.prompt_tokens


def test_lines_go_where_their_candidates_go(prompter):
  words = prompter.vocabulary
  mark, slot, end = words.control['<candidates>'], words.slot_base, words.eos
  tokens = np.array([50, 51, mark, 60, slot, slot + 1, 70, 71, slot + 2, end])
  found = compressed.split_up(tokens, prompter, np.array([2, 0, 1]))
  assert found == context.Ids([50, 51], [[], [70, 71], [60]])
  slate, order = tiny_data.slate(count=3), np.array([1, 2, 0])
  reader = dataclasses.replace(prompter, context=context.parse('text'))
  row = reader.prompt(slate | {'written': found}, order)
  assert row['prompt'].tolist() == [
    *prompter.opening, words.control['<history>'], 50, 51,
    mark, 70, 71, slot, 60, slot + 1, slot + 2,
  ]  # fmt: skip
  # Who reads the whole, such as a teacher, does not see what was written.
  whole = prompter.prompt(slate | {'written': found}, order)
  np.testing.assert_array_equal(
    whole['prompt'], prompter.prompt(slate, order)['prompt']
  )


WHOLE = context.Ids([5, 6, 4], [[7, 1], [2], [8, 9]])


def test_a_record_has_what_was_written_or_the_whole():
  written = context.Ids([5, 6], [[7], [], [8, 9]])
  row = compressed.record(written, WHOLE, 0)
  assert row['history'].tolist() == [5, 6]
  assert row['candidates'].tolist() == [7, 8, 9]
  assert row['lengths'].tolist() == [1, 0, 2]
  assert {array.dtype for array in row.values()} == {np.dtype(np.int32)}
  assert (row['whole'], row['fault']) == (8, 0)
  assert compressed.context(row) == written
  fault = compressed.FAULTS.index('uneven')
  row = compressed.record(written, WHOLE, fault)
  assert (row['whole'], row['fault']) == (8, fault)
  assert compressed.context(row) == WHOLE


def test_one_candidate_and_no_tokens_come_back():
  for written in (context.Ids([], [[]]), context.Ids([3], [[4, 5]])):
    row = compressed.record(written, WHOLE, 0)
    assert compressed.context(row) == written


def test_a_report_counts_what_was_kept_and_what_is_wrong():
  written = context.Ids([5], [[7], [], []])
  faults = [compressed.FAULTS.index(f) for f in ('cut_off', 'too_short')]
  found = compressed.report(
    compressed.record(written, WHOLE, fault)
    for fault in (0, 0, faults[0], 0, faults[1], faults[0])
  )
  marks = 1 + 3 + 1  # <candidates>, the slots and <eos>.
  kept = 3 * (2 + marks) + 3 * (8 + marks)
  assert found == {
    'slates': 6,
    'unchanged': 3,
    'faults': {'cut_off': 2, 'too_short': 1},
    'longest': 8,
    'kept': pytest.approx(kept / (6 * (8 + marks))),
  }
  assert compressed.report([])['kept'] == 0


class Slates:
  """Random access to slates, as `slates.SlateSource` gives them."""

  def __init__(self, size):
    self._size = size

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    return tiny_data.slate(index, 1 + index % K)


WRITTEN = [
  context.Ids(
    list(range(row % 3)), [[50 + row] * (rank % 3) for rank in range(count)]
  )
  for row in range(9)
  for count in [1 + row % K]
]


@pytest.fixture
def file(tmp_path):
  path = compressed.file(tmp_path, 'train')
  rows = (compressed.record(ids, WHOLE, 0) for ids in WRITTEN)
  assert records.write(path, rows) == len(WRITTEN)
  assert path.name == 'train.array_record'
  return records.Records(path)


def test_slates_come_with_what_was_written_of_them(file):
  found = compressed.Joined(Slates(9), file)
  assert len(found) == 9
  for index in (8, 0, np.int64(5)):
    row = found[index]
    assert row['written'] == WRITTEN[index]
    for name, value in tiny_data.slate(index, 1 + index % K).items():
      np.testing.assert_array_equal(row[name], value, name)
  with pytest.raises(IndexError):
    found[9]


def test_batches_are_made_of_what_was_written(file, prompter):
  longest = max(map(len, WRITTEN))
  own = dataclasses.replace(
    prompter, context=context.parse('text'), written=longest
  )
  render = examples.generation_rows(own, '<answer>', 'shuffled')
  joined = compressed.Joined(Slates(9), file)
  found = examples.first_batches(joined, render, 3, 3, 0)
  slots = own.vocabulary.is_slot
  lengths = sorted(
    int(n) - slots(row[:n]).sum()
    for batch in found
    for row, n in zip(batch['prompt'], batch['prompt_length'], strict=True)
  )
  marks = 1 + 2 + 1
  assert lengths == sorted(marks + len(ids) for ids in WRITTEN)


def test_the_first_slates_may_be_written_alone(file):
  found = compressed.Joined(Slates(12), file)
  assert len(found) == 9
  assert found[8]['written'] == WRITTEN[8]


def test_more_contexts_than_slates_are_refused(file):
  message = '9 contexts were written for 8 slates: .* delete the folder'
  with pytest.raises(ValueError, match=message):
    compressed.Joined(Slates(8), file)
