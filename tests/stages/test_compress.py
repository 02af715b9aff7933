import functools
import zlib

import jax
import numpy as np
import pytest

from gr2_jax.compressor import judge as judge_lib
from gr2_jax.compressor import rollouts as rollouts_lib
from gr2_jax.compressor import writer
from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.ops import compression
from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.policy import policy, ranking, sampling
from gr2_jax.prompts import compressed
from gr2_jax.prompts import examples as examples_lib
from gr2_jax.stages import compress
from gr2_jax.studies import compress as compress_lib

from .. import chat_server, tiny, tiny_world

pytestmark = pytest.mark.slow

STUDY = dict(
  study_compress__forms=('last:1', 'random:0.5'),
  study_compress__ratios=(0.3, 0.6),
  study_compress__distilled=('text', 'memory:2+candidates:evidence'),
  study_compress__test_slates=8,
  study_compress__resamples=50,
  study_compress__opd__steps=2,
  study_compress__opd__eval_every=2,
  study_compress__opd__eval_slates=8,
  study_compress__opd__eval_batch_size=8,
  study_compress__reinforced=('full', 'text'),
  study_compress__rl__steps=2,
  study_compress__rl__eval_every=2,
  study_compress__rl__eval_slates=8,
  study_compress__rl__eval_batch_size=8,
)


def run_stage(world, name, **changes):
  root = world['rl'].parent
  with artifacts.lock(root):
    return artifacts.run_stage(
      tiny_world.config(**changes), name, root, log=lambda _: None
    )


@pytest.fixture(scope='module')
def written(world):
  return run_stage(world, 'compress')


@pytest.fixture(scope='module')
def study(world, written):
  directory = run_stage(world, 'study_compress', **STUDY)
  return directory, artifacts.read_results(directory)


@pytest.fixture(scope='module')
def spec(world):
  return tiny_world.spec(world)


def is_part(part, whole):
  rest = iter(whole)
  return all(token in rest for token in part)


def wholes(world, spec, split):
  slates = tiny_world.source(world, split)
  for index in range(len(slates)):
    lines = spec.prompter.lines(slates[index])
    yield spec.prompter.context.reduce(lines, None)


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_each_written_context_is_an_extract(world, spec, written, split):
  stored = records.Records(compressed.file(written, split))
  assert len(stored) == (
    12 if split == 'train' else len(tiny_world.source(world, split))
  )
  for one, whole in zip(
    (stored[i] for i in range(len(stored))),
    wholes(world, spec, split),
    strict=False,
  ):
    kept = compressed.context(one)
    assert is_part(kept.history, whole.history)
    for line, source in zip(kept.candidates, whole.candidates, strict=True):
      assert is_part(line, source)
    anchors = 2 + len(whole.candidates)
    assert one['whole'] == len(whole)
    assert not one['fault']
    assert len(kept) + anchors <= 0.6 * (len(whole) + anchors)
  found = artifacts.read_results(written)
  assert found['splits'][split] == compressed.report(stored)
  assert found['longest'] >= max(map(len, map(compressed.context, stored)))


def test_the_judge_is_compared_with_the_ranking_downstream(world, written):
  found = artifacts.read_results(written)['judge']
  assert found['slates'] == len(slates_lib.read(world['slates'], 'validation'))
  assert set(found['n@5']) == {'whole', 'compressed'}
  assert set(found['spearman']) == {'n@5', 'change'}
  for numbers in found['spearman'].values():
    assert set(numbers) == {'preservation', 'ranking', 'judge', 'reward'}
    assert all(v is None or -1 <= v <= 1 for v in numbers.values())


def test_a_model_behind_an_endpoint_judges_the_whole_stage(world):
  """Its marks vary, and some are missing."""

  def answer(body, number):
    del number
    drawn = zlib.crc32(body['messages'][1]['content'].encode()) % 10
    text = f'preservation: 0.{drawn}\nranking: 0.5\nsolvable: 1'
    text = text if drawn else 'I cannot say.'
    return chat_server.Answer(chat_server.completion(text))

  with chat_server.serve(answer) as server:
    home = run_stage(
      world,
      'compress',
      compress__judge='remote',
      compress__endpoint=server.url,
      compress__model='m',
      compress__retries=0,
      compress__steps=2,
      compress__eval_every=2,
      compress__imitate__steps=2,
      compress__imitate__eval_every=2,
      compress__train_slates=4,
    )
  found = artifacts.read_results(home)
  assert found['asked']['answers'] == len(server.requests) > 50
  assert found['splits']['train']['slates'] == 4
  rows = reporting.read_metrics(home / 'metrics.jsonl')
  failed = [row['judge_failed'] for row in rows if 'judge_failed' in row]
  assert 0 < np.mean(failed) < 0.5
  losses = [row['loss'] for row in rows if 'loss' in row]
  assert len(losses) == 2
  assert np.isfinite(losses).all()


