import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.prompts import prompt

from .. import tiny_data

K = tiny_data.K


@pytest.fixture(scope='module')
def prompter(tmp_path_factory):
  return tiny_data.prompter(tmp_path_factory.mktemp('prompts'))


def orders(count):
  return st.permutations(range(count)).map(np.array)


SLATES = st.builds(
  tiny_data.slate,
  seed=st.integers(0, 500),
  count=st.integers(1, K),
  length=st.integers(0, tiny_data.H),
)


def test_a_prompt_reads_as_it_is_configured(prompter):
  slate = tiny_data.slate(count=2, length=5)
  order = np.array([1, 0])
  words, codes = prompter.vocabulary, tiny_data.codes()
  found = prompter.prompt(slate, order)
  binned = prompter.bins(slate['evidence'], 2)

  def sid(item):
    return ''.join(
      f'<{letter}{code}>'
      for letter, code in zip('abc', codes[item], strict=True)
    )

  text = '<history>' + ''.join(sid(i) for i in slate['history'][2:5])
  text += '<candidates>'
  for place, rank in enumerate(order):
    item = slate['candidates'][rank]
    text += sid(item) + ' ' + tiny_data.catalog().titles[item]
    text += f'<rank={binned[rank, 0]}><fame:raw={binned[rank, 1]}>'
    text += f'<slot{place}>'
  assert found['prompt'][0] == words.bos
  assert words.decode(found['prompt'][1:]) == text


def test_a_history_tells_how_items_were_taken_and_when(prompter):
  own = dataclasses.replace(prompter, history_fields=('age', 'sid', 'grade'))
  slate = tiny_data.slate()
  slate['history_grades'][:] = [2, 1, 1, 0, 2]
  slate['history_ages'][:] = [9, 9, 0, 10**7, -1]
  words, codes = own.vocabulary, tiny_data.codes()
  ids = own.prompt(slate, np.arange(K))['prompt'].tolist()
  end = ids.index(words.control['<candidates>'])
  wanted = ''
  for place, before, after in ((2, 0, '<grade1>'), (3, 3, ''), (4, None, 2)):
    wanted += '' if before is None else f'<age{before}>'
    wanted += '<a{}><b{}><c{}>'.format(*codes[slate['history'][place]])
    wanted += f'<grade{after}>' if after == 2 else after
  assert words.decode(ids[2:end]) == wanted


@settings(max_examples=50, deadline=None)
@given(slate=SLATES, data=st.data())
def test_slots_point_at_slot_tokens_and_labels_move_along(
  prompter, slate, data
):
  count = int(slate['count'])
  order = data.draw(orders(count))
  found = prompter.prompt(slate, order)
  assert found['count'] == count
  assert len(found['prompt']) + 1 <= prompter.prompt_tokens
  places = found['slots'][:count]
  slots = prompter.vocabulary.slot_base + np.arange(count)
  np.testing.assert_array_equal(found['prompt'][places], slots)
  is_slot = prompter.vocabulary.is_slot(found['prompt'])
  np.testing.assert_array_equal(np.flatnonzero(is_slot), places)
  np.testing.assert_array_equal(found['incoming'][:count], order)
  np.testing.assert_array_equal(found['grades'][:count], slate['grades'][order])
  assert not found['slots'][count:].any()
  assert not found['grades'][count:].any()
  assert sorted(found['incoming']) == list(range(K))
  # The line before each slot is the candidate's own.
  binned = prompter.vocabulary.bins(prompter.bins(slate['evidence'], count))
  for place, rank in enumerate(order):
    end = places[place]
    assert found['prompt'][end - 2 : end].tolist() == binned[rank].tolist()


def test_the_longest_prompt_fits_exactly(prompter):
  short = dataclasses.replace(prompter, fields=('sid', 'evidence'))
  found = short.prompt(tiny_data.slate(), np.arange(K))
  assert len(found['prompt']) + 1 == short.prompt_tokens


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, K), data=st.data())
def test_an_answer_names_the_places_of_its_ranking(prompter, count, data):
  order, ranking = data.draw(orders(count)), data.draw(orders(count))
  *slots, end = prompter.answer(ranking, order)
  assert end == prompter.vocabulary.eos
  places = np.array(slots) - prompter.vocabulary.slot_base
  np.testing.assert_array_equal(order[places], ranking)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, K), data=st.data())
def test_presented_reasoning_speaks_of_the_same_candidates(
  prompter, count, data
):
  order = data.draw(orders(count))
  words = prompter.vocabulary
  named = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=5)))
  ids = [*words.encode('so soap fits'), *(words.slot_base + named.astype(int))]
  found = np.array(prompter.present(ids, order))
  slot = words.is_slot(found)
  assert slot.sum() == len(named)
  np.testing.assert_array_equal(order[found[slot] - words.slot_base], named)
  assert found[~slot].tolist() == words.encode('so soap fits')


def test_long_reasoning_is_cut(prompter):
  ids = np.full(50, prompter.vocabulary.encode('so')[0])
  assert len(prompter.present(ids, np.arange(K))) == prompter.reasoning
  assert prompter.thinking_tokens == prompter.reasoning + 1 + K + 1
  assert prompter.answer_tokens == K + 1


