"""Metadata of a checkpoint, as fields of the decoder, and back.

A checkpoint with a feature that the decoder lacks (biases, sliding windows,
experts, other activations or rotary positions) is rejected here, by the
field's name.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from gr2_jax.models import transformer

# model_type -> its class in transformers, and whether it normalizes queries and
# keys.
FAMILIES = {
  'llama': ('LlamaForCausalLM', False),
  'qwen3': ('Qwen3ForCausalLM', True),
}
ROLES = ('bos_token', 'eos_token', 'pad_token')

# Field -> the only value it may have, where it is present; None: absent.
_ONLY = {
  'attention_bias': False,
  'mlp_bias': False,
  'hidden_act': 'silu',
  'use_sliding_window': False,
  'partial_rotary_factor': 1.0,
  'num_experts': None,
  'num_local_experts': None,
  'quantization_config': None,
}
_ROPE_ONLY = {
  'partial_rotary_factor': 1.0,
  'truncate': True,
  'mscale': None,
  'mscale_all_dim': None,
}
# Kind of scaling -> the fields of the fewest and most turns that it blends.
_ROPE_TURNS = {
  'linear': ('', ''),
  'llama3': ('low_freq_factor', 'high_freq_factor'),
  'yarn': ('beta_slow', 'beta_fast'),
}
_TORCH = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; raises ValueError where the file holds none."""
  if not file.is_file():
    raise FileNotFoundError(f'{file}: missing')
  try:
    content = json.loads(file.read_text())
  except ValueError as e:
    raise ValueError(f'{file}: not JSON: {e}') from e
  if not isinstance(content, dict):
    raise ValueError(f'{file}: not a JSON object')
  return content


