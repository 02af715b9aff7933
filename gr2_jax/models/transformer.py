"""The language model: a Qwen3-style decoder whose prompt is shared by a group.

RMSNorm, rotary positions, grouped-query attention with QK-norm, SwiGLU, tied
or separate output embedding, layers stacked by `nn.scan`. One attention serves
four callers, since keys come from two places that are never concatenated in
memory per rollout:

* the *prefix*, encoded once per prompt and shared by its group of rollouts
  (or once per user, where a prompt goes on behind memory tokens: `memory`);
* the rollout's *own* tokens, fresh or in a cache that is written at `index`.

| caller | tokens | prefix | cache |
|---|---|---|---|
| prompt encoding | [P, 1, Tp] | none | none |
| the rest of a prompt, behind its memory | [P, 1, Tp] | [P, M] | none |
| update, scoring, packed rows | [P, G, Tc] | [P, Tp] | none |
| decoding | [P, G, 1] | [P, Tp] | [P, G, Tc] |

Axes: P prompts, G group, T time, S own keys, R prefix keys, M memory tokens,
V vocabulary, D model width, N query heads, K key-value heads, H head width,
F feed-forward width, L layers.
"""

import dataclasses
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from gr2_jax.models import memory as memory_lib
from gr2_jax.models import rope

