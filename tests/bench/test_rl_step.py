import sys

import jax
import numpy as np
import pytest

from gr2_jax.bench import own_step, rl_step, tunix_step

from .. import tiny

pytestmark = pytest.mark.slow

SIZE = own_step.Size(prompt=6, completion=3, prompts=2, group=4)


def prompts(seed=0):
  ids = np.random.default_rng(seed).integers(1, tiny.MODEL.vocab_size, (2, 6))
  return ids.astype(np.int32)


def test_our_step_runs_every_phase_and_leaves_the_reference_alone():
  params = tiny.params()
  step, score = own_step.make_step(tiny.MODEL, SIZE, params)
  tokens = np.random.default_rng(1).integers(1, 40, (2, 4, 3)).astype(np.int32)
  before = score(prompts(), tokens)
  for index in range(3):
    seconds = step(index, prompts(index))
    assert tuple(seconds) == own_step.PHASES
    assert min(seconds.values()) > 0
  np.testing.assert_array_equal(score(prompts(), tokens), before)

  # The oracle: whole sequences, no prefix.
  ids = np.concatenate(
    [np.repeat(prompts()[:, None], 4, 1), tokens], -1
  ).reshape(8, 9)
  hidden = tiny.plain_hidden(tiny.MODEL, params, ids)[:, 5:-1]
  logps = jax.nn.log_softmax(hidden @ params['embedding'].T)
  wanted = np.take_along_axis(
    np.asarray(logps).reshape(2, 4, 3, -1), tokens[..., None], -1
  )
  np.testing.assert_allclose(before, wanted[..., 0], atol=1e-5)


def test_a_completion_that_ends_early_raises():
  own_step.check_drawn(np.array([3, 3]), SIZE)
  with pytest.raises(RuntimeError, match='has 2 tokens, not 3'):
    own_step.check_drawn(np.array([3, 2]), SIZE)


def test_sides_take_turns_and_warm_up_does_not_count():
  calls = []

  def side(name, seconds):
    def step(index, prompts):
      calls.append((name, index, prompts.tobytes()))
      assert prompts.shape == (2, 6)
      assert prompts.min() >= 1
      assert prompts.max() < 40
      value = 100.0 if index < rl_step.WARM_UP else seconds[index - 2]
      return dict.fromkeys(own_step.PHASES, value)

    return step

  found = rl_step.interleave(
    {'gr2_jax': side('a', [1, 5, 2]), 'tunix': side('b', [4, 9, 7])},
    SIZE,
    3,
    40,
  )
  assert [x[:2] for x in calls] == [(s, i) for i in range(5) for s in 'ab']
  assert len({x[2] for x in calls}) == 5  # New prompts, the same for both.
  phases = dict.fromkeys(own_step.PHASES, 2)
  assert found['gr2_jax'] == phases | {'total': 8, 'first': 400.0}
  assert found['tunix']['total'] == 28


def test_the_table_and_the_ratio_show_the_seconds():
  found = {
    side: dict.fromkeys((*own_step.PHASES, 'total', 'first'), seconds)
    for side, seconds in (('gr2_jax', 0.5), ('tunix', 1.55))
  }
  size = own_step.Size(192, 48)
  assert rl_step.ratio_line(size, found) == 'ratio 192+48: 3.1'
  header, _, own, other = rl_step.report(size, found).splitlines()
  assert [x.strip() for x in header.split('|')[1:-1]] == [
    '192+48', 'rollout', 'reference', 'reward', 'update', 'total', 'first',
  ]  # fmt: skip
  assert [x.strip() for x in own.split('|')[1:-1]] == ['gr2_jax'] + 6 * [
    '0.5000'
  ]
  assert [x.strip() for x in other.split('|')[1:-1]] == ['tunix'] + 6 * [
    '1.5500'
  ]


def test_main_ends_with_the_ratios(monkeypatch, capsys):
  def measure(size, count):
    assert count == 10
    seconds = dict.fromkeys((*own_step.PHASES, 'total', 'first'), 2.0)
    return {
      'gr2_jax': seconds,
      'tunix': seconds | {'total': 2.0 * size.completion},
    }

  monkeypatch.setattr(rl_step, 'measure', measure)
  rl_step.flags.FLAGS.mark_as_parsed()
  rl_step.main([])
  assert capsys.readouterr().out.splitlines()[-2:] == [
    'ratio 192+48: 48.0',
    'ratio 1024+64: 64.0',
  ]


def test_models_that_differ_are_not_compared(monkeypatch):
  def other(model, size, params):
    step, score = own_step.make_step(model, size, params)
    return step, lambda *args: score(*args) + 0.1, 7

  monkeypatch.setattr(rl_step, 'MODEL', tiny.MODEL)
  monkeypatch.setattr(tunix_step, 'make_step', other)
  with pytest.raises(RuntimeError, match='two decoders differ by 0.1'):
    rl_step.measure(SIZE, 1)


@pytest.mark.parametrize('text', ['192', '192+', 'a+48', '192-48', ''])
def test_a_size_that_is_not_a_sum_raises(text):
  assert own_step.Size.parse('192+48') == own_step.Size(192, 48)
  with pytest.raises(ValueError, match=r'--sizes has .* as in 192\+48'):
    own_step.Size.parse(text)


def test_without_tunix_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tunix', None)
  with pytest.raises(ImportError, match=r'gr2_jax\[bench\]'):
    tunix_step.make_step(tiny.MODEL, SIZE, tiny.params())
