"""Safetensors: slices of tensors out of one file or several, and back.

Reading touches only the requested slice. Writing holds one tensor at a time:
the header has the place of each, and they follow one another.
"""

import json
import math
import pathlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'

DTYPES = {
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}


class SafetensorsFolder:
  """The tensors of a checkpoint: `model.safetensors`, or an index and parts.

  Raises:
    FileNotFoundError: both are missing, or a part of the index is.
    ValueError: a file is truncated or damaged, the index is wrong, or a
      tensor's type is not F32, F16 or BF16.
  """

  def __init__(self, folder: pathlib.Path):
    import safetensors  # of the extra `hf`; writing does without

    files = _files(folder)
    self._files: dict[str, pathlib.Path] = {}
    self._slices: dict[str, Any] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    for file, names in files.items():
      try:
        handle = safetensors.safe_open(file, framework='numpy')
      except safetensors.SafetensorError as e:
        raise ValueError(
          f'{file}: not a whole safetensors file ({e}); fetch it again'
        ) from e
      present = set(handle.keys())
      for name in sorted(present) if names is None else names:
        if name not in present:
          raise ValueError(
            f'{file}: has no tensor {name}, which {INDEX} assigns to it'
          )
        self._files[name] = file
        self._slices[name] = handle.get_slice(name)
        self.shapes[name] = tuple(self._slices[name].get_shape())
        dtype = self._slices[name].get_dtype()
        if dtype not in DTYPES:
          raise ValueError(
            f'{file}: tensor {name} has type {dtype}; known: '
            f'{", ".join(DTYPES)} (quantized checkpoints are not supported)'
          )

  def file(self, name: str) -> pathlib.Path:
    """The file that holds a tensor."""
    return self._files[name]

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A block of a tensor, float32; only that block is read."""
    return np.asarray(self._slices[name][index]).astype(np.float32, copy=False)


def _files(folder: pathlib.Path) -> dict[pathlib.Path, list[str] | None]:
  """File -> the tensors to take from it; None: all."""
  if (folder / SINGLE).is_file():
    return {folder / SINGLE: None}
  index = folder / INDEX
  if not index.is_file():
    raise FileNotFoundError(f'{folder}: has neither {SINGLE} nor {INDEX}')
  try:
    names = json.loads(index.read_text())['weight_map']
    files: dict[pathlib.Path, list[str] | None] = {}
    for name, part in names.items():
      files.setdefault(folder / part, []).append(name)
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f'{index}: no weight_map of tensor to file: {e!r}') from e
  for file in files:
    if not file.is_file():
      raise FileNotFoundError(f'{file}: missing, but {index} names it')
  return files


# A tensor to write: its name, its shape, and what makes its values.
Source = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]


def write(
  folder: pathlib.Path,
  tensors: Sequence[Source],
  dtype: str,
  max_shard_bytes: int,
) -> None:
  """Writes `model.safetensors`, or several files, and an index.

  A single file has an index too: without one, vLLM loads every .safetensors of
  the folder, and would reject a file that is not the model's. `dtype` is a key
  of DTYPES. No file holds more than `max_shard_bytes`, or than one tensor.
  """
  width = DTYPES[dtype].itemsize
  parts: list[list[Source]] = [[]]
  room = max_shard_bytes
  for tensor in tensors:
    size = math.prod(tensor[1]) * width
    if parts[-1] and size > room:
      parts.append([])
      room = max_shard_bytes
    parts[-1].append(tensor)
    room -= size
  stem, names, metadata = SINGLE.removesuffix('.safetensors'), {}, {}
  if len(parts) > 1:
    total = sum(math.prod(shape) for _, shape, _ in tensors) * width
    metadata['total_size'] = total
  for i, part in enumerate(parts, 1):
    several = f'{stem}-{i:05}-of-{len(parts):05}.safetensors'
    file = several if len(parts) > 1 else SINGLE
    write_file(folder / file, part, dtype)
    names.update({name: file for name, _, _ in part})
  index = {'metadata': metadata, 'weight_map': names}
  (folder / INDEX).write_text(json.dumps(index, indent=2))


def write_file(
  file: pathlib.Path, tensors: Sequence[Source], dtype: str
) -> None:
  """Writes one file, a tensor at a time.

  The format: the header's length (8 bytes, little endian), the header (JSON,
  padded to 8 bytes), then the tensors' bytes in C order.
  """
  width, end = DTYPES[dtype].itemsize, 0
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  for name, shape, _ in tensors:
    begin, end = end, end + math.prod(shape) * width
    header[name] = {
      'dtype': dtype,
      'shape': list(shape),
      'data_offsets': [begin, end],
    }
  encoded = json.dumps(header).encode()
  encoded += b' ' * (-len(encoded) % 8)
  with file.open('wb') as f:
    f.write(struct.pack('<Q', len(encoded)))
    f.write(encoded)
    for _, _, values in tensors:
      flat = np.ascontiguousarray(values(), DTYPES[dtype]).reshape(-1)
      f.write(flat.view(np.uint8).data)
