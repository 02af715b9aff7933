import dataclasses

import numpy as np
import pytest

from gr2_jax.ops import parsing
from gr2_jax.prompts import chat
from gr2_jax.teachers import dialogue

from .. import tiny_data

ORDER = np.array([2, 0, 3, 1])


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  return dialogue.Dialogue(
    prompter=tiny_data.prompter(
      tmp_path_factory.mktemp('dialogue'), reasoning=60
    ),
    catalog=tiny_data.catalog(),
    system='You are an analyst.',
    words=80,
    knowledge=False,
  )


def slate(length=5):
  return tiny_data.slate(3, len(ORDER), length)


def test_a_chat_has_a_line_an_item_and_no_identifier(words):
  record = slate()
  system, user = (m['content'] for m in words.messages(record, ORDER))
  titles = tiny_data.catalog().titles
  assert 'You are an analyst.' in system
  assert 'all 4 candidates' in system
  assert 'RANKING: 4, 3, 2, 1' in system
  lines = user.splitlines()
  shown = record['history'][2:5]  # The prompter shows three.
  at = lines.index('History:')
  for place, item in enumerate(shown, 1):
    thing = titles[item].split()[1]
    assert lines[at + place] == f'[h{place}] {titles[item]} | beauty > {thing}'
  at = lines.index('Candidates:')
  for place, rank in enumerate(ORDER, 1):
    assert titles[record['candidates'][rank]] in lines[at + place]
    assert lines[at + place].startswith(f'[{place}] ')
  assert lines.index('History:') < at
  assert not any(name in user for name in tiny_data.catalog().item_ids)
  assert '[h1]' not in words.describe(slate(0), ORDER)
  assert '(none)' in words.describe(slate(0), ORDER)


def test_a_chat_does_not_depend_on_labels_unless_targeted(words):
  record = slate()
  other = record | {'grades': record['grades'][::-1].copy()}
  assert words.messages(record, ORDER) == words.messages(other, ORDER)
  _, user = words.messages(record, ORDER, target=3)
  assert 'engaged with [3] next' in user['content']
  assert 'engaged' not in words.messages(record, ORDER)[1]['content']


def test_knowledge_is_a_switch(words):
  primed = dataclasses.replace(words, knowledge=True)
  assert chat.KNOWLEDGE in primed.messages(slate(), ORDER)[0]['content']
  assert chat.KNOWLEDGE not in words.messages(slate(), ORDER)[0]['content']


@pytest.mark.parametrize(
  ('tail', 'verdict'),
  [
    ('RANKING: 3, 1, 2, 4', parsing.VALID),
    ('Ranking: [3] > [1] > [2] > [4].', parsing.VALID),
    ('**RANKING:** 3 1 2 4\n', parsing.VALID),
    ('ranking: 1, 2\nRANKING: 3,1,2,4', parsing.VALID),
    ('"ranking": [3, 1, 2, 4]}', parsing.VALID),
    ('', parsing.WRONG_FORMAT),
    ('RANKING:', parsing.WRONG_FORMAT),
    ('RANKING: 3, 1, 2, 4 as they all fit', parsing.WRONG_FORMAT),
    ('RANKING: three, one', parsing.WRONG_FORMAT),
    ('RANKING: h1, 1, 2, 4', parsing.WRONG_FORMAT),
    ('RANKING: ' + '9' * 5000, parsing.WRONG_FORMAT),
    ('RANKING: 3, 1, 2, 5', parsing.OUT_OF_SET),
    ('RANKING: 0, 1, 2, 3', parsing.OUT_OF_SET),
    ('RANKING: 3, 1, 1, 2, 4', parsing.REPETITION),
    ('RANKING: 3, 1', parsing.MISSING),
  ],
)
def test_an_answer_is_a_permutation_or_has_a_fault(words, tail, verdict):
  answer = words.read(
    f'<think>hm</think>\nReasoning: likes\n soap\n{tail}', ORDER
  )
  assert answer.verdict == verdict
  want = [3, 2, 0, 1] if verdict == parsing.VALID else []
  assert answer.ranking.tolist() == want
  assert answer.ranking.dtype == np.int32
  if verdict == parsing.VALID and tail.startswith(('R', '*')):
    assert answer.reasoning == 'likes soap'


def span(words, text, record=None):
  record = slate() if record is None else record
  return words.span(
    words.read(f'{text}\nRANKING: 3,1,2,4', ORDER), record, ORDER
  )


def test_citations_become_slots_and_semantic_ids(words):
  record, vocabulary = slate(), words.prompter.vocabulary
  sids = words.prompter.items['sid']
  result = span(words, 'likes soap as [h3] so [3], [1, 2] fits')
  slots = [vocabulary.slot_base + r for r in (3, 2, 0)]
  want = [
    *vocabulary.encode('likes soap as'),
    *sids[record['history'][4]],
    *vocabulary.encode('so'),
    slots[0],
    *vocabulary.encode(','),
    slots[1],
    vocabulary.slot_base + 0,
    *vocabulary.encode('fits'),
    *slots,
  ]
  assert result.ids == want
  assert (result.clipped, result.unknown) == (False, 0)


def test_a_span_ends_in_the_first_picks_once(words):
  slots = [words.prompter.vocabulary.slot_base + r for r in (3, 2, 0)]
  assert span(words, 'so [3] [1] [2]').ids[-3:] == slots
  assert not words.prompter.vocabulary.is_slot(
    span(words, 'so [3] [1] [2]').ids[-4]
  )
  assert span(words, '').ids == slots


def test_unknown_citations_are_dropped_and_counted(words):
  result = span(words, 'as [h4] so [5] [0] and <slot3> <answer>')
  assert result.unknown == 3
  vocabulary = words.prompter.vocabulary
  body = np.array(result.ids[:-3])
  assert not vocabulary.is_slot(body).any()
  assert vocabulary.control['<answer>'] not in body


def test_a_long_span_is_clipped_but_no_identifier_is_torn(words):
  text = 'soap [h1] [h2] [h3] brush [h1] cream'
  whole = span(words, text).ids
  for room in range(len(whole) + 2):
    short = dataclasses.replace(
      words, prompter=dataclasses.replace(words.prompter, reasoning=room)
    )
    result = span(short, text)
    assert len(result.ids) <= room
    assert result.clipped == (room < len(whole))
    ids = np.array(result.ids, int)
    base = words.prompter.vocabulary.sid_base
    assert ((ids >= base) & (ids < base + 15)).sum() % 3 == 0
    body = result.ids[: max(0, len(ids) - 3)]
    assert body == whole[: len(body)]


def test_tokens_are_shown_as_they_were_cited(words):
  result = span(words, 'likes soap as [h3] so [3] fits')
  shown = words.show(np.array(result.ids), slate(), ORDER)
  assert shown == 'likes soap as [h3] so [3] fits [3] [1] [2]'
