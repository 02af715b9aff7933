import dataclasses

import numpy as np
import pytest

from gr2_jax.teachers import heuristic

from .. import tiny_data


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  return heuristic.Heuristic(
    prompter=tiny_data.prompter(
      tmp_path_factory.mktemp('teachers'), reasoning=60
    ),
    catalog=tiny_data.catalog(),
    columns=(0, 1),
    noise=1.0,
  )


def slates(n=60):
  return [tiny_data.slate(s, 2 + s % 5, s % 6) for s in range(n)]


def rng(seed):
  return np.random.default_rng(seed)


def test_rejection_puts_a_positive_first_or_gives_up(teacher):
  tries = []
  for seed, slate in enumerate(slates()):
    slate['grades'][:] = 0
    slate['grades'][slate['count'] - 1] = 1
    trace = teacher.rejection(slate, rng(seed), 3)
    hit = slate['grades'][trace.ranking[0]] > 0
    assert (trace.verdict == 'accepted') == hit
    assert hit or (trace.verdict, trace.tries) == ('rejected', 3)
    assert sorted(trace.ranking) == list(range(slate['count']))
    tries.append((trace.verdict, trace.tries))
  assert {('accepted', 1), ('accepted', 2), ('rejected', 3)} <= set(tries)


def test_rejection_sees_no_label_until_it_has_ranked(teacher):
  for seed, slate in enumerate(slates(20)):
    one = teacher.rejection(slate, rng(seed), 1)
    other = slate | {'grades': slate['grades'][::-1].copy()}
    two = teacher.rejection(other, rng(seed), 1)
    np.testing.assert_array_equal(one.ranking, two.ranking)
    assert one.reasoning == two.reasoning


def test_targeted_puts_a_positive_first_and_keeps_the_rest(teacher):
  firsts = set()
  for seed, slate in enumerate(slates()):
    trace = teacher.targeted(slate, rng(seed))
    believed = teacher.rejection(slate, rng(seed), 1).ranking
    assert slate['grades'][trace.ranking[0]] > 0
    assert (trace.verdict, trace.tries) == ('targeted', 1)
    rest = [r for r in believed if r != trace.ranking[0]]
    assert trace.ranking[1:].tolist() == rest
    assert trace.ranking.dtype == np.int32
    firsts.add(trace.ranking[0] == believed[0])
  assert firsts == {True, False}


def test_without_noise_the_evidence_decides(teacher):
  sure = dataclasses.replace(teacher, columns=(2,), noise=0.0)
  for seed, slate in enumerate(slates(20)):
    trace = sure.rejection(slate, rng(seed), 1)
    values = slate['evidence'][: slate['count'], 2]
    assert trace.ranking.tolist() == np.argsort(-values).tolist()


def test_ties_are_drawn_and_not_taken_from_the_incoming_order(teacher):
  sure = dataclasses.replace(teacher, columns=(2,), noise=0.0)
  firsts = []
  for seed in range(200):
    slate = tiny_data.slate(seed, 4)
    slate['evidence'][:4, 2] = 1 / 3
    one, two = (sure.rejection(slate, rng(seed), 1).ranking for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert sorted(one) == list(range(4))
    firsts.append(one[0])
  assert np.bincount(firsts).min() > 30  # 50 each, but for chance.


def test_only_ties_are_drawn(teacher):
  sure = dataclasses.replace(teacher, columns=(2,), noise=0.0)
  slate = tiny_data.slate(0, 4)
  slate['evidence'][:4, 2] = (0, 1, 0, 2)
  rankings = {
    tuple(sure.rejection(slate, rng(s), 1).ranking) for s in range(20)
  }
  assert rankings == {(3, 1, 0, 2), (3, 1, 2, 0)}


def test_reasoning_cites_the_history_and_names_the_top_three(teacher):
  words = teacher.prompter.vocabulary
  sids = teacher.prompter.items['sid']
  cited = 0
  for seed, slate in enumerate(slates()):
    trace = teacher.targeted(slate, rng(seed))
    ids = np.array(trace.reasoning)
    is_slot = words.is_slot(ids)
    named = ids[is_slot] - words.slot_base
    assert named.tolist() == trace.ranking[:3].tolist()
    assert is_slot[-len(named) :].all()
    is_code = (ids >= words.sid_base) & (ids < words.sid_base + 15)
    codes = ids[is_code].reshape(-1, 3)
    shown = slate['history'][: slate['history_length']][-3:]
    assert {tuple(row) for row in codes.tolist()} <= {
      sids[item] for item in shown
    }
    cited += len(codes)
    text = words.decode(ids)
    assert text.startswith('likes ')
    assert 'so ' in text
    assert ('likes anything' in text) == (not slate['history_length'])
  assert cited > 30


def test_long_reasoning_is_cut(teacher):
  short = dataclasses.replace(
    teacher, prompter=dataclasses.replace(teacher.prompter, reasoning=4)
  )
  cut, whole = (t.targeted(slates()[5], rng(0)) for t in (short, teacher))
  assert cut.reasoning == whole.reasoning[:4]
  assert (cut.clipped, whole.clipped) == (len(whole.reasoning) - 4, 0)
