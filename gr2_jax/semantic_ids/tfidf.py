"""Item text as dense vectors by latent semantic analysis, without a download.

Title, categories (a path or a set of genres) and year become hashed TF-IDF
columns (words and word pairs, character n-grams, categories, years). A
truncated SVD projects them to one unit vector per item. `fit` learns the space
from a catalog; `embed` places items in it, including later ones. The vectors
depend on the text and the seed alone, never on the process.

The columns `titles`, `categories` and `years` (0 where unknown) have one entry
per item; titles and categories may be empty. ValueError is raised where they
differ in length or there is no item.

Axis letters: I items, F hashed columns, D width of a vector.
"""

import array
import dataclasses
import pathlib
import re
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from gr2_jax.data import files, hashed_text

# Length of each block's part of an item's row.
BLOCK_WEIGHTS = {'words': 1.0, 'grams': 0.7, 'categories': 1.0, 'years': 0.4}
# What numpy raises on an .npz file that was cut off or changed.
DAMAGE = (ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile)
_GRAM_SIZES = (3, 4)
_WORD = re.compile(r'\w+')

# Title, categories, year.
Text = tuple[str, tuple[str, ...], int]


@dataclasses.dataclass(frozen=True)
class Space:
  """A fitted map from text to vectors.

  Attributes:
    buckets: hash buckets per block of columns.
    columns: int64 [F], ascending; bucket j of block b is b * buckets + j.
    idf: float32 [F] inverse document frequencies.
    projection: float32 [F, D] right singular vectors, zero beyond the rank.
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
    """Writes an .npz file atomically."""
    with files.atomic_write(path, 'wb') as file:
      np.savez(file, **dataclasses.asdict(self))


def load(path: pathlib.Path) -> Space:
  """Reads a file of `Space.save`.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: it is damaged or of another kind.
  """
  names = [field.name for field in dataclasses.fields(Space)]
  try:
    with np.load(path) as file:
      arrays = {name: file[name] for name in names}
  except DAMAGE as e:
    raise ValueError(
      f'{path}: not a whole text space ({e}); run the stage that fitted it '
      'again'
    ) from e
  return Space(**arrays | {'buckets': int(arrays['buckets'])})


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

  A column's idf is 1 + log((1 + I) / (1 + df)). Columns that only one text has
  carry no similarity and are dropped, unless that would empty their block. Each
  of the blocks has `buckets` hashed columns; `seed` is of the SVD.
  """
  limit = np.iinfo(np.int32).max // len(BLOCK_WEIGHTS)
  if dim < 1 or not 1 <= buckets <= limit:
    raise ValueError(
      f'dim and buckets must be positive, buckets at most {limit}, got '
      f'dim={dim}, buckets={buckets}'
    )
  texts = distinct(titles, categories, years)[0]
  counts = _counts(texts, buckets)
  frequency = np.bincount(counts.indices, minlength=counts.shape[1])
  columns = []
  for block in range(len(BLOCK_WEIGHTS)):
    block_frequency = frequency[block * buckets : (block + 1) * buckets]
    kept = np.flatnonzero(block_frequency >= 2)
    if not len(kept):
      kept = np.flatnonzero(block_frequency)
    columns.append(kept + block * buckets)
  columns = np.concatenate(columns)
  idf = 1.0 + np.log((1.0 + len(texts)) / (1.0 + frequency[columns]))
  space = Space(
    buckets, columns, idf.astype(np.float32), np.zeros((len(columns), dim), 'f')
  )
  projection = right_singular_vectors(_weigh(space, counts), dim, seed)
  return dataclasses.replace(space, projection=projection)


def embed(
  space: Space,
  titles: Sequence[str],
  categories: Sequence[Sequence[str]],
  years: Sequence[int],
) -> np.ndarray:
  """Places items in a space.

  A row depends on its item's text alone, bit for bit. An item with no text, or
  with none of the space's columns, gets a row of zeros.

  Returns:
    float32 [I, D], rows of unit length.
  """
  texts, text_of_item = distinct(titles, categories, years)
  dense = tfidf(space, texts) @ space.projection
  norm = np.linalg.norm(dense, axis=1, keepdims=True)
  dense = np.where(norm > 1e-6, dense / np.maximum(norm, 1e-6), 0.0)
  return np.ascontiguousarray(dense[text_of_item], dtype=np.float32)


