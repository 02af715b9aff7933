"""ArrayRecord files of named arrays: appended whole, read by random access."""

import os
import pathlib
from collections.abc import Iterable

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from flax import serialization

from gr2_jax.data import files


def write(
  path: os.PathLike[str] | str, examples: Iterable[dict[str, np.ndarray]]
) -> int:
  """Writes flat dicts of arrays, and returns their number."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  written = 0
  with files.atomic_path(path) as temporary:
    writer = array_record_module.ArrayRecordWriter(
      str(temporary), 'group_size:1'
    )
    for example in examples:
      writer.write(serialization.msgpack_serialize(example))
      written += 1
    writer.close()
  return written


class Records:
  """Random access to a file of `write`, as Grain requires it."""

  def __init__(self, path: os.PathLike[str] | str):
    self._source = array_record_data_source.ArrayRecordDataSource(str(path))

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    (record,) = self._source.__getitems__([int(index)])
    return serialization.msgpack_restore(record)
