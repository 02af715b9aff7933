"""Items' text -> vectors: one function, three encoders, kept on disk.

'tfidf' fits hashed TF-IDF and an SVD to the catalog; 'minilm' is a BERT
sentence encoder; 'backbone' takes the hidden states of a language model, less
their mean.

Axis letters: I items, F width of a vector.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np

from gr2_jax.data import files
from gr2_jax.data import log as log_lib
from gr2_jax.distributed import sharding
from gr2_jax.pipeline import flags
from gr2_jax.semantic_ids import language_encoders, tfidf

ENCODERS = ('tfidf', *language_encoders.KINDS)
FEATURES = 'features.npy'
# What the vectors were made with and of; written before them.
RECORD = 'features.json'
# What later items need to be put into the same space: that of 'tfidf' (see
# `data/text`), the mean of 'backbone'.
SPACE = 'text.npz'
_ROWS = 65_536  # rows that are checked at a time


def embed(
  config,
  catalog: log_lib.Catalog,
  directory: os.PathLike[str] | str,
  *,
  fitted: os.PathLike[str] | str | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
  """The items' text vectors: those in the directory, or fresh ones.

  Writes features.npy, whole or not at all, and features.json, which says what
  it was made of; 'tfidf' and 'backbone' write text.npz too. Items with the same
  text have the same row, bit for bit; an item without any text has a row of
  zeros.

  Args:
    config: the `tokenizer` section: text_encoder, and text_dim, text_buckets
      and seed ('tfidf') or text_source and text_batch_size (the others).
    catalog: the items.
    directory: where the files lie or go.
    fitted: the directory of an earlier call, whose space new items are put
      into; None: the space is fitted to this catalog.
    mesh: what a language model runs on; None: the batch over all devices.

  Returns:
    float32 [I, F], memory-mapped, rows of unit length.

  Raises:
    ValueError: an unknown encoder; vectors in the directory that are damaged
      or of other texts; another space in `fitted`; a vector that is not finite
      (names the item).
    FileNotFoundError: the encoder's files, or those of `fitted`, are missing.
    ModuleNotFoundError: a package is missing; tells how to install it.
  """
  if config.text_encoder not in ENCODERS:
    raise ValueError(
      f'tokenizer.text_encoder={config.text_encoder!r} is unknown'
      f'{flags.nearest(str(config.text_encoder), ENCODERS)}; known: '
      f'{", ".join(ENCODERS)}'
    )
  if not len(catalog):
    raise ValueError('the catalog is empty: no item to embed')
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  fitted = None if fitted is None else pathlib.Path(fitted)
  _report_empty(catalog)
  encoder = None
  if config.text_encoder != 'tfidf':
    encoder = language_encoders.open_encoder(
      config.text_encoder, config.text_source
    )
  made_of = _made_of(config, catalog, encoder, fitted)
  if not (directory / FEATURES).exists():
    if 'fitted' in made_of:
      shutil.copyfile(fitted / SPACE, directory / SPACE)
    if encoder is None:
      rows = _tfidf(config, catalog, directory / SPACE, fitted is None)
    else:
      rows, of_item = _read_texts(config, catalog, encoder, mesh)
      if config.text_encoder == 'backbone':
        rows = _centre(rows, directory / SPACE, fitted is None)
      rows = rows[of_item]
    with files.atomic_write(directory / RECORD) as file:
      json.dump(made_of, file, indent=2)
    with files.atomic_write(directory / FEATURES, 'wb') as file:
      np.save(file, rows)
  return _open_features(directory, catalog, made_of)


def _made_of(
  config,
  catalog: log_lib.Catalog,
  encoder: language_encoders.Encoder | None,
  fitted: pathlib.Path | None,
) -> dict[str, object]:
  """What decides the vectors, as features.json has it."""
  found: dict[str, object] = {'text_encoder': config.text_encoder}
  if encoder is None:
    found['text_dim'] = config.text_dim
    found['text_buckets'] = config.text_buckets
  else:
    found['encoder'] = encoder.key
  if fitted is not None:
    _check_record(fitted, found, 'old and new items need one space')
    if config.text_encoder != 'minilm':
      content = (fitted / SPACE).read_bytes()
      found['fitted'] = hashlib.sha256(content).hexdigest()
  elif encoder is None:
    found['seed'] = config.seed
  return found | {'texts': _digest(catalog)}


def _tfidf(
  config, catalog: log_lib.Catalog, path: pathlib.Path, fit: bool
) -> np.ndarray:
  """Vectors [I, F], in the space of a file, which is fitted first or not."""
  columns = catalog.titles, catalog.categories, catalog.years
  if fit:
    tfidf.fit(
      *columns,
      dim=config.text_dim,
      buckets=config.text_buckets,
      seed=config.seed,
    ).save(path)
  return tfidf.embed(tfidf.load(path), *columns)


def _read_texts(
  config,
  catalog: log_lib.Catalog,
  encoder: language_encoders.Encoder,
  mesh: jax.sharding.Mesh | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Vectors of the distinct texts, and which of them each item has."""
  first: dict[str, int] = {}
  columns = zip(catalog.titles, catalog.categories, catalog.years, strict=True)
  of_item = [
    first.setdefault(language_encoders.line(*parts), len(first))
    for parts in columns
  ]
  owners = np.unique(of_item, return_index=True)[1]
  vectors = language_encoders.encode(
    encoder,
    list(first),
    [f'item {catalog.item_ids[item]!r}' for item in owners],
    config.text_batch_size,
    mesh or sharding.make_mesh(),
  )
  return vectors, np.array(of_item)


