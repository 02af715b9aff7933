"""What the compressor's rule keeps first, against extracts read one by one."""

import jax
import numpy as np
import pytest

from gr2_jax.compressor import extracts, judge, rollouts, rule
from gr2_jax.prompts import examples, prompt

from .. import tiny_world

N = 5  # slates


@pytest.fixture(scope='module')
def spec(world):
  return tiny_world.spec(world)


@pytest.fixture(scope='module')
def params(world, spec):
  """Of a ranker whose read-out says something."""
  found = spec.load_params(world['sft'], tiny_world.mesh())
  noise = jax.random.normal(jax.random.key(0), found['readout'].shape)
  return found | {'readout': noise}


class Few:
  def __init__(self, source):
    self._source = source

  def __len__(self):
    return N

  def __getitem__(self, i):
    return self._source[i]


def rows_of(spec, world):
  ask = rollouts.requests(
    spec.prompter, {1.0: spec.prompter.prompt_tokens}, 'shuffled'
  )
  source = Few(tiny_world.source(world, 'train'))
  ((_, batch),) = examples.in_order(source, ask, N, 0)
  return batch


def by_hand(world, spec, batch, units):
  """Extracts of some units alone: int32 [N, T] and [N]."""
  source, T = tiny_world.source(world, 'train'), spec.prompter.prompt_tokens
  ids = []
  for i in range(N):
    count = int(batch['count'][i])
    budget = count * (len(units) + 1) + 2
    order = batch['incoming'][i, :count]
    ids.append(
      extracts.extract(spec.prompter, source[i], order, budget, units, None)
    )
  tokens = np.stack([prompt.pad(one, T, 'ids') for one in ids])
  return tokens, np.array([len(one) for one in ids], np.int32)


def test_what_is_read_is_what_the_rule_writes(world, spec):
  batch, source = rows_of(spec, world), tiny_world.source(world, 'train')
  units = extracts.units(spec.prompter.lines(source[0]).candidates[0])
  lines = np.stack(
    [
      rule._lines(
        spec.prompter, source[i], batch['incoming'][i, : batch['count'][i]],
        units,
      )
      for i in range(N)
    ]
  )  # fmt: skip
  for kept in (range(1), range(1, 3), range(len(units))):
    one = np.array([list(kept)])
    tokens, length = rule._written(
      spec, lines[:, :, one], batch['count'], len(units)
    )
    wanted, long = by_hand(world, spec, batch, [units[k] for k in kept])
    np.testing.assert_array_equal(length[:, 0], long)
    for row in range(N):
      end = long[row]
      np.testing.assert_array_equal(tokens[row, 0, :end], wanted[row, :end])
      assert (tokens[row, 0, end:] == spec.grammar.pad).all()


@pytest.mark.parametrize('judge_by', ['order', 'labels'])
def test_the_first_to_go_is_what_is_missed_least(world, spec, params, judge_by):
  stage = tiny_world.config(
    compress__judge_by=judge_by, compress__eval_batch_size=4
  ).compress
  found = rule.most_telling(
    spec,
    tiny_world.mesh(),
    params,
    stage,
    'shuffled',
    Few(tiny_world.source(world, 'train')),
  )
  batch, source = rows_of(spec, world), tiny_world.source(world, 'train')
  units = extracts.units(spec.prompter.lines(source[0]).candidates[0])
  assert sorted(found) == sorted(units)
  scores = np.asarray(judge.read_whole(spec, params, batch))
  read = judge.make_reader(spec, rollouts.symbols(spec.vocabulary))
  without = []
  for unit in units:
    tokens, length = by_hand(
      world, spec, batch, [u for u in units if u != unit]
    )
    own = np.asarray(read(params, tokens[:, None], length[:, None]))[:, 0]
    likeness = []
    for row, count in enumerate(batch['count']):
      logs = own[row, :count] - np.log(np.exp(own[row, :count]).sum())
      target = batch['grades'][row, :count]
      if judge_by == 'order':
        target = np.exp(scores[row, :count])
      likeness.append((target / target.sum() * logs).sum())
    without.append(np.mean(likeness))
  assert without[units.index(found[-1])] >= max(without) - 1e-5
