import collections
import functools

import jax
import numpy as np
import pytest

from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.ops import parsing, rewards
from gr2_jax.pipeline import reporting
from gr2_jax.prompts import examples
from gr2_jax.stages import rl
from gr2_jax.train import learner, policy_gradient, rollouts

from .. import tiny, tiny_world

OFTEN_FLAT = dict(
  rl__reward='recall', rl__k=1, rl__gate='none', rl__thinking=False,
  rl__refills=3, rl__refill_size=4, rl__learning_rate=1e-3,
)  # fmt: skip


@pytest.fixture(scope='module')
def spec(world):
  return tiny_world.spec(world)


@pytest.fixture(scope='module')
def compiled(spec):
  @functools.lru_cache
  def make(constrained, gate):
    stage = tiny_world.config(rl__gate=gate).rl
    sampler = spec.sampling(4, False, 1.0, constrained)
    return rollouts.make_rollout_step(
      spec,
      sampler,
      rollouts.RewardOptions.from_config(stage, 'rl'),
      stage.advantage,
    )

  return make


def steps_of(workdir):
  rows = reporting.read_metrics(workdir / 'metrics.jsonl')
  return [row for row in rows if 'reward' in row]


def lines(workdir):
  rows = reporting.read_metrics(workdir / 'metrics.jsonl')
  return [
    {k: v for k, v in row.items() if k != 'steps_per_second'} for row in rows
  ]


def acted(world, spec, compiled, seed=0, constrained=True, gate='v2'):
  render = examples.generation_rows(spec.prompter, '<answer>', 'shuffled')
  slates = slates_lib.SlateSource(world['slates'], 'train')
  rows = [render(slates[i], np.random.default_rng((seed, i))) for i in range(8)]
  rows = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
  act = compiled(constrained, gate)
  with sharding.activate(tiny_world.mesh()):
    batch, watches = act(
      spec.load_params(world['sft'], tiny_world.mesh()),
      sharding.shard_batch(rows, tiny_world.mesh()),
      jax.random.key(seed),
    )
  return rows, jax.device_get(batch), jax.device_get(watches)


def parse(rows, batch, spec, p, g):
  """Reads one rollout in Python: (ranking, verdict)."""
  ids = batch.tokens[p, g, : batch.length[p, g]].tolist()
  count, base = int(rows['count'][p]), spec.grammar.slot_base
  places = [i - base for i in ids[:-1]]
  if ids[-1] == spec.grammar.eos and sorted(places) == list(range(count)):
    rest = list(range(count, spec.grammar.num_candidates))
    return np.int32(places + rest), parsing.VALID
  order = np.argsort(rows['incoming'][p][:count])
  rest = np.arange(count, spec.grammar.num_candidates)
  return np.int32([*order, *rest]), parsing.WRONG_FORMAT


@pytest.mark.parametrize(
  ('constrained', 'gate'), [(True, 'v2'), (True, 'none'), (False, 'v2')]
)
def test_rewards_are_those_of_the_sampled_tokens(
  world, spec, compiled, constrained, gate
):
  rows, batch, watches = acted(
    world, spec, compiled, constrained=constrained, gate=gate
  )
  stage = tiny_world.config().rl
  total, rank, copies, valid = (np.zeros((8, 4)) for _ in range(4))
  for p, g in np.ndindex(8, 4):
    ranking, verdict = parse(rows, batch, spec, p, g)
    found = rewards.reward(
      ranking, np.int32(verdict), rows['grades'][p], rows['count'][p],
      rows['incoming'][p], kind=stage.reward, k=stage.k, gate=gate,
      format_weight=stage.format_weight,
    )  # fmt: skip
    total[p, g], rank[p, g], copies[p, g], valid[p, g] = (
      found.total, found.rank, found.copied, found.format
    )  # fmt: skip
  assert valid.all() == constrained
  np.testing.assert_allclose(watches['reward'], total.mean(), atol=1e-5)
  np.testing.assert_allclose(watches['reward_rank'], rank.mean(), atol=1e-5)
  np.testing.assert_allclose(watches['copy_rate'], copies.mean(), atol=1e-6)
  np.testing.assert_allclose(watches['answer/valid'], valid.mean(), atol=1e-6)
  spread = total.max(1) - total.min(1)
  np.testing.assert_array_equal(batch.use, spread > 1e-5)
  np.testing.assert_allclose(
    watches['flat_groups'], (spread <= 1e-5).mean(), atol=1e-6
  )
  for p in np.flatnonzero(batch.use):
    wanted = (total[p] - total[p].mean()) / max(total[p].std(), 1e-3)
    np.testing.assert_allclose(batch.advantage[p], wanted, atol=1e-3)
  assert batch.use.any() or not constrained