def tfidf(space: Space, texts: Sequence[Text]) -> sparse.csr_array:
  """Blocks of (1 + log tf) * idf, each scaled to its weight: float32 [I, F]."""
  return _weigh(space, _counts(texts, space.buckets))


def distinct(
  titles: Sequence[str],
  categories: Sequence[Sequence[str]],
  years: Sequence[int],
) -> tuple[list[Text], np.ndarray]:
  """The distinct texts, by first appearance, and each item's text int64 [I]."""
  if not len(titles) == len(categories) == len(years):
    raise ValueError(
      f'titles ({len(titles)}), categories ({len(categories)}) and years '
      f'({len(years)}) must have one entry per item'
    )
  if not len(titles):
    raise ValueError('the catalog is empty: no item to embed')
  rows: dict[Text, int] = {}
  text_of_item = [
    rows.setdefault((title, tuple(path), int(year)), len(rows))
    for title, path, year in zip(titles, categories, years, strict=True)
  ]
  return list(rows), np.array(text_of_item, np.int64)


def right_singular_vectors(
  matrix_IxF: sparse.csr_array,
  dim: int,
  seed: int,
  *,
  oversample: int = 32,
  iterations: int = 3,
) -> np.ndarray:
  """The first `dim` singular vectors by a randomized SVD.

  Halko et al. 2011, algorithm 4.4: `oversample` extra directions in the range
  finder, and orthonormalized power iterations.

  Returns:
    float32 [F, dim], orthonormal columns in order of their singular values;
    zero beyond the rank. The largest entry of a column is positive.
  """
  n_rows, n_columns = matrix_IxF.shape
  out = np.zeros((n_columns, dim), np.float32)
  rank = min(dim + oversample, n_rows, n_columns)
  if not rank:
    return out
  rng = np.random.default_rng(seed)
  start = rng.standard_normal((n_columns, rank), dtype=np.float32)
  basis = np.linalg.qr(matrix_IxF @ start)[0]
  transposed = matrix_IxF.T.tocsr()
  for _ in range(iterations):
    other = np.linalg.qr(transposed @ basis)[0]
    basis = np.linalg.qr(matrix_IxF @ other)[0]
  other, triangle = np.linalg.qr(transposed @ basis)
  rotation, values, _ = np.linalg.svd(triangle)
  kept = np.flatnonzero(values[:dim] > 1e-5 * max(values[0], 1e-5))
  vectors = other @ rotation[:, kept]
  largest = np.abs(vectors).argmax(axis=0)
  vectors *= np.where(vectors[largest, kept] < 0, -1.0, 1.0)
  out[:, kept] = vectors
  return out


def _counts(texts: Sequence[Text], buckets: int) -> sparse.csr_array:
  """Term counts, float32 [I, blocks * buckets]."""
  offset = {name: i * buckets for i, name in enumerate(BLOCK_WEIGHTS)}
  word_columns: dict[str, array.array] = {}

  def column(block: str, term: str) -> int:
    return offset[block] + hashed_text.bucket(term, buckets)

  def columns(title: str, path: tuple[str, ...], year: int) -> array.array:
    indices = array.array('I')
    words = _WORD.findall(title.lower())
    for word in words:
      if word not in word_columns:
        grams = [column('grams', gram) for gram in _grams(word)]
        word_columns[word] = array.array('I', [column('words', word), *grams])
      indices.extend(word_columns[word])
    for a, b in zip(words, words[1:], strict=False):
      indices.append(column('words', f'{a} {b}'))
    indices.extend(column('categories', name) for name in _category_names(path))
    indices.extend(column('years', name) for name in _year_names(year))
    return indices

  return hashed_text.count(
    (columns(*text) for text in texts), len(BLOCK_WEIGHTS) * buckets
  )


def _weigh(space: Space, counts: sparse.csr_array) -> sparse.csr_array:
  """Counts -> TF-IDF of the kept columns."""
  frequencies = counts[:, space.columns]
  frequencies.data = 1.0 + np.log(frequencies.data)
  return hashed_text.weigh(
    frequencies,
    space.idf,
    block_F=space.columns // space.buckets,
    lengths=list(BLOCK_WEIGHTS.values()),
  )


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