# Scale of what a layer adds to the residual stream at first. It does not drown
# the embedding, so that every layer tells tokens apart from the first step.
_BRANCH_SCALE = 0.1


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Shape and numerics of the decoder; hashable, so it can be static in jit."""

  vocab_size: int
  d_model: int = 64
  num_layers: int = 2
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 16
  d_ff: int = 192
  rope_base: float = 10_000.0
  rope_scaling: str = ''  # how contexts were stretched: linear llama3 yarn
  rope_factor: float = 1.0  # by how much
  rope_length: int = 0  # positions before stretching; llama3 and yarn
  rope_slow: float = 1.0  # turns in rope_length at which a pair stretches whole
  rope_fast: float = 4.0  # and at which it does not; between: a blend
  rope_magnitude: float = 1.0  # of rotated queries and keys; yarn
  qk_norm: bool = True
  tie_embeddings: bool = True
  norm_eps: float = 1e-6
  dtype: str = 'float32'  # activations; parameters and log-probabilities: f32
  remat: bool = False  # recompute a layer's activations in the backward pass
  memory_base: int = 0  # id of memory token 0; the others follow
  num_memory: int = 0  # memory tokens in the vocabulary, see `memory`; 0: none

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'model.num_heads={self.num_heads} is not a multiple of '
        f'model.num_kv_heads={self.num_kv_heads}: each key-value head serves '
        'a whole number of query heads.'
      )
    if self.head_dim % 2:
      raise ValueError(
        f'model.head_dim={self.head_dim} is odd: rotary positions turn pairs.'
      )
    if self.rope_scaling not in rope.SCALINGS:
      raise ValueError(
        f'model.rope_scaling={self.rope_scaling!r} is unknown; known: '
        f'{", ".join(map(repr, rope.SCALINGS))}.'
      )
    if self.rope_scaling in ('llama3', 'yarn') and self.rope_length < 1:
      raise ValueError(
        f'model.rope_length={self.rope_length}: rope_scaling='
        f'{self.rope_scaling!r} needs the positions the model had before.'
      )
    if self.rope_scaling and not self.rope_slow < self.rope_fast:
      raise ValueError(
        f'model.rope_slow={self.rope_slow} is not below '
        f'model.rope_fast={self.rope_fast}.'
      )
    if min(self.memory_base, self.num_memory) < 0 or (
      self.memory_base + self.num_memory > self.vocab_size
    ):
      raise ValueError(
        f'model.memory_base={self.memory_base} and '
        f'model.num_memory={self.num_memory} name ids outside of the '
        f'{self.vocab_size} of the vocabulary.'
      )


@flax.struct.dataclass
class KeyValues:
  """Keys and values of every layer; a prefix has the axes [L, P, K, R, H]."""

  k: jax.Array  # float [L, P, G, S, K, H]
  v: jax.Array  # float [L, P, G, S, K, H]


@flax.struct.dataclass
class Prefix:
  """What a group of rollouts shares: the encoded prompt."""

  kv: KeyValues  # [L, P, K, R, H]: as decoding reads it, not transposed again
  mask: jax.Array  # bool [P, R], True where a prompt token stands to be read
  length: jax.Array  # int32 [P], prompt tokens = position of the next token
  last: jax.Array  # int32 [P], the last one's place among those just encoded


def attend(
  q_PxGxTxNxH: jax.Array,
  own: tuple[jax.Array, jax.Array],
  mask_PxGxTxS: jax.Array,
  prefix: tuple[jax.Array, jax.Array] | None,
  prefix_mask_PxR: jax.Array | None,
) -> jax.Array:
  """Softmax attention over the shared prefix and the rollout's own keys.

  Args:
    q_PxGxTxNxH: queries.
    own: keys and values [P, G, S, K, H].
    mask_PxGxTxS: bool, True where a query may read an own key.
    prefix: keys and values [P, K, R, H] shared by the group, or None.
    prefix_mask_PxR: bool, True where a prefix key stands.

  Returns:
    [P, G, T, N, H] in the dtype of the values; softmax in float32.
  """
  P, G, T, N, H = q_PxGxTxNxH.shape
  k, v = own
  heads = k.shape[-2]
  # Heads first: scores leave the product in the order in which they are read.
  q = q_PxGxTxNxH.reshape(P, G, T, heads, N // heads, H) * H**-0.5
  q = q.transpose(0, 3, 1, 4, 2, 5)
  floor = jnp.finfo(jnp.float32).min
  scores = jnp.einsum('pkgnth,pgskh->pkgnts', q, k).astype(jnp.float32)
  scores = jnp.where(mask_PxGxTxS[:, None, :, None], scores, floor)
  if prefix is None:
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum('pkgnts,pgskh->pkgnth', weights, v)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(P, G, T, N, H)
  # One softmax over both, without putting them side by side in memory.
  prefix_k, prefix_v = prefix
  shared = jnp.einsum('pkgnth,pkrh->pkgntr', q, prefix_k).astype(jnp.float32)
  real = prefix_mask_PxR[:, None, None, None, None]
  shared = jnp.where(real, shared, floor)
  top = jnp.maximum(
    shared.max(-1, keepdims=True), scores.max(-1, keepdims=True)
  )
  top = jax.lax.stop_gradient(top)
  shared, scores = jnp.exp(shared - top), jnp.exp(scores - top)
  total = shared.sum(-1, keepdims=True) + scores.sum(-1, keepdims=True)
  out = jnp.einsum('pkgntr,pkrh->pkgnth', shared.astype(v.dtype), prefix_v)
  out += jnp.einsum('pkgnts,pgskh->pkgnth', scores.astype(v.dtype), v)
  out = (out / total).astype(v.dtype)
  return out.transpose(0, 2, 4, 1, 3, 5).reshape(P, G, T, N, H)


def _param(self, name, shape, axes, init):
  return self.param(name, nn.with_logical_partitioning(init, axes), shape)


class RMSNorm(nn.Module):
  """Root-mean-square normalisation over the last axis, in float32."""

  eps: float
  axis: str = 'embed'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises [..., D]; the result has the dtype of `x`."""
    scale = _param(
      self, 'scale', (x.shape[-1],), (self.axis,), nn.initializers.ones
    )
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * scale).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query attention; returns its output and the keys and values."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, turn, mask, prefix, prefix_mask, cache, index):
    """See `Transformer`; prefix, cache: one layer's; turn: `rope.turns`."""
    c = self.config
    init = nn.initializers.variance_scaling(
      1.0, 'fan_in', 'normal', in_axis=0, out_axis=(1, 2)
    )

    def project(name, heads, axis):
      w = _param(
        self,
        name,
        (c.d_model, heads, c.head_dim),
        ('embed', axis, 'head_dim'),
        init,
      )
      return jnp.einsum('pgtd,dnh->pgtnh', x, w.astype(x.dtype))

    q = project('query', c.num_heads, 'heads')
    k = project('key', c.num_kv_heads, 'kv_heads')
    v = project('value', c.num_kv_heads, 'kv_heads')
    if c.qk_norm:
      q = RMSNorm(c.norm_eps, 'head_dim', name='query_norm')(q)
      k = RMSNorm(c.norm_eps, 'head_dim', name='key_norm')(k)
    q, k = rope.rotate(q, *turn), rope.rotate(k, *turn)
    if cache is not None:
      write = jax.lax.dynamic_update_slice_in_dim
      k = write(cache.k, k.astype(cache.k.dtype), index, axis=2)
      v = write(cache.v, v.astype(cache.v.dtype), index, axis=2)
    shared = None if prefix is None else (prefix.k, prefix.v)
    out = attend(q, (k, v), mask, shared, prefix_mask)
    w = _param(
      self,
      'out',
      (c.num_heads, c.head_dim, c.d_model),
      ('heads', 'head_dim', 'embed'),
      nn.initializers.variance_scaling(
        _BRANCH_SCALE**2, 'fan_in', 'normal', in_axis=(0, 1), out_axis=2
      ),
    )
    return jnp.einsum('pgtnh,nhd->pgtd', out, w.astype(x.dtype)), KeyValues(
      k=k, v=v
    )


