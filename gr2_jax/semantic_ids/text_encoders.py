"""Item text -> vectors by one of three encoders, kept on disk.

'tfidf' fits hashed TF-IDF and an SVD to the catalog; 'minilm' is a BERT
sentence encoder; 'backbone' takes the centered hidden states of a language
model. `config` is the section `tokenizer` throughout.

Axis letters: n texts, I items, F width of a vector.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from gr2_jax.data import files
from gr2_jax.data import log as log_lib
from gr2_jax.distributed import sharding
from gr2_jax.pipeline import flags
from gr2_jax.semantic_ids import language_encoders, tfidf

ENCODERS = ('tfidf', *language_encoders.KINDS)
FEATURES = 'features.npy'
RECORD = 'features.json'  # settings and texts of the vectors
SPACE = 'text.npz'  # the fitted space ('tfidf') or mean vector ('backbone')
_ROWS = 65_536  # rows checked at a time


def embed(
  config: ConfigDict,
  catalog: log_lib.Catalog,
  directory: os.PathLike[str] | str,
  *,
  fitted: os.PathLike[str] | str | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
  """The items' text vectors: those in the directory, or new ones.

  Writes features.npy and, with the settings, features.json; 'tfidf' and
  'backbone' also write text.npz. Items with equal text have equal rows, bit for
  bit; an item without text has a row of zeros.

  Args:
    config: the section.
    catalog: the items.
    directory: folder of the files.
    fitted: folder of an earlier call, whose space new items are placed in;
      None: the space is fitted to this catalog.
    mesh: of the language model; None: the batch over all devices.

  Returns:
    float32 [I, F], memory-mapped, rows of unit length.

  Raises:
    ValueError: the encoder is unknown; the vectors in the directory are damaged
      or of other texts; `fitted` has another space; a vector is not finite.
    FileNotFoundError: a file of the encoder or of `fitted` is missing.
    ModuleNotFoundError: a package is missing.
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
  record = _record(config, catalog, encoder, fitted)
  if not (directory / FEATURES).exists():
    if 'fitted' in record:
      shutil.copyfile(fitted / SPACE, directory / SPACE)
    space, fit = directory / SPACE, fitted is None
    if encoder is None:
      rows = _tfidf(config, catalog, space, fit)
    else:
      vectors, text_of_item = _encode(config, catalog, encoder, mesh)
      if config.text_encoder == 'backbone':
        vectors = _center(vectors, space, fit)
      rows = vectors[text_of_item]
    with files.atomic_write(directory / RECORD) as file:
      json.dump(record, file, indent=2)
    with files.atomic_write(directory / FEATURES, 'wb') as file:
      np.save(file, rows)
  return _open_features(directory, catalog, record)


def _record(
  config: ConfigDict,
  catalog: log_lib.Catalog,
  encoder: language_encoders.Encoder | None,
  fitted: pathlib.Path | None,
) -> dict[str, object]:
  """Everything that determines the vectors; the content of features.json."""
  record: dict[str, object] = {'text_encoder': config.text_encoder}
  if encoder is None:
    record['text_dim'] = config.text_dim
    record['text_buckets'] = config.text_buckets
  else:
    record['encoder'] = encoder.key
  if fitted is not None:
    _check_record(fitted, record, 'old and new items need one space')
    if config.text_encoder != 'minilm':
      content = (fitted / SPACE).read_bytes()
      record['fitted'] = hashlib.sha256(content).hexdigest()
  elif encoder is None:
    record['seed'] = config.seed
  texts = hashlib.sha256()
  for title, path, year in _texts(catalog):
    texts.update(json.dumps([title, *path, int(year)]).encode())
  return record | {'texts': texts.hexdigest()}


def _texts(catalog: log_lib.Catalog) -> zip:
  """(title, categories, year) of every item."""
  columns = catalog.titles, catalog.categories, catalog.years
  return zip(*columns, strict=True)


