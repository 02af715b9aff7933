"""Vectors of texts on disk, addressed by what was said and who read it.

One folder per encoder, named after a hash of its files; inside it shards, each
whole from the moment it has its name. A shard is never changed, so processes
may write beside one another: at worst they encode a text twice.

Axis letters: n texts, F width of a vector.
"""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Iterable

import numpy as np

from gr2_jax.semantic_ids import tfidf

_SUFFIX = '.npz'


def folder(encoder: str) -> pathlib.Path:
  """Where the vectors of an encoder lie.

  Args:
    encoder: a hash of all that decides which vector a text gets.

  Returns:
    `$XDG_CACHE_HOME/gr2_jax/text/<encoder>`, or under `~/.cache`.
  """
  cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(cache) / 'gr2_jax' / 'text' / encoder


def digests(texts: Iterable[str]) -> np.ndarray:
  """128-bit hashes of texts: bytes S16 [n]."""
  found = b''.join(
    hashlib.blake2b(line.encode(), digest_size=16).digest() for line in texts
  )
  return np.frombuffer(found, 'S16')


def read(
  directory: pathlib.Path, wanted: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Looks texts up.

  Args:
    directory: of `folder`; need not exist.
    wanted: S16 [n], of `digests`, each once.
    width: of a vector, F.

  Returns:
    float32 [n, F], and bool [n], True where the store has the text; other
    rows are zero.

  Raises:
    ValueError: a shard is damaged; names the file.
  """
  vectors = np.zeros((len(wanted), width), np.float32)
  found = np.zeros(len(wanted), bool)
  order = np.argsort(wanted)
  ordered = wanted[order]
  for path in sorted(directory.glob(f'*{_SUFFIX}')):
    if found.all():
      break
    try:
      with np.load(path) as shard:
        held = shard['texts']
        at = np.minimum(np.searchsorted(ordered, held), len(wanted) - 1)
        ours = np.flatnonzero(ordered[at] == held)
        if not len(ours):
          continue
        rows = shard['vectors']
      if rows.shape != (len(held), width):
        raise ValueError(f'vectors {rows.shape} of {len(held)} texts')
    except tfidf.DAMAGE as e:
      raise ValueError(
        f'{path}: damaged ({e}); delete it, and its texts are encoded again'
      ) from e
    into = order[at[ours]]
    vectors[into] = rows[ours]
    found[into] = True
  return vectors, found


def append(
  directory: pathlib.Path, texts: np.ndarray, vectors: np.ndarray
) -> None:
  """Adds a shard, whole or not at all.

  Args:
    directory: of `folder`; made where it does not exist.
    texts: S16 [n], of `digests`.
    vectors: float32 [n, F].
  """
  directory.mkdir(parents=True, exist_ok=True)
  name = hashlib.blake2b(texts.tobytes(), digest_size=16).hexdigest()
  with tempfile.NamedTemporaryFile(
    dir=directory, suffix='.tmp', delete=False
  ) as file:
    try:
      np.savez(file, texts=texts, vectors=vectors)
      file.flush()
      os.replace(file.name, directory / f'{name}{_SUFFIX}')
    except BaseException:
      pathlib.Path(file.name).unlink(missing_ok=True)
      raise
