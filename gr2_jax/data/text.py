"""Item text as dense vectors, without any download.

Title, categories (a path or a set of genres) and year become hashed TF-IDF
columns (words and word pairs, character n-grams, categories, years); a
truncated SVD turns them into one unit vector per item. The vectors depend on
the text and the seed alone, never on the process: the hash is CRC-32.

Axis letters: I items, F hashed columns.
"""

import re
import zlib
from collections.abc import Sequence

import numpy as np
from scipy import sparse

# Share of each block in an item's vector: blocks are unit length before it.
BLOCK_WEIGHTS = {
  'words': 1.0,
  'grams': 0.7,
  'categories': 1.0,
  'years': 0.4,
}
_GRAM_SIZES = (3, 4)
_WORD = re.compile(r'\w+')


def features(
  titles: Sequence[str],
  categories: Sequence[Sequence[str]],
  years: Sequence[int],
  *,
  dim: int,
  buckets: int = 1 << 16,
  seed: int = 0,
) -> np.ndarray:
  """Embeds items by latent semantic analysis of their text.

  Items with the same text get the same row, bit for bit. An item with no text
  at all gets a row of zeros.

  Args:
    titles: [I] titles, may be empty.
    categories: [I] category paths or genres, may be empty.
    years: [I] years, 0 where unknown.
    dim: width of the result; columns beyond the rank of the text are zero.
    buckets: hash buckets per block of columns.
    seed: of the range finder of the SVD.

  Returns:
    float32 [I, dim], rows of unit length.

  Raises:
    ValueError: the three columns differ in length, there is no item, or the
      sizes are not positive.
  """
  if not len(titles) == len(categories) == len(years):
    raise ValueError(
      f'titles ({len(titles)}), categories ({len(categories)}) and years '
      f'({len(years)}) must have one entry per item'
    )
  if not len(titles):
    raise ValueError('the catalog is empty: no item to embed')
  if dim < 1 or buckets < 1:
    raise ValueError(
      f'dim and buckets must be positive, got dim={dim}, buckets={buckets}'
    )
  rows = {}
  of_item = np.array(
    [
      rows.setdefault((title, tuple(path), int(year)), len(rows))
      for title, path, year in zip(titles, categories, years, strict=True)
    ],
    dtype=np.int64,
  )
  matrix = tfidf(list(rows), buckets)
  dense = truncated_svd(matrix, dim, seed)
  norm = np.linalg.norm(dense, axis=1, keepdims=True)
  dense = np.where(norm > 1e-6, dense / np.maximum(norm, 1e-6), 0.0)
  return np.ascontiguousarray(dense[of_item], dtype=np.float32)


def tfidf(
  texts: Sequence[tuple[str, tuple[str, ...], int]], buckets: int
) -> sparse.csr_matrix:
  """Hashed TF-IDF blocks side by side, each scaled to its weight.

  The weight of a column is (1 + log tf) * (1 + log((1 + I) / (1 + df))).
  Columns that fewer than two items have say nothing about likeness and are
  dropped, unless that leaves an empty block.

  Args:
    texts: [I] distinct (title, categories, year).
    buckets: hash buckets per block.

  Returns:
    float32 [I, F].
  """
  hashes_of_word: dict[str, list[int]] = {}
  blocks = {name: ([], []) for name in BLOCK_WEIGHTS}
  for row, (title, path, year) in enumerate(texts):
    words = _WORD.findall(title.lower())
    grams = []
    for word in words:
      if word not in hashes_of_word:
        hashes_of_word[word] = _gram_hashes(word)
      grams += hashes_of_word[word]
    pairs = [f'{a} {b}' for a, b in zip(words, words[1:], strict=False)]
    found = {
      'words': [_hash(word) for word in words + pairs],
      'grams': grams,
      'categories': [_hash(name) for name in _category_names(path)],
      'years': [_hash(name) for name in _year_names(year)],
    }
    for name, hashes in found.items():
      blocks[name][0].extend([row] * len(hashes))
      blocks[name][1].extend(hashes)
  return sparse.hstack(
    [
      _block(
        np.asarray(rows, np.int64),
        np.asarray(hashes, np.int64) % buckets,
        (len(texts), buckets),
        BLOCK_WEIGHTS[name],
      )
      for name, (rows, hashes) in blocks.items()
    ],
    format='csr',
  )


