"""The language model: a Qwen3-style decoder whose prompt is shared by a group.

RMSNorm, rotary positions, grouped-query attention with QK-norm, SwiGLU, tied
or separate output embedding, layers stacked by `nn.scan`. One attention serves
four callers. Keys come from two places, which are never concatenated in memory
for each rollout:

* the *prefix*, encoded once per prompt and shared by its group of rollouts
  (or once per user, where memory tokens precede the rest of a prompt);
* the rollout's *own* tokens, fresh or in a cache that is written at `index`.

| caller | tokens | prefix | cache |
|---|---|---|---|
| prompt encoding | [P, 1, Tp] | none | none |
| the rest of a prompt, behind its memory | [P, 1, Tp] | [P, M] | none |
| update, scoring, packed rows | [P, G, Tc] | [P, Tp] | none |
| decoding | [P, G, 1] | [P, Tp] | [P, G, Tc] |

Memory tokens: a prompt may hold learned tokens behind a user's history. They
read the history, and later tokens read only them and each other, as with gist
tokens (Mu et al., arXiv 2304.08467). Their keys and values replace the history;
they depend on the user alone and may be cached.

Axes: P prompts, G group, T time, S own keys, R prefix keys, M memory tokens,
V vocabulary, D model width, N query heads, K key-value heads, H head width,
F feed-forward width, L layers. `params` are unboxed.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from gr2_jax.ops import masking

# Scale of what a layer adds to the residual stream at first. It does not drown
# the embedding, so that every layer can distinguish tokens from the start.
_BRANCH_SCALE = 0.1
ROPE_SCALINGS = ('', 'linear', 'llama3', 'yarn')


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
  num_memory: int = 0  # memory tokens in the vocabulary

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
    if self.rope_scaling not in ROPE_SCALINGS:
      raise ValueError(
        f'model.rope_scaling={self.rope_scaling!r} is unknown; known: '
        f'{", ".join(map(repr, ROPE_SCALINGS))}.'
      )
    if self.rope_scaling in ('llama3', 'yarn') and self.rope_length < 1:
      raise ValueError(
        f'model.rope_length={self.rope_length}: rope_scaling='
        f'{self.rope_scaling!r} needs the positions before stretching.'
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


@struct.dataclass
class KeyValues:
  """Keys and values of every layer; a prefix has the axes [L, P, K, R, H]."""

  k: jax.Array  # float [L, P, G, S, K, H]
  v: jax.Array  # float [L, P, G, S, K, H]


@struct.dataclass
class Prefix:
  """The encoded prompt, which a group of rollouts shares."""

  kv: KeyValues  # [L, P, K, R, H]: as decoding reads it, not transposed again
  mask: jax.Array  # bool [P, R], True where a token may be read
  length: jax.Array  # int32 [P], prompt tokens = position of the next token
  last: jax.Array  # int32 [P], the last one's place among those just encoded


def rope_frequencies(config: 'TransformerConfig') -> jax.Array:
  """Angle in radians from one position to the next, per pair: float32 [H/2].

  Rotary positions (Su et al., arXiv 2104.09864). Unscaled, pair i turns by
  `base ** (-i / (H/2))`. A stretched context divides that by `rope_factor`: for
  all pairs ('linear', arXiv 2306.15595), or for slow pairs only, blended by the
  number of turns within `rope_length` ('llama3', arXiv 2407.21783) or by pair
  index between the pairs of `rope_fast` and `rope_slow` turns ('yarn', arXiv
  2309.00071, NTK by parts).
  """
  c, half = config, config.head_dim // 2
  frequency = c.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if not c.rope_scaling:
    return frequency
  stretched = frequency / c.rope_factor
  if c.rope_scaling == 'linear':
    return stretched
  if c.rope_scaling == 'llama3':
    turns = frequency * (c.rope_length / (2 * math.pi))
    keep = (turns - c.rope_slow) / (c.rope_fast - c.rope_slow)
  else:

    def pair(turns: float) -> float:
      wavelength = c.rope_length / (turns * 2 * math.pi)
      return half * math.log(wavelength) / math.log(c.rope_base)

    low = max(math.floor(pair(c.rope_fast)), 0)
    high = min(math.ceil(pair(c.rope_slow)), c.head_dim - 1)
    keep = (high - jnp.arange(half, dtype=jnp.float32)) / max(high - low, 1e-3)
  keep = jnp.clip(keep, 0.0, 1.0)
  return keep * frequency + (1.0 - keep) * stretched


def rope_turns(
  positions: jax.Array, frequency: jax.Array, magnitude: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Sine and cosine of each pair's angle at int positions [..., T].

  `magnitude` is a factor on both. Returns two float32 [..., T, 1, H/2], the
  same for every head and layer.
  """
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  return jnp.sin(angle) * magnitude, jnp.cos(angle) * magnitude


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Rotary position embedding of [..., T, heads, H], half-split pairs.

  `sin` and `cos` come from `rope_turns`. Computed in float32; the result has
  the dtype of `x`.
  """
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  return rotated.astype(x.dtype)


def find_memory(
  prompt_PxT: jax.Array, length_P: jax.Array, base: int, size: int
) -> jax.Array:
  """The places of the memory tokens: bool [P, T], False in the padding.

  Their ids are `base` to `base + size - 1`; prompts are right-padded.
  """
  is_memory = (prompt_PxT >= base) & (prompt_PxT < base + size)
  return is_memory & masking.length_mask(length_P, prompt_PxT.shape[-1])


def readable_keys(memory_PxT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The causal mask, in which memory tokens hide the history from later tokens.

  With seen[t] = a memory token stands at t or before, and behind[t] = seen[t]
  and t is none itself, a query t reads a key s where s <= t and (seen[s] or not
  behind[t]). A completion stands behind the whole prompt: it reads s where
  seen[s], or anywhere in a prompt without memory tokens.

  Returns the keys that each query of the prompt reads, bool [P, T, T], and the
  keys that a completion reads, bool [P, T].
  """
  seen = jnp.cumsum(memory_PxT, axis=-1) > 0
  behind = seen & ~memory_PxT
  time = jnp.arange(memory_PxT.shape[-1])
  within = seen[:, None, :] | ~behind[:, :, None]
  return within & (time[:, None] >= time), seen | ~seen[:, -1:]


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
    prefix_mask_PxR: bool, True where a prefix key may be read.

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


