import pytest

from gr2_jax.teachers import dialogue, endpoint, http, ledger

from .. import chat_server, tiny_data
from ..chat_server import Answer, completion


@pytest.fixture(autouse=True)
def _key(monkeypatch):
  monkeypatch.setenv(chat_server.VARIABLE, chat_server.KEY)


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  return dialogue.Dialogue(
    prompter=tiny_data.prompter(tmp_path_factory.mktemp('words')),
    catalog=tiny_data.catalog(),
    system='',
    words=80,
    knowledge=True,
  )


def slates(n=12):
  """The one positive is the last of four candidates."""
  rows = [tiny_data.slate(seed, 4) for seed in range(n)]
  for row in rows:
    row['grades'][:] = 0
    row['grades'][3] = 1
  return rows


def ask(
  tmp_path, words, answer, kind='targeted', tries=3, batch=None, **changes
):
  batch = slates() if batch is None else batch
  with (
    chat_server.serve(answer) as server,
    ledger.Ledger(tmp_path / 'a.jsonl', None) as book,
    endpoint.Endpoint(
      chat_server.settings(server, **changes), book, lambda _: None
    ) as model,
  ):
    teacher = http.HttpTeacher(words, model, 'shuffled')
    traces = list(teacher.traces(batch, range(len(batch)), kind, tries, 0))
    assert sorted(i for i, _ in traces) == list(range(len(batch)))
  return dict(traces), teacher.report(), server


def test_targeted_is_shown_a_target_and_puts_it_first(tmp_path, words):
  traces, report, server = ask(tmp_path, words, chat_server.ranks)
  for trace in traces.values():
    assert trace.ranking[0] == 3
    assert (trace.verdict, trace.tries) == ('targeted', 1)
  assert report['verdicts'] == {'targeted': 12}
  assert report['answers'] == len(server.requests) == 12
  assert (report['prompt_tokens'], report['completion_tokens']) == (360, 240)
  assert server.most <= 3


def test_rejection_hides_the_target_until_it_is_first(tmp_path, words):
  traces, report, server = ask(
    tmp_path, words, chat_server.ranks, kind='rejection', tries=2
  )
  assert all(not chat_server.candidates(b)[1] for b in server.requests)
  verdicts = {t.verdict for t in traces.values()}
  assert verdicts == {'accepted', 'rejected'}
  for trace in traces.values():
    hit = trace.ranking[0] == 3
    want = ('accepted', 1) if hit else ('rejected', 2)
    assert (trace.verdict, trace.tries) == want
  assert report['answers'] == sum(t.tries for t in traces.values())


@pytest.mark.parametrize(
  ('body', 'verdict'),
  [
    (completion(''), 'empty'),
    (completion(None), 'empty'),
    (completion('I cannot', refusal='no'), 'refused'),
    (completion('half', 'content_filter'), 'refused'),
    (completion('likes soap', 'length'), 'cut'),
    (completion('RANKING: 1, 2', 'length'), 'cut'),
    (completion('likes soap'), 'wrong_format'),
    (completion('RANKING: 1, 2, 3, 9'), 'out_of_set'),
    (completion('RANKING: 1, 2, 2, 3'), 'repetition'),
    (completion('RANKING: 1, 2'), 'missing'),
  ],
)
def test_an_unfit_answer_is_requested_again(tmp_path, words, body, verdict):
  batch = slates(1)

  def second(request, number):
    return Answer(body) if number == 1 else chat_server.ranks(request)

  traces, report, _ = ask(tmp_path, words, second, batch=batch)
  assert (traces[0].verdict, traces[0].tries) == ('targeted', 2)
  assert report['verdicts'] == {verdict: 1, 'targeted': 1}
  traces, report, server = ask(
    tmp_path, words, lambda *_: Answer(body), batch=batch, tries=2
  )
  assert (traces[0].verdict, traces[0].tries) == (verdict, 2)
  assert len(traces[0].ranking) == 0
  assert len(server.requests) == 2


def test_a_slate_without_an_answer_is_repeated_at_the_end(tmp_path, words):
  batch, failed = slates(), []

  def answer(request, number):
    if number <= 4 and len(failed) < 4:
      failed.append(number)
      return Answer('', status=500)
    return chat_server.ranks(request)

  traces, report, _ = ask(tmp_path, words, answer, batch=batch, retries=0)
  assert failed
  assert report['verdicts'] == {'targeted': 12}
  assert len(traces) == 12


def test_a_slate_that_is_never_answered_is_reported(tmp_path, words):
  batch = slates()
  title = dialogue.Dialogue.describe(words, batch[5], range(4)).splitlines()[
    1:4
  ]

  def answer(request, number):
    del number
    if all(line in request['messages'][1]['content'] for line in title):
      return Answer('', status=500)
    return chat_server.ranks(request)

  traces, report, _ = ask(tmp_path, words, answer, batch=batch, retries=1)
  assert traces[5].verdict == 'unanswered'
  assert report['verdicts'] == {'targeted': 11, 'unanswered': 1}
  declined, *_ = ask(
    tmp_path / 'other',
    words,
    lambda r, n: (
      Answer('', status=400) if answer(r, n).status == 500 else answer(r, n)
    ),
    batch=batch,
  )
  assert declined[5].verdict == 'declined'


def test_an_endpoint_that_is_down_stops_the_run(tmp_path, words):
  with pytest.raises(endpoint.EndpointError, match='6 slates in a row .* 503'):
    ask(tmp_path, words, lambda *_: Answer('', status=503), retries=0)
