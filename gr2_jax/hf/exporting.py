"""Export: a folder that transformers and vLLM load, tensor by tensor."""

import contextlib
import functools
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from gr2_jax.hf import config, leaves, safetensors_files
from gr2_jax.hf.backbone import token_ids
from gr2_jax.hf.importing import READOUT, abstract_params, named_leaves
from gr2_jax.models import transformer


def export(
  directory: str | pathlib.Path,
  family: str,
  params: Any,
  model: transformer.TransformerConfig,
  tokenizer_json: str,
  chat_template: str = '',
  bos_token: str | None = None,
  eos_token: str | None = None,
  pad_token: str | None = None,
  max_positions: int = 32768,
  dtype: str = 'F32',
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a checkpoint that transformers and vLLM load; whole or not at all.

  The folder holds config.json, generation_config.json (greedy decoding),
  model.safetensors (several files above `max_shard_bytes`) and its index,
  tokenizer.json, tokenizer_config.json, and the read-out vector beside them.

  The family is a key of leaves.LEAVES ('qwen3' has QK-norm, 'llama' has not).
  `params` are unboxed, on this process's devices; the tokenizer includes the
  added symbols; `chat_template` is Jinja ('' for none); `max_positions` is in
  tokens; `dtype` is F32, BF16 or F16.

  Raises:
    FileExistsError: the folder exists and is not empty.
    ValueError: a leaf is missing or has no place in the family, or the
      tokenizer has more ids than the model has rows.
  """
  if family not in leaves.LEAVES:
    raise ValueError(
      f'family {family!r} is unknown; known: {", ".join(leaves.LEAVES)}'
    )
  directory = pathlib.Path(directory).absolute()
  ids = token_ids(tokenizer_json)
  if max(ids.values()) >= model.vocab_size:
    raise ValueError(
      f'{directory}: leaf embedding has shape ({model.vocab_size}, '
      f'{model.d_model}), but the tokenizer has {max(ids.values()) + 1} ids'
    )
  special = dict(
    zip(config.ROLES, (bos_token, eos_token, pad_token), strict=True)
  )
  special = {role: token for role, token in special.items() if token}
  tensors = _tensors(family, params, model)
  readout = np.asarray(params['readout'])
  with _whole_folder(directory) as folder:
    safetensors_files.write(folder, tensors, dtype, max_shard_bytes)
    safetensors_files.write_file(
      folder / READOUT, [('readout', readout.shape, lambda: readout)], 'F32'
    )
    (folder / 'tokenizer.json').write_text(tokenizer_json)
    config.write(
      folder, family, model, special, ids, chat_template, max_positions, dtype
    )


def _tensors(
  family: str, params: Any, model: transformer.TransformerConfig
) -> list[safetensors_files.Source]:
  """The tensors to write; checked against the family and the decoder."""
  given, expected = named_leaves(params), named_leaves(abstract_params(model))
  for name in sorted({*given, *expected}):
    if name not in given:
      raise ValueError(f'leaf {name} {expected[name].shape}: not in `params`')
    if name not in expected:
      raise ValueError(
        f'leaf {name} {given[name].shape}: the model has no such parameter'
      )
    if given[name].shape != expected[name].shape:
      raise ValueError(
        f'leaf {name} has shape {given[name].shape}, but the config requires '
        f'{expected[name].shape}'
      )
  if model.qk_norm != config.FAMILIES[family][1]:
    raise ValueError(
      f'model.qk_norm={model.qk_norm}: a {family} model has '
      f'{"it" if not model.qk_norm else "none"}'
    )
  lengths, tensors = leaves.sizes(model), []
  for name, (tensor, form) in leaves.LEAVES[family][0].items():
    if name not in given:
      continue
    shape = leaves.shapes(form, lengths)[0]
    for layer in range(model.num_layers) if '{}' in tensor else [...]:
      fetch = functools.partial(_fetch, given[name], layer, form)
      tensors.append((tensor.format(layer), shape, fetch))
  return tensors


def _fetch(leaf: Any, layer: Any, form: str) -> np.ndarray:
  """One tensor of a parameter, on the host."""
  return leaves.write(np.asarray(leaf[layer]), form)


@contextlib.contextmanager
def _whole_folder(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary sibling folder that is renamed to `directory` on success."""
  if directory.exists() and any(directory.iterdir()):
    raise FileExistsError(f'{directory}: is not empty; name another folder')
  directory.parent.mkdir(parents=True, exist_ok=True)
  partial = directory.with_name(f'.{directory.name}.{uuid.uuid4().hex[:8]}')
  partial.mkdir()
  try:
    yield partial
    partial.rename(directory)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