def test_a_constant_has_no_correlation():
  rising = np.arange(5.0)
  assert compress._spearman(rising, np.ones(5)) is None
  np.testing.assert_allclose(compress._spearman(rising, -(rising**3)), -1)


def test_sampler_and_learner_agree(written):
  rows = reporting.read_metrics(written / 'metrics.jsonl')
  gaps = [row['sampler_gap'] for row in rows if 'sampler_gap' in row]
  assert len(gaps) == 6
  assert max(gaps) < 1e-5


def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(
  world, written, tmp_path, monkeypatch
):
  """It is killed in imitation, in RL, and while writing."""
  inputs = tiny_world.inputs(world, 'rl')
  run = functools.partial(
    compress.run, tiny_world.config(), inputs, tmp_path / 'run'
  )
  write, steps = reporting.MetricsWriter.write, []

  def dying(self, step, metrics):
    steps.append(step)
    if len(steps) in (4, 12):
      raise KeyboardInterrupt
    write(self, step, metrics)

  def stopping(path, examples):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(reporting.MetricsWriter, 'write', dying)
    for _ in range(2):
      with pytest.raises(KeyboardInterrupt):
        run()
    patch.setattr(records, 'write', stopping)
    with pytest.raises(KeyboardInterrupt):
      run()
  assert artifacts.dumps(run()) == artifacts.dumps(
    artifacts.read_results(written)
  )
  here = tiny_world.spec(world)
  one, two = (
    jax.device_get(here.load_params(p, tiny_world.mesh()))
    for p in (tmp_path / 'run', written)
  )
  tiny.assert_trees_equal(one, two)


def judged(world, spec, tokens_of, budget=None):
  """The judgment of given completions."""
  stage = tiny_world.config(compress__judge_by='labels').compress
  grammar = rollouts_lib.grammar(spec.prompter, stage.slack)
  render = rollouts_lib.generation_rows(spec.prompter, {0.9: 10**6}, 'shuffled')
  slates = tiny_world.source(world, 'train')
  rows = [render(slates[i], np.random.default_rng(i)) for i in range(4)]
  T = spec.prompter.prompt_tokens + 4
  made = [tokens_of(spec, row) for row in rows]
  tokens = np.zeros((4, 1, T), np.int32)
  for row, ids in enumerate(made):
    tokens[row, 0, : len(ids)] = ids
  length = np.array([[len(ids)] for ids in made], np.int32)
  stacked = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
  if budget is not None:
    stacked['budget'][:] = budget
  zeros = np.zeros(tokens.shape, np.float32)
  rollouts = sampling.Rollouts(tokens, length, zeros, zeros)

  @jax.jit
  def judge(params, rows, rollouts):
    source = rollouts_lib.constraint_inputs(grammar, rows)
    verified = rollouts_lib.verify(spec, stage, rows, source, rollouts)
    judged = judge_lib.judge_by_ranker(
      spec, stage, params, rows, rollouts, verified.preservation
    )
    return judge_lib.judgment(verified, judged, stage.compression_weight)

  with sharding.activate(tiny_world.mesh()):
    found = judge(tiny.params(spec.model), stacked, rollouts)
  return jax.device_get(found)


def test_a_budget_is_a_share_of_an_average_context_and_below_the_whole(
  world, spec
):
  slates, p = tiny_world.source(world, 'train'), spec.prompter
  whole = [
    rollouts_lib.context_tokens(
      p, p.prompt(slates[i], np.arange(slates[i]['count']))['prompt']
    )
    for i in range(len(slates))
  ]
  found = rollouts_lib.budgets(p, slates, (0.3, 0.5, 0.95))
  assert list(found) == [0.3, 0.5, 0.95]
  for ratio, tokens in found.items():
    assert abs(tokens - ratio * np.mean(whole)) < 1 + 0.05 * np.std(whole)
    render = rollouts_lib.generation_rows(p, {ratio: tokens}, 'shuffled')
    for i in range(8):
      row = render(slates[i], np.random.default_rng(i))
      assert row['budget'] == min(tokens, whole[i] - 1)
      assert row['whole'] == whole[i]


