import dataclasses
import json

import numpy as np
import pytest

from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.pipeline import artifacts
from gr2_jax.stages import traces
from gr2_jax.teachers import endpoint, heuristic, ledger, policy

from .. import chat_server, tiny_world


def run(world, workdir, **changes):
  config = tiny_world.config(
    **{f'traces__{name}': value for name, value in changes.items()}
  )
  results = traces.run(config, tiny_world.inputs(world, 'traces'), workdir)
  kept, lost = (
    records.Records(workdir / name)
    for name in (traces.ACCEPTED, traces.REJECTED)
  )
  return results, *([r[i] for i in range(len(r))] for r in (kept, lost))


def test_every_slate_is_kept_or_rejected_and_counted(world, tmp_path):
  results, kept, lost = run(world, tmp_path, noise=4.0, tries=2)
  slates = slates_lib.SlateSource(world['slates'], 'train')
  assert lost
  assert (results['traces'], results['rejected']) == (len(kept), len(lost))
  indices = sorted(int(r['slate']) for r in [*kept, *lost])
  assert indices == list(range(len(slates)))
  for record in kept:
    grades = slates[int(record['slate'])]['grades']
    assert grades[record['ranking'][0]] > 0
    assert record['verdict'] == heuristic.VERDICTS.index('accepted')
  for record in lost:
    assert not slates[int(record['slate'])]['grades'][record['ranking'][0]] > 0
    assert record['tries'] == 2
  tries = [int(r['tries']) for r in [*kept, *lost]]
  np.testing.assert_allclose(results['tries'], np.mean(tries))
  first = sum(r['tries'] == 1 for r in kept)
  np.testing.assert_allclose(results['first_try'], first / len(slates))


