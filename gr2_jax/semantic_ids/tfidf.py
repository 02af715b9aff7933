"""Item text as dense vectors, without any download.

Title, categories (a path or a set of genres) and year become hashed TF-IDF
columns (words and word pairs, character n-grams, categories, years); a
truncated SVD turns them into one unit vector per item. `fit` learns the space
from a catalog, `embed` puts items into it, those that came later too. The
vectors depend on the text and the seed alone, never on the process: the hash
is CRC-32.

Axis letters: I items, F hashed columns, D width of a vector.
"""

import array
import dataclasses
import os
import pathlib
import re
import zipfile
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
# What numpy raises on an .npz file that was cut off or changed.
DAMAGE = (ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile)
_GRAM_SIZES = (3, 4)
_WORD = re.compile(r'\w+')

# Title, categories, year.
Text = tuple[str, tuple[str, ...], int]


@dataclasses.dataclass(frozen=True)
class Space:
  """What turns a text into a vector.

  Attributes:
    buckets: hash buckets per block of columns.
    columns: int64 [F], ascending; block b's bucket j is b * buckets + j.
    idf: float32 [F], what a column's term frequencies are multiplied with.
    projection: float32 [F, D], right singular vectors; zero where the rank of
      the text ends.
  """

  buckets: int
  columns: np.ndarray
  idf: np.ndarray
  projection: np.ndarray

  @property
  def dim(self) -> int:
    """Width of a vector, D."""
    return self.projection.shape[1]

  def save(self, path: pathlib.Path) -> None:
    """Writes an .npz file, whole or not at all."""
    temporary = path.with_name(f'{path.name}.tmp')
    with temporary.open('wb') as file:
      np.savez(file, **dataclasses.asdict(self))
    os.replace(temporary, path)


def load(path: pathlib.Path) -> Space:
  """Reads what `Space.save` wrote.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or another kind of file.
  """
  names = [field.name for field in dataclasses.fields(Space)]
  try:
    with np.load(path) as file:
      found = {name: file[name] for name in names}
  except DAMAGE as e:
    raise ValueError(
      f'{path}: not a whole text space ({e}); it is written by the run that '
      'fitted it, run that again'
    ) from e
  return Space(**found | {'buckets': int(found['buckets'])})


def fit(
  titles: Sequence[str],
  categories: Sequence[Sequence[str]],
  years: Sequence[int],
  *,
  dim: int,
  buckets: int = 1 << 16,
  seed: int = 0,
) -> Space:
  """Latent semantic analysis of a catalog's distinct texts.

  A column's idf is 1 + log((1 + I) / (1 + df)). Columns that fewer than two
  texts have say nothing about likeness and are dropped, unless that leaves an
  empty block.

  Args:
    titles: [I] titles, may be empty.
    categories: [I] category paths or genres, may be empty.
    years: [I] years, 0 where unknown.
    dim: width of a vector, D.
    buckets: hash buckets per block of columns.
    seed: of the range finder of the SVD.

  Returns:
    The space.

  Raises:
    ValueError: the three columns differ in length, there is no item, or the
      sizes are not positive.
  """
  most = np.iinfo(np.int32).max // len(BLOCK_WEIGHTS)
  if dim < 1 or not 1 <= buckets <= most:
    raise ValueError(
      f'dim and buckets must be positive, buckets at most {most}, got '
      f'dim={dim}, buckets={buckets}'
    )
  texts = distinct(titles, categories, years)[0]
  counts = _counts(texts, buckets)
  frequency = np.bincount(counts.indices, minlength=counts.shape[1])
  columns = []
  for block in range(len(BLOCK_WEIGHTS)):
    of_block = frequency[block * buckets : (block + 1) * buckets]
    kept = np.flatnonzero(of_block >= 2)
    if not len(kept):
      kept = np.flatnonzero(of_block)
    columns.append(kept + block * buckets)
  columns = np.concatenate(columns)
  idf = 1.0 + np.log((1.0 + len(texts)) / (1.0 + frequency[columns]))
  space = Space(
    buckets, columns, idf.astype(np.float32), np.zeros((len(columns), dim), 'f')
  )
  matrix = _weigh(space, counts)
  return dataclasses.replace(
    space, projection=right_singular_vectors(matrix, dim, seed)
  )


def embed(
  space: Space,
  titles: Sequence[str],
  categories: Sequence[Sequence[str]],
  years: Sequence[int],
) -> np.ndarray:
  """Puts items into a space.

  A row depends on that item's text alone: items with the same text get the
  same row, bit for bit, whatever other items stand beside them. An item with
  no text, or with none of the space's columns, gets a row of zeros.

  Args:
    space: of `fit`.
    titles: [I] titles, may be empty.
    categories: [I] category paths or genres, may be empty.
    years: [I] years, 0 where unknown.

  Returns:
    float32 [I, D], rows of unit length.

  Raises:
    ValueError: the three columns differ in length, or there is no item.
  """
  texts, of_item = distinct(titles, categories, years)
  dense = tfidf(space, texts) @ space.projection
  norm = np.linalg.norm(dense, axis=1, keepdims=True)
  dense = np.where(norm > 1e-6, dense / np.maximum(norm, 1e-6), 0.0)
  return np.ascontiguousarray(dense[of_item], dtype=np.float32)


def tfidf(space: Space, texts: Sequence[Text]) -> sparse.csr_matrix:
  """TF-IDF blocks side by side, each scaled to its weight.

  An entry is (1 + log tf) * idf before its block is scaled.

  Args:
    space: its projection is not read.
    texts: [I].

  Returns:
    float32 [I, F].
  """
  return _weigh(space, _counts(texts, space.buckets))


