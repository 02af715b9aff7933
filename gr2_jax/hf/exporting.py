"""Export: a folder that transformers and vLLM load, tensor by tensor."""

import contextlib
import functools
import json
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gr2_jax.hf import config, leaves, safetensors_files
from gr2_jax.hf.backbone import token_ids
from gr2_jax.hf.importing import READOUT, abstract_params, leaf_name
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

  The folder holds config.json, generation_config.json (which does not sample),
  model.safetensors (parts above `max_shard_bytes`) and its index,
  tokenizer.json, tokenizer_config.json, and the read-out vector beside them.

  Args:
    directory: the folder to make; must not exist, or be empty.
    family: a key of leaves.LEAVES; 'qwen3' has QK-norm, 'llama' has not.
    params: unboxed parameters, arrays of this process's devices.
    model: their shape.
    tokenizer_json: with the added symbols.
    chat_template: Jinja; '' for none.
    bos_token: special tokens of the tokenizer, or None.
    eos_token: likewise.
    pad_token: likewise.
    max_positions: the longest context, in tokens.
    dtype: of the weights in the files: F32, BF16 or F16.
    max_shard_bytes: the size of a file from which on there are several.

  Raises:
    FileExistsError: the folder is there and not empty.
    ValueError: a leaf has no place in the family or lacks, or the tokenizer
      has more ids than the model has rows.
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
  special = {'bos': bos_token, 'eos': eos_token, 'pad': pad_token}
  special_ids = {
    f'{role}_token_id': ids[token] for role, token in special.items() if token
  }
  tensors = _tensors(family, params, model)
  readout = np.asarray(params['readout'])
  with _whole_folder(directory) as folder:
    safetensors_files.write(folder, tensors, dtype, max_shard_bytes)
    _index(folder, tensors)
    safetensors_files.write_file(
      folder / READOUT, [('readout', readout.shape, lambda: readout)], 'F32'
    )
    (folder / 'tokenizer.json').write_text(tokenizer_json)
    config.write(
      folder,
      family,
      model,
      {f'{role}_token': token for role, token in special.items() if token},
      special_ids,
      chat_template,
      max_positions,
      dtype,
    )


def _tensors(family, params, model) -> list[safetensors_files.Source]:
  """What to write; checked against the family and the decoder."""
  found = {
    leaf_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  wanted = {
    leaf_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      abstract_params(model)
    )
  }
  table = leaves.LEAVES[family][0]
  for name in sorted({*found, *wanted}):
    if name not in found:
      raise ValueError(f'leaf {name} {wanted[name].shape}: not in `params`')
    if name not in wanted:
      raise ValueError(
        f'leaf {name} {found[name].shape}: the model has no such parameter'
      )
    if found[name].shape != wanted[name].shape:
      raise ValueError(
        f'leaf {name} has shape {found[name].shape}, but the config asks for '
        f'{wanted[name].shape}'
      )
  if model.qk_norm != config.FAMILIES[family][1]:
    raise ValueError(
      f'model.qk_norm={model.qk_norm}: a {family} model has '
      f'{"it" if not model.qk_norm else "none"}'
    )
  lengths, tensors = leaves.sizes(model), []
  for name, (tensor, form) in table.items():
    if name not in found:
      continue
    shape = leaves.shapes(form, lengths)[0]
    for layer in range(model.num_layers) if '{}' in tensor else [...]:
      fetch = functools.partial(_fetch, found[name], layer, form)
      tensors.append((tensor.format(layer), shape, fetch))
  return tensors


def _index(
  folder: pathlib.Path, tensors: list[safetensors_files.Source]
) -> None:
  """Names the model's own tensors, where several files do not do so already.

  vLLM loads every .safetensors of a folder without an index, and would refuse
  the read-out, which is ours.
  """
  index = folder / safetensors_files.INDEX
  if not index.exists():
    names = {name: safetensors_files.SINGLE for name, _, _ in tensors}
    content = {'metadata': {}, 'weight_map': names}
    index.write_text(json.dumps(content, indent=2))


def _fetch(leaf: Any, layer: Any, form: str) -> np.ndarray:
  """One tensor of a parameter, on the host."""
  return leaves.write(np.asarray(leaf[layer]), form)


@contextlib.contextmanager
def _whole_folder(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary sibling that becomes `directory` when all went well."""
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
