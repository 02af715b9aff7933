"""A chat model of a few thousand parameters, as Hugging Face writes one."""

import tokenizers

from gr2_jax import hf
from gr2_jax.models import transformer

from . import tiny, tiny_data

SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
THINK = ('<think>', '</think>')
SPARE = 5  # rows of the embedding that no token has

# Turns in ChatML, every one like the others.
CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{{- '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# One that may be asked not to reason, and looks back through the turns.
THINKING = """\
{%- set seen = namespace(last=0) %}
{%- if messages[0].role == 'system' %}
  {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages[::-1] %}
  {%- if message.role == 'user' and not tools %}
    {%- set seen.last = messages|length - loop.index0 - 1 %}
    {%- break %}
  {%- endif %}
{%- endfor %}
{%- for message in messages[seen.last:] %}
  {%- if message.content is not string %}
    {{- raise_exception('text only') }}
  {%- endif %}
  {{- '<|im_start|>' + message.role + '\\n' + message.content.strip() }}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
  {%- endif %}
{%- endif %}
"""


def tokenizer(thinks: bool) -> tokenizers.Tokenizer:
  """Byte-level BPE of a catalog's titles."""
  found = tokenizers.Tokenizer(tokenizers.models.BPE())
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  found.pre_tokenizer = byte_level
  found.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=340,
    special_tokens=list(SPECIAL),
    initial_alphabet=byte_level.alphabet(),
    show_progress=False,
  )
  found.train_from_iterator(
    [*tiny_data.catalog().titles, 'system user assistant', 'likes and as so'],
    trainer,
  )
  if thinks:
    found.add_tokens(
      [tokenizers.AddedToken(t, normalized=False) for t in THINK]
    )
  return found


def write(directory, family: str, **changes) -> transformer.TransformerConfig:
  """A checkpoint with random weights: qwen3 reasons, llama does not."""
  thinks = family == 'qwen3'
  words = tokenizer(thinks)
  fields = dict(
    vocab_size=words.get_vocab_size() + SPARE,
    d_model=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    qk_norm=thinks,
  )
  model = transformer.TransformerConfig(**(fields | changes))
  hf.export(
    directory,
    family,
    tiny.params(model),
    model,
    words.to_str(),
    THINKING if thinks else CHATML,
    bos_token=None if thinks else '<|im_start|>',
    eos_token='<|im_end|>',
    pad_token='<|im_end|>',
  )
  return model
