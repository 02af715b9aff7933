"""Compressions by rule, and the order of units against single read-outs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr2_jax.compressor import judge, rollouts, rule
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.prompts import examples
from gr2_jax.prompts import prompt as prompt_lib

from .. import tiny_data, tiny_world

N = 5  # slates


@pytest.fixture(scope='module')
def spec(world):
  return tiny_world.spec(world)


@pytest.fixture(scope='module')
def params(world, spec):
  """Of a ranker with a random read-out."""
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
  ask = rollouts.generation_rows(
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
      rule.extract(spec.prompter, source[i], order, budget, units, None)
    )
  tokens = np.stack([prompt_lib.pad(one, T, 'ids') for one in ids])
  return tokens, np.array([len(one) for one in ids], np.int32)


def test_the_ranker_reads_the_same_compressions_as_the_rule_writes(world, spec):
  batch, source = rows_of(spec, world), tiny_world.source(world, 'train')
  units = rule.units(spec.prompter.lines(source[0]).candidates[0])
  lines = np.stack(
    [
      rule._unit_ids(
        spec.prompter, source[i], batch['incoming'][i, : batch['count'][i]],
        units,
      )
      for i in range(N)
    ]
  )  # fmt: skip
  for kept in (range(1), range(1, 3), range(len(units))):
    one = np.array([list(kept)])
    tokens, length = rule._compressions(
      spec, lines[:, :, one], batch['count'], len(units)
    )
    wanted, long = by_hand(world, spec, batch, [units[k] for k in kept])
    np.testing.assert_array_equal(length[:, 0], long)
    for row in range(N):
      end = long[row]
      np.testing.assert_array_equal(tokens[row, 0, :end], wanted[row, :end])
      assert (tokens[row, 0, end:] == spec.grammar.pad).all()


@pytest.mark.parametrize('judge_by', ['order', 'labels'])
def test_the_first_unit_dropped_is_the_least_important(
  world, spec, params, judge_by
):
  stage = tiny_world.config(
    compress__judge_by=judge_by, compress__eval_batch_size=4
  ).compress
  found = rule.rank_units(
    spec,
    tiny_world.mesh(),
    params,
    stage,
    'shuffled',
    Few(tiny_world.source(world, 'train')),
  )
  batch, source = rows_of(spec, world), tiny_world.source(world, 'train')
  units = rule.units(spec.prompter.lines(source[0]).candidates[0])
  assert sorted(found) == sorted(units)
  scores = np.asarray(judge.read_whole(spec, params, batch))
  without = []
  for unit in units:
    tokens, length = by_hand(
      world, spec, batch, [u for u in units if u != unit]
    )
    own = np.asarray(
      judge.read(spec, params, tokens[:, None], length[:, None])
    )[:, 0]
    likeness = []
    for row, count in enumerate(batch['count']):
      logs = own[row, :count] - np.log(np.exp(own[row, :count]).sum())
      target = batch['grades'][row, :count]
      if judge_by == 'order':
        target = np.exp(scores[row, :count])
      likeness.append((target / target.sum() * logs).sum())
    without.append(np.mean(likeness))
  assert without[units.index(found[-1])] >= max(without) - 1e-5


@pytest.fixture(scope='module')
def prompter(tmp_path_factory):
  return tiny_data.prompter(
    tmp_path_factory.mktemp('words'),
    history_fields=('sid', 'title', 'categories', 'grade', 'age'),
    fields=('sid', 'title', 'categories', 'evidence'),
  )


def test_the_grammar_allows_every_compression_by_rule(prompter):
  grammar, T = rollouts.grammar(prompter, 1), prompter.prompt_tokens

  @jax.jit
  def is_allowed(prompt, length, count, budget, tokens):
    """Whether each token is allowed where it stands."""
    facts = grammar.source(prompt, length, count, budget)
    progress = grammar_lib.replay(grammar, facts, tokens, False)
    left = budget[:, None] - jnp.arange(T)
    menu = grammar.candidate_tokens(facts)
    allowed = grammar.allowed(facts, progress, left, menu.shape[1])
    return (allowed & (menu[:, None] == tokens[..., None])).any(-1)

  rng = np.random.default_rng(0)
  for seed in range(12):
    count = 2 + seed % (tiny_data.K - 1)
    slate, order = tiny_data.slate(seed, count), rng.permutation(count)
    prompt = prompter.prompt(slate, order)['prompt']
    units = rule.units(prompter.lines(slate).candidates[0])
    ranked = [units[i] for i in rng.permutation(len(units))]
    for budget in (count + 2, count + 9, len(prompt)):
      drawn_by = rng if seed % 3 else None
      ids = rule.extract(prompter, slate, order, budget, ranked, drawn_by)
      assert len(ids) <= budget
      assert ids[-1] == grammar.eos
      found = is_allowed(
        prompt_lib.pad(prompt, T, 'prompt')[None],
        *(np.int32([x]) for x in (len(prompt), count, budget)),
        prompt_lib.pad(ids, T, 'ids')[None],
      )
      assert np.asarray(found)[0, : len(ids)].all()


def test_random_compressions_differ_and_have_lines_of_one_length(prompter):
  slate, order = tiny_data.slate(3), np.arange(tiny_data.K)
  ranked = rule.units(prompter.lines(slate).candidates[0])
  words = prompter.vocabulary
  found = set()
  for seed in range(20):
    ids = rule.extract(
      prompter, slate, order, tiny_data.K * 3 + 2, ranked,
      np.random.default_rng(seed),
    )  # fmt: skip
    lines, line = [], []
    for token in ids[ids.index(words.control['<candidates>']) + 1 :]:
      if words.is_slot(np.int32(token)):
        lines.append(line)
        line = []
      else:
        line.append(token)
    assert len({len(line) for line in lines}) == 1
    found.add(tuple(ids))
  assert len(found) > 5


def test_without_randomness_the_first_units_are_kept(prompter):
  slate, order = tiny_data.slate(3), np.array([1, 0])
  slate = slate | {'count': np.int32(2)}
  lines = prompter.lines(slate).candidates
  words, ranked = prompter.vocabulary, [('evidence', 1), ('sid', 0)]
  for quota in (1, 2):
    ids = rule.extract(prompter, slate, order, 2 * quota + 4, ranked, None)
    wanted = [words.control['<candidates>']]
    for slot, rank in enumerate(order):
      first, second = lines[rank]['evidence'][1], lines[rank]['sid'][0]
      wanted += [second, first][2 - quota :]  # As the line has them.
      wanted.append(words.slot_base + slot)
    assert ids == [*wanted, words.eos]


def test_the_elimination_is_backward():
  """It drops the unit without which the others are worth most."""
  says = {'a': {1, 2, 3}, 'b': {1, 2, 4}, 'c': {3, 4}, 'd': {5, 6}}
  asked = []

  def worth(alternatives):
    asked.append(alternatives)
    return [len(set().union(*(says[u] for u in one))) for one in alternatives]

  assert rule.backward_elimination(says, worth) == ['a', 'd', 'b', 'c']
  assert [len(found) for found in asked] == [4, 3, 2]
  assert asked[1] == [['b', 'd'], ['a', 'd'], ['a', 'b']]
  assert rule.backward_elimination([], worth) == []


def test_units_are_in_fields_of_one_length_for_all(prompter):
  lines = prompter.lines(tiny_data.slate(3)).candidates
  found = rule.units(lines[0])
  assert {field for field, _ in found} == {'sid', 'evidence'}
  assert all(rule.units(line) == found for line in lines)
