"""The place of each parameter in a checkpoint, by family and format.

A parameter's entry is the tensor's name ({}: the layer) and an einops form
from the tensor's axes to ours, which imports and, read backwards, exports.
Axes of the forms: v vocabulary, d width, n query heads, k key-value heads,
h head width, f feed-forward width; (j two) and (two j): the halves of a head,
interleaved and side by side.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import einops
import numpy as np

from gr2_jax.models import transformer

Leaves = Mapping[str, tuple[str, str]]

# Parameter (keys joined by dots), tensor in safetensors and in GGUF, form.
_TOP = (
  ('embedding', 'model.embed_tokens', 'token_embd', 'v d -> v d'),
  ('unembedding', 'lm_head', 'output', 'v d -> v d'),
  ('final_norm.scale', 'model.norm', 'output_norm', 'd -> d'),
)
_LAYER = (
  ('attention_norm.scale', 'input_layernorm', 'attn_norm', 'd -> d'),
  ('attention.query', 'self_attn.q_proj', 'attn_q', '(n h) d -> d n h'),
  ('attention.key', 'self_attn.k_proj', 'attn_k', '(k h) d -> d k h'),
  ('attention.value', 'self_attn.v_proj', 'attn_v', '(k h) d -> d k h'),
  ('attention.out', 'self_attn.o_proj', 'attn_output', 'd (n h) -> n h d'),
  ('mlp_norm.scale', 'post_attention_layernorm', 'ffn_norm', 'd -> d'),
  ('gate', 'mlp.gate_proj', 'ffn_gate', 'f d -> d f'),
  ('up', 'mlp.up_proj', 'ffn_up', 'f d -> d f'),
  ('down', 'mlp.down_proj', 'ffn_down', 'd f -> f d'),
)
_QK_NORM = (
  ('attention.query_norm.scale', 'self_attn.q_norm', 'attn_q_norm', 'h -> h'),
  ('attention.key_norm.scale', 'self_attn.k_norm', 'attn_k_norm', 'h -> h'),
)


# In GGUF files of Llama, rotary positions turn neighbors, so the rows of a
# query's or key's head are interleaved.
_TURNED = {
  'layers.attention.query': '(n j two) d -> d n (two j)',
  'layers.attention.key': '(k j two) d -> d k (two j)',
}


def _tables(
  layer: Sequence[tuple[str, str, str, str]], gguf_forms: Mapping[str, str]
) -> tuple[Leaves, Leaves]:
  """Leaves in safetensors and in GGUF of a family with these in each layer."""
  rows = _TOP + tuple(
    (f'layers.{name}', f'model.layers.{{}}.{tensor}', f'blk.{{}}.{gguf}', form)
    for name, tensor, gguf, form in layer
  )
  return (
    {name: (f'{tensor}.weight', form) for name, tensor, _, form in rows},
    {
      name: (f'{gguf}.weight', gguf_forms.get(name, form))
      for name, _, gguf, form in rows
    },
  )


# Family -> its leaves in safetensors and in GGUF.
LEAVES = {
  'llama': _tables(_LAYER, _TURNED),
  'qwen3': _tables(_LAYER + _QK_NORM, {}),
}


def sizes(model: transformer.TransformerConfig) -> dict[str, int]:
  """The length of every axis of the forms."""
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
  tensor, part = (
    tuple(math.prod(lengths[a] for a in axes) for axes in side)
    for side in _parse(form)
  )
  return tensor, part


def read(
  tensor: Callable[[tuple[slice, ...]], np.ndarray],
  form: str,
  lengths: Mapping[str, int],
  index: tuple[slice, ...],
) -> np.ndarray:
  """Reads a block of a parameter, from no more of the tensor than it needs.

  `tensor` reads a block of the tensor; `lengths` come from `sizes`; `index` is
  the block, with bounds, in the parameter's axes.
  """
  tensor_axes, part_axes = _parse(form)
  outer = {axes[0] for axes in tensor_axes}
  cut = {
    axes[0]: s
    for axes, s in zip(part_axes, index, strict=True)
    if len(axes) == 1 and axes[0] in outer
  }
  block = []
  for axes in tensor_axes:
    inner = math.prod(lengths[a] for a in axes[1:])
    s = cut.get(axes[0], slice(0, lengths[axes[0]]))
    block.append(slice(s.start * inner, s.stop * inner))
  inner = {a: lengths[a] for axes in tensor_axes for a in axes[1:]}
  part = einops.rearrange(tensor(tuple(block)), form, **inner)
  rest = (
    slice(None) if axes[0] in cut else s
    for axes, s in zip(part_axes, index, strict=True)
  )
  return part[tuple(rest)]


def write(part: np.ndarray, form: str) -> np.ndarray:
  """A tensor, from its part of a parameter: the form read backwards."""
  return einops.rearrange(part, ' -> '.join(form.split(' -> ')[::-1]))


def _parse(form: str) -> tuple[list[list[str]], list[list[str]]]:
  """'(n h) d -> d n h' as [[n, h], [d]] and [[d], [n], [h]]."""
  tensor, part = (
    [axis.strip('()').split() for axis in re.findall(r'\([^)]*\)|\S+', side)]
    for side in form.split(' -> ')
  )
  return tensor, part