def fields(
  file: pathlib.Path, config: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
  """Family and decoder fields of a config.json, whose name is for messages.

  The fields are TransformerConfig's without vocab_size, dtype and remat.

  Raises:
    ValueError: an unknown architecture, a missing field, or one with a value
      that the decoder does not support.
  """
  family = config.get('model_type')
  if family not in FAMILIES:
    raise ValueError(
      f'{file}: model_type is {family!r} (architectures '
      f'{config.get("architectures")}); known: {", ".join(FAMILIES)}'
    )
  _reject(file, config, _ONLY)
  for kind in config.get('layer_types') or ():
    if kind != 'full_attention':
      raise ValueError(
        f'{file}: layer_types has {kind!r}; known: full_attention'
      )

  def need(name: str) -> int:
    if not isinstance(config.get(name), int):
      raise ValueError(f'{file}: {name} is {config.get(name)!r}, not a number')
    return config[name]

  need('vocab_size')
  d_model, heads = need('hidden_size'), need('num_attention_heads')
  width = 128 if family == 'qwen3' else d_model // heads
  return family, dict(
    d_model=d_model,
    num_layers=need('num_hidden_layers'),
    num_heads=heads,
    num_kv_heads=config.get('num_key_value_heads') or heads,
    head_dim=config.get('head_dim') or width,
    d_ff=need('intermediate_size'),
    qk_norm=FAMILIES[family][1],
    tie_embeddings=config.get('tie_word_embeddings', False),
    norm_eps=config.get('rms_norm_eps', 1e-6),
    **_rope(file, config, need('max_position_embeddings')),
  )


def _rope(
  file: pathlib.Path, config: Mapping[str, Any], max_positions: int
) -> dict[str, Any]:
  """Rotary positions, from `rope_parameters` or the older `rope_scaling`."""
  rope = {
    **(config.get('rope_scaling') or {}),
    **(config.get('rope_parameters') or {}),
  }
  base = rope.get('rope_theta', config.get('rope_theta', 10_000.0))
  kind = rope.get('rope_type', rope.get('type', 'default'))
  _reject(f'{file}: in rope_scaling,', rope, _ROPE_ONLY)
  if kind == 'default':
    return _stretch(float(base))
  if kind not in transformer.ROPE_SCALINGS:
    raise ValueError(
      f'{file}: rope_scaling has rope_type {kind!r}; known: default, '
      f'{", ".join(filter(None, transformer.ROPE_SCALINGS))}'
    )
  length = rope.get('original_max_position_embeddings') or max_positions
  factor = rope.get('factor') or max_positions / length
  slow, fast = (rope.get(name) for name in _ROPE_TURNS[kind])
  magnitude = rope.get('attention_factor') if kind == 'yarn' else 1.0
  return _stretch(float(base), kind, factor, length, slow, fast, magnitude)


def _stretch(
  base: float,
  kind: str = '',
  factor: float = 1.0,
  length: int = 0,
  slow: float | None = None,
  fast: float | None = None,
  magnitude: float | None = 1.0,
) -> dict[str, Any]:
  """The decoder's rope fields; None stands for the paper's default."""
  if magnitude is None:  # yarn, section 3.4
    magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
  return dict(
    rope_base=base,
    rope_scaling=kind,
    rope_factor=float(factor),
    rope_length=length if kind in ('llama3', 'yarn') else 0,
    rope_slow=float(slow or 1.0),
    rope_fast=float(fast or (32.0 if kind == 'yarn' else 4.0)),
    rope_magnitude=float(magnitude),
  )


def gguf_fields(file: Any) -> tuple[str, dict[str, Any]]:
  """As `fields`, from the metadata of a `gguf_file.GgufFile`."""
  family = file.require('general.architecture')
  if family not in FAMILIES:
    raise ValueError(
      f'{file.path}: general.architecture is {family!r}; known: '
      f'{", ".join(FAMILIES)}'
    )

  def need(name: str) -> Any:
    return file.require(f'{family}.{name}')

  def get(name: str, default: Any) -> Any:
    return file.get(f'{family}.{name}', default)

  d_model, heads = need('embedding_length'), need('attention.head_count')
  head_dim = get('attention.key_length', d_model // heads)
  only = {
    'attention.value_length': head_dim,
    'rope.dimension_count': head_dim,
    'attention.sliding_window': 0,
    'expert_count': 0,
  }
  _reject(file.path, {name: get(name, None) for name in only}, only)
  kind = get('rope.scaling.type', 'none')
  if kind not in ('none', 'linear', 'yarn'):
    raise ValueError(
      f'{file.path}: rope.scaling.type is {kind!r}; known: none, linear, yarn'
    )
  rope = [_decimal(get('rope.freq_base', 10_000.0))]
  if kind != 'none':
    rope += [kind, _decimal(need('rope.scaling.factor'))]
  if kind == 'yarn':
    rope += [need('rope.scaling.original_context_length'), None, None, None]
  return family, dict(
    d_model=d_model,
    num_layers=need('block_count'),
    num_heads=heads,
    num_kv_heads=get('attention.head_count_kv', heads),
    head_dim=head_dim,
    d_ff=need('feed_forward_length'),
    qk_norm=FAMILIES[family][1],
    tie_embeddings='output.weight' not in file.shapes,
    norm_eps=_decimal(need('attention.layer_norm_rms_epsilon')),
    **_stretch(*rope),
  )


def _decimal(x: float) -> float:
  """The shortest decimal number of a float32."""
  return float(f'{x:.7g}')


def _reject(
  where: Any, given: Mapping[str, Any], only: Mapping[str, Any]
) -> None:
  """Raises where a field has a value that the decoder does not support."""
  for name, value in only.items():
    if given.get(name) not in (None, value):
      known = 'absent' if value is None else value
      raise ValueError(
        f'{where}: {name} is {given[name]!r}, which this decoder does not '
        f'have; known: {known}'
      )


def special_tokens(folder: pathlib.Path) -> dict[str, str | None]:
  """The tokens of ROLES, from tokenizer_config.json; None where it has none."""
  file = folder / 'tokenizer_config.json'
  config = read_json(file) if file.is_file() else {}
  tokens = {role: config.get(role) for role in ROLES}
  return {
    role: token['content'] if isinstance(token, dict) else token
    for role, token in tokens.items()
  }


def chat_template(folder: pathlib.Path) -> str:
  """Jinja, from its own file or from tokenizer_config.json; '' for none."""
  jinja, file = folder / 'chat_template.jinja', folder / 'tokenizer_config.json'
  if jinja.is_file():
    return jinja.read_text()
  template = read_json(file).get('chat_template') if file.is_file() else None
  if isinstance(template, list):  # named templates
    template = {t['name']: t['template'] for t in template}.get('default')
  return template or ''


def write(
  folder: pathlib.Path,
  family: str,
  model: transformer.TransformerConfig,
  tokens: Mapping[str, str],
  ids: Mapping[str, int],
  template: str,
  max_positions: int,
  dtype: str,
) -> None:
  """Writes config.json, generation_config.json and tokenizer_config.json.

  `tokens` maps roles, as in ROLES, to the special tokens that exist, `ids` all
  tokens to ids. `max_positions` is in tokens; `dtype` is F32, BF16 or F16.
  """
  special_ids = {f'{role}_id': ids[token] for role, token in tokens.items()}
  config = {
    'architectures': [FAMILIES[family][0]],
    'model_type': family,
    'vocab_size': model.vocab_size,
    'hidden_size': model.d_model,
    'intermediate_size': model.d_ff,
    'num_hidden_layers': model.num_layers,
    'num_attention_heads': model.num_heads,
    'num_key_value_heads': model.num_kv_heads,
    'head_dim': model.head_dim,
    'hidden_act': 'silu',
    'attention_bias': False,
    'rms_norm_eps': model.norm_eps,
    'rope_theta': model.rope_base,
    'rope_scaling': _rope_scaling(model),
    'max_position_embeddings': max_positions,
    'tie_word_embeddings': model.tie_embeddings,
    'torch_dtype': _TORCH[dtype],
    **special_ids,
  }
  tokenizer = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': max_positions,
    'clean_up_tokenization_spaces': False,
    **tokens,
  }
  if template:
    tokenizer['chat_template'] = template
  for name, content in {
    'config.json': config,
    'generation_config.json': {'do_sample': False, **special_ids},
    'tokenizer_config.json': tokenizer,
  }.items():
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (folder / name).write_text(text + '\n')


def _rope_scaling(model: transformer.TransformerConfig) -> dict | None:
  """The inverse of `_rope`."""
  kind = model.rope_scaling
  if not kind:
    return None
  content = {'rope_type': kind, 'factor': model.rope_factor}
  if kind == 'linear':
    return content
  content['original_max_position_embeddings'] = model.rope_length
  turns = (model.rope_slow, model.rope_fast)
  content |= zip(_ROPE_TURNS[kind], turns, strict=True)
  if kind == 'yarn':
    content['attention_factor'] = model.rope_magnitude
  return content
