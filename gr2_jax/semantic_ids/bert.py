"""A BERT sentence encoder: mean-pooled hidden states of unit length.

Post-norm layers, learned positions and exact GELU (Devlin et al., arXiv
1810.04805), pooled as in sentence-transformers (Reimers and Gurevych, arXiv
1908.10084). Weights come from the folder of such a model, for example MiniLM.

Axis letters: B texts, T time, D model width, N heads, H head width.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.hf import config as hf_config

WEIGHTS = 'model.safetensors'


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Shape of the encoder; hashable, so it can be static in jit."""

  vocab_size: int
  d_model: int
  num_layers: int
  num_heads: int
  d_ff: int
  max_positions: int  # rows of the table of positions
  max_tokens: int  # of a text; later tokens are cut off
  norm_eps: float = 1e-12


class Layer(nn.Module):
  """Attention and MLP, each normalized after the residual."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array):
    """One layer, in the form that `nn.scan` requires."""
    c, x = self.config, x_BxTxD
    heads = (c.num_heads, c.d_model // c.num_heads)
    q, k, v = (
      nn.DenseGeneral(heads, name=name)(x) for name in ('query', 'key', 'value')
    )
    scores = jnp.einsum('btnh,bsnh->bnts', q * heads[1] ** -0.5, k)
    floor = jnp.finfo(scores.dtype).min
    weights = jax.nn.softmax(
      jnp.where(mask_BxT[:, None, None], scores, floor), axis=-1
    )
    y = jnp.einsum('bnts,bsnh->btnh', weights, v)
    y = nn.DenseGeneral(c.d_model, axis=(-2, -1), name='out')(y)
    x = _norm(c, 'attention_norm')(x + y)
    y = nn.gelu(nn.Dense(c.d_ff, name='up')(x), approximate=False)
    y = nn.Dense(c.d_model, name='down')(y)
    return _norm(c, 'mlp_norm')(x + y), None


class Bert(nn.Module):
  """The encoder."""

  config: BertConfig

  @nn.compact
  def __call__(self, tokens_BxT: jax.Array, length_B: jax.Array) -> jax.Array:
    """One unit vector per text, float32 [B, D]; padding has no effect.

    Args:
      tokens_BxT: int32 ids with special tokens, padding at the end.
      length_B: int32, tokens without padding, at least 1.
    """
    c = self.config
    T = tokens_BxT.shape[1]
    mask = jnp.arange(T) < length_B[:, None]
    x = nn.Embed(c.vocab_size, c.d_model, name='words')(tokens_BxT)
    x += nn.Embed(c.max_positions, c.d_model, name='positions')(jnp.arange(T))
    x = _norm(c, 'embedding_norm')(x)
    x, _ = nn.scan(
      Layer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=c.num_layers,
    )(c, name='layers')(x, mask)
    return pool(x, length_B)


def pool(hidden_BxTxD: jax.Array, length_B: jax.Array) -> jax.Array:
  """Mean over a text's first `length_B` tokens, scaled to unit length.

  float32 [B, D]; zeros where a text has no token.
  """
  x = hidden_BxTxD.astype(jnp.float32)
  mask = jnp.arange(x.shape[1]) < length_B[:, None]
  total = jnp.where(mask[..., None], x, 0.0).sum(axis=1)
  mean = total / jnp.maximum(length_B, 1)[:, None]
  norm = jnp.linalg.norm(mean, axis=-1, keepdims=True)
  return mean / jnp.maximum(norm, 1e-12)


def _norm(config: BertConfig, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(config.norm_eps, use_fast_variance=False, name=name)


# Parameter -> tensor and its einops pattern; '{}' is the layer. Positions have
# the embedding of token type 0, the only type, added.
_EMBEDDINGS = {
  'words.embedding': ('embeddings.word_embeddings.weight', 'v d -> v d'),
  'positions.embedding': (
    'embeddings.position_embeddings.weight',
    'p d -> p d',
  ),
  'embedding_norm.scale': ('embeddings.LayerNorm.weight', 'd -> d'),
  'embedding_norm.bias': ('embeddings.LayerNorm.bias', 'd -> d'),
}
_TYPES = 'embeddings.token_type_embeddings.weight'
_SELF = 'encoder.layer.{}.attention.self'
_OUT = 'encoder.layer.{}.attention.output'
_UP = 'encoder.layer.{}.intermediate.dense'
_DOWN = 'encoder.layer.{}.output'
_LAYERS = {
  **{
    f'layers.{name}.{kind}': (f'{_SELF}.{name}.{theirs}', form)
    for name in ('query', 'key', 'value')
    for kind, theirs, form in (
      ('kernel', 'weight', '(n h) d -> d n h'),
      ('bias', 'bias', '(n h) -> n h'),
    )
  },
  'layers.out.kernel': (f'{_OUT}.dense.weight', 'd (n h) -> n h d'),
  'layers.out.bias': (f'{_OUT}.dense.bias', 'd -> d'),
  'layers.attention_norm.scale': (f'{_OUT}.LayerNorm.weight', 'd -> d'),
  'layers.attention_norm.bias': (f'{_OUT}.LayerNorm.bias', 'd -> d'),
  'layers.up.kernel': (f'{_UP}.weight', 'f d -> d f'),
  'layers.up.bias': (f'{_UP}.bias', 'f -> f'),
  'layers.down.kernel': (f'{_DOWN}.dense.weight', 'd f -> f d'),
  'layers.down.bias': (f'{_DOWN}.dense.bias', 'd -> d'),
  'layers.mlp_norm.scale': (f'{_DOWN}.LayerNorm.weight', 'd -> d'),
  'layers.mlp_norm.bias': (f'{_DOWN}.LayerNorm.bias', 'd -> d'),
}
# Field of config.json -> its required value, where the field is present.
_ONLY = {
  'model_type': 'bert',
  'hidden_act': 'gelu',
  'position_embedding_type': 'absolute',
}


def read_config(folder: pathlib.Path) -> BertConfig:
  """Reads config.json, and the longest text in sentence_bert_config.json.

  Raises:
    FileNotFoundError: config.json is missing.
    ValueError: a file is damaged, or the model or its pooling is of another
      kind.
  """
  file = folder / 'config.json'
  content = hf_config.read_json(file)
  for name, value in _ONLY.items():
    if content.get(name, value) != value:
      raise ValueError(
        f'{file}: {name} is {content[name]!r}, which this encoder does not '
        f'support; known: {value!r}'
      )
  pooling = folder / '1_Pooling' / 'config.json'
  if pooling.is_file():
    modes = hf_config.read_json(pooling)
    used = {k for k, v in modes.items() if k.startswith('pooling_mode_') and v}
    if not used <= {'pooling_mode_mean_tokens'}:
      raise ValueError(
        f'{pooling}: pools by {", ".join(sorted(used))}; known: '
        'pooling_mode_mean_tokens'
      )
  names = {
    'vocab_size': 'vocab_size',
    'd_model': 'hidden_size',
    'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads',
    'd_ff': 'intermediate_size',
    'max_positions': 'max_position_embeddings',
  }
  for name in names.values():
    if not isinstance(content.get(name), int):
      raise ValueError(f'{file}: {name} is {content.get(name)!r}, not a number')
  if content['hidden_size'] % content['num_attention_heads']:
    raise ValueError(
      f'{file}: num_attention_heads is {content["num_attention_heads"]}, which '
      f'does not divide hidden_size {content["hidden_size"]}'
    )
  longest = content['max_position_embeddings']
  sentence = folder / 'sentence_bert_config.json'
  if sentence.is_file():
    longest = min(
      hf_config.read_json(sentence).get('max_seq_length') or longest, longest
    )
  return BertConfig(
    **{field: content[name] for field, name in names.items()},
    max_tokens=longest,
    norm_eps=content.get('layer_norm_eps', 1e-12),
  )


def load_params(folder: pathlib.Path, config: BertConfig) -> Any:
  """Reads the float32 parameters of `Bert` from model.safetensors.

  Raises:
    FileNotFoundError: the file is missing.
    ModuleNotFoundError: safetensors, of the extra `hf`, is not installed.
    ValueError: it is damaged, or a tensor is missing or of another shape.
  """
  try:
    from safetensors import SafetensorError, numpy
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
      f"{folder}: reading it needs {e.name}: pip install 'gr2_jax[hf]'",
      name=e.name,
    ) from e
  file = folder / WEIGHTS
  if not file.is_file():
    raise FileNotFoundError(f'{file}: missing')
  try:
    tensors = numpy.load_file(file)
  except SafetensorError as e:
    raise ValueError(
      f'{file}: not a whole safetensors file ({e}); fetch it again'
    ) from e
  lengths = {'n': config.num_heads, 'h': config.d_model // config.num_heads}
  wanted = jax.eval_shape(
    Bert(config).init,
    jax.random.key(0),
    jnp.zeros((1, 2), jnp.int32),
    jnp.ones(1, jnp.int32),
  )['params']
  types = _tensor(file, tensors, _TYPES)[0]

  def read(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    name = '.'.join(entry.key for entry in path)
    tensor, form = (_EMBEDDINGS | _LAYERS)[name]
    axes = {a: lengths[a] for a in ('n', 'h') if a in form}
    parts = [
      einops.rearrange(_tensor(file, tensors, tensor.format(i)), form, **axes)
      for i in range(config.num_layers if '{}' in tensor else 1)
    ]
    value = np.stack(parts) if '{}' in tensor else parts[0]
    if value.shape != leaf.shape:
      raise ValueError(
        f'{file}: tensor {tensor} gives {name} {value.shape}, but config.json '
        f'requires {leaf.shape}'
      )
    return value + types if name == 'positions.embedding' else value

  return jax.tree_util.tree_map_with_path(read, wanted)


def _tensor(
  file: pathlib.Path, tensors: Mapping[str, np.ndarray], name: str
) -> np.ndarray:
  if name not in tensors:
    raise ValueError(
      f'{file}: tensor {name} is not in it; the folder of a sentence encoder '
      'has a BertModel at its root'
    )
  return np.asarray(tensors[name], np.float32)