def _param(
  self: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  init: nn.initializers.Initializer,
) -> Any:
  return self.param(name, nn.with_logical_partitioning(init, axes), shape)


class RMSNorm(nn.Module):
  """Root-mean-square normalization over the last axis, in float32."""

  eps: float
  axis: str = 'embed'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes [..., D]; the result has the dtype of `x`."""
    ones = nn.initializers.ones
    scale = _param(self, 'scale', (x.shape[-1],), (self.axis,), ones)
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * scale).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query attention; returns its output and the keys and values."""

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    prefix: KeyValues | None,
    prefix_mask: jax.Array | None,
    cache: KeyValues | None,
    index: jax.Array | int,
  ) -> tuple[jax.Array, KeyValues]:
    """See `Transformer`; prefix, cache: one layer's; turn: `rope_turns`."""
    c = self.config
    init = nn.initializers.variance_scaling(
      1.0, 'fan_in', 'normal', in_axis=0, out_axis=(1, 2)
    )

    def project(name: str, heads: int, axis: str) -> jax.Array:
      shape = (c.d_model, heads, c.head_dim)
      w = _param(self, name, shape, ('embed', axis, 'head_dim'), init)
      return jnp.einsum('pgtd,dnh->pgtnh', x, w.astype(x.dtype))

    q = project('query', c.num_heads, 'heads')
    k = project('key', c.num_kv_heads, 'kv_heads')
    v = project('value', c.num_kv_heads, 'kv_heads')
    if c.qk_norm:
      q = RMSNorm(c.norm_eps, 'head_dim', name='query_norm')(q)
      k = RMSNorm(c.norm_eps, 'head_dim', name='key_norm')(k)
    q, k = rotate(q, *turn), rotate(k, *turn)
    if cache is not None:
      write = jax.lax.dynamic_update_slice_in_dim
      k = write(cache.k, k.astype(cache.k.dtype), index, axis=2)
      v = write(cache.v, v.astype(cache.v.dtype), index, axis=2)
    shared = None if prefix is None else (prefix.k, prefix.v)
    out = attend(q, (k, v), mask, shared, prefix_mask)
    out_init = nn.initializers.variance_scaling(
      _BRANCH_SCALE**2, 'fan_in', 'normal', in_axis=(0, 1), out_axis=2
    )
    shape = (c.num_heads, c.head_dim, c.d_model)
    w = _param(self, 'out', shape, ('heads', 'head_dim', 'embed'), out_init)
    out = jnp.einsum('pgtnh,nhd->pgtd', out, w.astype(x.dtype))
    return out, KeyValues(k=k, v=v)


