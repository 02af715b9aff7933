import dataclasses
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from gr2_jax.data import slates as slates_lib
from gr2_jax.pipeline import artifacts, checkpoint
from gr2_jax.policy import policy
from gr2_jax.prompts import examples, prompt, vocabulary
from gr2_jax.teachers import policy as policy_lib

from .. import tiny, tiny_world

SEED = 3


@pytest.fixture(scope='module')
def finished(world, tmp_path_factory):
  """Makes an artifact of a policy with random parameters, of another width."""
  root = tmp_path_factory.mktemp('teachers')
  for stage in ('slates', 'tokenizer', 'backbone'):
    (root / world[stage].name).symlink_to(world[stage])

  def make(name, **changes):
    run = artifacts.read_run(world['sft'])
    run['config']['model']['d_model'] = 24
    config = ConfigDict(run['config'])
    config.update_from_flattened_dict(changes)
    path = root / name
    path.mkdir()
    run['config'] = config.to_dict()
    (path / 'config.json').write_text(artifacts.dumps(run))
    (path / 'results.json').write_text('{}')
    spec = policy.load(config, world)
    params = tiny.params(spec.model)
    slots = spec.grammar.slot_base + np.arange(spec.grammar.num_slots)
    # Of short reasoning and many tokens, few would be slots.
    often = params['embedding'].at[slots].multiply(2.0)
    checkpoint.save_params(path / policy.PARAMS, params | {'embedding': often})
    return path

  return make


@pytest.fixture(scope='module')
def student(world):
  return tiny_world.spec(world).prompter


@pytest.fixture(scope='module')
def source(world):
  return slates_lib.SlateSource(world['slates'], 'train')


def restore(path, world, student, kind='rejection', mesh=None):
  """On one device, unless a mesh is given."""
  return policy_lib.restore(
    path,
    mesh or common.mesh(),
    student,
    tiny_world.inputs(world, 'traces'),
    kind=kind,
    temperature=0.7,
    batch_size=16,
  )


@pytest.fixture(scope='module')
def with_targets(finished):
  return finished('told', **{'sft.privileged': True})


@pytest.fixture(scope='module')
def teacher(with_targets, world, student):
  return restore(with_targets, world, student)


def ask(teacher, source, indices, tries=1, kind='rejection', seed=SEED):
  results = list(teacher.traces(source, indices, kind, tries, seed))
  assert sorted(i for i, _ in results) == sorted(indices)
  return dict(results)


def alone(teacher, source, index, attempt, privileged=False):
  """One row, sampled on its own: presentation, target, completion, ranking."""
  spec = teacher.policy.spec
  rng = np.random.default_rng((SEED, index, attempt))
  row = examples.generation_rows(
    spec.prompter, '<think>', 'shuffled', privileged
  )(source[index], rng)
  rng = np.random.default_rng((SEED, index, attempt))
  count = int(row['count'])
  order = prompt.presentation(count, 'shuffled', rng)
  target = examples.draw_target(row['grades'], rng) if privileged else None
  key = jax.random.fold_in(jax.random.key(SEED), index)
  rollouts = tiny.sample(
    spec.model,
    jax.device_get(teacher.policy.params),
    row['prompt'][None],
    row['prompt_length'][None],
    row['count'][None],
    jax.random.fold_in(key, attempt),
    spec.grammar,
    spec.sampling(1, True, teacher.temperature, True),
  )
  ids = np.asarray(rollouts.tokens)[0, 0].tolist()
  end = ids.index(spec.grammar.think_end)
  slots = np.array(ids[end + 1 : end + 1 + count]) - spec.grammar.slot_base
  return order, target, ids[:end], slots


def test_a_trace_equals_that_of_the_slate_alone(teacher, source):
  """As the sampler has it, in a batch of one, slots renamed."""
  results = ask(teacher, source, range(12), tries=3)
  words = teacher.student.vocabulary
  renamed = 0
  for index, trace in results.items():
    order, _, ids, slots = alone(teacher, source, index, trace.tries)
    assert trace.ranking.tolist() == order[slots].tolist()
    assert trace.ranking.dtype == np.int32
    shown = [
      t
      for t in ids
      if not (words.is_slot(t) and t - words.slot_base >= len(order))
    ]
    assert teacher.student.present(trace.reasoning, order) == shown
    assert trace.unknown == len(ids) - len(shown)
    stored = [t for t in trace.reasoning if words.is_slot(t)]
    renamed += stored != [t for t in shown if words.is_slot(t)]
  assert renamed
  assert {trace.tries for trace in results.values()} == {1, 2, 3}