def _tfidf(
  config: ConfigDict, catalog: log_lib.Catalog, path: pathlib.Path, fit: bool
) -> np.ndarray:
  """Vectors [I, F] in the space of a file, which is fitted first if `fit`."""
  columns = catalog.titles, catalog.categories, catalog.years
  if fit:
    tfidf.fit(
      *columns,
      dim=config.text_dim,
      buckets=config.text_buckets,
      seed=config.seed,
    ).save(path)
  return tfidf.embed(tfidf.load(path), *columns)


def _encode(
  config: ConfigDict,
  catalog: log_lib.Catalog,
  encoder: language_encoders.Encoder,
  mesh: jax.sharding.Mesh | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Vectors [n, F] of the distinct texts, and each item's text int [I]."""
  rows: dict[str, int] = {}
  text_of_item = [
    rows.setdefault(language_encoders.line(*text), len(rows))
    for text in _texts(catalog)
  ]
  first_items = np.unique(text_of_item, return_index=True)[1]
  vectors = language_encoders.encode(
    encoder,
    list(rows),
    [f'item {catalog.item_ids[item]!r}' for item in first_items],
    config.text_batch_size,
    mesh or sharding.make_mesh(),
  )
  return vectors, np.array(text_of_item)


def _center(
  vectors_nxF: np.ndarray, path: pathlib.Path, fit: bool
) -> np.ndarray:
  """Subtracts the mean and scales to unit length; zero rows stay zero.

  A decoder's hidden states share a large mean, whatever the text (Mu and
  Viswanath, arXiv 1702.01417). `fit` computes the mean and writes it to the
  file; otherwise the file has it.
  """
  real = vectors_nxF.any(axis=1, keepdims=True)
  if fit:
    total = vectors_nxF.sum(axis=0, dtype=np.float64)
    mean = (total / max(real.sum(), 1)).astype(np.float32)
    with files.atomic_write(path, 'wb') as file:
      np.savez(file, mean=mean)
  else:
    try:
      with np.load(path) as file:
        mean = file['mean']
    except tfidf.DAMAGE as e:
      raise ValueError(
        f'{path}: no mean of text vectors in it ({e}); run the stage that '
        'fitted it again'
      ) from e
  out = np.where(real, vectors_nxF - mean, np.float32(0))
  norm = np.linalg.norm(out, axis=1, keepdims=True)
  return out / np.maximum(norm, 1e-6)


def _report_empty(catalog: log_lib.Catalog) -> None:
  """Prints a line where items have neither title nor category."""
  empty = [
    item_id
    for item_id, (title, path, _) in zip(
      catalog.item_ids, _texts(catalog), strict=True
    )
    if not title.strip() and not any(name.strip() for name in path)
  ]
  if empty:
    print(
      f'{len(empty)} of {len(catalog)} items have neither title nor category, '
      f'the first is item {empty[0]!r}: only the drawn codes distinguish them; '
      'give them a title'
    )


def _check_record(
  directory: pathlib.Path, record: Mapping[str, object], cure: str
) -> None:
  """Raises ValueError where the vectors of a directory have another record."""
  file = directory / RECORD
  try:
    stored = json.loads(file.read_text())
  except (OSError, ValueError) as e:
    raise ValueError(f'{file}: missing or damaged ({e}); {cure}') from e
  for name, value in record.items():
    if stored.get(name) != value:
      raise ValueError(
        f'{file}: made with {name} {stored.get(name)!r}, but this run has '
        f'{value!r}; {cure}'
      )


def _open_features(
  directory: pathlib.Path,
  catalog: log_lib.Catalog,
  record: Mapping[str, object],
) -> np.ndarray:
  """The vectors of a directory, checked against catalog and record."""
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
      item_id = catalog.item_ids[start + int(bad.argmax())]
      raise ValueError(
        f'{path}: the vector of item {item_id!r} is not finite; {cure}'
      )
  return rows
