import dataclasses
import functools

import jax
import numpy as np
import pytest
import scipy.special

from gr2_jax.policy import policy
from gr2_jax.train import distillation, policy_gradient

from .. import tiny

G = tiny.GRAMMAR
WIDER = dataclasses.replace(tiny.MODEL, d_model=24, vocab_size=44)
V = tiny.MODEL.vocab_size
TEMPERATURE = 0.7  # of `tiny.sampler`


def teacher(view='same', own_prompts=True, lacks=()):
  """A wider policy whose vocabulary stands in another order."""
  table = np.random.default_rng(5).permutation(WIDER.vocab_size)[:V]
  table = table.astype(np.int32)
  table[list(lacks)] = -1
  own = policy.Policy(
    tiny.spec(model=WIDER), tiny.params(WIDER, seed=3), tiny.one_device()
  )
  return distillation.TeacherPolicy(own, view, table, own_prompts)


def batch_for(config):
  """Rollouts, and longer prompts that the teacher reads."""
  rng = np.random.default_rng(6)
  length = np.array([9, 4, 8, 6, 9], np.int32)
  prompt = rng.integers(5, WIDER.vocab_size, (5, 9)).astype(np.int32)
  return dataclasses.replace(
    tiny.policy_batch(config),
    teacher_prompt=prompt,
    teacher_prompt_length=length,
    teacher_slots=np.tile(np.arange(3, 8, dtype=np.int32) % 4, (5, 1)),
  )


def plain_logp(found, batch):
  """log p of the teacher over the student's tokens it has: [P, G, T, V]."""
  tokens = np.where(found.table >= 0, found.table, G.pad)[batch.tokens]
  logp = _plain_logits(
    found.policy.params, batch.teacher_prompt, batch.teacher_prompt_length,
    tokens,
  )  # fmt: skip
  return np.where(
    found.table >= 0, logp[..., np.maximum(found.table, 0)], -np.inf
  )


def _plain_logits(params, prompt, length, completion):
  P, group, T = completion.shape
  ids, first = tiny.whole_sequences(prompt, length, completion)
  hidden = np.asarray(tiny.plain_hidden(WIDER, params, ids), np.float64)
  at = (first - 1)[:, None] + np.arange(T)
  hidden = np.take_along_axis(hidden, at[..., None], 1)
  logits = hidden @ np.asarray(params['embedding'], np.float64).T
  return logits.reshape(P, group, T, -1) / TEMPERATURE


def scorer(source, config, divergence):
  options = tiny.gradient_options(kl_weight=1.0, kl_kind=divergence)
  return distillation.make_teacher(source, G, config, options)


def loss_of(teacher):
  options = tiny.gradient_options(kl_weight=1.0, kl_kind=teacher.kind)
  loss_fn = policy_gradient.make_loss(
    tiny.MODEL, G, teacher.sampler, options, teacher
  )
  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


@functools.lru_cache
def looked(divergence, view='same', lacks=()):
  config = tiny.sampler(constrained=view == 'readout')
  found = scorer(teacher(view, lacks=lacks), config, divergence)
  batch, watches = found.score(batch_for(config))
  return found, batch, watches


def divergence_by_hand(divergence, found, batch):
  """Mean over all written tokens that count, in float64."""
  params = tiny.params()
  own = tiny.plain_logp(
    params, batch.prompt, batch.prompt_length, batch.tokens, TEMPERATURE
  )
  logits = plain_logp(found, batch)
  theirs = logits - scipy.special.logsumexp(logits, -1, keepdims=True)
  known = found.table >= 0
  total, count = 0.0, 0
  for p, g, t in np.ndindex(batch.tokens.shape):
    if t >= batch.length[p, g]:
      continue
    mine, its = own[p, g, t], theirs[p, g, t]
    if divergence == 'k3':
      token = batch.tokens[p, g, t]
      if not known[token]:
        continue
      gap = np.clip(its[token] - mine[token], -20, 20)
      total += np.exp(gap) - 1 - gap
    else:
      mine, its = mine[known], its[known]
      mine = mine - scipy.special.logsumexp(mine)
      if divergence == 'forward':
        mine, its = its, mine
      total += (np.exp(mine) * (mine - its)).sum()
    count += 1
  return total / count


@pytest.mark.parametrize('lacks_some', [False, True])
@pytest.mark.parametrize('divergence', ['k3', 'reverse', 'forward'])
def test_the_divergence_equals_a_numpy_oracle(divergence, lacks_some):
  tokens = looked('reverse')[1].tokens[:, 0, :2]  # Some that were written.
  lacks = tuple(np.unique(tokens).tolist()) if lacks_some else ()
  teacher, batch, watches = looked(divergence, lacks=lacks)
  found = teacher.source
  (_, metrics), _ = loss_of(teacher)(tiny.params(), batch, *teacher.vocabulary)
  wanted = divergence_by_hand(divergence, found, batch)
  np.testing.assert_allclose(metrics['teacher_kl'], wanted, rtol=2e-4)
  written = np.arange(10) < batch.length[..., None]
  known = (found.table >= 0)[batch.tokens][written].mean()
  np.testing.assert_allclose(watches['teacher_knows'], known, rtol=1e-6)
  assert (0.2 < known < 1) == lacks_some