class Block(nn.Module):
  """One pre-norm decoder layer, in the form `nn.scan` wants."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, prefix, cache, turn, mask, prefix_mask, index):
    """Scanned over `prefix` and `cache`; the rest is the same everywhere."""
    c = self.config
    y = RMSNorm(c.norm_eps, name='attention_norm')(x)
    y, kv = Attention(c, name='attention')(
      y, turn, mask, prefix, prefix_mask, cache, index
    )
    x = x + y
    y = RMSNorm(c.norm_eps, name='mlp_norm')(x)
    init = nn.initializers.lecun_normal()
    up, down = ('embed', 'mlp'), ('mlp', 'embed')
    gate = _param(self, 'gate', (c.d_model, c.d_ff), up, init)
    value = _param(self, 'up', (c.d_model, c.d_ff), up, init)
    out = _param(
      self,
      'down',
      (c.d_ff, c.d_model),
      down,
      nn.initializers.variance_scaling(
        _BRANCH_SCALE**2, 'fan_in', 'truncated_normal'
      ),
    )
    gate, value, out = (w.astype(x.dtype) for w in (gate, value, out))
    x = x + (nn.silu(y @ gate) * (y @ value)) @ out
    return nn.with_logical_constraint(
      x, ('batch', 'group', 'time', 'embed')
    ), kv


class Transformer(nn.Module):
  """The decoder: token ids in, normalised hidden states and keys/values out.

  Logits are not computed here: callers multiply the hidden states that a loss
  reads with `output_embedding(params)`.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    tokens_PxGxT: jax.Array,
    positions_PxGxT: jax.Array,
    mask_PxGxTxS: jax.Array,
    prefix: Prefix | None = None,
    cache: KeyValues | None = None,
    index: jax.Array | int = 0,
  ) -> tuple[jax.Array, KeyValues]:
    """Runs the decoder.

    Args:
      tokens_PxGxT: int32 token ids.
      positions_PxGxT: int32 rotary positions.
      mask_PxGxTxS: bool, which own keys (S = T, or the cache's length) each
        query reads.
      prefix: the group's encoded prompt; every query reads all of it.
      cache: own keys and values so far; this call writes at `index`.
      index: int32 scalar, where in the cache the first of these tokens goes.

    Returns:
      Hidden states float [P, G, T, D] after the last norm, and the own keys
      and values [L, P, G, S, K, H] (the updated cache where one was given).
    """
    c = self.config
    embedding = _param(
      self,
      'embedding',
      (c.vocab_size, c.d_model),
      ('vocab', 'embed'),
      nn.initializers.normal(c.d_model**-0.5),
    )
    if not c.tie_embeddings:
      _param(
        self,
        'unembedding',
        (c.vocab_size, c.d_model),
        ('vocab', 'embed'),
        nn.initializers.normal(c.d_model**-0.5),
      )
    x = embedding.astype(c.dtype)[tokens_PxGxT]
    block = nn.remat(Block, prevent_cse=False) if c.remat else Block
    x, kv = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
      length=c.num_layers,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(c, name='layers')(
      x,
      None if prefix is None else prefix.kv,
      cache,
      rope.turns(positions_PxGxT, rope.frequencies(c), c.rope_magnitude),
      mask_PxGxTxS,
      None if prefix is None else prefix.mask,
      index,
    )
    x = RMSNorm(c.norm_eps, name='final_norm')(x)
    # Read by `slot_scores` alone; declared here so that `init` makes it.
    _param(self, 'readout', (c.d_model,), ('embed',), nn.initializers.zeros)
    return x, kv


