"""Text vectors on disk, addressed by encoder and text.

An encoder has one folder, named by a hash of its files, with shards that are
written atomically and never changed. So several processes may write at once; at
worst they encode a text twice.

Axis letters: n texts, F width of a vector.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from gr2_jax.data import files
from gr2_jax.semantic_ids import tfidf

_SUFFIX = '.npz'


def folder(encoder: str) -> pathlib.Path:
  """`$XDG_CACHE_HOME/gr2_jax/text/<hash of encoder>`, or under `~/.cache`."""
  cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(cache) / 'gr2_jax' / 'text' / encoder


def digests(texts: Iterable[str]) -> np.ndarray:
  """128-bit hashes of texts: bytes S16 [n]."""
  hashes = (hashlib.blake2b(text.encode(), digest_size=16) for text in texts)
  return np.frombuffer(b''.join(h.digest() for h in hashes), 'S16')


def read(
  directory: pathlib.Path, texts: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Reads the vectors of texts that the store has.

  Args:
    directory: of `folder`; may be missing.
    texts: S16 [n], distinct `digests`.
    width: of a vector, F.

  Returns:
    float32 [n, F], zeros where the store lacks the text, and bool [n], whether
    it has the text.

  Raises:
    ValueError: a shard is damaged.
  """
  vectors = np.zeros((len(texts), width), np.float32)
  present = np.zeros(len(texts), bool)
  order = np.argsort(texts)
  ordered = texts[order]
  for path in sorted(directory.glob(f'*{_SUFFIX}')):
    if present.all():
      break
    try:
      with np.load(path) as shard:
        stored = shard['texts']
        at = np.minimum(np.searchsorted(ordered, stored), len(texts) - 1)
        matches = np.flatnonzero(ordered[at] == stored)
        if not len(matches):
          continue
        rows = shard['vectors']
      if rows.shape != (len(stored), width):
        raise ValueError(f'vectors {rows.shape} of {len(stored)} texts')
    except tfidf.DAMAGE as e:
      raise ValueError(
        f'{path}: damaged ({e}); delete it, and its texts are encoded again'
      ) from e
    into = order[at[matches]]
    vectors[into] = rows[matches]
    present[into] = True
  return vectors, present


def append(
  directory: pathlib.Path, texts: np.ndarray, vectors: np.ndarray
) -> None:
  """Adds a shard of texts S16 [n] and vectors [n, F] atomically."""
  directory.mkdir(parents=True, exist_ok=True)
  name = hashlib.blake2b(texts.tobytes(), digest_size=16).hexdigest()
  path = directory / f'{name}{_SUFFIX}'
  with files.atomic_write(path, 'wb', shared=True) as file:
    np.savez(file, texts=texts, vectors=vectors)
