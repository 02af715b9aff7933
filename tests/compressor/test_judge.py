import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr2_jax.compressor import judge as compressor_judge
from gr2_jax.compressor import options, writer
from gr2_jax.compressor import rollouts as rollouts_lib
from gr2_jax.models import lora, transformer
from gr2_jax.ops import advantages, compression
from gr2_jax.policy import policy, sampling
from gr2_jax.stages import compress
from gr2_jax.teachers import dialogue, endpoint, ledger
from gr2_jax.teachers import judge as judge_lib

from .. import chat_server, tiny, tiny_data, tiny_world
from ..chat_server import Answer, completion

P, G = 4, 3
BUDGETS = {0.4: 16, 0.5: 20}  # tokens, of contexts of some forty
UNREADABLE = 4  # one text in four gets no readable answer


@pytest.fixture(scope='module')
def reader(tmp_path_factory):
  """A ranker's spec of the catalog of twelve items."""
  prompter = tiny_data.prompter(
    tmp_path_factory.mktemp('judge'), history_fields=('sid', 'title', 'grade')
  )
  return policy.PolicySpec(
    catalog=tiny_data.catalog(),
    prompter=prompter,
    model=transformer.TransformerConfig(
      vocab_size=len(prompter.vocabulary),
      d_model=16,
      num_layers=1,
      num_heads=2,
      num_kv_heads=2,
      head_dim=8,
      d_ff=24,
    ),
    adapters=lora.Adapters(),
  )


def config(**changes):
  return tiny_world.config(
    **{'compress__eval_batch_size': P}
    | {f'compress__{name}': value for name, value in changes.items()}
  )


def grammar_of(spec):
  return rollouts_lib.grammar(spec.prompter, config().compress.slack)


MESH = tiny.one_device()


@pytest.fixture(scope='module')
def world_(reader):
  """Spec, parameters of ranker and policy, sampler, rows."""
  spec, grammar = reader, grammar_of(reader)
  sampler = rollouts_lib.sampler(grammar, BUDGETS, group=G, temperature=1.0)
  render = rollouts_lib.generation_rows(
    spec.prompter, BUDGETS, 'shuffled', True
  )
  made = [
    render(tiny_data.slate(seed, 3 + seed % 3), np.random.default_rng(seed))
    for seed in range(P)
  ]
  rows = {name: jnp.stack([row[name] for row in made]) for name in made[0]}
  parameters = [tiny.params(spec.model, seed) for seed in (0, 1)]
  return spec, *parameters, sampler, rows