def _centre(vectors: np.ndarray, path: pathlib.Path, fit: bool) -> np.ndarray:
  """Takes the mean out, and scales to unit length again.

  Hidden states of a decoder all lean one way, whatever the text (Mu and
  Viswanath, arXiv 1702.01417); what is left tells texts apart.

  Args:
    vectors: float32 [n, F] of distinct texts; rows of zeros stay.
    path: the .npz file of the mean.
    fit: write it; else read it.

  Returns:
    float32 [n, F].
  """
  real = vectors.any(axis=1, keepdims=True)
  if fit:
    total = vectors.sum(axis=0, dtype=np.float64)
    mean = (total / max(real.sum(), 1)).astype(np.float32)
    with files.atomic_write(path, 'wb') as file:
      np.savez(file, mean=mean)
  else:
    try:
      with np.load(path) as file:
        mean = file['mean']
    except tfidf.DAMAGE as e:
      raise ValueError(
        f'{path}: no mean of text vectors in it ({e}); it is written by the '
        'run that fitted it, run that again'
      ) from e
  out = np.where(real, vectors - mean, np.float32(0))
  norm = np.linalg.norm(out, axis=1, keepdims=True)
  return out / np.maximum(norm, 1e-6)


def _report_empty(catalog: log_lib.Catalog) -> None:
  """One line where items have neither title nor category."""
  empty = [
    item
    for item, title, path in zip(
      catalog.item_ids, catalog.titles, catalog.categories, strict=True
    )
    if not title.strip() and not any(name.strip() for name in path)
  ]
  if empty:
    print(
      f'{len(empty)} of {len(catalog)} items have neither title nor category, '
      f'the first is item {empty[0]!r}: nothing tells them apart but the code '
      'that is drawn; give them a title'
    )


def _digest(catalog: log_lib.Catalog) -> str:
  """SHA-256 of the texts in catalog order."""
  found = hashlib.sha256()
  for title, path, year in zip(
    catalog.titles, catalog.categories, catalog.years, strict=True
  ):
    found.update(json.dumps([title, *path, int(year)]).encode())
  return found.hexdigest()


def _check_record(
  directory: pathlib.Path, record: Mapping[str, object], cure: str
) -> None:
  """Compares what the vectors of a directory were made of."""
  file = directory / RECORD
  try:
    found = json.loads(file.read_text())
  except (OSError, ValueError) as e:
    raise ValueError(f'{file}: missing or damaged ({e}); {cure}') from e
  for name, value in record.items():
    if found.get(name) != value:
      raise ValueError(
        f'{file}: made with {name} {found.get(name)!r}, but this run has '
        f'{value!r}; {cure}'
      )


def _open_features(
  directory: pathlib.Path,
  catalog: log_lib.Catalog,
  record: Mapping[str, object],
) -> np.ndarray:
  """The vectors of a directory, where they are of this catalog."""
  path = directory / FEATURES
  cure = f'delete {path} to embed the items again'
  _check_record(directory, record, cure)
  try:
    rows = np.load(path, mmap_mode='r')
  except (ValueError, EOFError) as e:
    raise ValueError(f'{path}: damaged ({e}); {cure}') from e
  if rows.ndim != 2 or len(rows) != len(catalog) or rows.dtype != np.float32:
    raise ValueError(
      f'{path}: {rows.dtype} {rows.shape}, but the catalog has {len(catalog)} '
      f'items; {cure}'
    )
  for start in range(0, len(rows), _ROWS):
    bad = ~np.isfinite(rows[start : start + _ROWS]).all(axis=1)
    if bad.any():
      raise ValueError(
        f'{path}: the vector of item '
        f'{catalog.item_ids[start + int(bad.argmax())]!r} is not finite; {cure}'
      )
  return rows
