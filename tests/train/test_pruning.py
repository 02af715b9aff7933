import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gr2_jax.policy import policy
from gr2_jax.train import distillation, pruning

from .. import tiny

DEEP = dataclasses.replace(tiny.MODEL, num_layers=4)
SPEC = tiny.spec(model=DEEP)
OPTIONS = tiny.gradient_options(
  kl_weight=1.0, kl_kind='forward', readout_weight=0.5
)


def deep(idle=()):
  """Parameters of four layers, of which some add nothing to the stream."""
  return tiny.idle(tiny.params(DEEP), idle)


def looked_at(params):
  """Rollouts of the policy, with what it says of them itself."""
  sampler = tiny.sampler()
  ids, lengths, found = tiny.rollouts(sampler, model=DEEP)
  batch = dataclasses.replace(
    tiny.policy_batch(sampler),
    tokens=found.tokens,
    length=found.length,
    slots=np.stack([np.arange(5) % n for n in lengths]).astype(np.int32),
  )
  source = distillation.TeacherPolicy(
    policy.Policy(SPEC, params, tiny.one_device()), 'same', np.arange(40), False
  )
  teacher = distillation.make_teacher(source, tiny.GRAMMAR, sampler, OPTIONS)
  return [teacher.score(batch)[0]], teacher


def test_layers_are_taken_and_nothing_else_changes():
  params = deep()
  cut = pruning.take(SPEC, tiny.one_device(), params, [0, 3])
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x, np.asarray(y)[[0, 3]]),
    cut['layers'],
    params['layers'],
  )
  rest = {name: x for name, x in params.items() if name != 'layers'}
  tiny.assert_trees_equal({n: cut[n] for n in rest}, rest)
  assert pruning.shallower(SPEC, 2).model.num_layers == 2


def test_one_program_takes_any_layers_of_a_number():
  params = deep()
  before = pruning._take._cache_size()
  for kept in itertools.combinations(range(4), 3):
    cut = pruning.take(SPEC, tiny.one_device(), params, kept)
    wanted = pruning.shallower(SPEC, 3).abstract_params(tiny.one_device())[
      'layers'
    ]
    for x, like in zip(
      jax.tree.leaves(cut['layers']), jax.tree.leaves(wanted), strict=True
    ):
      assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
  assert pruning._take._cache_size() - before <= 1


def test_layers_that_do_nothing_cost_nothing_and_go_first():
  params = deep(idle=(1, 2))
  batches, teacher = looked_at(params)
  measure = pruning.make_measure(SPEC, tiny.sampler(), OPTIONS, teacher)
  found = pruning.choose(
    SPEC,
    tiny.one_device(),
    params,
    2,
    lambda fewer: measure(fewer, batches),
  )
  np.testing.assert_array_equal(found.kept, [0, 3])
  first, second = found.effects
  np.testing.assert_allclose(first[[1, 2]], 0.0, atol=1e-5)
  assert min(first[0], first[3]) > 0.01
  gone = np.isnan(second)
  assert gone.sum() == 1
  assert gone[1] or gone[2]


def test_an_effect_weighs_tokens_and_read_out():
  params = deep()
  batches, teacher = looked_at(params)
  cut = pruning.take(SPEC, tiny.one_device(), params, [0, 1, 3])

  def measured(**weights):
    options = dataclasses.replace(OPTIONS, **weights)
    measure = pruning.make_measure(SPEC, tiny.sampler(), options, teacher)
    return measure(cut, batches)

  tokens = measured(readout_weight=0.0)
  both = measured(readout_weight=1.0)
  assert both > tokens > 0
  np.testing.assert_allclose(
    measured(kl_weight=2.0, readout_weight=3.0),
    2 * tokens + 3 * (both - tokens),
    rtol=1e-5,
  )


def test_effects_are_measured_anew_without_what_went():
  """Two layers stand in for each other: alone each is idle, together not."""
  params = deep()
  marks = np.asarray(params['layers']['down'])[:, 0, 0].tolist()

  def measure(fewer):
    left = np.asarray(fewer['layers']['down'])[:, 0, 0].tolist()
    gone = {layer for layer, mark in enumerate(marks) if mark not in left}
    return 9.0 if {0, 1} <= gone else sum((1, 1, 4, 3)[i] for i in gone)

  found = pruning.choose(SPEC, tiny.one_device(), params, 2, measure)
  np.testing.assert_array_equal(found.kept, [1, 2])
  np.testing.assert_array_equal(found.effects[0], [1, 1, 4, 3])
  np.testing.assert_array_equal(found.effects[1], [np.nan, 9, 5, 4])


@pytest.mark.parametrize('layers', [0, 4, 5])
def test_a_depth_that_cannot_be_is_refused(layers):
  with pytest.raises(ValueError, match=f'prune.layers={layers}: .* the 4 lay'):
    pruning.choose(SPEC, tiny.one_device(), deep(), layers, lambda fewer: 0.0)