def marks(text):
  """The fake judge's marks of a text; None for some texts."""
  number = zlib.crc32(text.encode())
  if number % UNREADABLE == 0:
    return None
  return [number % 7 / 8, number // 7 % 5 / 4, number // 35 % 2]


def answer(body, number=0):
  del number
  found = marks(body['messages'][1]['content'])
  if found is None:
    return Answer(completion('I cannot say.'))
  axes = judge_lib.COMPRESSION.axes
  lines = [f'{axis}: {mark}' for axis, mark in zip(axes, found, strict=True)]
  return Answer(completion('\n'.join(lines)))


def remote(server, **changes):
  """Fields of `compress` for a judge at a server."""
  fields = dict(
    judge='remote', endpoint=server.url, model='m', answer_tokens=50, retries=0
  )
  return fields | changes


def texts(spec, rows, rollouts):
  """The text for the judge of each compression: [P][G]."""
  words = dialogue.Dialogue(
    spec.prompter, spec.catalog, 'An analyst.', 9, False
  )
  found = []
  for p in range(P):
    slate, count = tiny_data.slate(p, 3 + p % 3), int(rows['count'][p])
    order = np.asarray(rows['incoming'][p, :count])
    ends = np.asarray(rollouts.length[p])
    ids = [np.asarray(rollouts.tokens[p, g, : ends[g]]) for g in range(G)]
    cases = [judge_lib.Compression(slate, order, own) for own in ids]
    found.append([case.shown(words) for case in cases])
  return found


def expected(spec, stage, rows, drawn):
  """Expected rewards, where marks are missing, and their quality."""
  values = [
    [marks(text) for text in own] for own in texts(spec, rows, drawn.rollouts)
  ]
  failed = np.array([[one is None for one in own] for own in values])
  p, q, solvable = np.moveaxis(
    np.array([[one or [0, 0, 0] for one in own] for own in values]), -1, 0
  )
  total = np.where(solvable, 0.2 * p + 0.8 * q, 0.8 * p + 0.2 * q)
  rewards = compression.reward(
    drawn.verdict,
    drawn.saved,
    jnp.asarray(total, jnp.float32),
    drawn.ellipsis,
    stage.compression_weight,
  )
  return np.asarray(rewards), failed, q


def keep_all(rows, drawn, judged):
  del rows
  return drawn, judged


def test_rewards_follow_from_the_marks(reader, world_, tmp_path):
  spec, ranker, params, sampler, rows = world_
  with chat_server.serve(answer) as server:
    own = config(**remote(server))
    with compress.http_judge(own, reader, MESH, tmp_path / 'c') as (
      judge,
      spent,
    ):
      act = rollouts_lib.make_judged_rollouts(
        spec, sampler, own.compress, ranker, judge, keep_all
      )
      drawn, judged = act(params, rows, jax.random.key(0))
      asked = spent()['asked']
  assert (drawn.verdict == compression.VALID).all()
  rewards, failed, quality = expected(spec, own.compress, rows, drawn)
  assert 0 < failed.sum() < P * G
  np.testing.assert_allclose(judged.reward, rewards, atol=1e-6)
  np.testing.assert_array_equal(judged.judge_failed, failed)
  np.testing.assert_allclose(judged.ranking, quality, atol=1e-6)
  np.testing.assert_array_equal(judged.judge[failed], 0)
  np.testing.assert_array_equal(judged.preservation, drawn.preservation)
  shown = {x for own in texts(spec, rows, drawn.rollouts) for x in own}
  unread = sum(marks(text) is None for text in shown)
  assert asked['answers'] == len(server.requests) == len(shown) + unread
  metrics = compressor_judge.metrics(judged)
  np.testing.assert_allclose(metrics['judge_failed'], failed.mean())


def test_advantages_follow_from_the_marks(reader, world_, tmp_path):
  spec, ranker, params, sampler, rows = world_
  key = jax.random.key(0)
  with chat_server.serve(answer) as server:
    own = config(**remote(server))
    with compress.http_judge(own, reader, MESH, tmp_path / 'c') as (
      judge,
      _,
    ):
      act = rollouts_lib.make_rollout_step(
        spec, sampler, own.compress, ranker, judge
      )
      batch, metrics = act(params, rows, key)
      before = len(server.requests)
      again, _ = act(params, rows, key)
  assert len(server.requests) == before  # The answers are stored.
  tiny.assert_trees_equal(again, batch)
  drawn = jax.jit(
    functools.partial(rollouts_lib.sample, spec, sampler, own.compress)
  )(params, rows, key)
  rewards, failed, _ = expected(spec, own.compress, rows, drawn)
  np.testing.assert_array_equal(batch.tokens, drawn.rollouts.tokens)
  np.testing.assert_allclose(
    batch.advantage,
    advantages.group_advantage(rewards, kind=own.compress.advantage),
    atol=1e-4,
  )
  np.testing.assert_allclose(metrics['reward'], rewards.mean(), atol=1e-6)
  np.testing.assert_allclose(metrics['judge_failed'], failed.mean())


def test_invalid_compressions_are_not_judged(reader, world_, tmp_path):
  spec, ranker, params, _, rows = world_
  free = rollouts_lib.sampler(
    grammar_of(spec), BUDGETS, group=G, temperature=1.0, constrained=False
  )
  with chat_server.serve(answer) as server:
    own = config(**remote(server))
    with compress.http_judge(own, reader, MESH, tmp_path / 'c') as (
      judge,
      _,
    ):
      act = rollouts_lib.make_judged_rollouts(
        spec, free, own.compress, ranker, judge, keep_all
      )
      drawn, judged = act(params, rows, jax.random.key(0))
  assert (drawn.verdict != compression.VALID).all()
  assert not server.requests
  for name in ('reward', 'judge', 'judge_failed', 'ranking', 'solvable'):
    assert not getattr(judged, name).any()


def test_each_written_context_is_judged_once(reader, world_, tmp_path):
  spec, ranker, params, *_ = world_
  slates = [tiny_data.slate(seed, 4) for seed in range(P + 1)]
  with chat_server.serve(answer) as server:
    own = config(**remote(server))
    with compress.http_judge(own, reader, MESH, tmp_path / 'c') as (
      judge,
      _,
    ):
      parts, plain = (
        list(
          writer.make_write(
            spec, MESH, ranker, own.prompt.order, own.compress, {0.5: 20}, who
          )(params, slates, 0)
        )
        for who in (judge, None)
      )
  assert [len(part.count) for part in parts] == [P, 1]
  shown = {body['messages'][1]['content'] for body in server.requests}
  assert len(shown) == P + 1
  failed = sum(int(part.judged.judge_failed.sum()) for part in parts)
  assert failed == sum(marks(text) is None for text in shown)
  for part, other in zip(parts, plain, strict=True):
    np.testing.assert_array_equal(part.tokens, other.tokens)
    np.testing.assert_array_equal(part.judged.verdict, other.judged.verdict)
    assert not other.judged.judge_failed.any()


@pytest.mark.parametrize('judge_by', options.CHOICES['judge_by'])
def test_a_ranker_judges_in_one_compiled_function(world_, judge_by):
  spec, ranker, params, sampler, rows = world_
  stage, key = config(judge_by=judge_by).compress, jax.random.key(0)
  act = rollouts_lib.make_rollout_step(spec, sampler, stage, ranker)
  batch, metrics = act(params, rows, key)
  text = act.func.lower(*act.args, params, rows, key).as_text()
  assert 'callback' not in text
  assert len(re.findall('func.func public', text)) == 1

  # The same, step by step.
  rollouts = jax.jit(sampling.sample, static_argnums=(0, 6, 7))(
    spec.model, params, rows['prompt'], rows['prompt_length'],
    jax.jit(rollouts_lib.constraint_inputs, static_argnums=0)(
      grammar_of(spec), rows
    ), key,
    grammar_of(spec), sampler,
  )  # fmt: skip
  np.testing.assert_array_equal(batch.tokens, rollouts.tokens)
  scores = _scores(spec, ranker, rows, rollouts)
  grades = rows['grades']
  if judge_by == 'order':
    hidden, _ = transformer.encode_prompt(
      spec.model, ranker, rows['prompt'], rows['prompt_length']
    )
    whole = transformer.slot_scores(ranker, hidden, rows['slots'])
    grades = compression.order_grades(whole, rows['count'])
  rewards, judged = jax.jit(lambda *arrays: _rewards(spec, stage, *arrays))(
    rows | {'grades': grades}, rollouts, scores
  )
  assert judged.solvable.any()
  np.testing.assert_allclose(metrics['reward'], rewards.mean(), atol=1e-5)
  np.testing.assert_allclose(metrics['judge'], judged.total.mean(), atol=1e-5)
  np.testing.assert_allclose(
    batch.advantage,
    advantages.group_advantage(rewards, kind=stage.advantage),
    atol=1e-3,
  )
  assert metrics['judge_failed'] == 0


def _rewards(spec, stage, rows, rollouts, scores):
  """Eq. 10 of a ranker's scores, and the judgment."""
  marks_ = rollouts_lib.symbols(spec.vocabulary)
  tokens, length = rollouts.tokens, rollouts.length
  shown = rows['prompt'], rows['prompt_length']
  judged = compression.judge(
    scores,
    rows['grades'],
    rows['count'],
    compression.preservation(
      shown[0],
      compression.source_segments(*shown, marks_) == 0,
      tokens,
      compression.segments(tokens, length, marks_) == 0,
    ),
    k=stage.judge_k,
    top=stage.judge_top,
  )
  verdict = compression.verify(
    tokens, length, *shown, rows['count'], rows['budget'], marks_,
    2 * stage.slack,
  )  # fmt: skip
  rewards = compression.reward(
    verdict,
    compression.compression_reward(length, rows['whole']),
    judged.total,
    compression.ellipsis_factor(tokens, length, marks_, stage.ellipsis_cost),
    stage.compression_weight,
  )
  return rewards, judged


def _scores(spec, ranker, rows, rollouts):
  """The ranker's scores [P, G, K], of whole sequences."""
  words, K = spec.vocabulary, spec.prompter.num_candidates
  before = [*spec.prompter.opening, words.control['<history>']]
  tokens, length = np.asarray(rollouts.tokens), np.asarray(rollouts.length)
  ids = np.zeros((P * G, len(before) + tokens.shape[2]), np.int32)
  places = np.zeros((P * G, K), np.int32)
  for row in range(P * G):
    p, g = divmod(row, G)
    own = [*before, *tokens[p, g, : length[p, g]].tolist()]
    ids[row, : len(own)] = own
    for k in range(int(rows['count'][p])):
      places[row, k] = own.index(words.slot_base + k)
  hidden = tiny.plain_hidden(spec.model, ranker, ids)
  scores = jax.jit(transformer.slot_scores)(ranker, hidden, places)
  return scores.reshape(P, G, K)


def test_marks_give_the_same_total_as_a_ranker():
  given = np.array([[[0.75, 1, 1], [0.75, 0.5, 0], [np.nan] * 3]], np.float32)
  found = compressor_judge.from_marks(given)
  np.testing.assert_allclose(found.total, [[0.95, 0.7, np.nan]], rtol=1e-6)
  assert found.solvable.tolist() == [[True, False, False]]
  assert found.ranking.tolist() == [[1, 0.5, 0]]
  # `compression.judge`, of scores with the same quality.
  scores = np.array([[[0.9, 0.2], [0.2, 0.9]]], np.float32)
  other = compression.judge(
    scores,
    np.array([[2, 0]]),
    np.array([2]),
    given[:, :2, 0],
    k=1,
    top=1,
  )
  same = np.stack([given[:, :2, 0], other.ranking, other.solvable], -1)
  np.testing.assert_allclose(
    compressor_judge.from_marks(same).total, other.total, rtol=1e-6
  )


def test_usage_and_cost_add_up_over_runs(reader, tmp_path):
  good = Answer(completion('preservation: 1\nranking: 1\nsolvable: 1'))
  with chat_server.serve(lambda *_: good) as server:
    fields = remote(server, prompt_price=2.0, answer_price=10.0)
    for run, name in enumerate(('one', 'two'), 1):
      own = config(**fields, token_limit=10**6 + run)
      workdir = tmp_path / name
      with compress.http_judge(own, reader, MESH, workdir) as (
        judge,
        spent,
      ):
        judge.ask(['a', 'b', f'of {name}'])
        found = spent()['asked']
      assert found == {
        'model': 'm',
        'answers': 2 + run,
        'prompt_tokens': 30 * (2 + run),
        'completion_tokens': 20 * (2 + run),
        'cost': pytest.approx((2 + run) * (30 * 2 + 20 * 10) / 1e6),
      }
  assert len(server.requests) == 4
  assert all(body['temperature'] == 0 for body in server.requests)


@pytest.mark.parametrize(
  ('fields', 'error', 'message'),
  [
    ({}, endpoint.EndpointError, r'compress\.endpoint must be the base URL'),
    (
      {'endpoint': 'http://localhost:1/v1'},
      endpoint.EndpointError,
      r'compress\.model is empty',
    ),
    (
      {
        'endpoint': 'http://localhost:1/v1',
        'model': 'm',
        'key_variable': 'GR2_NO_SUCH_KEY',
      },
      endpoint.EndpointError,
      r'GR2_NO_SUCH_KEY \(compress\.key_variable\) is not set',
    ),
    ({'request': '{'}, ValueError, r'compress\.request must be a JSON object'),
  ],
)
def test_an_invalid_endpoint_is_an_error(
  reader, tmp_path, fields, error, message
):
  own = config(judge='remote', **fields)
  with (
    pytest.raises(error, match=message),
    compress.http_judge(own, reader, MESH, tmp_path / 'c'),
  ):
    pass


def test_the_token_limit_is_that_of_the_section(reader, world_, tmp_path):
  spec, ranker, params, sampler, rows = world_
  with chat_server.serve(answer) as server:
    own = config(**remote(server, token_limit=100))
    with (
      pytest.raises(ledger.OverLimit, match=r'compress\.token_limit=100, 0 '),
      compress.http_judge(own, reader, MESH, tmp_path / 'c') as (judge, _),
    ):
      rollouts_lib.make_rollout_step(
        spec, sampler, own.compress, ranker, judge
      )(params, rows, jax.random.key(0))
  assert not server.requests


def test_an_unknown_judge_is_named():
  with pytest.raises(ValueError, match=r"compress\.judge='rank'.*remote"):
    options.CompressorOptions.from_config(config(judge='rank').compress)