def init_params(config: TransformerConfig, key: jax.Array) -> Any:
  """Parameters with their axis names; `sharding.unbox` strips those."""
  tokens = jnp.zeros((1, 1, 2), jnp.int32)
  mask = jnp.ones((1, 1, 2, 2), bool)
  return Transformer(config).init(key, tokens, tokens, mask)['params']


def output_embedding(params: Any) -> jax.Array:
  """The rows that hidden states are multiplied with: float [V, D]."""
  return params.get('unembedding', params['embedding'])


def encode_prompt(
  config: TransformerConfig,
  params: Any,
  prompt_PxTp: jax.Array,
  length_P: jax.Array,
  memory: Prefix | None = None,
) -> tuple[jax.Array, Prefix]:
  """Encodes right-padded prompts once for all their rollouts.

  What stands behind memory tokens, completions included, reads nothing that
  stands before them (`memory.readable`). So a prompt may be encoded in two
  pieces as well: up to its memory tokens by `encode_memory`, and the rest here.

  Args:
    config: the decoder's.
    params: unboxed parameters.
    prompt_PxTp: int32 ids, padding after `length_P`.
    length_P: int32, at least 1.
    memory: of `encode_memory`, where `prompt_PxTp` is the rest of a prompt
      that stands behind it. All of it is read, and positions go on from there.

  Returns:
    Hidden states float [P, Tp, D] of `prompt_PxTp`, and the shared prefix:
    with a memory, R = M + Tp, and its length counts the whole prompt.
  """
  P, T = prompt_PxTp.shape
  time = jnp.arange(T, dtype=jnp.int32)
  mask = jnp.broadcast_to(time[:, None] >= time, (P, 1, T, T))
  positions = jnp.broadcast_to(time, (P, 1, T))
  kept = time < length_P[:, None]
  if memory is not None:
    positions += memory.length[:, None, None]
  elif config.num_memory:
    reads, after = memory_lib.readable(
      memory_lib.find(
        prompt_PxTp, length_P, config.memory_base, config.num_memory
      )
    )
    mask, kept = reads[:, None], kept & after
  hidden, kv = Transformer(config).apply(
    {'params': params}, prompt_PxTp[:, None], positions, mask, memory
  )
  kv = jax.tree.map(lambda x: x[:, :, 0].swapaxes(2, 3), kv)
  prefix = Prefix(kv=kv, mask=kept, length=length_P, last=length_P - 1)
  if memory is None:
    return hidden[:, 0], prefix
  return hidden[:, 0], prefix.replace(
    kv=jax.tree.map(
      lambda *pieces: jnp.concatenate(pieces, axis=3), memory.kv, kv
    ),
    mask=jnp.concatenate([memory.mask, kept], axis=1),
    length=memory.length + length_P,
  )


