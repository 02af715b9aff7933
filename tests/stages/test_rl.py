import functools

import jax
import numpy as np
import pytest

from gr2_jax import reporting, sharding
from gr2_jax.data import batches
from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import parsing, rewards
from gr2_jax.stages import rl

from .. import tiny_world


@pytest.fixture(scope='module')
def setup(world):
  return tiny_world.setup(world)


@pytest.fixture(scope='module')
def compiled(setup):
  @functools.lru_cache
  def make(constrained, gate):
    stage = tiny_world.config(rl__gate=gate).rl
    sampler = setup.sampling(4, False, 1.0, constrained)
    return rl.make_act(setup, sampler, stage)

  return make


def acted(world, setup, compiled, seed=0, constrained=True, gate='v2'):
  render = batches.requests(setup.prompter, '<answer>', 'shuffled')
  slates = slates_lib.source(world['slates'], 'train')
  rows = [render(slates[i], np.random.default_rng((seed, i))) for i in range(8)]
  rows = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
  act = compiled(constrained, gate)
  with sharding.activate(setup.mesh):
    batch, watches = act(
      setup.load_params(world['sft']),
      sharding.shard_batch(rows, setup.mesh),
      jax.random.key(seed),
    )
  return rows, jax.device_get(batch), jax.device_get(watches)


def parse(rows, batch, setup, p, g):
  """Reads one rollout in Python: (ranking, verdict)."""
  ids = batch.tokens[p, g, : batch.length[p, g]].tolist()
  count, base = int(rows['count'][p]), setup.grammar.slot_base
  places = [i - base for i in ids[:-1]]
  if ids[-1] == setup.grammar.eos and sorted(places) == list(range(count)):
    rest = list(range(count, setup.grammar.num_candidates))
    return np.int32(places + rest), parsing.VALID
  order = np.argsort(rows['incoming'][p][:count])
  rest = np.arange(count, setup.grammar.num_candidates)
  return np.int32([*order, *rest]), parsing.WRONG_FORMAT


@pytest.mark.parametrize(
  ('constrained', 'gate'), [(True, 'v2'), (True, 'none'), (False, 'v2')]
)
def test_rewards_are_those_of_the_sampled_tokens(
  world, setup, compiled, constrained, gate
):
  rows, batch, watches = acted(
    world, setup, compiled, constrained=constrained, gate=gate
  )
  stage = tiny_world.config().rl
  total, rank, copies, valid = (np.zeros((8, 4)) for _ in range(4))
  for p, g in np.ndindex(8, 4):
    ranking, verdict = parse(rows, batch, setup, p, g)
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


def test_groups_of_equal_rewards_are_masked(world, setup):
  stage = tiny_world.config(rl__reward='recall', rl__k=5, rl__gate='none').rl
  act = rl.make_act(setup, setup.sampling(4, False, 1.0, True), stage)
  render = batches.requests(setup.prompter, '<answer>', 'shuffled')
  slates = slates_lib.source(world['slates'], 'train')
  rows = [render(slates[i], np.random.default_rng(i)) for i in range(8)]
  rows = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
  with sharding.activate(setup.mesh):
    batch, watches = act(
      setup.load_params(world['sft']),
      sharding.shard_batch(rows, setup.mesh),
      jax.random.key(0),
    )
  # Recall at K of a permutation is 1 whatever the order.
  assert not np.asarray(batch.use).any()
  assert float(watches['flat_groups']) == 1.0
  np.testing.assert_allclose(watches['reward'], 1.2, atol=1e-6)
  np.testing.assert_allclose(batch.advantage, 0.0, atol=1e-6)


def test_watches_are_in_their_ranges(world, setup, compiled):
  _, batch, watches = acted(world, setup, compiled)
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


def test_one_trace_serves_every_step(world, setup, compiled):
  tokens = [acted(world, setup, compiled, seed)[1].tokens for seed in (1, 2, 3)]
  assert compiled(True, 'v2')._cache_size() == 1
  assert (tokens[0] != tokens[1]).any()


def test_the_log_says_what_must_be_watched(world):
  rows = reporting.read_metrics(world['rl'] / 'metrics.jsonl')
  steps = [row for row in rows if 'reward' in row]
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
  setup = tiny_world.setup(world, config)
  found = setup.load_params(tmp_path)
  for x, y in zip(
    jax.tree.leaves(found),
    jax.tree.leaves(setup.load_params(world['sft'])),
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
  assert result == meta
  assert found['params']['embedding'].shape[1] == 16


def test_every_step_samples_with_a_key_of_its_own(world, tmp_path, monkeypatch):
  make_act, keys = rl.make_act, []

  def spying(*arguments):
    act = make_act(*arguments)

    def spy(params, rows, key):
      keys.append(tuple(jax.random.key_data(key).tolist()))
      return act(params, rows, key)

    return spy

  monkeypatch.setattr(rl, 'make_act', spying)
  config = tiny_world.config(rl__steps=3)
  rl.run(config, tiny_world.inputs(world, 'rl'), tmp_path)
  assert len(set(keys)) == 3
