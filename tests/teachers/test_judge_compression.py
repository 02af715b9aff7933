import numpy as np
import pytest

from gr2_jax.teachers import dialogue, endpoint, ledger
from gr2_jax.teachers import judge as judge_lib

from .. import chat_server, tiny_data
from ..chat_server import Answer, completion

ORDER = np.array([1, 0, 2])
MARKS = 'preservation: 0.5\n**ranking**: 0.75\nsolvable: 1'


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  prompter = tiny_data.prompter(
    tmp_path_factory.mktemp('judge'),
    history_fields=('sid', 'title', 'grade', 'age'),
  )
  return dialogue.Dialogue(prompter, tiny_data.catalog(), '', 0, False)


def slate(seed=3):
  """A record without labels."""
  record = tiny_data.slate(seed, len(ORDER))
  record.pop('grades')
  return record


def whole(words, record):
  """The tokens of a context that nothing is left out of."""
  prompter = words.prompter
  lines = prompter.context.reduce(prompter.lines(record), None)
  ids = [*lines.history, prompter.vocabulary.control['<candidates>']]
  for place, rank in enumerate(ORDER):
    ids += [*lines.candidates[rank], prompter.vocabulary.slot_base + place]
  return [*ids, prompter.vocabulary.eos]


def shown(words, record, ids):
  case = judge_lib.Compression(record, ORDER, np.array(ids, np.int32))
  full, _, short = case.shown(words).partition('# The short form\n\n')
  return full, short


@pytest.mark.parametrize(
  ('text', 'marks'),
  [
    (MARKS, [0.5, 0.75, 1]),
    ('<think>ranking: 3</think>' + MARKS.upper(), [0.5, 0.75, 1]),
    (MARKS.replace('able: 1', 'able: 0'), [0.5, 0.75, 0]),
    (MARKS.replace('able: 1', 'able: 0.5'), None),
    (MARKS.replace('able: 1', 'able: 1%'), None),
    (MARKS.replace('0.75', '1/4'), None),
    (MARKS.replace('0.5', '0,5'), None),
    (MARKS.replace('0.5', '-0.5'), None),
    (MARKS.replace('ranking', 'order'), None),
    ('', None),
  ],
)
def test_marks_are_read_or_there_are_none(text, marks):
  assert judge_lib.read(text, judge_lib.COMPRESSION) == marks


def test_the_full_text_has_words_and_symbols_of_every_item(words):
  record = slate()
  prompter, catalog = words.prompter, tiny_data.catalog()
  full, _ = shown(words, record, [])
  lines = full.splitlines()
  items = [*prompter.shown(record), *record['candidates'][ORDER]]
  names = ['[h1]', '[h2]', '[h3]', '[1]', '[2]', '[3]']
  for name, item in zip(names, items, strict=True):
    (line,) = [x for x in lines if x.startswith(name)]
    assert catalog.titles[item] in line
    assert prompter.vocabulary.decode(prompter.items['sid'][item]) in line
  read = prompter.lines(record)
  for place, rank in enumerate(ORDER, 1):
    (line,) = [x for x in lines if x.startswith(f'[{place}]')]
    evidence = read.candidates[rank]['evidence']
    assert line.endswith(prompter.vocabulary.decode(evidence))
  assert not any(name in full for name in catalog.item_ids)


def test_the_short_form_has_what_was_kept_and_nothing_else(words):
  record = slate()
  prompter, vocabulary = words.prompter, words.prompter.vocabulary
  sids = prompter.items['sid']
  past, first = prompter.shown(record)[1], record['candidates'][ORDER[0]]
  evidence = prompter.lines(record).candidates[ORDER[0]]['evidence'][:1]
  ids = [
    *sids[past],
    *vocabulary.encode('red soap'),
    vocabulary.control['<candidates>'],
    *evidence,
    vocabulary.slot_base,
    *sids[first][:1],
    vocabulary.slot_base + 1,
    vocabulary.slot_base + 2,
    vocabulary.eos,
    *vocabulary.encode('green cream'),
  ]
  _, short = shown(words, record, ids)
  assert short.splitlines() == [
    'History:',
    '[h2] red soap',
    '',
    'Candidates:',
    f'[1] {vocabulary.decode(evidence)}',
    f'[2] {vocabulary.decode(sids[first][:1])}',
    '[3]',
  ]


