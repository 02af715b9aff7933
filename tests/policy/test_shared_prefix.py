"""One encoded prompt for a group equals a whole sequence for every rollout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr2_jax.models import transformer
from gr2_jax.policy import sampling
from gr2_jax.train import distillation, policy_gradient

from .. import tiny

MODELS = {
  'grouped queries': tiny.MODEL,
  'one key-value head, own output embedding': dataclasses.replace(
    tiny.MODEL, num_kv_heads=1, tie_embeddings=False, remat=True
  ),
}
P, GROUP, TIME = 5, 3, 10


def sampler(constrained, group=GROUP):
  return sampling.SamplingOptions(
    group=group,
    max_tokens=TIME,
    temperature=0.7,
    thinking=True,
    constrained=constrained,
  )


def make_batch(model, constrained):
  """Rollouts of another policy, so that clip, KL and weights all act."""
  ids, lengths, found = tiny.rollouts(sampler(constrained), P, model=model)
  rng = np.random.default_rng(3)
  noise = rng.normal(size=(2, *found.tokens.shape)).astype(np.float32) * 0.3
  # Both as ragged as they can be, whatever the sampler drew.
  length = np.array(found.length)
  length[::2, 0] = np.minimum(length[::2, 0], [2, 5, 1])
  assert len(set(lengths)) > 3
  assert len(set(length.flat)) > 3
  return policy_gradient.PolicyBatch(
    prompt=ids,
    prompt_length=lengths,
    constraint_inputs=tiny.counts(P),
    tokens=np.asarray(found.tokens),
    length=length,
    logp=np.asarray(found.logp) + noise[0],
    advantage=rng.normal(size=length.shape).astype(np.float32),
    use=np.arange(P) != 1,
    importance=rng.uniform(0.5, 1.5, found.tokens.shape).astype(np.float32),
    teacher_scores=tiny.sampled_scores(np.asarray(found.logp) + noise[1]),
  )


def unshared(batch):
  """The same rollouts, each with a prompt of its own: [P * G, 1, ...]."""
  groups = ('prompt', 'prompt_length', 'constraint_inputs', 'use')

  def spread(field):
    value = getattr(batch, field.name)
    if field.name in groups:
      return np.repeat(value, GROUP, axis=0)
    return jax.tree.map(lambda x: x.reshape(P * GROUP, 1, *x.shape[2:]), value)

  return type(batch)(**{f.name: spread(f) for f in dataclasses.fields(batch)})


def encode_nothing(unused_model, unused_params, prompt, length):
  return None, (prompt, length)


def hidden_of_whole_sequences(model, params, unused_hidden, prompt, completion):
  """Prompt and completion end to end, one after the other, without prefix."""
  ids, length = prompt
  rows, _, time = completion.shape
  after = jnp.arange(ids.shape[1] + time) - length[:, None]
  written = jnp.take_along_axis(
    completion[:, 0], jnp.clip(after, 0, time - 1), axis=1
  )
  ids = jnp.where(after < 0, jnp.pad(ids, ((0, 0), (0, time))), written)
  hidden = tiny.plain_hidden(model, params, ids)
  at = (length - 1)[:, None] + jnp.arange(time)
  hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
  return hidden.reshape(rows, 1, time, -1)


def loss(model, constrained, average, group):
  return jax.jit(
    jax.value_and_grad(
      policy_gradient.make_loss(
        model,
        tiny.GRAMMAR,
        sampler(constrained, group),
        tiny.gradient_options(average=average, kl_weight=0.1),
        distillation.SampledTokens(
          None, tiny.GRAMMAR, sampler(constrained, group), 'k3'
        ),
      ),
      has_aux=True,
    )
  )


@pytest.mark.parametrize(
  ('name', 'constrained', 'average'),
  [
    ('grouped queries', True, 'token'),
    ('grouped queries', False, 'sequence'),
    ('one key-value head, own output embedding', False, 'token'),
  ],
)
def test_loss_and_gradients_equal_those_of_the_unshared_computation(
  name, constrained, average, monkeypatch
):
  model = MODELS[name]
  params, batch = tiny.params(model), make_batch(model, constrained)
  (found, watches), gradient = loss(model, constrained, average, GROUP)(
    params, batch
  )
  monkeypatch.setattr(transformer, 'encode_prompt', encode_nothing)
  monkeypatch.setattr(
    transformer, 'completion_hidden', hidden_of_whole_sequences
  )
  (wanted, others), alone = loss(model, constrained, average, 1)(
    params, unshared(batch)
  )
  assert abs(float(wanted)) > 1e-2
  np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
  assert watches.keys() == others.keys()

  def close(path, x, y):
    where = jax.tree_util.keystr(path)
    assert x.shape == y.shape
    if 'readout' not in where:  # Which no policy loss reads.
      assert float(jnp.abs(y).max()) > 1e-3, where
    apart = jnp.abs(x - y) / jnp.maximum(1.0, jnp.abs(y))
    assert float(apart.max()) <= 1e-5, where

  jax.tree_util.tree_map_with_path(close, gradient, alone)