@pytest.mark.parametrize(
  ('divergence', 'view'),
  [('reverse', 'same'), ('forward', 'same'), ('reverse', 'readout')],
)
def test_the_gradient_equals_finite_differences(divergence, view):
  found, batch, _ = looked(divergence, view)
  loss = loss_of(found)
  still = dataclasses.replace(
    batch, advantage=np.zeros_like(batch.advantage)
  )  # The surrogate has its own test.
  params, rows = tiny.params(), found.vocabulary
  _, gradient = loss(params, still, *rows)
  rng = np.random.default_rng(0)
  direction = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), params
  )
  wanted = sum(
    float((a * b).sum())
    for a, b in zip(
      jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True
    )
  )

  def at(size):
    moved = jax.tree.map(lambda x, d: x + size * d, params, direction)
    return float(loss(moved, still, *rows)[0][0])

  found = (at(1e-3) - at(-1e-3)) / 2e-3
  assert abs(wanted) > 0.02
  np.testing.assert_allclose(found, wanted, rtol=0.05)


def test_groups_that_compare_nothing_still_have_a_teacher():
  found, batch, _ = looked('reverse')
  none = dataclasses.replace(batch, use=np.zeros(5, bool))
  (loss, metrics), gradient = loss_of(found)(
    tiny.params(), none, *found.vocabulary
  )
  assert float(loss) == float(metrics['teacher_kl']) > 0.1
  assert any(np.asarray(x).any() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize('thinking', [True, False])
def test_the_readout_speaks_of_the_candidates_still_left(thinking):
  config = tiny.sampler(thinking=thinking)
  found = dataclasses.replace(teacher('readout'), sharpness=3.0)
  reader = scorer(found, config, 'reverse')
  batch, _ = reader.score(batch_for(config))
  (_, metrics), _ = loss_of(reader)(tiny.params(), batch, *reader.vocabulary)
  logits = plain_logp(found, batch)  # Of its tokens, for the reasoning.
  scores = np.asarray(batch.teacher_scores.slots, np.float64)
  logp = tiny.plain_logp(
    tiny.params(), batch.prompt, batch.prompt_length, batch.tokens, TEMPERATURE
  )
  apart = []
  for p, g in np.ndindex(batch.length.shape):
    tokens = batch.tokens[p, g, : batch.length[p, g]]
    begin = 1 + list(tokens).index(G.think_end) if thinking else 0
    remaining = 10 - np.arange(begin)
    for t in range(begin):
      if remaining[t] <= batch.constraint_inputs[p] + 2:
        apart.append(0.0)  # It had to close: nothing to choose.
        continue
      allowed = ~np.isin(np.arange(V), [G.eos, G.pad])
      mine, its = logp[p, g, t, allowed], logits[p, g, t, allowed]
      mine = mine - scipy.special.logsumexp(mine)
      its = its - scipy.special.logsumexp(its)
      apart.append((np.exp(mine) * (mine - its)).sum())
    left = list(range(batch.constraint_inputs[p]))
    for t in range(begin, begin + int(batch.constraint_inputs[p])):
      mine = logp[p, g, t, [G.slot_base + k for k in left]]
      mine = mine - scipy.special.logsumexp(mine)
      its = scores[p, left] - scipy.special.logsumexp(scores[p, left])
      apart.append((np.exp(mine) * (mine - its)).sum())
      left.remove(int(tokens[t]) - G.slot_base)
  np.testing.assert_allclose(metrics['teacher_kl'], np.mean(apart), rtol=2e-4)


def test_the_readout_is_that_of_the_slot_tokens():
  found = dataclasses.replace(teacher('readout'), sharpness=3.0)
  config = tiny.sampler(constrained=False)
  batch, _ = scorer(found, config, 'reverse').score(batch_for(config))
  hidden = tiny.plain_hidden(WIDER, found.policy.params, batch.teacher_prompt)
  at = np.take_along_axis(
    np.asarray(hidden), np.asarray(batch.teacher_slots)[..., None], 1
  )
  wanted = 3.0 * at @ np.asarray(found.policy.params['readout'])
  np.testing.assert_allclose(batch.teacher_scores.slots, wanted, atol=1e-4)


def test_a_policy_is_no_way_from_itself():
  config = tiny.sampler()
  source = distillation.self_teacher(
    tiny.spec(), tiny.one_device(), tiny.params()
  )
  assert not source.own_prompts
  for divergence in ('k3', 'reverse', 'forward'):
    itself = scorer(source, config, divergence)
    batch, watches = itself.score(tiny.policy_batch(config))
    assert float(watches['teacher_knows']) == 1
    (_, metrics), _ = loss_of(itself)(tiny.params(), batch, *itself.vocabulary)
    assert abs(float(metrics['teacher_kl'])) < 1e-5


def test_a_teacher_that_thinks_own_prompts_reasoning_first():
  config = tiny.sampler(thinking=False)
  spec = tiny.spec(model=WIDER)
  spec.prompter.reasoning, spec.prompter.thinking_tokens = 4, 10
  params = tiny.params(WIDER, seed=3)
  batch = batch_for(config)
  prompt, length = jax.jit(functools.partial(distillation._think, spec))(
    params,
    batch.teacher_prompt,
    batch.teacher_prompt_length,
    batch.constraint_inputs,
  )
  assert prompt.shape == (5, 9 + 8)
  alone = tiny.sample(
    WIDER, params, batch.teacher_prompt, batch.teacher_prompt_length,
    batch.constraint_inputs, jax.random.key(0), G,
    spec.sampling(1, True, 0.0, True),
  )  # fmt: skip
  for p in range(5):
    before = int(batch.teacher_prompt_length[p])
    written = list(np.asarray(alone.tokens[p, 0]))
    span = written[: written.index(G.think_end) + 1]
    assert list(prompt[p, : length[p]]) == [
      *batch.teacher_prompt[p, :before], *span
    ]  # fmt: skip