def test_traces_do_not_depend_on_the_batch(teacher, source):
  wanted = ask(teacher, source, range(20), tries=2)
  for other, indices in (
    (dataclasses.replace(teacher, batch_size=8), range(19, -1, -1)),
    (teacher, range(5, 15)),
  ):
    results = ask(other, source, indices, tries=2)
    for index in indices:
      same(results[index], wanted[index])


def same(one, two):
  np.testing.assert_array_equal(one.ranking, two.ranking)
  drop = {'ranking': None}
  assert dataclasses.replace(one, **drop) == dataclasses.replace(two, **drop)


def test_a_slate_is_repeated_until_its_first_choice_is_right(teacher, source):
  once, often = (ask(teacher, source, range(40), tries) for tries in (1, 4))
  for index in once:
    for trace, tries in ((once[index], 1), (often[index], 4)):
      right = source[index]['grades'][trace.ranking[0]] > 0
      assert trace.verdict == ('accepted' if right else 'rejected')
      assert right or trace.tries == tries
    if once[index].verdict == 'accepted':
      same(once[index], often[index])
  assert {trace.tries for trace in often.values()} == {1, 2, 3, 4}
  rejected = {trace.verdict for trace in often.values() if trace.tries == 4}
  assert 'rejected' in rejected
  assert (
    ask(teacher, source, [0], seed=4)[0].ranking.tolist()
    != (once[0].ranking.tolist())
    or ask(teacher, source, [0], seed=4)[0].reasoning != once[0].reasoning
  )


def test_traces_depend_on_the_seed(teacher, source):
  one, two = (ask(teacher, source, range(8), seed=s) for s in (SEED, 4))
  assert sum(one[i].reasoning != two[i].reasoning for i in one) > 4