def test_hardness_of_kept_and_lost_slates(world, tmp_path):
  results, kept, lost = run(world, tmp_path, noise=4.0, tries=3)
  slates = slates_lib.read(world['slates'], 'train')
  for pile, rows in (('kept', kept), ('lost', lost)):
    dcg, first, positives = [], [], []
    for row in rows:
      grades = slates.grades[int(row['slate'])].astype(float)
      gains, best = (2.0**g - 1 for g in (grades, np.sort(grades)[::-1]))
      discount = np.log2(np.arange(2, len(grades) + 2))
      dcg.append((gains / discount).sum() / (best / discount).sum())
      first.append(np.flatnonzero(grades)[0] + 1)
      positives.append(np.count_nonzero(grades))
    found = results['hardness'][pile]
    assert found.pop('slates') == len(rows)
    wanted = {
      'n@5': np.mean(dcg),  # No slate here has more than five.
      'r@1': np.mean(np.equal(first, 1)),
      'first_positive': np.mean(first),
      'positives': np.mean(positives),
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
      np.testing.assert_allclose(found[name], value, rtol=1e-5)
    tries = np.array([row['tries'] for row in rows])
    counted = [np.sum(tries == n) for n in range(1, tries.max() + 1)]
    assert results['tries_histogram'][pile] == counted
  assert results['tries_histogram']['lost'][:2] == [0, 0]


def test_where_nothing_is_lost_there_is_nothing_to_report(world, tmp_path):
  results, *_ = run(world, tmp_path, kind='targeted', slates=3)
  assert results['tries_histogram'] == {'kept': [3], 'lost': [0]}
  lost = results['hardness']['lost']
  assert lost.pop('slates') == 0
  assert set(lost.values()) == {None}


def test_a_teacher_that_is_never_right_is_an_error(
  world, tmp_path, monkeypatch
):
  plain = heuristic.Heuristic.rejection

  def wrong(self, slate, rng, tries):
    trace = plain(self, slate, rng, tries)
    return dataclasses.replace(trace, verdict='rejected')

  monkeypatch.setattr(heuristic.Heuristic, 'rejection', wrong)
  with pytest.raises(ValueError, match='in 2 tries .*none of 5 slates'):
    run(world, tmp_path, tries=2, slates=5)
  assert not (tmp_path / traces.ACCEPTED).exists()


def ask_policy(world, workdir, **changes):
  fields = dict(teacher='policy', policy=str(world['sft']), slates=40, tries=2)
  return run(world, workdir, **fields | changes)


def test_a_policy_is_a_teacher(world, tmp_path):
  results, kept, lost = ask_policy(world, tmp_path)
  slates = slates_lib.SlateSource(world['slates'], 'train')
  spec = tiny_world.spec(world)
  assert results['teacher'] == 'policy'
  assert (len(kept), len(lost)) == (results['traces'], results['rejected'])
  assert len(kept) + len(lost) == 40
  assert kept
  assert lost
  for record in [*kept, *lost]:
    slate = slates[int(record['slate'])]
    right = slate['grades'][record['ranking'][0]] > 0
    verdict = 'accepted' if right else 'rejected'
    assert heuristic.VERDICTS[record['verdict']] == verdict
    assert sorted(record['ranking']) == list(range(slate['count']))
    assert len(record['reasoning']) <= spec.prompter.reasoning
  unknown = sum(int(record['unknown']) for record in kept)
  assert results['unknown_tokens'] == unknown
  assert results['clipped_tokens'] == 0
  assert not (tmp_path / traces.PARTS).exists()


def test_a_killed_run_of_a_policy_repeats_only_missing_traces(
  world, tmp_path, monkeypatch
):
  monkeypatch.setattr(traces, '_PART', 6)
  whole, *_ = ask_policy(world, tmp_path / 'whole')
  plain = policy.PolicyTeacher._answer_rows
  batches = []

  def dies(self, rows, labels, seed):
    if len(batches) == 2:
      raise KeyboardInterrupt
    batches.append(labels)
    return plain(self, rows, labels, seed)

  with monkeypatch.context() as patch:
    patch.setattr(policy.PolicyTeacher, '_answer_rows', dies)
    with pytest.raises(KeyboardInterrupt):
      ask_policy(world, tmp_path / 'killed')
  parts = list((tmp_path / 'killed' / traces.PARTS).iterdir())
  known = {
    int(record['slate']) for path in parts for record in records.Records(path)
  }
  assert known
  assert len(known) == 6 * len(parts)
  repeated = set()

  def spy(self, rows, labels, seed):
    repeated.update(index for index, _ in labels)
    return plain(self, rows, labels, seed)

  monkeypatch.setattr(policy.PolicyTeacher, '_answer_rows', spy)
  resumed, *_ = ask_policy(world, tmp_path / 'killed')
  assert resumed == whole
  assert len(repeated) == 40 - len(known)
  assert not repeated & known
  for name in (traces.ACCEPTED, traces.REJECTED):
    one, two = (tmp_path / run / name for run in ('whole', 'killed'))
    assert one.read_bytes() == two.read_bytes()


def test_a_policy_has_to_be_named(world, tmp_path):
  with pytest.raises(ValueError, match='needs traces.policy: the folder'):
    ask_policy(world, tmp_path, policy='')
  with pytest.raises(artifacts.ArtifactError, match='leaves no policy'):
    ask_policy(world, tmp_path, policy=str(world['traces']))


def test_one_try_that_fails_is_no_first_try(world, tmp_path):
  results, kept, lost = run(world, tmp_path, noise=4.0, tries=1)
  assert lost
  np.testing.assert_allclose(
    results['first_try'], len(kept) / (len(kept) + len(lost))
  )


def test_targeted_traces_lose_no_slate(world, tmp_path):
  results, kept, lost = run(world, tmp_path, kind='targeted')
  assert len(kept) == len(slates_lib.SlateSource(world['slates'], 'train'))
  assert not lost
  assert results['first_try'] is None


def test_a_trace_is_a_function_of_seed_and_slate(world, tmp_path):
  run(world, tmp_path)
  for name in (traces.ACCEPTED, traces.REJECTED):
    found = (tmp_path / name).read_bytes()
    assert found == (world['traces'] / name).read_bytes()
  whole = artifacts.read_results(world['traces'])
  assert whole['traces'] == len(records.Records(tmp_path / traces.ACCEPTED))
  config = tiny_world.config()
  with config.unlocked():
    config.seed = 1
  traces.run(config, tiny_world.inputs(world, 'traces'), tmp_path)
  found = (tmp_path / traces.ACCEPTED).read_bytes()
  assert found != (world['traces'] / traces.ACCEPTED).read_bytes()


def test_an_unknown_kind_is_named(world, tmp_path):
  with pytest.raises(ValueError, match="traces.kind is 'target'.*rejection"):
    run(world, tmp_path, kind='target')


def test_an_unknown_teacher_is_named(world, tmp_path):
  with pytest.raises(ValueError, match="traces.teacher is 'htp'.*heuristic"):
    run(world, tmp_path, teacher='htp')


def remote(world, workdir, server, **changes):
  """A run with a teacher behind an endpoint."""
  fields = dict(
    teacher='http',
    endpoint=server.url,
    model='m',
    key_variable=chat_server.VARIABLE,
    kind='targeted',
    slates=10,
    concurrency=2,
    retries=0,
    answer_tokens=50,
    prompt_price=2.0,
    answer_price=10.0,
  )
  return run(world, workdir, **(fields | changes))


@pytest.fixture
def _key(monkeypatch):
  monkeypatch.setenv(chat_server.VARIABLE, chat_server.KEY)


@pytest.mark.usefixtures('_key')
def test_a_model_behind_an_endpoint_is_a_teacher(world, tmp_path):
  with chat_server.serve(chat_server.ranks) as server:
    results, kept, lost = remote(world, tmp_path / 'traces', server)
  slates = slates_lib.SlateSource(world['slates'], 'train')
  assert (len(kept), len(lost), len(server.requests)) == (10, 0, 10)
  assert results['traces'] == results['answers'] == 10
  assert (results['teacher'], results['model']) == ('http', 'm')
  np.testing.assert_allclose(results['cost'], (300 * 2 + 200 * 10) / 1e6)
  spec = tiny_world.spec(world)
  sids = {tuple(row) for row in spec.prompter.items['sid']}
  indices = [int(r['slate']) for r in kept]
  assert indices == sorted(set(indices))
  for record in kept:
    slate = slates[int(record['slate'])]
    assert slate['grades'][record['ranking'][0]] > 0
    assert sorted(record['ranking']) == list(range(slate['count']))
    assert len(record['reasoning']) <= spec.prompter.reasoning
    slots = record['reasoning'][-3:] - spec.vocabulary.slot_base
    assert slots.tolist() == record['ranking'][:3].tolist()
  assert results['clipped'] == 10  # Six tokens are not much.
  assert len(sids) > 1
  for path in tmp_path.rglob('*'):
    if path.is_file():
      assert chat_server.KEY.encode() not in path.read_bytes()


@pytest.mark.usefixtures('_key')
def test_invalid_answers_are_stored_with_their_verdict(world, tmp_path):
  def answer(body, number):
    if number % 2:
      return chat_server.ranks(body)
    return chat_server.Answer(chat_server.completion('RANKING: 1, 1'))

  with chat_server.serve(answer) as server:
    results, kept, lost = remote(
      world, tmp_path / 'traces', server, tries=1, concurrency=1
    )
  assert (len(kept), len(lost)) == (5, 5)
  assert results['rejected'] == 5
  assert results['verdicts'] == {'targeted': 5, 'repetition': 5}
  assert {heuristic.VERDICTS[r['verdict']] for r in lost} == {'repetition'}


@pytest.mark.usefixtures('_key')
@pytest.mark.parametrize('torn', [False, True])
def test_a_broken_run_repeats_only_missing_requests(world, tmp_path, torn):
  def answer(body, number):
    broken = number in (5, 6)
    return (
      chat_server.Answer('', status=503) if broken else chat_server.ranks(body)
    )

  with chat_server.serve(answer) as server:
    with pytest.raises(endpoint.EndpointError, match='in a row'):
      remote(world, tmp_path / 'traces', server, concurrency=1)
    (path,) = (tmp_path / 'answers').iterdir()
    have = len(path.read_bytes().splitlines())
    assert have == 4
    if torn:
      path.write_bytes(path.read_bytes()[:-9])
    before = len(server.requests)
    results, kept, _ = remote(world, tmp_path / 'traces', server)
    assert len(server.requests) - before == 10 - have + torn
    assert results['answers'] == 10
    assert len(path.read_bytes().splitlines()) == 10
    # Another length of reasoning is another artifact of the same answers.
    again, *_ = remote(world, tmp_path / 'other', server, retries=3)
    assert len(server.requests) - before == 10 - have + torn
    assert again == results
  rows = [json.loads(line) for line in path.open()]
  assert len({row['key'] for row in rows}) == 10


@pytest.mark.usefixtures('_key')
def test_a_higher_limit_reuses_the_answers(world, tmp_path):
  with chat_server.serve(chat_server.ranks) as server:
    remote(world, tmp_path / 'a' / 'traces', server)
    need = 50 + max(
      sum(32 + len(m['content'].encode()) for m in body['messages'])
      for body in server.requests
    )
    server.requests.clear()
    with pytest.raises(ledger.OverLimit, match='higher limit'):
      remote(world, tmp_path / 'b' / 'one', server, token_limit=need + 200)
    assert 5 <= len(server.requests) < 10
    remote(world, tmp_path / 'b' / 'two', server, token_limit=0)
    assert len(server.requests) == 10


@pytest.mark.usefixtures('_key')
def test_answers_that_are_all_unfit_are_an_error(world, tmp_path):
  bad = chat_server.Answer(chat_server.completion('hm'))
  with (
    chat_server.serve(lambda *_: bad) as server,
    pytest.raises(ValueError, match="no answer is fit .*'wrong_format': 10"),
  ):
    remote(world, tmp_path / 'traces', server, tries=1)


@pytest.mark.usefixtures('_key')
def test_a_judge_marks_a_sample_of_any_teachers_traces(world, tmp_path):
  marks = 'grounding: 1\nconsistency: 0.5\nflow: 0.5\nidentifiers: 0'
  good = chat_server.Answer(chat_server.completion(marks))
  with chat_server.serve(lambda *_: good) as server:
    results, *_ = run(
      world,
      tmp_path / 'traces',
      judged=5,
      judge_endpoint=server.url,
      judge_model='m',
    )
  assert len(server.requests) == 5
  assert set(server.keys) == {'Bearer none'}
  assert results.pop('judge') == {
    'grounding': 1,
    'consistency': 0.5,
    'flow': 0.5,
    'identifiers': 0,
    'total': 0.5,
    'judged': 5,
    'unjudged': 0,
  }
  assert results == artifacts.read_results(world['traces'])


@pytest.mark.parametrize('request_', ['{', '[1]', '3'])
@pytest.mark.usefixtures('_key')
def test_request_fields_are_a_json_object(world, tmp_path, request_):
  with (
    chat_server.serve(chat_server.ranks) as server,
    pytest.raises(ValueError, match='traces.request must be a JSON object'),
  ):
    remote(world, tmp_path / 'traces', server, request=request_)


@pytest.mark.usefixtures('_key')
def test_request_fields_are_added_and_left_out(world, tmp_path):
  more = '{"seed": 7, "temperature": null}'
  with chat_server.serve(chat_server.ranks) as server:
    remote(world, tmp_path / 'traces', server, request=more)
  for body in server.requests:
    assert body['seed'] == 7
    assert body['max_tokens'] == 50
    assert 'temperature' not in body