@pytest.mark.parametrize(
  ('share', 'percent'),
  [(0.0, 5), (0.05, 5), (0.1, 10), (0.13, 15), (0.22, 20), (0.3, 30), (1, 50)],
)
def test_what_asks_tells_the_share_to_keep(prompter, share, percent):
  words = prompter.vocabulary
  ids = prompter.ask('<compress>', ratio=share)
  assert words.decode(ids) == f'<keep={percent}><compress>'
  ids = prompter.ask('<compress>', target=3, ratio=share)
  assert words.decode(ids) == f'<keep={percent}><target><slot3><compress>'
  assert words.decode(prompter.ask('<think>')) == '<think>'


def test_ids_of_the_outside_world_never_reach_a_prompt(tmp_path):
  found = [
    tiny_data.prompter(
      tmp_path,
      tiny_data.catalog(prefix),
      fields=('sid', 'title', 'categories', 'evidence'),
    )
    for prefix in ('item', 'secret')
  ]
  assert found[0].items == found[1].items
  one, two = (p.prompt(tiny_data.slate(), np.arange(K)) for p in found)
  for name, value in one.items():
    np.testing.assert_array_equal(value, two[name], name)


@pytest.mark.parametrize('layout', [('candidates', 'history'), ('candidates',)])
def test_blocks_stand_in_the_configured_order(prompter, layout):
  other = dataclasses.replace(prompter, layout=layout)
  ids = other.prompt(tiny_data.slate(), np.arange(K))['prompt'].tolist()
  control = prompter.vocabulary.control
  at = [ids.index(control[f'<{block}>']) for block in layout]
  assert at == sorted(at)
  assert ('history' in layout) == (control['<history>'] in ids)
  assert len(ids) + 1 <= other.prompt_tokens


def test_no_history_is_shown_where_none_is_wanted(prompter):
  other = dataclasses.replace(prompter, history=0)
  ids = other.prompt(tiny_data.slate(), np.arange(K))['prompt'].tolist()
  control = prompter.vocabulary.control
  assert ids[1:3] == [control['<history>'], control['<candidates>']]


def history_of(prompter, row, slate):
  """Items of the history in a prompt, by their lines."""
  ids = row['prompt'].tolist()
  control = prompter.vocabulary.control
  begin = ids.index(control['<history>']) + 1
  end = ids.index(control['<candidates>'])
  found, at = [], begin
  shown = slate['history'][: int(slate['history_length'])][::-1]
  lines = {}
  for item in shown:
    line = [prompter.items[f][item] for f in prompter.history_fields]
    lines[sum(line, ())] = item
  while at < end:
    size = next(
      n for n in range(1, end - at + 1) if tuple(ids[at : at + n]) in lines
    )
    found.append(lines[tuple(ids[at : at + size])])
    at += size
  return found


def test_a_budget_leaves_out_the_oldest_items_first(prompter):
  prompter = dataclasses.replace(
    prompter, fields=('sid', 'evidence'), history_fields=('sid', 'title')
  )
  slate = tiny_data.slate()
  whole = prompter.prompt(slate, np.arange(K))
  every = history_of(prompter, whole, slate)
  np.testing.assert_array_equal(every, prompter.shown(slate))
  lengths = [
    sum(len(prompter.items[field][item]) for field in prompter.history_fields)
    for item in every
  ]
  kept = []
  for budget in range(prompter._least_tokens, prompter.prompt_tokens + 1):
    other = dataclasses.replace(prompter, budget=budget)
    assert other.prompt_tokens == budget
    row, shown = other.prompt(slate, np.arange(K)), other.shown(slate)
    np.testing.assert_array_equal(history_of(other, row, slate), shown)
    left_out = len(every) - len(shown)
    np.testing.assert_array_equal(shown, every[left_out:])
    room = budget - len(row['prompt']) - other.ask_tokens
    assert room >= 0
    assert not left_out or room < lengths[left_out - 1]
    kept.append(len(shown))
  assert kept[0] == 0
  assert kept[-1] == len(every) > 1


def test_a_budget_too_small_for_the_candidates_says_so(prompter):
  least = prompter._least_tokens
  with pytest.raises(ValueError, match=f'prompt.budget=7: .* {least} tokens'):
    dataclasses.replace(prompter, budget=7)


def test_padding_fills_up_and_never_cuts():
  assert prompt.pad([5, 6], 4, 'prompt').tolist() == [5, 6, 0, 0]
  with pytest.raises(ValueError, match='prompt: 3 tokens, room for 2'):
    prompt.pad([5, 6, 7], 2, 'prompt')


def test_presentation_is_a_permutation_or_the_incoming_order():
  rng = np.random.default_rng(0)
  assert prompt.presentation(5, 'incoming', rng).tolist() == [0, 1, 2, 3, 4]
  drawn = {tuple(prompt.presentation(3, 'shuffled', rng)) for _ in range(200)}
  assert len(drawn) == 6