def test_only_wrong_answers_are_repeated(teacher, source, monkeypatch):
  batches = []
  plain = policy_lib.PolicyTeacher._answer_rows

  def spy(self, rows, labels, seed):
    batches.append(list(labels))
    return plain(self, rows, labels, seed)

  monkeypatch.setattr(policy_lib.PolicyTeacher, '_answer_rows', spy)
  results = ask(teacher, source, range(40), tries=4)
  every = [label for batch in batches for label in batch]
  assert sorted(every) == [
    (i, t) for i in range(40) for t in range(1, results[i].tries + 1)
  ]
  full = [len(batch) == 16 for batch in batches]
  assert all(full[: len(every) // 16 - 1])
  assert len(batches) <= len(every) // 16 + 3


def test_a_target_is_named_and_must_come_first(
  with_targets, world, student, source
):
  teacher = restore(with_targets, world, student, kind='targeted')
  results = ask(teacher, source, range(16), tries=3, kind='targeted')
  verdicts = set()
  for index, trace in results.items():
    order, target, _, slots = alone(teacher, source, index, trace.tries, True)
    assert trace.ranking.tolist() == order[slots].tolist()
    assert source[index]['grades'][order[target]] > 0
    right = trace.ranking[0] == order[target]
    assert trace.verdict == ('targeted' if right else 'rejected')
    assert right or trace.tries == 3
    verdicts.add(trace.verdict)
  assert verdicts == {'targeted', 'rejected'}


def test_a_mesh_that_splits_parameters_gives_the_same_traces(
  with_targets, teacher, world, student, source
):
  mesh = ConfigDict(dict(data=2, fsdp=2, tensor=2))
  other = restore(with_targets, world, student, mesh=mesh)
  wanted, results = (ask(t, source, range(16)) for t in (teacher, other))
  for index in wanted:
    same(wanted[index], results[index])


def test_tokens_the_student_lacks_are_left_out_and_counted(teacher, source):
  wanted = ask(teacher, source, range(10))
  lacks = np.unique(np.concatenate([t.reasoning for t in wanted.values()]))[::2]
  tokens = teacher.tokens.copy()
  words = teacher.student.vocabulary
  lacks = lacks[~words.is_slot(lacks)]
  tokens[lacks[0]], tokens[lacks[1:]] = words.eos, -1
  other = dataclasses.replace(teacher, tokens=tokens)
  for index, trace in ask(other, source, range(10)).items():
    whole = wanted[index]
    assert trace.reasoning == [t for t in whole.reasoning if t not in lacks]
    missing = len(whole.reasoning) - len(trace.reasoning)
    assert trace.unknown == whole.unknown + missing
    np.testing.assert_array_equal(trace.ranking, whole.ranking)


def test_reasoning_the_student_has_no_room_for_is_cut(teacher, source):
  wanted = ask(teacher, source, range(4))
  short = dataclasses.replace(teacher.student, reasoning=2)
  results = ask(dataclasses.replace(teacher, student=short), source, range(4))
  for index, trace in results.items():
    assert trace.reasoning == wanted[index].reasoning[:2]
    assert trace.clipped == max(0, len(wanted[index].reasoning) - 2)
  assert any(trace.clipped for trace in results.values())


def test_another_vocabulary_is_translated(
  with_targets, teacher, world, student, source, tmp_path
):
  words = vocabulary.train(
    tmp_path / vocabulary.TRAINED,
    ['few words'],
    dataclasses.replace(
      student.vocabulary.layout, num_slots=9, codebook_size=3
    ),
    15,
  )
  other = restore(
    with_targets,
    world | {'backbone': tmp_path},
    dataclasses.replace(student, vocabulary=words),
  )
  np.testing.assert_array_equal(teacher.tokens, np.arange(len(teacher.tokens)))
  theirs = teacher.policy.spec.vocabulary
  unknown = 0
  plain, results = (ask(t, source, range(30)) for t in (teacher, other))
  for index, trace in results.items():
    known = [t for t in plain[index].reasoning if other.tokens[t] >= 0]
    spelt = [theirs.pieces.spelling(t) for t in known]
    assert [words.pieces.spelling(t) for t in trace.reasoning] == spelt
    unknown += trace.unknown - plain[index].unknown
    np.testing.assert_array_equal(trace.ranking, plain[index].ranking)
  assert unknown


def test_a_teacher_of_other_slates_is_rejected(with_targets, world, student):
  for stage in ('slates', 'tokenizer'):
    other = world[stage].with_name(f'{stage}-other')
    with pytest.raises(
      artifacts.ArtifactError, match=f'{world[stage].name}.*{stage}-other'
    ):
      restore(with_targets, world | {stage: other}, student)


def test_a_teacher_trained_without_targets_is_rejected(
  finished, world, student
):
  plain = finished('plain', **{'sft.privileged': False})
  restore(plain, world, student)
  with pytest.raises(artifacts.ArtifactError, match='sft.privileged'):
    restore(plain, world, student, kind='targeted')


@pytest.mark.parametrize('between', ['opd', ''])
def test_training_with_targets_is_found_through_earlier_stages(
  with_targets, world, student, between
):
  """RL from SFT, and from OPD from SFT: as their config.json says."""
  chain = [with_targets.name, *filter(None, [between]), f'rl{between}']
  for before, name in zip(chain[:-1], chain[1:], strict=True):
    path = with_targets.with_name(name)
    path.mkdir()
    run = artifacts.read_run(with_targets)
    run['stage'] = name[:3].rstrip('o')
    run['config'][run['stage']] = run['config'].pop('sft')
    stage = 'opd' if before == 'opd' else 'sft'
    run['inputs'] |= {stage: before}
    (path / 'config.json').write_text(json.dumps(run))
    (path / 'results.json').write_text('{}')
    (path / policy.PARAMS).symlink_to(with_targets / policy.PARAMS)
  restore(path, world, student, kind='targeted')


def test_a_policy_without_sft_saw_no_targets(with_targets, world, student):
  path = with_targets.with_name('midtrained')
  path.mkdir()
  run = artifacts.read_run(with_targets)
  run['stage'] = 'midtrain'
  run['config']['midtrain'] = run['config'].pop('sft')
  (path / 'config.json').write_text(json.dumps(run))
  (path / 'results.json').write_text('{}')
  (path / policy.PARAMS).symlink_to(with_targets / policy.PARAMS)
  with pytest.raises(artifacts.ArtifactError, match='trained without targets'):
    restore(path, world, student, kind='targeted')


def test_the_sampler_is_traced_once_for_all_batches(teacher, source):
  ask(teacher, source, range(3))
  size = policy_lib._answer._cache_size()
  ask(teacher, source, range(3, 40), tries=2)
  assert policy_lib._answer._cache_size() == size