def blocks(spec, row):
  """The tokens between <history> and the last slot, and the vocabulary."""
  words = spec.vocabulary
  ids = row['prompt'][: row['prompt_length']].tolist()
  begin = ids.index(words.control['<history>']) + 1
  end = ids.index(words.slot_base + int(row['count']) - 1) + 1
  return ids[begin:end], words


def copied(spec, row):
  ids, words = blocks(spec, row)
  return [*ids, words.eos]


def anchors_alone(spec, row):
  _, words = blocks(spec, row)
  slots = words.slot_base + np.arange(int(row['count']))
  return [words.control['<candidates>'], *slots.tolist(), words.eos]


def answered(spec, row):
  """It begins with the ranking by the labels."""
  slots = spec.vocabulary.slot_base + np.argsort(-row['grades'])
  return [*slots[: int(row['count'])].tolist(), *anchors_alone(spec, row)]


def labelled(spec, row):
  """It has a foreign token before the slots of positives."""
  ids, words = [], spec.vocabulary
  for slot in anchors_alone(spec, row):
    place = slot - words.slot_base
    if 0 <= place < int(row['count']) and row['grades'][place] > 0:
      ids.append(words.control['<target>'])
    ids.append(slot)
  return ids


def one_line(spec, row):
  """It has full lines of the positives and empty lines of the others."""
  ids, words = blocks(spec, row)
  ids = ids[ids.index(words.control['<candidates>']) :]
  kept, line = [ids[0]], []
  for token in ids[1:]:
    line.append(token)
    place = token - words.slot_base
    if 0 <= place < int(row['count']):
      kept += line if row['grades'][place] > 0 else line[-1:]
      line = []
  return [*kept, words.eos]


@pytest.mark.parametrize(
  ('cheat', 'verdict'),
  [
    (copied, 'over_budget'),
    (answered, 'malformed'),
    (labelled, 'ungrounded'),
    (one_line, 'uneven'),
    (lambda spec, row: anchors_alone(spec, row)[:-1], 'cut_off'),
  ],
)
def test_cheats_earn_nothing(world, spec, cheat, verdict):
  found = judged(world, spec, cheat)
  code = compression.VERDICTS.index(verdict)
  assert (found.verdict == code).all()
  assert (found.reward == 0).all()


def test_the_ranker_reads_the_compression(world, spec):
  """The read-out of a copy, if it is allowed, is that of the full prompt."""
  found = judged(world, spec, copied, budget=1000)
  assert (found.verdict == compression.VALID).all()
  np.testing.assert_allclose(found.kept, 1, atol=1e-6)
  np.testing.assert_allclose(found.preservation, 1)
  render = examples_lib.generation_rows(spec.prompter, '<answer>', 'shuffled')
  source = tiny_world.source(world, 'train')
  rows = [render(source[i], np.random.default_rng(i)) for i in range(4)]
  rows = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
  params = tiny.params(spec.model)
  with sharding.activate(tiny_world.mesh()):
    hidden, _ = transformer.encode_prompt(
      spec.model, params, rows['prompt'], rows['prompt_length']
    )
  scores = transformer.slot_scores(params, hidden, rows['slots'])
  wanted = compression.judge(
    scores[:, None], rows['grades'], rows['count'], np.ones((4, 1))
  )
  np.testing.assert_allclose(found.ranking, wanted.ranking, atol=1e-5)
  np.testing.assert_array_equal(found.solvable, wanted.solvable)
  bare = judged(world, spec, anchors_alone)
  assert (bare.verdict == compression.VALID).all()
  assert (bare.preservation == 0).all()
  assert (bare.kept < found.kept).all()
  assert not np.allclose(bare.ranking, found.ranking)


@pytest.mark.parametrize(
  ('ratio', 'constrained', 'fault'),
  [(0.05, True, 'too_short'), (0.6, False, None)],
)
def test_failed_compressions_stay_full_and_are_counted(
  world, spec, written, ratio, constrained, fault
):
  config = tiny_world.config(compress__constrained=constrained)
  params = spec.load_params(world['sft'], tiny_world.mesh())
  budgets = rollouts_lib.budgets(
    spec.prompter, tiny_world.source(world, 'train'), (ratio,)
  )
  write = writer.make_write(
    spec,
    tiny_world.mesh(),
    params,
    config.prompt.order,
    config.compress,
    budgets,
  )
  slates = ranking.Chosen(tiny_world.source(world, 'train'), np.arange(9))
  stored = list(writer.store(spec, slates, write(params, slates, 0)))
  report = compressed.report(stored)
  assert report['unchanged'] == report['slates'] == 9
  assert report['kept'] == 1
  assert sum(report['faults'].values()) == 9
  assert fault is None or report['faults'] == {fault: 9}
  for one, whole in zip(stored, wholes(world, spec, 'train'), strict=False):
    assert compressed.context(one) == whole


