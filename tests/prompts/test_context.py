"""Forms of a context: what each leaves, and the room that a prompt needs."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.prompts import context as context_lib

from .. import tiny_data

K = tiny_data.K
WHOLE = context_lib.Lines(
  history=[
    {'sid': [1, 2], 'title': [3], 'grade': [4], 'age': [5]},
    {'sid': [6, 7], 'title': [], 'grade': [], 'age': [8]},
    {'sid': [9, 10], 'title': [11, 12], 'grade': [13], 'age': []},
  ],
  candidates=[
    {'sid': [20, 21], 'title': [22], 'evidence': [23, 24, 25]},
    {'sid': [30, 31], 'title': [], 'evidence': [33, 34, 35]},
  ],
)
HISTORY = list(range(1, 14))
CANDIDATES = [[20, 21, 22, 23, 24, 25], [30, 31, 33, 34, 35]]
BARE = [[], []]


def generator(seed=0):
  return np.random.default_rng(seed)


@pytest.mark.parametrize(
  ('form', 'history', 'candidates'),
  [
    ('full', HISTORY, CANDIDATES),
    ('memory:4', HISTORY, CANDIDATES),
    ('last:2', HISTORY[5:], CANDIDATES),
    ('last:0', [], CANDIDATES),
    ('last:9', HISTORY, CANDIDATES),
    ('history:', [], CANDIDATES),
    ('history:sid', [1, 2, 6, 7, 9, 10], CANDIDATES),
    ('history:categories', [], CANDIDATES),
    # In the order of the prompt config, not of the form.
    ('history:age,title', [3, 5, 8, 11, 12], CANDIDATES),
    ('candidates:', HISTORY, BARE),
    ('candidates:evidence', HISTORY, [[23, 24, 25], [33, 34, 35]]),
    ('candidates:title,sid', HISTORY, [[20, 21, 22], [30, 31]]),
    ('columns:2', HISTORY, [[20, 21, 22, 23, 24], [30, 31, 33, 34]]),
    ('columns:0', HISTORY, [[20, 21, 22], [30, 31]]),
    ('candidates:sid+columns:2', HISTORY, [[20, 21], [30, 31]]),
    (
      'last:1 + history:sid,grade + candidates:evidence + columns:1',
      [9, 10, 13],
      [[23], [33]],
    ),
    ('random:1', HISTORY, CANDIDATES),
    ('random:0', [], BARE),
    ('last:2+random:1', HISTORY[5:], CANDIDATES),
  ],
)
def test_what_a_form_leaves(form, history, candidates):
  found = context_lib.parse(form).reduce(WHOLE, generator())
  assert found == context_lib.Ids(history, candidates)


def test_forms_that_leave_nothing_to_chance_do_without_a_generator():
  for form in ('full', 'last:2', 'history:', 'candidates:sid', 'columns:1'):
    one = context_lib.parse(form).reduce(WHOLE, None)
    assert one == context_lib.parse(form).reduce(WHOLE, generator())


def test_parts_are_read():
  form = 'last:5+history:sid,grade+candidates:+columns:3+dropped:7+memory:2'
  assert context_lib.parse(form) == context_lib.Context(
    last=5,
    history=('sid', 'grade'),
    candidates=(),
    columns=3,
    dropped=7,
    memory=2,
  )
  assert context_lib.parse('text') == context_lib.Context(text=True)
  assert context_lib.parse('full') == context_lib.FULL


@pytest.mark.parametrize(
  ('form', 'part', 'message'),
  [
    ('', '', 'no such part'),
    ('all', 'all', 'no such part'),
    ('full+last:5', 'full', 'no such part'),
    ('last:5+', '', 'no such part'),
    ('last', 'last', 'invalid literal'),
    ('last:-1', 'last:-1', 'below 0'),
    ('last:2.5', 'last:2.5', 'invalid literal'),
    ('columns:x', 'columns:x', 'invalid literal'),
    ('dropped:0', 'dropped:0', 'below 1'),
    ('last:3+memory:0', 'memory:0', 'below 1'),
    ('random:1.5', 'random:1.5', 'no chance between 0 and 1'),
    ('random:nan', 'random:nan', 'no chance between 0 and 1'),
    ('random:', 'random:', 'could not convert'),
    ('history:evidence', 'history:evidence', "no field 'evidence'; known: sid"),
    ('candidates:sid,age', 'candidates:sid,age', "no field 'age'; known: sid"),
    ('text:3', 'text:3', 'no such part'),
  ],
)
def test_a_bad_form_names_its_part_and_a_cure(form, part, message):
  with pytest.raises(ValueError) as error:  # noqa: PT011
    context_lib.parse(form)
  said = str(error.value)
  assert said.startswith(f'context {form!r}, part {part!r}: ')
  assert message in said
  assert 'write full, or parts like last:5' in said


@pytest.mark.parametrize('form', ['text+last:5', 'memory:3+text'])
def test_what_the_compressor_wrote_stands_alone(form):
  with pytest.raises(ValueError, match='text stands alone'):
    context_lib.parse(form)


def is_part(short, long):
  """Whether `short` is `long` with some left out."""
  rest = iter(long)
  return all(token in rest for token in short)


def flat(line):
  return [i for part in line.values() for i in part]


@st.composite
def wholes(draw):
  """Lines of any lengths; no token is there twice."""
  sizes = st.integers(0, 4)
  width, told = draw(sizes), draw(st.sets(st.sampled_from('stga')))
  shown = draw(st.sets(st.sampled_from('stce')))
  at = 0

  def line(names, kept):
    nonlocal at
    made = {}
    for name in names:
      size = width if name == 'evidence' else draw(sizes)
      if name[0] in kept:
        made[name] = list(range(at, at + size))
        at += size
    return made

  items, count = draw(st.integers(0, 5)), draw(st.integers(1, 5))
  return context_lib.Lines(
    [line(('sid', 'title', 'grade', 'age'), told) for _ in range(items)],
    [
      line(('sid', 'title', 'categories', 'evidence'), shown)
      for _ in range(count)
    ],
  )


@settings(max_examples=200, deadline=None)
@given(
  whole=wholes(),
  most=st.integers(1, 60),
  form=st.sampled_from(['', '+last:2', '+columns:1', '+history:sid']),
  seed=st.integers(0, 2**32),
)
def test_what_is_dropped_holds_the_limit_and_the_order(whole, most, form, seed):
  context = context_lib.parse(f'dropped:{most}{form}')
  found = context.reduce(whole, generator(seed))
  lines = found.candidates
  assert len(found.history) + sum(map(len, lines)) <= most
  # Nothing comes back that the other parts of the form leave out.
  rest = dataclasses.replace(context, dropped=0).reduce(whole, None)
  assert is_part(found.history, rest.history)
  assert len(lines) == len(whole.candidates)
  for line, every in zip(lines, rest.candidates, strict=True):
    assert is_part(line, every)
  assert found == context.reduce(whole, generator(seed))


def test_what_is_dropped_is_now_this_and_now_that():
  found = [
    context_lib.parse('dropped:14').reduce(WHOLE, generator(seed))
    for seed in range(300)
  ]
  sizes = [len(f.history) + sum(map(len, f.candidates)) for f in found]
  assert max(sizes) == 14
  assert min(sizes) == 0
  histories = {tuple(f.history) for f in found}
  assert {(), (9, 10, 11, 12), (1, 2, 6, 7, 9, 10)} <= histories
  seen = [set(sum(f.candidates, f.history)) for f in found]
  for token in sum(CANDIDATES, HISTORY):  # None is always there, nor never.
    assert 0 < sum(token in some for some in seen) < 300


def test_the_oldest_history_makes_room_first():
  whole = context_lib.Lines(
    [{'sid': [i]} for i in range(9)], [{'evidence': [20, 21]}]
  )
  full = 0
  for seed in range(100):
    found = context_lib.parse('dropped:4').reduce(whole, generator(seed))
    room = 4 - len(found.candidates[0])
    if len(found.history) == room and found.history[-1:] == [8]:
      full += found.history == list(range(9 - room, 9))
  assert full > 10


@settings(max_examples=30, deadline=None)
@given(whole=wholes(), seed=st.integers(0, 2**32))
def test_tokens_left_by_chance_keep_their_order(whole, seed):
  found = context_lib.parse('random:0.5').reduce(whole, generator(seed))
  rest = context_lib.FULL.reduce(whole, None)
  assert is_part(found.history, rest.history)
  for line, every in zip(found.candidates, rest.candidates, strict=True):
    assert is_part(line, every)


def test_each_token_has_the_chance_that_is_said():
  context, rng = context_lib.parse('random:0.2'), generator()
  drawn = [context.reduce(WHOLE, rng) for _ in range(500)]
  for token in sum(CANDIDATES, HISTORY):
    share = np.mean([token in sum(f.candidates, f.history) for f in drawn])
    assert share == pytest.approx(0.2, abs=0.08)


FORMS = (
  'full',
  'last:2',
  'last:0+candidates:sid',
  'history:sid,age',
  'history:',
  'candidates:evidence+columns:1',
  'candidates:',
  'columns:0',
  'random:0.5',
  'dropped:1',
  'dropped:24',
  'dropped:5000',
  'memory:3',
  'last:2+memory:1+history:sid',
  'memory:2+dropped:12',
)


@pytest.fixture(scope='module')
def prompter(tmp_path_factory):
  return tiny_data.prompter(
    tmp_path_factory.mktemp('contexts'),
    fields=context_lib.CANDIDATE_FIELDS,
    history_fields=context_lib.HISTORY_FIELDS,
    history=4,
  )


def reading(prompter, form, **changes):
  return dataclasses.replace(
    prompter, context=context_lib.parse(form), **changes
  )


@settings(max_examples=150, deadline=None)
@given(
  form=st.sampled_from(FORMS),
  spare=st.sampled_from([None, 0, 15, 1000]),
  slate=st.builds(
    tiny_data.slate,
    seed=st.integers(0, 500),
    count=st.integers(1, K),
    length=st.integers(0, tiny_data.H),
  ),
  seed=st.integers(0, 2**32),
)
def test_every_prompt_of_a_form_has_room(prompter, form, spare, slate, seed):
  """With and without a budget, a tight one too."""
  budget = 0 if spare is None else prompter._least_tokens + spare
  own = reading(prompter, form, budget=budget)
  rng, count = generator(seed), int(slate['count'])
  order = rng.permutation(count)
  row = own.prompt(slate, order, rng)
  size = len(row['prompt']) + own.ask_tokens
  assert size <= own.prompt_tokens
  # The marks stand in every form.
  words, ids = own.vocabulary, row['prompt'].tolist()
  slots = words.slot_base + np.arange(count)
  np.testing.assert_array_equal(row['prompt'][row['slots'][:count]], slots)
  opened = ids.index(words.control['<candidates>'])
  memory = own.context.memory
  assert ids[opened - memory : opened] == list(
    range(words.memory_base, words.memory_base + memory)
  )
  history = ids[ids.index(words.control['<history>']) + 1 : opened - memory]
  lines = own.lines(slate)
  assert is_part(history, sum(map(flat, lines.history), []))
  for place, rank in enumerate(order):
    begin = row['slots'][place - 1] if place else opened
    line = ids[begin + 1 : row['slots'][place]]
    assert is_part(line, flat(lines.candidates[rank]))
  if budget:
    assert size <= budget + memory


@pytest.mark.parametrize(
  ('form', 'size'),
  [
    ('full', 3 * (3 + 1 + 1) + K * (3 + 2)),
    ('last:2', 2 * (3 + 1 + 1) + K * (3 + 2)),
    ('history:sid', 3 * 3 + K * (3 + 2)),
    ('history:+columns:1', K * (3 + 1)),
    ('candidates:sid', 3 * (3 + 1 + 1) + K * 3),
    ('memory:3+candidates:', 3 * (3 + 1 + 1) + 3),
    ('dropped:17', 17),
  ],
)
def test_a_form_takes_no_more_room_than_it_needs(prompter, form, size):
  own = reading(
    prompter,
    form,
    fields=('sid', 'evidence'),
    history_fields=('sid', 'grade', 'age'),
    history=3,
  )
  marks = 1 + 2 + K + 1  # <bos>, the blocks' marks, slots and what asks.
  assert own.prompt_tokens == marks + size
  slate = tiny_data.slate()
  slate['history_grades'][:] = 2
  slate['history_ages'][:] = 7
  longest = max(
    len(own.prompt(slate, np.arange(K), generator(seed))['prompt'])
    for seed in range(30)
  )
  assert longest + 1 == own.prompt_tokens


@pytest.mark.parametrize('form', ['dropped:3', 'candidates:', 'last:1'])
def test_a_budget_is_of_the_whole_context_in_every_form(prompter, form):
  """What a form leaves out makes no room, and takes none."""
  slate, shown = tiny_data.slate(), set()
  for budget in range(prompter._least_tokens, prompter.prompt_tokens + 9, 5):
    whole = dataclasses.replace(prompter, budget=budget)
    own = reading(prompter, form, budget=budget)
    assert own.lines(slate) == whole.lines(slate)
    shown.add(len(whole.lines(slate).history))
  assert shown == set(range(5))


def test_memory_tokens_that_there_are_not_are_refused(prompter):
  with pytest.raises(ValueError, match='4 memory .* prompt.num_memory=3'):
    reading(prompter, 'memory:4')
  with pytest.raises(ValueError, match='the history must come first'):
    reading(prompter, 'memory:2', layout=('candidates', 'history'))


@pytest.mark.parametrize('name', ['fields', 'history_fields'])
def test_a_field_that_a_prompt_cannot_show_is_named(prompter, name):
  message = f"prompt.{name}: no field 'price'; known: sid, title"
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(prompter, **{name: ('sid', 'price')})