def test_what_is_kept_whole_is_shown_whole(words):
  record, catalog = slate(), tiny_data.catalog()
  _, short = shown(words, record, whole(words, record))
  for place, rank in enumerate(ORDER, 1):
    title = catalog.titles[record['candidates'][rank]]
    assert f'\n[{place}] [{place}] {title}' in short
  for place, item in enumerate(words.prompter.shown(record), 1):
    assert f'[h{place}] {catalog.titles[item]}' in short


def test_any_tokens_can_be_shown(words):
  vocabulary, rng = words.prompter.vocabulary, np.random.default_rng(0)
  record, texts = slate(), set()
  for size in range(60):
    ids = rng.integers(-3, len(vocabulary) + 3, size)
    texts.add(shown(words, record, ids)[1])
    texts.add(
      shown(words, record, rng.permutation(whole(words, record))[:size])[1]
    )
  assert len(texts) > 100
  for text in texts:
    assert text.startswith('History:\n')
  assert any('<?>' in text for text in texts)


def judge(words, tmp_path, answer, cases, **changes):
  limit = changes.pop('limit', None)
  with (
    chat_server.serve(answer) as server,
    ledger.Ledger(tmp_path / 'a.jsonl', limit, 'compress') as book,
    endpoint.Endpoint(
      chat_server.settings(server, section='compress', **changes),
      book,
      pause=lambda _: None,
    ) as model,
  ):
    ask = judge_lib.Judge(judge_lib.COMPRESSION, model)
    marks = ask(case.shown(words) for case in cases)
    return marks, server.requests, book.usage()


@pytest.fixture
def _key(monkeypatch):
  monkeypatch.setenv(chat_server.VARIABLE, chat_server.KEY)


def cases(words, seeds):
  return [
    judge_lib.Compression(
      slate(seed), ORDER, np.array(whole(words, slate(seed)))
    )
    for seed in seeds
  ]


@pytest.mark.usefixtures('_key')
def test_equal_compressions_share_a_request(words, tmp_path):
  unread = cases(words, [1])[0].shown(words)

  def answer(body, number):
    del number
    user = body['messages'][1]['content']
    if user == unread:
      return Answer(completion('no idea'))
    return Answer(completion(MARKS.replace('0.5', str(user.count('soap') / 9))))

  inputs = cases(words, [0, 1, 2, 0, 0, 1])
  marks, requests, usage = judge(words, tmp_path, answer, inputs)
  assert marks.shape == (6, 3)
  for row, case in zip(marks, inputs, strict=True):
    text = case.shown(words)
    if text == unread:
      assert np.isnan(row).all()
    else:
      np.testing.assert_allclose(row, [text.count('soap') / 9, 0.75, 1])
  assert len(requests) == 2 + 2  # What cannot be read is asked for twice.
  assert usage == {
    'answers': 4,
    'prompt_tokens': 4 * 30,
    'completion_tokens': 4 * 20,
  }
  means = judge_lib.summary(marks, judge_lib.COMPRESSION)
  assert (means['judged'], means['unjudged'], means['ranking']) == (4, 2, 0.75)


@pytest.mark.usefixtures('_key')
def test_declined_requests_have_no_marks_and_stop_nothing(words, tmp_path):
  def answer(body, number):
    del body
    if number <= 4:
      return Answer({'error': {'message': 'too long'}}, status=400)
    return Answer(completion(MARKS))

  marks, *_ = judge(
    words, tmp_path, answer, cases(words, range(6)), concurrency=1
  )
  assert np.isnan(marks[:4]).all()
  assert marks[4:].tolist() == [[0.5, 0.75, 1]] * 2


@pytest.mark.usefixtures('_key')
def test_an_endpoint_that_is_down_is_an_error(words, tmp_path):
  down = Answer('', status=503)
  with pytest.raises(endpoint.EndpointError, match='4 requests in a row'):
    judge(
      words,
      tmp_path,
      lambda *_: down,
      cases(words, range(8)),
      concurrency=2,
      retries=0,
    )


@pytest.mark.usefixtures('_key')
def test_the_limit_and_the_key_name_their_section(words, tmp_path, monkeypatch):
  good = Answer(completion(MARKS))
  with pytest.raises(ledger.OverLimit, match=r'compress\.token_limit=100, '):
    judge(words, tmp_path, lambda *_: good, cases(words, [0]), limit=100)
  monkeypatch.delenv(chat_server.VARIABLE)
  with pytest.raises(endpoint.EndpointError, match=r'compress\.key_variable'):
    judge(words, tmp_path, lambda *_: good, cases(words, [0]))