def test_groups_that_are_all_flat_end_no_run(world, spec, tmp_path):
  # Recall at K of a permutation is 1 whatever the order.
  config = tiny_world.config(
    **OFTEN_FLAT | {'rl__k': 5, 'rl__refills': 2, 'rl__steps': 5}
  )
  result = rl.run(config, tiny_world.inputs(world, 'rl'), tmp_path)
  assert result['stopped'] == 'no'
  for row in steps_of(tmp_path):
    assert row['flat_groups'] == 1.0
    assert row['refills'] == 2
    assert row['used_groups'] == 0.0
    assert row['loss'] == row['gradient_norm'] == 0.0
    np.testing.assert_allclose(row['reward'], 1.2, atol=1e-6)
  params = spec.load_params(tmp_path, tiny_world.mesh())
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_watches_are_in_their_ranges(world, spec, compiled):
  _, batch, watches = acted(world, spec, compiled)
  shares = {
    k: float(v) for k, v in watches.items()
    if k in ('n@5', 'r@1', 'copy_rate', 'top3_unchanged', 'flat_groups')
    or k.startswith(('answer/', 'first_pick/'))
  }  # fmt: skip
  assert all(0 <= v <= 1 for v in shares.values())
  for family in ('answer/', 'first_pick/'):
    total = sum(v for k, v in shares.items() if k.startswith(family))
    np.testing.assert_allclose(total, 1.0, atol=1e-5)
  mean = sum(rank * shares[f'first_pick/{rank}'] for rank in range(5))
  np.testing.assert_allclose(watches['first_pick'], mean, atol=1e-5)
  assert -1 <= float(watches['kendall_tau']) <= 1
  assert float(watches['length']) == batch.length.mean() == 6
  assert 0 < float(watches['sampler_entropy']) <= np.log(5) + 1e-5


def test_one_trace_serves_every_step(world, spec, compiled):
  tokens = [acted(world, spec, compiled, seed)[1].tokens for seed in (1, 2, 3)]
  assert compiled(True, 'v2')._cache_size() == 1
  assert (tokens[0] != tokens[1]).any()


def test_the_log_says_what_must_be_watched(world):
  rows = reporting.read_metrics(world['rl'] / 'metrics.jsonl')
  steps = steps_of(world['rl'])
  assert [row['step'] for row in steps] == [1, 2, 3, 4, 5, 6]
  for row in steps:
    assert row['sampler_gap'] < 1e-5
    for name in ('copy_rate', 'kendall_tau', 'gradient_norm', 'ratio'):
      assert np.isfinite(row[name])
  validated = [row['step'] for row in rows if 'validation/n@5' in row]
  assert validated == [0, 2, 4, 6]


def test_the_start_is_a_candidate_too(world, tmp_path):
  config = tiny_world.config(rl__steps=2, rl__learning_rate=1e-12)
  result = rl.run(config, tiny_world.inputs(world, 'rl'), tmp_path)
  assert result['step'] == 0
  spec = tiny_world.spec(world, config)
  found = spec.load_params(tmp_path, tiny_world.mesh())
  for x, y in zip(
    jax.tree.leaves(found),
    jax.tree.leaves(spec.load_params(world['sft'], tiny_world.mesh())),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)


def test_a_resumed_policy_takes_its_parameters_along(world, tmp_path):
  config = tiny_world.config(
    rl__steps=8, rl__resume=str(world['rl'] / 'checkpoints')
  )
  result = rl.run(config, tiny_world.inputs(world, 'rl'), tmp_path)
  found, step, meta = tiny_world.left(world, 'rl', tmp_path, config)
  assert step == 8
  assert result == meta['best'] | {'stopped': 'no'}
  # What the other run chose is not here: the start is, as a candidate.
  assert [entry['step'] for entry in meta['history']] == [6, 8]
  assert found['params']['embedding'].shape[1] == 16


class Spy:
  """Stands in for `make_rollout_step` and `make_update`; sees what is called.

  `traces` counts how often each was traced, `compiles` what had been compiled,
  anywhere in the program, when each draw was sampled.
  """

  def __init__(self, patch, die_at=None):
    self.keys, self.rows, self.batches, self.compiles = [], [], [], []
    self.traces = collections.Counter()
    self._compiled = 0
    jax.monitoring.register_event_duration_secs_listener(self._heard)
    for module, name in (
      (rollouts.rewards, 'reward'),
      (policy_gradient.losses, 'clipped_surrogate'),
    ):  # fmt: skip
      patch.setattr(module, name, self._counting(getattr(module, name)))
    make_rollout_step = rollouts.make_rollout_step
    make_update = learner.make_update

    def spying_act(*arguments):
      act = make_rollout_step(*arguments)

      def call(params, rows, key):
        if len(self.keys) == die_at:
          raise KeyboardInterrupt
        self.compiles.append(self._compiled)
        self.keys.append(tuple(jax.random.key_data(key).tolist()))
        self.rows.append(jax.device_get(rows))
        return act(params, rows, key)

      return call

    def spying_update(*arguments):
      update = make_update(*arguments)

      def call(state, frozen, batch, *rest):
        self.batches.append(batch)
        return update(state, frozen, batch, *rest)

      return call

    patch.setattr(rollouts, 'make_rollout_step', spying_act)
    patch.setattr(learner, 'make_update', spying_update)

  def _heard(self, event, seconds, **_):
    del seconds
    self._compiled += event.endswith('backend_compile_duration')

  def _counting(self, function):
    def call(*arguments, **options):
      self.traces[function.__name__] += 1
      return function(*arguments, **options)

    return call


