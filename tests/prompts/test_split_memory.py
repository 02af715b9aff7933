"""Prompts in two pieces: what their memory tokens stand for, and the rest."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.prompts import context, examples, prompt

from .. import tiny_data

K = tiny_data.K
FORMS = (
  'memory:1',
  'memory:3+candidates:evidence+columns:1',
  'memory:2+last:2+history:sid',
  'memory:2+history:',
  'memory:3+dropped:12',
)


@pytest.fixture(scope='module')
def prompter(tmp_path_factory):
  return tiny_data.prompter(
    tmp_path_factory.mktemp('split'),
    fields=('sid', 'evidence'),
    history_fields=('sid', 'grade', 'age'),
    history=4,
  )


def reading(prompter, form, **changes):
  return dataclasses.replace(prompter, context=context.parse(form), **changes)


@settings(max_examples=80, deadline=None)
@given(
  form=st.sampled_from(FORMS),
  spare=st.sampled_from([None, 0, 9]),
  slate=st.builds(
    tiny_data.slate,
    seed=st.integers(0, 500),
    count=st.integers(1, K),
    length=st.integers(0, tiny_data.H),
  ),
  layout=st.sampled_from([('history', 'candidates'), ('history',)]),
  control=st.sampled_from(['<think>', '<answer>']),
)
def test_both_pieces_have_room_and_make_the_prompt(
  prompter, form, spare, slate, layout, control
):
  budget = 0 if spare is None else prompter._least_tokens + spare
  own = reading(prompter, form, budget=budget, layout=layout)
  row = examples.generation_rows(own, control, 'shuffled')(
    slate, np.random.default_rng(0)
  )
  ids = row['prompt'][: row['prompt_length']]
  before, rest = own.split_memory(ids)
  np.testing.assert_array_equal([*before, *rest], ids)
  family = own.vocabulary.memory_base + np.arange(own.context.memory)
  np.testing.assert_array_equal(before[-len(family) :], family)
  assert not np.isin(rest, family).any()
  history, behind = examples.behind_memory(own, row)
  for piece, wanted, room in (
    (history, before, own.memory_prompt_tokens),
    (behind, rest, own.rest_tokens),
  ):
    padded = prompt.pad(wanted, room, 'piece')
    np.testing.assert_array_equal(piece['prompt'], padded)
    assert piece['prompt_length'] == len(wanted)
  assert behind['memory_length'] == len(before)
  assert set(behind) == set(row) | {'memory_length'}
  if 'candidates' in layout:
    count = int(slate['count'])
    slots = own.vocabulary.slot_base + np.arange(count)
    np.testing.assert_array_equal(
      behind['prompt'][behind['slots'][:count]], slots
    )
    assert not behind['slots'][count:].any()


@pytest.mark.parametrize(
  ('form', 'before', 'rest'),
  [
    ('memory:1', 4 * (3 + 1 + 1) + 1, K * (3 + 2)),
    ('memory:3+candidates:evidence', 4 * (3 + 1 + 1) + 3, K * 2),
    ('memory:2+last:1+history:sid+candidates:', 3 + 2, 0),
  ],
)
def test_neither_piece_has_more_room_than_it_needs(
  prompter, form, before, rest
):
  own = reading(prompter, form)
  assert own.memory_prompt_tokens == 2 + before  # <bos>, the block's mark.
  assert own.rest_tokens == 1 + K + rest + 1  # Slots, and what asks.
  assert own.memory_prompt_tokens + own.rest_tokens == own.prompt_tokens
  slate = tiny_data.slate()
  slate['history_grades'][:] = 2
  slate['history_ages'][:] = 7
  ids = [*own.prompt(slate, np.arange(K))['prompt'], *own.ask('<answer>')]
  found = own.split_memory(np.array(ids))
  assert [len(piece) for piece in found] == [2 + before, rest + K + 2]


def test_what_stands_before_is_the_same_for_other_candidates(prompter):
  own = reading(prompter, 'memory:2')
  slate, other = tiny_data.slate(0), tiny_data.slate(1, count=3)
  user = [name for name in slate if name.startswith('history')]
  other |= {name: slate[name] for name in user}
  first, second = (
    own.split_memory(own.prompt(s, np.arange(int(s['count'])))['prompt'])
    for s in (slate, other)
  )
  np.testing.assert_array_equal(first[0], second[0])
  assert len(first[1]) > len(second[1])
