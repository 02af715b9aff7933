import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gr2_jax.distributed import sharding
from gr2_jax.models import transformer

from .. import tiny

GOLDEN = pathlib.Path(__file__).parent.parent / 'goldens/partition_specs.txt'


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def norm(x, scale, eps=1e-6):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def turn(x, positions, base):
  """Rotary positions as complex numbers; x [T, heads, H]."""
  half = x.shape[-1] // 2
  angle = positions[:, None] * base ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
  return np.concatenate([turned.real, turned.imag], -1)


def forward(model, params, ids):
  """The decoder on one sequence, in float64 loops over heads."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = p['embedding'][ids]
  time = np.arange(len(ids))
  for layer in range(model.num_layers):
    w = jax.tree.map(lambda a, i=layer: a[i], p['layers'])
    a = w['attention']
    y = norm(x, w['attention_norm']['scale'])
    q, k, v = (
      np.einsum('td,dnh->tnh', y, a[name]) for name in ('query', 'key', 'value')
    )
    if model.qk_norm:
      q = norm(q, a['query_norm']['scale'])
      k = norm(k, a['key_norm']['scale'])
    q, k = turn(q, time, model.rope_base), turn(k, time, model.rope_base)
    for head in range(model.num_heads):
      shared = head // (model.num_heads // model.num_kv_heads)
      scores = q[:, head] @ k[:, shared].T / model.head_dim**0.5
      scores = np.where(time[:, None] >= time, scores, -np.inf)
      x = x + softmax(scores) @ v[:, shared] @ a['out'][head]
    y = norm(x, w['mlp_norm']['scale'])
    gate = y @ w['gate']
    x = x + (gate / (1 + np.exp(-gate)) * (y @ w['up'])) @ w['down']
  return norm(x, p['final_norm']['scale'])


@pytest.mark.parametrize('change', [{}, {'qk_norm': False, 'num_layers': 1}])
def test_the_decoder_equals_a_numpy_oracle(change):
  model = dataclasses.replace(tiny.MODEL, **change)
  params = tiny.params(model)
  ids = np.random.default_rng(0).integers(0, 40, (2, 9))
  found = tiny.plain_hidden(model, params, ids)
  for row in range(2):
    np.testing.assert_allclose(
      found[row], forward(model, params, ids[row]), atol=2e-5
    )


def test_rms_norm_equals_a_numpy_oracle():
  rng = np.random.default_rng(0)
  x, scale = rng.normal(size=(3, 5)), rng.normal(size=5)
  module = transformer.RMSNorm(eps=0.5)
  found = module.apply(
    {'params': {'scale': jnp.float32(scale)}}, jnp.float32(x)
  )
  np.testing.assert_allclose(found, norm(x, scale, 0.5), atol=1e-6)


def test_rotation_equals_complex_multiplication():
  x = np.random.default_rng(0).normal(size=(6, 2, 8)).astype(np.float32)
  positions = np.array([0, 1, 2, 7, 100, 1000])
  frequency = 500.0 ** (-np.arange(4) / 4)
  found = transformer.rotate(x, *transformer.rope_turns(positions, frequency))
  np.testing.assert_allclose(found, turn(x, positions, 500.0), atol=1e-4)


STRETCHED = dataclasses.replace(
  tiny.MODEL, head_dim=32, rope_base=1e4, rope_factor=8.0, rope_length=256
)


@pytest.mark.parametrize('fast', [4.0, 32.0])
@pytest.mark.parametrize('scaling', ['llama3', 'yarn'])
def test_stretching_keeps_fast_pairs_and_slows_slow_ones(scaling, fast):
  model = dataclasses.replace(
    STRETCHED, rope_scaling=scaling, rope_slow=1.0, rope_fast=fast
  )
  plain = 1e4 ** (-np.arange(16) / 16)
  ratio = plain / np.asarray(transformer.rope_frequencies(model))
  turns = 256 * plain / (2 * np.pi)
  # yarn rounds its bounds to whole pairs, outwards.
  margin = 1e4 ** (1 / 16) if scaling == 'yarn' else 1.0
  np.testing.assert_allclose(ratio[turns > fast * margin], 1.0, rtol=1e-5)
  np.testing.assert_allclose(ratio[turns < 1.0 / margin], 8.0, rtol=1e-5)
  between = (turns < fast) & (turns > 1.0)
  assert np.all((ratio[between] > 1.0) & (ratio[between] < 8.0))
  assert np.all(np.diff(ratio) > -1e-5)


def test_linear_stretching_is_slower_time():
  model = dataclasses.replace(STRETCHED, rope_scaling='linear')
  plain = dataclasses.replace(STRETCHED, rope_scaling='')
  np.testing.assert_allclose(
    8.0 * transformer.rope_frequencies(model),
    transformer.rope_frequencies(plain),
    rtol=1e-6,
  )


def test_magnitude_scales_what_was_turned():
  x = np.random.default_rng(0).normal(size=(3, 1, 8)).astype(np.float32)
  frequency, positions = 0.1 ** np.arange(4), np.arange(3)
  np.testing.assert_allclose(
    transformer.rotate(x, *transformer.rope_turns(positions, frequency, 1.5)),
    1.5 * transformer.rotate(x, *transformer.rope_turns(positions, frequency)),
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(rope_scaling='ntk'), "rope_scaling='ntk' is unknown.*'yarn'"),
    (dict(rope_scaling='yarn'), 'rope_length=0: .*needs the positions'),
    (
      dict(rope_scaling='llama3', rope_length=8, rope_fast=1.0),
      'rope_slow=1.0 is not below model.rope_fast=1.0',
    ),
  ],
)
def test_stretching_that_means_nothing_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(tiny.MODEL, **change)


def test_rotated_products_depend_on_the_distance_alone():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 8)).astype(np.float32)

  def product(i, j):
    a, b = (
      transformer.rotate(
        x, *transformer.rope_turns(np.array([t]), 100.0 ** (-np.arange(4) / 4))
      )
      for x, t in ((q, i), (k, j))
    )
    return float(jnp.sum(a * b))

  np.testing.assert_allclose(product(9, 4), product(25, 20), rtol=1e-4)
  assert abs(product(9, 4) - product(9, 5)) > 1e-2


def attention_case(heads=2, N=4, P=2, G=3, T=3, S=4, R=5, H=4):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  mask = rng.random((P, G, T, S)) < 0.6
  mask[..., 0] = True
  prefix_mask = np.arange(R) < np.array([[R], [2]])
  return dict(
    q_PxGxTxNxH=draw(P, G, T, N, H),
    own=(draw(P, G, S, heads, H), draw(P, G, S, heads, H)),
    mask_PxGxTxS=mask,
    prefix=(draw(P, heads, R, H), draw(P, heads, R, H)),
    prefix_mask_PxR=prefix_mask,
  )


@pytest.mark.parametrize('with_prefix', [True, False])
def test_attention_equals_a_loop(with_prefix):
  case = attention_case()
  if not with_prefix:
    case |= dict(prefix=None, prefix_mask_PxR=None)
  found = transformer.attend(**case)
  q, (k, v), mask = case['q_PxGxTxNxH'], case['own'], case['mask_PxGxTxS']
  for p, g, t, n in np.ndindex(q.shape[:4]):
    keys, values = (x[p, g, mask[p, g, t], n // 2] for x in (k, v))
    if with_prefix:
      real = case['prefix_mask_PxR'][p]
      first, second = (x[p, n // 2, real] for x in case['prefix'])
      keys, values = np.r_[first, keys], np.r_[second, values]
    wanted = softmax(keys @ q[p, g, t, n] / 2.0) @ values
    np.testing.assert_allclose(found[p, g, t, n], wanted, atol=1e-5)


def test_grouped_queries_equal_repeated_heads():
  case = attention_case()
  found = transformer.attend(**case)
  for name, axis in (('own', -2), ('prefix', 1)):
    case[name] = tuple(np.repeat(x, 2, axis=axis) for x in case[name])
  np.testing.assert_allclose(found, transformer.attend(**case), atol=1e-6)


def test_a_token_reads_itself_and_what_came_before():
  params = tiny.params()
  ids = np.random.default_rng(0).integers(5, 40, (1, 8))
  before = tiny.plain_hidden(tiny.MODEL, params, ids)[0]
  for t in (0, 3, 7):
    other = ids.copy()
    other[0, t] = 4
    after = tiny.plain_hidden(tiny.MODEL, params, other)[0]
    np.testing.assert_array_equal(after[:t], before[:t])
    assert (np.abs(after[t:] - before[t:]).max(-1) > 1e-3).all()


def empty_cache(model, P, G, T):
  shape = (model.num_layers, P, G, T, model.num_kv_heads, model.head_dim)
  return transformer.KeyValues(k=jnp.zeros(shape), v=jnp.zeros(shape))


encode = jax.jit(transformer.encode_prompt, static_argnums=0)
complete = jax.jit(transformer.completion_hidden, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, tokens, index, prefix, cache):
  P, G, n = tokens.shape
  time = index + jnp.arange(n)
  S = cache.k.shape[3]
  start = prefix.length[:, None, None] if prefix is not None else 0
  return transformer.Transformer(model).apply(
    {'params': params},
    tokens,
    jnp.broadcast_to(start + time, (P, G, n)),
    jnp.broadcast_to(time[:, None] >= jnp.arange(S), (P, G, n, S)),
    prefix,
    cache,
    index,
  )


@pytest.mark.parametrize('sizes', [(1,) * 6, (3, 1, 1, 1), (2, 4)])
@pytest.mark.parametrize('with_prefix', [True, False])
def test_cached_decoding_equals_the_full_forward(sizes, with_prefix):
  params = tiny.params()
  prompt, length = tiny.prompts(2)
  completion = np.random.default_rng(1).integers(5, 40, (2, 2, 6))
  prefix = None
  if with_prefix:
    _, prefix = encode(tiny.MODEL, params, prompt, length)
  else:
    length = np.zeros(2, np.int32)
  ids, first = tiny.whole_sequences(prompt, length, completion)
  wanted = tiny.plain_hidden(tiny.MODEL, params, ids)
  wanted = np.stack(
    [row[n : n + 6] for row, n in zip(wanted, first, strict=True)]
  ).reshape(2, 2, 6, -1)
  cache, index = empty_cache(tiny.MODEL, 2, 2, 6), 0
  for n in sizes:
    tokens = completion[..., index : index + n]
    hidden, cache = step(
      tiny.MODEL, params, tokens, jnp.int32(index), prefix, cache
    )
    np.testing.assert_allclose(
      hidden, wanted[:, :, index : index + n], atol=1e-5
    )
    index += n


def shared_hidden(params, prompt, length, completion):
  hidden, prefix = transformer.encode_prompt(tiny.MODEL, params, prompt, length)
  return transformer.completion_hidden(
    tiny.MODEL, params, hidden, prefix, completion
  )


def unshared_hidden(params, prompt, length, completion):
  P, G, T = completion.shape
  ids, first = tiny.whole_sequences(prompt, length, completion)
  hidden = tiny.plain_hidden(tiny.MODEL, params, ids)
  at = (first - 1)[:, None] + np.arange(T)
  return jnp.take_along_axis(hidden, at[..., None], 1).reshape(P, G, T, -1)


@pytest.mark.parametrize('time', [5, 1])
def test_a_shared_prefix_equals_one_sequence_a_rollout(time):
  params = tiny.params()
  prompt, length = tiny.prompts(6)
  completion = np.random.default_rng(1).integers(5, 40, (6, 3, time))
  found = jax.jit(shared_hidden)(params, prompt, length, completion)
  wanted = unshared_hidden(params, prompt, length, completion)
  assert set(length) == {7, 6, 5, 4, 3, 2}
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_shared_prefix_has_the_gradients_of_one_sequence_a_rollout():
  params = tiny.params()
  prompt, length = tiny.prompts(3)
  completion = np.random.default_rng(1).integers(5, 40, (3, 2, 5))
  weight = np.random.default_rng(2).normal(size=(3, 2, 5, 16)) / 30

  def gradient(hidden_fn):
    return jax.jit(
      jax.grad(
        lambda p: jnp.sum(hidden_fn(p, prompt, length, completion) * weight)
      )
    )(params)

  found, wanted = gradient(shared_hidden), gradient(unshared_hidden)
  assert float(jnp.abs(wanted['layers']['gate']).max()) > 1e-2
  tiny.assert_trees_close(found, wanted, 1e-5)


def test_prompt_padding_is_never_read():
  params = tiny.params()
  prompt, length = tiny.prompts(6)
  completion = np.random.default_rng(1).integers(5, 40, (6, 2, 4))
  other = prompt.copy()
  other[np.arange(7) >= length[:, None]] = 33
  assert (other != prompt).sum() == 15
  found = jax.jit(shared_hidden)
  np.testing.assert_array_equal(
    found(params, prompt, length, completion),
    found(params, other, length, completion),
  )


def test_rematerialised_layers_change_nothing():
  params = tiny.params()
  ids = np.random.default_rng(0).integers(5, 40, (2, 6))

  def gradient(remat):
    model = dataclasses.replace(tiny.MODEL, remat=remat)

    def loss(p):
      return jnp.sum(tiny.plain_hidden(model, p, ids) ** 3)

    return jax.grad(loss)(params)

  tiny.assert_trees_close(gradient(True), gradient(False), 1e-3)


def test_bfloat16_activations_stay_near_and_parameters_stay_float32():
  model = dataclasses.replace(tiny.MODEL, dtype='bfloat16')
  params = tiny.params(model)
  ids = np.random.default_rng(0).integers(5, 40, (2, 6))
  found = tiny.plain_hidden(model, params, ids)
  assert found.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}
  wanted = tiny.plain_hidden(tiny.MODEL, params, ids)
  gap = np.abs(found.astype(np.float32) - wanted)
  assert 1e-4 < gap.mean() < 0.1


def test_an_untied_model_reads_its_own_output_embedding():
  params = tiny.params(dataclasses.replace(tiny.MODEL, tie_embeddings=False))
  assert transformer.output_embedding(params) is params['unembedding']
  assert params['unembedding'].shape == (40, 16)
  tied = tiny.params()
  assert 'unembedding' not in tied
  assert transformer.output_embedding(tied) is tied['embedding']


def test_slot_scores_are_read_at_the_slot_tokens():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(2, 6, 16)).astype(np.float32)
  slots = np.array([[1, 4, 0], [5, 2, 2]])
  readout = rng.normal(size=16).astype(np.float32)
  found = transformer.slot_scores({'readout': readout}, hidden, slots)
  for p, k in np.ndindex(2, 3):
    np.testing.assert_allclose(
      found[p, k], hidden[p, slots[p, k]] @ readout, rtol=1e-5
    )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'num_heads': 3}, 'model.num_heads=3 is not a multiple'),
    ({'head_dim': 5}, 'model.head_dim=5 is odd'),
  ],
)
def test_a_shape_that_cannot_be_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(tiny.MODEL, **change)


def test_every_parameter_of_the_presets_has_its_golden_partition():
  mesh, lines = sharding.make_mesh(2, 2, 2), []
  for preset in ('tiny', 'small'):
    given = common.model(preset).to_dict()
    fields = {f.name for f in dataclasses.fields(transformer.TransformerConfig)}
    model = transformer.TransformerConfig(
      vocab_size=1024, **{k: v for k, v in given.items() if k in fields}
    )
    boxed = jax.eval_shape(
      lambda key, m=model: transformer.init_params(m, key), jax.random.key(0)
    )
    shapes = jax.tree_util.tree_leaves_with_path(sharding.unbox(boxed))
    specs = jax.tree.leaves(sharding.param_shardings(mesh, boxed))
    for (path, leaf), found in zip(shapes, specs, strict=True):
      name = '.'.join(entry.key for entry in path)
      spec = ', '.join(map(str, found.spec))
      lines.append(f'{preset} {name} {leaf.shape} -> ({spec})')
  assert '\n'.join(lines) + '\n' == GOLDEN.read_text()
