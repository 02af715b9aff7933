"""The smallest decoder and grammar, and random batches for them."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.distributed import sharding
from gr2_jax.models import lora, transformer
from gr2_jax.policy import grammar, policy, sampling
from gr2_jax.train import distillation, learner, policy_gradient

MODEL = transformer.TransformerConfig(
  vocab_size=40,
  d_model=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=24,
)
GRAMMAR = grammar.Ranking(
  slot_base=10, num_slots=7, num_candidates=5, think_end=4, eos=2, pad=0
)


def one_device():
  """A mesh of one device: quicker to compile for and to step."""
  return jax.make_mesh(
    (1, 1, 1),
    sharding.MESH_AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:1],
  )


def spec(model=MODEL, trained=None):
  """What training needs of a spec: no data, and ids without their text."""
  words = types.SimpleNamespace(
    slot_base=GRAMMAR.slot_base,
    layout=types.SimpleNamespace(num_slots=GRAMMAR.num_slots),
    control={'</think>': GRAMMAR.think_end},
    eos=GRAMMAR.eos,
    pad=GRAMMAR.pad,
  )
  prompter = types.SimpleNamespace(
    vocabulary=words, num_candidates=GRAMMAR.num_candidates
  )
  return policy.PolicySpec(
    catalog=None,
    prompter=prompter,
    model=model,
    adapters=trained or lora.Adapters(),
  )


def sampler(thinking=True, constrained=True, temperature=0.7, group=3):
  return sampling.SamplingOptions(
    group=group,
    max_tokens=10,
    temperature=temperature,
    thinking=thinking,
    constrained=constrained,
  )


def gradient_options(**changes):
  """Options of the policy gradient: one update, DAPO's clip, no teacher."""
  fields = dict(
    batch_size=5, refill_size=5, refills=0, advantage='dapo', clip_low=0.2,
    clip_high=0.28, average='token', epochs=1, minibatches=1,
    importance_cap=0.0, kl_weight=0.0, kl_kind='k3',
  )  # fmt: skip
  return policy_gradient.PolicyGradientOptions(**fields | changes)


def sampled_scores(logp):
  """Scores of a teacher that has every token."""
  return distillation.SampledScores(
    logp.astype(np.float32), np.ones(logp.shape, bool)
  )


def params(model=MODEL, seed=0):
  """Random parameters, read-out and norms too, drawn without a compiler."""
  shapes = jax.eval_shape(
    lambda key: sharding.unbox(transformer.init_params(model, key)),
    jax.random.key(0),
  )
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    x = rng.normal(size=leaf.shape).astype(np.float32)
    name = path[-1].key
    if name == 'scale':
      return jnp.asarray(1 + 0.3 * x)
    return jnp.asarray(x * (1.0 if 'embedding' in name else 0.25))

  return jax.tree_util.tree_map_with_path(draw, shapes)


def idle(params, layers):
  """The same, but that some layers add nothing to the stream."""

  def silence(path, x):
    last = path[-1].key in ('out', 'down')
    return x.at[np.array(layers, int)].set(0.0) if last else x

  silent = jax.tree_util.tree_map_with_path(silence, params['layers'])
  return params | {'layers': silent}


def prompts(size=5, length=7, seed=0):
  """Right-padded prompts int32 [P, Tp] of every length, and the lengths."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(5, MODEL.vocab_size, (size, length)).astype(np.int32)
  lengths = (length - np.arange(size) % (length - 1)).astype(np.int32)
  ids[np.arange(length) >= lengths[:, None]] = GRAMMAR.pad
  return ids, lengths


def counts(size):
  return (1 + np.arange(size) % GRAMMAR.num_candidates).astype(np.int32)


def plain_logp(params, prompt, length, completion, temperature=1.0):
  """Log-probabilities float64 [P, G, T, V] of whole sequences."""
  P, group, T = completion.shape
  ids, first = whole_sequences(prompt, length, completion)
  hidden = np.asarray(plain_hidden(MODEL, params, ids), np.float64)
  at = (first - 1)[:, None] + np.arange(T)
  hidden = np.take_along_axis(hidden, at[..., None], 1)
  logits = hidden @ np.asarray(params['embedding'], np.float64).T / temperature
  logits -= logits.max(-1, keepdims=True)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return logp.reshape(P, group, T, -1)


def rollouts(config, size=5, seed=0, model=MODEL):
  ids, lengths = prompts(size, seed=seed)
  return (
    ids,
    lengths,
    sample(
      model,
      params(model),
      ids,
      lengths,
      counts(size),
      jax.random.key(seed),
      GRAMMAR,
      config,
    ),
  )


sample = jax.jit(sampling.sample, static_argnums=(0, 6, 7))


def policy_batch(config, size=5, seed=0):
  """Rollouts of the tiny model, with advantages that say something."""
  ids, lengths, found = rollouts(config, size, seed)
  rng = np.random.default_rng(seed)
  return policy_gradient.PolicyBatch(
    prompt=ids,
    prompt_length=lengths,
    constraint_inputs=counts(size),
    tokens=np.asarray(found.tokens),
    length=np.asarray(found.length),
    logp=np.asarray(found.logp),
    advantage=rng.normal(size=found.length.shape).astype(np.float32),
    use=np.arange(size) != 1,
  )


def examples(size=5, group=2, time=8, seed=0):
  """A supervised batch; the second completion is ranked by the read-out."""
  rng = np.random.default_rng(seed)
  ids, lengths = prompts(size, 12, seed)
  K = GRAMMAR.num_candidates
  count = counts(size)
  shape = (size, group, time)
  completion = rng.integers(5, MODEL.vocab_size, shape).astype(np.int32)
  weights = rng.choice([0.0, 0.2, 1.0], shape).astype(np.float32)
  weights[..., -2:] = 0.0
  # No slot twice: equal scores would be sorted by their rounding.
  slots = np.stack([rng.permutation(n)[:K] for n in lengths])
  return learner.Examples(
    prompt=ids,
    prompt_length=lengths,
    completion=completion,
    weights=weights,
    answer_at=np.tile(np.int32([0, 2])[:group], (size, 1)),
    rank_by_readout=np.tile(np.arange(group) == 1, (size, 1)),
    slots=slots.astype(np.int32),
    grades=rng.integers(0, 3, (size, K)).astype(np.float32),
    count=count,
  )


@functools.partial(jax.jit, static_argnums=0)
def plain_hidden(model, params, ids_BxT):
  """The decoder on whole sequences: no prefix, no cache."""
  time = jnp.arange(ids_BxT.shape[1])
  shape = (len(ids_BxT), 1, len(time))
  mask = jnp.broadcast_to(time[:, None] >= time, (*shape, len(time)))
  hidden, _ = transformer.Transformer(model).apply(
    {'params': params},
    ids_BxT[:, None],
    jnp.broadcast_to(time, shape),
    mask,
  )
  return hidden[:, 0]


def whole_sequences(prompt, length, completion):
  """Prompt and completion end to end: ids [P * G, T], first place [P * G]."""
  P, G, T = completion.shape
  out = np.zeros((P * G, prompt.shape[1] + T), np.int32)
  for row in range(P * G):
    p, g = divmod(row, G)
    ids = [*prompt[p, : length[p]], *completion[p, g]]
    out[row, : len(ids)] = ids
  return out, np.repeat(length, G)


def assert_trees_close(found, wanted, atol):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree_util.tree_map_with_path(
    lambda path, x, y: np.testing.assert_allclose(
      x, y, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path)
    ),
    found,
    wanted,
  )


def assert_trees_equal(found, wanted):
  """Byte for byte."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