def distinct(
  titles: Sequence[str],
  categories: Sequence[Sequence[str]],
  years: Sequence[int],
) -> tuple[list[Text], np.ndarray]:
  """The texts that differ, in order of appearance, and each item's among them.

  Returns:
    The texts, and int64 [I].

  Raises:
    ValueError: the three columns differ in length, or there is no item.
  """
  if not len(titles) == len(categories) == len(years):
    raise ValueError(
      f'titles ({len(titles)}), categories ({len(categories)}) and years '
      f'({len(years)}) must have one entry per item'
    )
  if not len(titles):
    raise ValueError('the catalog is empty: no item to embed')
  rows: dict[Text, int] = {}
  of_item = [
    rows.setdefault((title, tuple(path), int(year)), len(rows))
    for title, path, year in zip(titles, categories, years, strict=True)
  ]
  return list(rows), np.array(of_item, np.int64)


def right_singular_vectors(
  matrix: sparse.csr_matrix,
  dim: int,
  seed: int,
  *,
  oversample: int = 32,
  iterations: int = 3,
) -> np.ndarray:
  """The first V_k of a randomised SVD (Halko et al. 2011, algorithm 4.4).

  Args:
    matrix: [I, F].
    dim: number of vectors, k.
    seed: of the Gaussian test matrix.
    oversample: extra directions in the range finder.
    iterations: power iterations, each orthonormalised.

  Returns:
    float32 [F, dim], orthonormal columns in order of their singular values;
    zero beyond the rank. The largest entry of a column is positive.
  """
  n_rows, n_columns = matrix.shape
  out = np.zeros((n_columns, dim), np.float32)
  rank = min(dim + oversample, n_rows, n_columns)
  if not rank:
    return out
  rng = np.random.default_rng(seed)
  start = rng.standard_normal((n_columns, rank), dtype=np.float32)
  basis = np.linalg.qr(matrix @ start)[0]
  transposed = matrix.T.tocsr()
  for _ in range(iterations):
    other = np.linalg.qr(transposed @ basis)[0]
    basis = np.linalg.qr(matrix @ other)[0]
  other, triangle = np.linalg.qr(transposed @ basis)
  rotation, values, _ = np.linalg.svd(triangle)
  kept = np.flatnonzero(values[:dim] > 1e-5 * max(values[0], 1e-5))
  vectors = other @ rotation[:, kept]
  largest = np.abs(vectors).argmax(axis=0)
  vectors *= np.where(vectors[largest, kept] < 0, -1.0, 1.0)
  out[:, kept] = vectors
  return out


def _counts(texts: Sequence[Text], buckets: int) -> sparse.csr_matrix:
  """Term counts, float32 [I, blocks * buckets]."""
  found = array.array('I')
  ends = array.array('q', [0])
  of_word: dict[str, array.array] = {}
  offset = {name: i * buckets for i, name in enumerate(BLOCK_WEIGHTS)}

  def column(block: str, text: str) -> int:
    """CRC-32: the same in every process, unlike Python's salted hash."""
    return (
      offset[block]
      + zlib.crc32(text.encode('utf-8', 'surrogatepass')) % buckets
    )

  for title, path, year in texts:
    words = _WORD.findall(title.lower())
    for word in words:
      if word not in of_word:
        columns = [column('grams', gram) for gram in _grams(word)]
        of_word[word] = array.array('I', [column('words', word), *columns])
      found.extend(of_word[word])
    for a, b in zip(words, words[1:], strict=False):
      found.append(column('words', f'{a} {b}'))
    found.extend(column('categories', name) for name in _category_names(path))
    found.extend(column('years', name) for name in _year_names(year))
    ends.append(len(found))
  counts = sparse.csr_matrix(
    (
      np.ones(len(found), np.float32),
      np.asarray(found, np.int64),
      np.asarray(ends),
    ),
    shape=(len(texts), len(BLOCK_WEIGHTS) * buckets),
  )
  counts.sum_duplicates()
  return counts


def _weigh(space: Space, counts: sparse.csr_matrix) -> sparse.csr_matrix:
  """Counts -> TF-IDF of the kept columns, blocks of the length of their weight.

  Sums run inside a row, in the order of its columns: rows are independent of
  one another bit for bit.
  """
  matrix = counts[:, space.columns].sorted_indices()
  matrix.data = (1.0 + np.log(matrix.data)) * space.idf[matrix.indices]
  block = (space.columns // space.buckets)[matrix.indices]
  n_blocks = len(BLOCK_WEIGHTS)
  row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
  part = row * n_blocks + block
  squares = np.bincount(part, matrix.data**2, minlength=n_blocks)
  weight = np.array(list(BLOCK_WEIGHTS.values()))
  scale = weight[block] / np.sqrt(squares)[part]
  matrix.data = (matrix.data * scale).astype(np.float32)
  return matrix


def _grams(word: str) -> list[str]:
  """Character n-grams of a word with its boundaries."""
  marked = f'<{word}>'
  return [
    marked[start : start + size]
    for size in _GRAM_SIZES
    for start in range(len(marked) - size + 1)
  ]


def _category_names(path: tuple[str, ...]) -> list[str]:
  """Each category by itself and each prefix of the path."""
  path = tuple(filter(str.strip, path))
  names = [f'has {name.lower()}' for name in path]
  prefixes = ['/'.join(path[: depth + 1]).lower() for depth in range(len(path))]
  return names + [f'path {prefix}' for prefix in prefixes]


def _year_names(year: int) -> list[str]:
  """Overlapping spans of years, so that close years share some."""
  if not year:
    return []
  return [f'{year // 5} by 5', f'{year // 10} by 10', f'{(year + 5) // 10} +5']