class Block(nn.Module):
  """One pre-norm decoder layer, with the signature that `nn.scan` requires."""

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    prefix: KeyValues | None,
    cache: KeyValues | None,
    turn: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    prefix_mask: jax.Array | None,
    index: jax.Array | int,
  ) -> tuple[jax.Array, KeyValues]:
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
    init = nn.initializers.variance_scaling(
      _BRANCH_SCALE**2, 'fan_in', 'truncated_normal'
    )
    out = _param(self, 'down', (c.d_ff, c.d_model), down, init)
    gate, value, out = (w.astype(x.dtype) for w in (gate, value, out))
    x = x + (nn.silu(y @ gate) * (y @ value)) @ out
    axes = ('batch', 'group', 'time', 'embed')
    return nn.with_logical_constraint(x, axes), kv


class Transformer(nn.Module):
  """The decoder: token ids in, normalized hidden states and keys/values out.

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
      mask_PxGxTxS: bool, the own keys that each query reads (S = T, or the
        cache's length).
      prefix: the group's encoded prompt; every query reads all of it.
      cache: own keys and values so far; this call writes at `index`.
      index: int32 scalar, the place of the first of these tokens in the cache.

    Returns:
      Hidden states float [P, G, T, D] after the last norm, and the own keys
      and values [L, P, G, S, K, H] (the updated cache where one was given).
    """
    c = self.config
    shape, axes = (c.vocab_size, c.d_model), ('vocab', 'embed')
    init = nn.initializers.normal(c.d_model**-0.5)
    embedding = _param(self, 'embedding', shape, axes, init)
    if not c.tie_embeddings:
      _param(self, 'unembedding', shape, axes, init)
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
      rope_turns(positions_PxGxT, rope_frequencies(c), c.rope_magnitude),
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
  """The rows by which hidden states are multiplied: float [V, D]."""
  return params.get('unembedding', params['embedding'])


def encode_prompt(
  config: TransformerConfig,
  params: Any,
  prompt_PxTp: jax.Array,
  length_P: jax.Array,
  memory: Prefix | None = None,
) -> tuple[jax.Array, Prefix]:
  """Encodes right-padded prompts once for all their rollouts.

  Tokens behind memory tokens, completions included, read nothing before them
  (`readable_keys`). So a prompt may also be encoded in two pieces: up to its
  memory tokens by `encode_memory`, and the rest here.

  Args:
    config: the decoder's.
    params: unboxed.
    prompt_PxTp: int32 ids, padding after `length_P`.
    length_P: int32, at least 1.
    memory: from `encode_memory`, where `prompt_PxTp` is the rest of a prompt
      behind it. All of it is read, and positions continue from there.

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
    memory_PxTp = find_memory(
      prompt_PxTp, length_P, config.memory_base, config.num_memory
    )
    within, after = readable_keys(memory_PxTp)
    mask, kept = within[:, None], kept & after
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
  """Encodes prompts that end in their memory tokens, and keeps only these.

  The result is the keys and values of M tokens in every layer. They depend only
  on the prompt up to there, and may be cached for any rest of a prompt, see
  `encode_prompt`. The last M ids before the padding are all the memory tokens
  of `prompt_PxT`. Returns a prefix of R = M keys, whose length counts the whole
  of `prompt_PxT`. Raises ValueError where the vocabulary has fewer memory
  tokens.
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
  """Hidden states that predict each completion token: float [P, G, Tc, D].

  The first is the prompt's last one, shared by the group; the others come from
  the completion shifted by one. Exact: equal to running prompt + completion
  as one sequence, at the cost of encoding the prompt once per group.

  `segments_PxGxTc` is for packed rows: adjacent equal numbers are one document.
  Each document follows the prompt, at the positions it would have alone, and
  reads no other.
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
    segment, following = segments_PxGxTc[..., :-1], segments_PxGxTc[..., 1:]
    mask &= segment[..., :, None] == segment[..., None, :]
    # The first token of a document, after the last one of another.
    opens = segment[..., 1:] != segment[..., :-1]
    opens = jnp.pad(opens, [(0, 0), (0, 0), (1, 0)])
    since -= jax.lax.cummax(jnp.where(opens, time, 0), axis=2)
  rest, _ = Transformer(config).apply(
    {'params': params},
    completion_PxGxTc[..., :-1],
    prefix.length[:, None, None] + since,
    mask,
    prefix,
  )
  if segments_PxGxTc is not None:
    rest = jnp.where((segment == following)[..., None], rest, first)
  return jnp.concatenate([first, rest], axis=2)


def slot_scores(
  params: Any, prompt_hidden_PxTpxD: jax.Array, slots_PxK: jax.Array
) -> jax.Array:
  """The listwise read-out: one float32 score per candidate, at its slot token.

  `slots_PxK` is the place of each candidate's slot token in the encoded prompt
  (in its rest, where that was encoded behind a memory).
  """
  at_slots = jnp.take_along_axis(
    prompt_hidden_PxTpxD, slots_PxK[..., None], axis=1
  )
  return at_slots.astype(jnp.float32) @ params['readout']
