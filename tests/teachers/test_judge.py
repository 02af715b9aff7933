import numpy as np
import pytest

from gr2_jax.teachers import dialogue, endpoint, judge, ledger

from .. import chat_server, tiny_data
from ..chat_server import Answer, completion

MARKS = 'grounding: 0.5\nconsistency: 1\n**flow**: 0.75\n"identifiers": 0'


@pytest.mark.parametrize(
  ('text', 'marks'),
  [
    (MARKS, [0.5, 1, 0.75, 0]),
    ('<think>flow: 3</think>' + MARKS.upper(), [0.5, 1, 0.75, 0]),
    (MARKS.replace('1', '7'), None),
    (MARKS.replace('0.75', 'good'), None),
    ('', None),
  ],
)
def test_marks_are_read_or_there_are_none(text, marks):
  assert judge.read(text) == marks


def test_each_case_gets_its_marks_or_none(tmp_path, monkeypatch):
  monkeypatch.setenv(chat_server.VARIABLE, chat_server.KEY)
  prompter = tiny_data.prompter(tmp_path)
  words = dialogue.Dialogue(prompter, tiny_data.catalog(), '', 80, False)
  order = np.array([1, 0, 2])
  slot = prompter.vocabulary.slot_base
  cases = [
    judge.Case(
      slate=tiny_data.slate(seed, 3),
      order=order,
      reasoning=np.array([slot + seed % 3]),
      ranking=np.array([2, 0, 1]),
    )
    for seed in range(6)
  ]

  def answer(body, number):
    del number
    text = body['messages'][1]['content']
    assert 'Ranking:\n[3] [2] [1]' in text
    cited = text.partition('Reasoning:\n')[2].partition('\n')[0]
    if cited == '[3]':
      return Answer(completion('no idea'))
    return Answer(
      completion(MARKS.replace('0.5', '0.25' if cited == '[1]' else '0.5'))
    )

  with (
    chat_server.serve(answer) as server,
    ledger.Ledger(tmp_path / 'a.jsonl', None) as book,
    endpoint.Endpoint(chat_server.settings(server), book) as model,
  ):
    mark = judge.Judge(judge.REASONING, model)
    marks = mark(case.shown(words) for case in cases)
  assert marks[:, 0].tolist()[:2] == [0.5, 0.25]
  assert np.isnan(marks[2]).all()
  np.testing.assert_array_equal(marks[:3], marks[3:])
  assert len(server.requests) == 4 + 2 * 2
  means = judge.summary(marks)
  assert (means['judged'], means['unjudged']) == (4, 2)
  assert means['grounding'] == pytest.approx(0.375)
  assert means['total'] == pytest.approx((0.375 + 1 + 0.75 + 0) / 4)
  assert judge.summary(marks[2:3])['total'] is None