def test_later_stages_read_the_written_contexts(world, written, spec):
  path = run_stage(
    world, 'rl', rl__context='text', rl__steps=2, rl__eval_every=2
  )
  assert artifacts.read_run(path)['inputs']['compress'] == written.name
  assert policy.form_of(path).context == 'text'
  with pytest.raises(artifacts.ArtifactError, match='compressor wrote'):
    policy.form_of(path, own_slates=False)
  inputs = tiny_world.inputs(world, 'rl') | {'compress': written}
  own = policy.load(tiny_world.config(), inputs, 'text')
  assert own.prompter.prompt_tokens < spec.prompter.prompt_tokens
  render = examples_lib.generation_rows(own.prompter, '<answer>', 'shuffled')
  source = policy.source(inputs, 'train', 'text')
  assert len(source) == 12
  stored = records.Records(compressed.file(written, 'train'))
  for index in range(3):
    row = render(source[index], np.random.default_rng(0))
    context = compressed.context(stored[index])
    ids = row['prompt'][: row['prompt_length']].tolist()
    assert len(ids) == len(context) + len(context.candidates) + 4
    for place, rank in enumerate(row['incoming'][: int(row['count'])]):
      line = context.candidates[rank]
      at = int(row['slots'][place])
      assert ids[at] == own.vocabulary.slot_base + place
      assert ids[at - len(line) : at] == line


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('judge_by', 'taste', 'labels.*order'),
    ('ratio', 0.0, 'above 0'),
    ('ratio', 0.9, 'not learned'),
    ('ratios', (0.2, 1.5), 'at most 1'),
  ],
)
def test_an_invalid_field_is_an_error(world, tmp_path, field, value, message):
  config = tiny_world.config(**{f'compress__{field}': value})
  with pytest.raises(ValueError, match=message):
    compress.run(config, tiny_world.inputs(world, 'rl'), tmp_path)


def test_the_study_compares_every_form_with_the_whole(study):
  directory, results = study
  rows = {row['form']: row for row in results['rows']}
  assert list(rows) == [
    'full', 'last:1', 'random:0.5', 'compressor, 30%', 'compressor, 60%',
    'compressor, 60%, distilled', 'memory:2+candidates:evidence, distilled',
    'full, RL', 'compressor, 60%, RL',
  ]  # fmt: skip
  assert rows['full']['kept'] == rows['full, RL']['kept'] == 1
  for name, row in rows.items():
    whole = rows['full, RL' if name.endswith(', RL') else 'full']
    assert row is whole or row['tokens'] < whole['tokens']
    for measure in compress_lib.MEASURES:
      lost, test = row[measure]['lost'], row[measure]['test']
      assert lost['low'] <= lost['estimate'] <= lost['high']
      apart = whole[measure]['mean'] - row[measure]['mean']
      np.testing.assert_allclose(lost['estimate'], apart, atol=1e-6)
      np.testing.assert_allclose(test['estimate'], -apart, atol=1e-6)
      assert test['equivalent'] or row is not whole
  asked, written = rows['compressor, 60%'], rows['compressor, 60%, distilled']
  assert rows['compressor, 30%']['kept'] < asked['kept'] <= 0.6
  assert written['tokens'] == asked['tokens']
  table = (directory / compress_lib.TABLE).read_text()
  assert table.strip() == compress_lib.summary(results)
  assert all(name in table for name in rows)
  assert (directory / compress_lib.FIGURE).stat().st_size > 1000


def test_the_teacher_of_a_distilled_form_reads_the_full_context(study):
  directory, _ = study
  forms = set()
  for run in directory.parent.glob('opd-*'):
    found = artifacts.read_run(run)['config']['opd']
    forms.add(found['context'])
    assert found['view'] == 'whole'
    rows = reporting.read_metrics(run / 'metrics.jsonl')
    assert any(row.get('teacher_kl', 0) > 0 for row in rows)
  assert forms == {'text', 'memory:2+candidates:evidence'}


def test_rl_continues_from_the_distilled_policy(study):
  directory, _ = study
  found = {
    tuple(
      artifacts.read_run(run)['config']['rl'][k]
      for k in ('context', 'start', 'thinking')
    )
    for run in directory.parent.glob('rl-*')
  }
  assert found >= {('full', 'sft', False), ('text', 'opd', False)}
