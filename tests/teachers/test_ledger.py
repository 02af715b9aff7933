import json
import threading

import pytest

from gr2_jax.teachers import ledger

REPLY = ledger.Reply('yes', 'stop', 3, 4)


def test_answers_and_tokens_are_restored(tmp_path):
  with ledger.Ledger(tmp_path / 'deep' / 'a.jsonl', None) as book:
    assert book.get('one') is None
    book.reserve(10)
    book.settle(10, 7, 'one', REPLY)
    book.settle(0, 5)
    assert book.get('one') == REPLY
  with ledger.Ledger(tmp_path / 'deep' / 'a.jsonl', None) as book:
    assert book.get('one') == REPLY
    assert (len(book), book.charged) == (1, 12)


def test_a_torn_last_line_is_dropped(tmp_path):
  path = tmp_path / 'a.jsonl'
  with ledger.Ledger(path, None) as book:
    for name in ('one', 'two'):
      book.settle(0, 7, name, REPLY)
  whole = path.read_bytes()
  for size in range(len(whole) // 2, len(whole)):
    path.write_bytes(whole[:size])
    with ledger.Ledger(path, None) as book:
      assert book.get('one') == REPLY
      assert book.get('two') is None
      book.settle(0, 7, 'two', REPLY)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
  'line', ['{', '[]', '{}', '{"charged": 1, "key": "k"}', '{"charged": "x"}']
)
def test_a_damaged_line_is_named(tmp_path, line):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"charged": 1}\n' + line + '\n{"charged": 1}\n')
  with pytest.raises(ValueError, match=r'a.jsonl:2: not an answer'):
    ledger.Ledger(path, None)


def test_the_limit_holds_over_runs_and_counts_reservations(tmp_path):
  path = tmp_path / 'a.jsonl'
  with ledger.Ledger(path, 100) as book:
    book.reserve(60)
    waiting = threading.Thread(target=book.reserve, args=(60,))
    waiting.start()
    assert waiting.is_alive()
    book.settle(60, 30, 'one', REPLY)
    waiting.join()
    book.settle(60, 20)
  with (
    ledger.Ledger(path, 100) as book,
    pytest.raises(ledger.OverLimit, match='token_limit=100, 50 .*higher limit'),
  ):
    book.reserve(51)
  assert [json.loads(x)['charged'] for x in path.open()] == [30, 20]
