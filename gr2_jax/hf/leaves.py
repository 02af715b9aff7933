"""Where each parameter lies in a checkpoint, one table a family and format.

A parameter's entry is the tensor's name ({}: the layer) and an einops form
from the tensor's axes to ours, which imports and, read backwards, exports.
Axes of the forms: v vocabulary, d width, n query heads, k key-value heads,
h head width, f feed-forward width; (j two) and (two j): the halves of a head,
interleaved and side by side.
"""

import math
import re
from collections.abc import Callable, Mapping

import einops
import numpy as np

from gr2_jax.models import transformer

Leaves = Mapping[str, tuple[str, str]]

_QUERY, _KEY, _OUT = '(n h) d -> d n h', '(k h) d -> d k h', 'd (n h) -> n h d'

# Parameter (keys joined by dots) -> tensor ({}: the layer) and form.
_LLAMA: Leaves = {
  'embedding': ('model.embed_tokens.weight', 'v d -> v d'),
  'unembedding': ('lm_head.weight', 'v d -> v d'),
  'final_norm.scale': ('model.norm.weight', 'd -> d'),
  'layers.attention_norm.scale': (
    'model.layers.{}.input_layernorm.weight',
    'd -> d',
  ),
  'layers.attention.query': (
    'model.layers.{}.self_attn.q_proj.weight',
    _QUERY,
  ),
  'layers.attention.key': (
    'model.layers.{}.self_attn.k_proj.weight',
    _KEY,
  ),
  'layers.attention.value': (
    'model.layers.{}.self_attn.v_proj.weight',
    _KEY,
  ),
  'layers.attention.out': (
    'model.layers.{}.self_attn.o_proj.weight',
    _OUT,
  ),
  'layers.mlp_norm.scale': (
    'model.layers.{}.post_attention_layernorm.weight',
    'd -> d',
  ),
  'layers.gate': ('model.layers.{}.mlp.gate_proj.weight', 'f d -> d f'),
  'layers.up': ('model.layers.{}.mlp.up_proj.weight', 'f d -> d f'),
  'layers.down': ('model.layers.{}.mlp.down_proj.weight', 'd f -> f d'),
}
_QWEN3: Leaves = {
  **_LLAMA,
  'layers.attention.query_norm.scale': (
    'model.layers.{}.self_attn.q_norm.weight',
    'h -> h',
  ),
  'layers.attention.key_norm.scale': (
    'model.layers.{}.self_attn.k_norm.weight',
    'h -> h',
  ),
}
# In this family's GGUF files rotary positions turn neighbours, so the rows of
# a query's or key's head are interleaved.
_QUERY_TURNED = '(n j two) d -> d n (two j)'
_KEY_TURNED = '(k j two) d -> d k (two j)'
_GGUF_LLAMA: Leaves = {
  'embedding': ('token_embd.weight', 'v d -> v d'),
  'unembedding': ('output.weight', 'v d -> v d'),
  'final_norm.scale': ('output_norm.weight', 'd -> d'),
  'layers.attention_norm.scale': ('blk.{}.attn_norm.weight', 'd -> d'),
  'layers.attention.query': ('blk.{}.attn_q.weight', _QUERY_TURNED),
  'layers.attention.key': ('blk.{}.attn_k.weight', _KEY_TURNED),
  'layers.attention.value': ('blk.{}.attn_v.weight', _KEY),
  'layers.attention.out': ('blk.{}.attn_output.weight', _OUT),
  'layers.mlp_norm.scale': ('blk.{}.ffn_norm.weight', 'd -> d'),
  'layers.gate': ('blk.{}.ffn_gate.weight', 'f d -> d f'),
  'layers.up': ('blk.{}.ffn_up.weight', 'f d -> d f'),
  'layers.down': ('blk.{}.ffn_down.weight', 'd f -> f d'),
}
_GGUF_QWEN3: Leaves = {
  **_GGUF_LLAMA,
  'layers.attention.query': ('blk.{}.attn_q.weight', _QUERY),
  'layers.attention.key': ('blk.{}.attn_k.weight', _KEY),
  'layers.attention.query_norm.scale': ('blk.{}.attn_q_norm.weight', 'h -> h'),
  'layers.attention.key_norm.scale': ('blk.{}.attn_k_norm.weight', 'h -> h'),
}

# Family -> its leaves in safetensors and in GGUF.
LEAVES: dict[str, tuple[Leaves, Leaves]] = {
  'llama': (_LLAMA, _GGUF_LLAMA),
  'qwen3': (_QWEN3, _GGUF_QWEN3),
}


def sizes(model: transformer.TransformerConfig) -> dict[str, int]:
  """The length of every axis that forms name."""
  return {
    'v': model.vocab_size,
    'd': model.d_model,
    'n': model.num_heads,
    'k': model.num_kv_heads,
    'h': model.head_dim,
    'j': model.head_dim // 2,
    'two': 2,
    'f': model.d_ff,
  }


def shapes(
  form: str, lengths: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The shape of a tensor, and of the part of a parameter that it becomes."""
  theirs, ours = (
    tuple(math.prod(lengths[a] for a in axes) for axes in side)
    for side in _parse(form)
  )
  return theirs, ours


def read(
  tensor: Callable[[tuple[slice, ...]], np.ndarray],
  form: str,
  lengths: Mapping[str, int],
  index: tuple[slice, ...],
) -> np.ndarray:
  """A block of a parameter, from no more of the tensor than it needs.

  Args:
    tensor: reads a block of the tensor.
    form: from the tensor's axes to the parameter's.
    lengths: of `sizes`.
    index: the block, with bounds, in the parameter's axes.

  Returns:
    The block, in the parameter's axes.
  """
  theirs, ours = _parse(form)
  outer = {axes[0] for axes in theirs}
  cut = {
    axes[0]: s
    for axes, s in zip(ours, index, strict=True)
    if len(axes) == 1 and axes[0] in outer
  }
  wanted = []
  for axes in theirs:
    inner = math.prod(lengths[a] for a in axes[1:])
    s = cut.get(axes[0], slice(0, lengths[axes[0]]))
    wanted.append(slice(s.start * inner, s.stop * inner))
  inner = {a: lengths[a] for axes in theirs for a in axes[1:]}
  block = einops.rearrange(tensor(tuple(wanted)), form, **inner)
  rest = (
    slice(None) if axes[0] in cut else s
    for axes, s in zip(ours, index, strict=True)
  )
  return block[tuple(rest)]


def write(part: np.ndarray, form: str) -> np.ndarray:
  """A tensor, from its part of a parameter: the form read backwards."""
  theirs, ours = form.split(' -> ')
  return einops.rearrange(part, f'{ours} -> {theirs}')


def _parse(form: str) -> tuple[list[list[str]], list[list[str]]]:
  """'(n h) d -> d n h' as [[n, h], [d]] and [[d], [n], [h]]."""
  theirs, ours = (
    [part.strip('()').split() for part in re.findall(r'\([^)]*\)|\S+', side)]
    for side in form.split(' -> ')
  )
  return theirs, ours