def encode_memory(
  config: TransformerConfig,
  params: Any,
  prompt_PxT: jax.Array,
  length_P: jax.Array,
  num_memory: int,
) -> Prefix:
  """What is kept of prompts that end in their memory tokens.

  The keys and values of M tokens in every layer (Mu et al., arXiv 2304.08467):
  they depend on what stands before them alone, and may be cached for whatever
  rest a prompt goes on with, see `encode_prompt`.

  Args:
    config: the decoder's.
    params: unboxed parameters.
    prompt_PxT: int32 ids, padding after `length_P`; the last M before the
      padding are all the memory tokens that there are.
    length_P: int32, at least M.
    num_memory: M, static.

  Returns:
    A prefix of R = M keys; its length counts the whole of `prompt_PxT`.

  Raises:
    ValueError: the vocabulary does not have so many memory tokens.
  """
  if not 1 <= num_memory <= config.num_memory:
    raise ValueError(
      f'num_memory={num_memory} memory tokens at the end of a prompt, of '
      f'model.num_memory={config.num_memory} in the vocabulary: raise that, '
      'or encode the prompt as a whole.'
    )
  _, prefix = encode_prompt(config, params, prompt_PxT, length_P)
  time = jnp.arange(num_memory, dtype=jnp.int32)
  at = (length_P - num_memory)[:, None] + time
  return prefix.replace(
    kv=jax.tree.map(
      lambda x: jnp.take_along_axis(x, at[None, :, None, :, None], axis=3),
      prefix.kv,
    ),
    mask=jnp.ones(at.shape, bool),
  )


def completion_hidden(
  config: TransformerConfig,
  params: Any,
  prompt_hidden_PxTpxD: jax.Array,
  prefix: Prefix,
  completion_PxGxTc: jax.Array,
  segments_PxGxTc: jax.Array | None = None,
) -> jax.Array:
  """Hidden states that predict each completion token.

  The first is the prompt's last one, shared by the group; the others come from
  the completion shifted by one. Exact: equal to running prompt + completion
  as one sequence, at the cost of encoding the prompt once per group.

  Args:
    config: the decoder's.
    params: unboxed parameters.
    prompt_hidden_PxTpxD: from `encode_prompt`.
    prefix: likewise.
    completion_PxGxTc: int32 ids.
    segments_PxGxTc: int32, where a row is packed: equal numbers, next to each
      other, are one document. Each follows the prompt, at the positions it
      would have alone, and reads no other.

  Returns:
    float [P, G, Tc, D]: entry t predicts completion token t.
  """
  P, G, T = completion_PxGxTc.shape
  last = jnp.take_along_axis(
    prompt_hidden_PxTpxD, prefix.last[:, None, None], axis=1
  )
  first = jnp.broadcast_to(last[:, None], (P, G, 1, last.shape[-1]))
  if T == 1:
    return first
  time = jnp.arange(T - 1, dtype=jnp.int32)
  since = jnp.broadcast_to(time, (P, G, T - 1))
  mask = jnp.broadcast_to(time[:, None] >= time, (P, G, T - 1, T - 1))
  if segments_PxGxTc is not None:
    own, following = segments_PxGxTc[..., :-1], segments_PxGxTc[..., 1:]
    mask &= own[..., :, None] == own[..., None, :]
    # A document's first token: what stands left of it is another's.
    opens = jnp.pad(own[..., 1:] != own[..., :-1], [(0, 0), (0, 0), (1, 0)])
    since -= jax.lax.cummax(jnp.where(opens, time, 0), axis=2)
  rest, _ = Transformer(config).apply(
    {'params': params},
    completion_PxGxTc[..., :-1],
    prefix.length[:, None, None] + since,
    mask,
    prefix,
  )
  if segments_PxGxTc is not None:
    rest = jnp.where((own == following)[..., None], rest, first)
  return jnp.concatenate([first, rest], axis=2)


def slot_scores(
  params: Any, prompt_hidden_PxTpxD: jax.Array, slots_PxK: jax.Array
) -> jax.Array:
  """The listwise read-out: one score per candidate, at its slot token.

  Args:
    params: unboxed parameters.
    prompt_hidden_PxTpxD: from `encode_prompt`.
    slots_PxK: int32, where in the encoded prompt (in its rest, where that was
      encoded behind a memory) each candidate's slot token stands.

  Returns:
    float32 [P, K].
  """
  at_slots = jnp.take_along_axis(
    prompt_hidden_PxTpxD, slots_PxK[..., None], axis=1
  )
  return at_slots.astype(jnp.float32) @ params['readout']
