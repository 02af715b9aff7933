"""Hashed terms of texts and their TF-IDF weights.

Axis letters: n texts, F columns.
"""

import array
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import sparse


def bucket(term: str, buckets: int) -> int:
  """Hash of a term by CRC-32, which is equal in every process."""
  return zlib.crc32(term.encode('utf-8', 'surrogatepass')) % buckets


def count(texts: Iterable[Iterable[int]], columns: int) -> sparse.csr_array:
  """Counts each text's columns: float32 [n, F]."""
  indices = array.array('I')
  ends = array.array('q', [0])
  for text in texts:
    indices.extend(text)
    ends.append(len(indices))
  counts = sparse.csr_array(
    (
      np.ones(len(indices), np.float32),
      np.asarray(indices, np.int64),
      np.asarray(ends),
    ),
    shape=(len(ends) - 1, columns),
  )
  counts.sum_duplicates()
  return counts


def weigh(
  counts: sparse.csr_array,
  idf_F: np.ndarray,
  *,
  block_F: np.ndarray | None = None,
  lengths: Sequence[float] = (1.0,),
) -> sparse.csr_array:
  """Multiplies counts by idf and scales each row's blocks to a given length.

  Sums run within a row in the order of its columns, so a row's bits do not
  depend on the other rows.

  Args:
    counts: float32 [n, F] (dampened) term frequencies.
    idf_F: inverse document frequencies.
    block_F: int block of each column; None: one block.
    lengths: of each block's part of a row; a part of zeros stays zero.

  Returns:
    float32 [n, F].
  """
  matrix = counts.sorted_indices()
  matrix.data = matrix.data * idf_F[matrix.indices]
  matrix.eliminate_zeros()
  block = 0 if block_F is None else block_F[matrix.indices]
  row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
  part = row * len(lengths) + block
  norms = np.sqrt(np.bincount(part, matrix.data**2, minlength=1))
  scale = np.asarray(lengths)[block] / np.maximum(norms, 1e-6)[part]
  matrix.data = (matrix.data * scale).astype(np.float32)
  return matrix