def test_five_hundred_steps_are_compiled_once(world, tmp_path, monkeypatch):
  spy = Spy(monkeypatch)
  config = tiny_world.config(
    **OFTEN_FLAT | {'rl__refill_size': 2, 'rl__refills': 1}, rl__batch_size=4,
    rl__group_size=4, rl__steps=500, rl__eval_every=500,
  )  # fmt: skip
  rl.run(config, tiny_world.inputs(world, 'rl'), tmp_path)
  rows = steps_of(tmp_path)
  assert len(rows) == 500
  # A batch and a refill have a trace each; nothing is compiled later on.
  assert spy.traces == {'reward': 2, 'clipped_surrogate': 1}
  assert 0 < spy.compiles[20] == spy.compiles[-1]
  # Refills are counted, and no draw is sampled with the key of another.
  refills = [row['refills'] for row in rows]
  assert set(refills) == {0, 1}
  assert len(spy.keys) == 500 + sum(refills)
  assert len(set(spy.keys)) == len(spy.keys)
  drawn = [len(rows['count']) for rows in spy.rows]
  assert sorted(set(drawn)) == [2, 4]
  assert drawn.count(2) == sum(refills)
  for row in rows:
    assert (row['used_groups'] == 1.0) or row['refills'] == 1
    assert row['sampler_gap'] < 1e-5
  used = np.mean([row['used_groups'] for row in rows])
  assert used > np.mean([1 - row['flat_groups'] for row in rows]) + 0.1


def test_a_run_killed_in_a_refill_ends_like_a_whole_one(
  world, tmp_path, monkeypatch
):
  inputs = tiny_world.inputs(world, 'rl')
  config = tiny_world.config(**OFTEN_FLAT, rl__steps=5, rl__patience=9)
  with monkeypatch.context() as patch:
    spy = Spy(patch)
    wanted = rl.run(config, inputs, tmp_path / 'whole')
  refills = [int(row['refills']) for row in steps_of(tmp_path / 'whole')]
  assert refills[2] + refills[3]
  # The draws of a step are its batch's and its refills'; die at a refill
  # after the checkpoint of step 2.
  step = 2 if refills[2] else 3
  die_at = sum(1 + n for n in refills[:step]) + 1
  assert len(spy.rows[die_at]['count']) == 4
  with monkeypatch.context() as patch:
    again = Spy(patch, die_at)
    with pytest.raises(KeyboardInterrupt):
      rl.run(config, inputs, tmp_path / 'killed')
    assert again.keys == spy.keys[:die_at]
  found = rl.run(config, inputs, tmp_path / 'killed')
  assert found == wanted
  one, two = (
    tiny_world.left(world, 'rl', tmp_path / name, config)
    for name in ('killed', 'whole')
  )
  assert one[1:] == two[1:]
  assert [entry['step'] for entry in two[2]['history']] == [0, 2, 4, 5]
  tiny.assert_trees_equal(one[0], two[0])
  assert lines(tmp_path / 'killed') == lines(tmp_path / 'whole')


VARIANTS = {
  'reasoning': dict(
    rl__order_cost=0.1, rl__judge_weight=0.2, rl__overlong_buffer=3,
    rl__advantage='rloo', rl__average='sequence', rl__kl_weight=0.1,
    rl__refill_size=4, rl__steps=3, model__lora_rank=2,
    prompt__order='mixed',
  ),
  'updates': dict(
    rl__thinking=False, rl__credit='placement', rl__importance_cap=2.0,
    rl__advantage='dr_grpo', rl__average='fixed', rl__epochs=2,
    rl__minibatches=2, rl__steps=2,
  ),
}  # fmt: skip


@pytest.fixture(scope='module')
def variants(world, tmp_path_factory):
  @functools.lru_cache
  def run(name):
    config = tiny_world.config(
      **VARIANTS[name], rl__learning_rate=1e-2, rl__eval_every=3
    )
    workdir = tmp_path_factory.mktemp(name)
    with pytest.MonkeyPatch.context() as patch:
      spy = Spy(patch)
      rl.run(config, tiny_world.inputs(world, 'rl'), workdir)
    return config, workdir, spy

  return run


