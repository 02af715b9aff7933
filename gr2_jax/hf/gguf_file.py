"""A GGUF file: metadata, tensors dequantized in part, and the tokenizer.

The file holds a byte-level BPE tokenizer as lists, and only the name of its
pre-tokenizer (`tokenizer.ggml.pre`); a table here defines those.
"""

import json
import pathlib
from typing import Any

import gguf
import numpy as np

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r'[^\r\n\p{L}\p{N}]?\p{L}+'
_REST = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
_GPT2 = _BYTES | {'use_regex': True}


def _split(digits: str) -> list[dict[str, Any]]:
  """Splits text by a pattern, then maps bytes to characters."""
  pattern = '|'.join((_CONTRACTIONS, _WORDS, digits, _REST))
  split = {
    'type': 'Split',
    'pattern': {'Regex': pattern},
    'behavior': 'Isolated',
    'invert': False,
  }
  return [split, _BYTES | {'use_regex': False}]


# `tokenizer.ggml.pre` -> the tokenizer's parts that depend on it.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
  'gpt-2': {'pre': [_GPT2]},
  'smollm': {'pre': [{'type': 'Digits', 'individual_digits': True}, _GPT2]},
  'qwen2': {'pre': _split(r'\p{N}'), 'normalizer': {'type': 'NFC'}},
  'llama-bpe': {'pre': _split(r'\p{N}{1,3}'), 'ignore_merges': True},
}

# Values of `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4


class GgufFile:
  """Metadata and tensors of one file; tensors are read on demand.

  Raises ValueError where the file is truncated, or no GGUF file.
  """

  def __init__(self, path: pathlib.Path):
    if not path.is_file():
      raise FileNotFoundError(f'{path}: no such file')
    self.path = path
    try:
      self._reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as e:
      raise ValueError(
        f'{path}: not a whole GGUF file ({e}); fetch it again'
      ) from e
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
    self.shapes = {
      name: tuple(int(n) for n in reversed(tensor.shape))
      for name, tensor in self._tensors.items()
    }

  def get(self, key: str, default: Any = None) -> Any:
    """Metadata as Python values, or `default`."""
    field = self._reader.get_field(key)
    return default if field is None else field.contents()

  def require(self, key: str) -> Any:
    """Metadata as Python values; raises ValueError where it is missing."""
    value = self.get(key)
    if value is None:
      raise ValueError(f'{self.path}: has no metadata {key}')
    return value

  def file(self, name: str) -> pathlib.Path:
    """The file that holds a tensor: this one."""
    del name
    return self.path

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A block of a tensor, float32; only its rows are dequantized."""
    tensor = self._tensors[name]
    if len(self.shapes[name]) == 1:
      rows, rest = slice(None), index
    else:
      rows, rest = index[0], (slice(None), *index[1:])
    block = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
    return block[rest].astype(np.float32, copy=False)

  def token(self, role: str) -> str | None:
    """The special token of a role (bos, eos, padding), or None."""
    ident = self.get(f'tokenizer.ggml.{role}_token_id')
    return None if ident is None else self._tokens()[ident]

  def tokenizer_json(self) -> str:
    """The tokenizer in the serialization of the `tokenizers` package.

    Text is split and merged as by the original tokenizer. Control tokens are
    special, user-defined ones are added tokens. No token is put around a text.
    Raises ValueError where the model is no byte-level BPE, or its pre-tokenizer
    is unknown.
    """
    kind = self.require('tokenizer.ggml.model')
    if kind != 'gpt2':
      raise ValueError(
        f'{self.path}: tokenizer.ggml.model is {kind!r}; known: gpt2 '
        '(byte-level BPE)'
      )
    pre = self.get('tokenizer.ggml.pre', 'gpt-2')
    if pre not in PRE_TOKENIZERS:
      raise ValueError(
        f'{self.path}: tokenizer.ggml.pre is {pre!r}; known: '
        f'{", ".join(PRE_TOKENIZERS)}'
      )
    parts, tokens = PRE_TOKENIZERS[pre], self._tokens()
    plain = dict(
      single_word=False, lstrip=False, rstrip=False, normalized=False
    )
    added = [
      {'id': i, 'content': tokens[i], **plain, 'special': kind == _CONTROL}
      for i, kind in enumerate(self.require('tokenizer.ggml.token_type'))
      if kind in (_CONTROL, _USER_DEFINED)
    ]
    return json.dumps(
      {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': added,
        'normalizer': parts.get('normalizer'),
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': parts['pre']},
        'post_processor': None,
        'decoder': _GPT2,
        'model': {
          'type': 'BPE',
          'dropout': None,
          'unk_token': None,
          'continuing_subword_prefix': None,
          'end_of_word_suffix': None,
          'fuse_unk': False,
          'byte_fallback': False,
          'ignore_merges': parts.get('ignore_merges', False),
          'vocab': {token: i for i, token in enumerate(tokens)},
          'merges': self.require('tokenizer.ggml.merges'),
        },
      },
      ensure_ascii=False,
    )

  def _tokens(self) -> list[str]:
    return self.require('tokenizer.ggml.tokens')