def truncated_svd(
  matrix: sparse.csr_matrix,
  dim: int,
  seed: int,
  *,
  oversample: int = 32,
  iterations: int = 3,
) -> np.ndarray:
  """Scores U_k S_k of a randomised SVD (Halko et al. 2011, algorithm 4.4).

  Args:
    matrix: [I, F].
    dim: number of components, k.
    seed: of the Gaussian test matrix.
    oversample: extra directions in the range finder.
    iterations: power iterations, each orthonormalised.

  Returns:
    float32 [I, dim]; components beyond min(I, F) are zero. The sign of a
    component makes its largest entry positive.
  """
  n_rows, n_columns = matrix.shape
  rank = min(dim + oversample, n_rows, n_columns)
  rng = np.random.default_rng(seed)
  start = rng.standard_normal((n_columns, rank), dtype=np.float32)
  basis = np.linalg.qr(matrix @ start)[0]
  transposed = matrix.T.tocsr()
  for _ in range(iterations):
    other = np.linalg.qr(transposed @ basis)[0]
    basis = np.linalg.qr(matrix @ other)[0]
  projected = transposed @ basis  # [F, rank]
  values, vectors = np.linalg.eigh(projected.T @ projected)
  order = np.argsort(-values, kind='stable')[:dim]
  scale = np.sqrt(np.maximum(values[order], 0.0))
  scores = basis @ (vectors[:, order] * scale)
  largest = np.abs(scores).argmax(axis=0)
  scores *= np.where(scores[largest, np.arange(len(order))] < 0, -1.0, 1.0)
  out = np.zeros((n_rows, dim), np.float32)
  out[:, : scores.shape[1]] = scores
  return out


def _block(
  rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int], weight: float
) -> sparse.csr_matrix:
  """One block: counts -> TF-IDF -> rows of length `weight` (or zero)."""
  counts = sparse.coo_matrix(
    (np.ones(len(rows), np.float32), (rows, columns)), shape=shape
  ).tocsr()  # sums duplicates
  frequency = np.bincount(counts.indices, minlength=shape[1])
  keep = np.flatnonzero(frequency >= 2)
  if not len(keep):
    keep = np.flatnonzero(frequency >= 1)
  if not len(keep):
    return sparse.csr_matrix((shape[0], 1), dtype=np.float32)
  counts = counts[:, keep]
  counts.data = 1.0 + np.log(counts.data)
  idf = 1.0 + np.log((1.0 + shape[0]) / (1.0 + frequency[keep]))
  counts = counts @ sparse.diags(idf.astype(np.float32))
  norm = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1))[:, 0])
  scale = np.where(norm > 0, weight / np.maximum(norm, 1e-12), 0.0)
  return (sparse.diags(scale.astype(np.float32)) @ counts).tocsr()


def _hash(text: str) -> int:
  """CRC-32: the same in every process, unlike Python's salted hash."""
  return zlib.crc32(text.encode('utf-8'))


def _gram_hashes(word: str) -> list[int]:
  """Hashes of the character n-grams of a word with its boundaries."""
  marked = f'<{word}>'
  return [
    _hash(marked[start : start + size])
    for size in _GRAM_SIZES
    for start in range(len(marked) - size + 1)
  ]


def _category_names(path: tuple[str, ...]) -> list[str]:
  """Each category by itself and each prefix of the path."""
  names = [f'has {name.lower()}' for name in path]
  prefixes = ['/'.join(path[: depth + 1]).lower() for depth in range(len(path))]
  return names + [f'path {prefix}' for prefix in prefixes]


def _year_names(year: int) -> list[str]:
  """Overlapping spans of years, so that close years share some."""
  if not year:
    return []
  return [f'{year // 5} by 5', f'{year // 10} by 10', f'{(year + 5) // 10} +5']