@pytest.mark.parametrize('name', VARIANTS)
def test_every_option_trains(world, variants, name):
  config, workdir, spy = variants(name)
  found, step, _ = tiny_world.left(world, 'rl', workdir, config)
  assert step == config.rl.steps
  assert spy.traces['clipped_surrogate'] == 1
  here = tiny_world.spec(world, config)
  begun = here.load_params(world['sft'], tiny_world.mesh())
  if config.model.lora_rank:
    begun = here.adapters.start(begun, jax.random.key(0))
    moved = found['state'].params['up']
    assert all(np.abs(x).max() > 0 for x in moved.values())
    new, old = found['state'].params['rows'], begun['rows']
    assert (new['embedding'] != old['embedding']).any()
    # What is left is a plain policy, its base rows and norms untouched.
    first = here.adapters.first_row
    before = here.load_params(world['sft'], tiny_world.mesh())
    after = found['params']
    assert 0 < first < len(after['embedding'])
    tiny.assert_trees_equal(
      [after['embedding'][:first], after['final_norm']],
      [before['embedding'][:first], before['final_norm']],
    )
  else:
    moved = jax.tree.map(
      lambda x, y: np.abs(x - y).max(), found['state'].params, begun
    )
    assert moved['embedding'] > 0
    assert min(jax.tree.leaves(moved['layers'])) > 0
  for row in steps_of(workdir):
    assert all(np.isfinite(v) for v in row.values())
    assert row['sampler_gap'] < 1e-5


def test_the_terms_of_the_reward_are_watched(variants):
  _, workdir, _ = variants('reasoning')
  for row in steps_of(workdir):
    assert 0 <= row['order_disagreement'] <= 1
    assert -1 <= row['overlong_penalty'] <= 0
    axes = {k: v for k, v in row.items() if k.startswith('judge/')}
    assert len(axes) == 5
    assert 'judge/total' in axes
    assert all(0 <= v <= 1 for v in axes.values())
  rows = steps_of(workdir)
  assert any(row['order_disagreement'] > 0 for row in rows)
  assert any(row['overlong_penalty'] < 0 for row in rows)


def test_the_reference_is_the_start(variants):
  _, workdir, _ = variants('reasoning')
  found = [row['teacher_kl'] for row in steps_of(workdir)]
  # The first update is the warm-up's, at a rate of 0.
  assert abs(found[0]) < 1e-6
  assert abs(found[1]) < 1e-6
  assert found[2] > 1e-6


def test_two_presentations_of_a_slate_stand_side_by_side(variants):
  _, _, spy = variants('reasoning')
  assert {len(rows['count']) for rows in spy.rows} >= {8}
  differ = 0
  for rows in spy.rows:
    n = rows['count']
    for p in range(0, len(n), 2):
      assert n[p] == n[p + 1]
      grades = [
        rows['grades'][i][np.argsort(rows['incoming'][i])] for i in (p, p + 1)
      ]
      np.testing.assert_array_equal(*grades)
      ids = [sorted(rows['prompt'][i].tolist()) for i in (p, p + 1)]
      assert ids[0] == ids[1]
      differ += (rows['incoming'][p] != rows['incoming'][p + 1]).any()
  assert differ > 5


def test_later_updates_of_a_batch_leave_the_policy_that_sampled(variants):
  config, workdir, spy = variants('updates')
  assert len(spy.batches) == config.rl.steps * 4
  for batch in spy.batches:
    assert batch.use.shape == (4,)
    assert batch.advantage.shape == batch.tokens.shape
  rows = steps_of(workdir)
  # The last update's ratio; the gap is the first's, under 1e-5.
  assert abs(rows[0]['ratio'] - 1) > 1e-4
  assert abs(rows[1]['ratio'] - 1) > 1e-4
  for row in rows:
    np.testing.assert_allclose(row['importance'], 1.0, atol=1e-4)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(refill_size=3), 'rl.refill_size=3 does not divide rl.batch_size=8'),
    (dict(refill_size=0), 'rl.refill_size=0 does not divide'),
    (
      dict(refill_size=1, order_cost=0.1),
      'rl.order_cost=0.1 .* rl.refill_size=1 must be even',
    ),
    (dict(minibatches=3), 'rl.minibatches=3 does not divide rl.batch_size=8'),
    (dict(credit='token'), "rl.credit='token': must be one of answer"),
    (
      dict(judge_weight=0.5, thinking=False),
      'rl.judge_weight=0.5 .* rl.thinking is False',
    ),
  ],
)
def test_what_cannot_be_names_its_field(world, tmp_path, changes, message):
  own = tiny_world.config(**{f'rl__{k}': v for k, v in changes.items()})
  with pytest.raises(ValueError, match=message):
    rl.run(own, tiny_world.inputs(world, 'rl'), tmp_path)
