"""A trained quantizer that maps catalogs of any size to semantic IDs.

Vectors are read in batches of one static shape, so they may be memory-mapped;
only codes are kept for every item.

Axis letters: B batch, I items, F text features, D latent width, L levels,
C codebook size.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import chex
import jax
import numpy as np
from ml_collections import ConfigDict

from gr2_jax.distributed import sharding
from gr2_jax.semantic_ids import assignment, ids, quantizer, rqvae

CHUNK = 4096  # vectors per batch; the last batch is padded


@dataclasses.dataclass(frozen=True)
class SidTokenizer:
  """Maps item vectors, in memory or memory-mapped, to semantic IDs."""

  config: ConfigDict  # the section `tokenizer`
  model: rqvae.Autoencoder
  # 'networks' of the autoencoder, and 'vectors' float32 [L, C, D].
  params: Mapping[str, chex.ArrayTree]
  mesh: jax.sharding.Mesh  # batches are split over it
  chunk: int = CHUNK

  def fitted_codes(self, features_IxF: np.ndarray) -> np.ndarray:
    """Codes of the fitted levels, int32 [I, L]; equal vectors get equal codes.

    Raises:
      ValueError: an item vector is not finite; the message names the first.
    """
    codes = functools.partial(_codes, self.model, self.config.beam)
    return self._map(codes, features_IxF)

  def latents(self, features_IxF: np.ndarray) -> np.ndarray:
    """Encodes items: float32 [I, D]; equal vectors get equal bits."""
    return self._map(functools.partial(_latents, self.model), features_IxF)

  def complete(
    self,
    features_IxF: np.ndarray,
    fitted_IxL: np.ndarray,
    taken: np.ndarray | None = None,
  ) -> tuple[ids.SemanticIds, int]:
    """A tuple for every item, unique where `last_level` guarantees it.

    Args:
      features_IxF: float32.
      fitted_IxL: int32, of `fitted_codes`.
      taken: int32 [T, levels], tuples that no item here may get.

    Returns:
      The semantic IDs, and the number of items moved out of full prefixes.
    """
    codes, spilled = assignment.complete(
      fitted_IxL,
      np.asarray(self.params['vectors']),
      lambda items: self.latents(features_IxF[items]),
      levels=self.config.levels,
      kind=self.config.last_level,
      seed=self.config.seed,
      taken=taken,
    )
    return ids.SemanticIds(codes, self.config.codebook_size), spilled

  def reconstruction_r2(
    self, features_IxF: np.ndarray, codes_IxL: np.ndarray
  ) -> float:
    """Share of the vectors' variance that the codewords' sum explains.

    1 - sum |x - x'|^2 / sum |x - mean x|^2, with codes of the fitted levels.
    """
    error, square, total = 0.0, 0.0, np.zeros(self.model.features)
    begin = 0
    for batch, real in self._batches(
      features_IxF, np.arange(len(features_IxF))
    ):
      codes = np.zeros((len(batch), codes_IxL.shape[1]), np.int32)
      codes[:real] = codes_IxL[begin : begin + real]
      begin += real
      codes = sharding.shard_batch(codes, self.mesh)
      residual = np.asarray(_residual(self.model, self.params, batch, codes))
      x = np.asarray(batch)[:real].astype(np.float64)
      error += float((residual[:real].astype(np.float64) ** 2).sum())
      total += x.sum(0)
      square += float((x**2).sum())
    variance = square - float((total**2).sum()) / len(features_IxF)
    return 1.0 - error / max(variance, 1e-12)

  def _map(
    self, function: Callable[..., jax.Array], features_IxF: np.ndarray
  ) -> np.ndarray:
    """Applies a function to every distinct vector: [I, ...]."""
    rows, row_of_item = distinct_rows(features_IxF)
    results = [
      (function(self.params, batch), real)
      for batch, real in self._batches(features_IxF, rows)
    ]
    values = np.concatenate([np.asarray(x)[:real] for x, real in results])
    return values[row_of_item]

  def _batches(
    self, features_IxF: np.ndarray, rows: np.ndarray
  ) -> Iterator[tuple[jax.Array, int]]:
    """Batches [B, F] of rows, and the number of real rows in each."""
    for begin in range(0, len(rows), self.chunk):
      part = features_IxF[rows[begin : begin + self.chunk]]
      padded = np.zeros((self.chunk, part.shape[1]), np.float32)
      padded[: len(part)] = part
      yield sharding.shard_batch(padded, self.mesh), len(part)


@functools.partial(jax.jit, static_argnums=0)
def _latents(
  model: rqvae.Autoencoder, params: Mapping[str, chex.ArrayTree], x: jax.Array
) -> jax.Array:
  return model.apply({'params': params['networks']}, x, method='encode')


@functools.partial(jax.jit, static_argnums=(0, 1))
def _codes(
  model: rqvae.Autoencoder,
  beam: int,
  params: Mapping[str, chex.ArrayTree],
  x_BxF: jax.Array,
) -> jax.Array:
  latents = _latents(model, params, x_BxF)
  return quantizer.search(latents, params['vectors'], beam=beam)


@functools.partial(jax.jit, static_argnums=0)
def _residual(
  model: rqvae.Autoencoder,
  params: Mapping[str, chex.ArrayTree],
  x_BxF: jax.Array,
  codes_BxL: jax.Array,
) -> jax.Array:
  """Vectors minus their reconstruction from codes, [B, F]."""
  levels = np.arange(codes_BxL.shape[1])
  words = params['vectors'][levels, codes_BxL].sum(1)
  variables = {'params': params['networks']}
  return x_BxF - model.apply(variables, words, method='decode')


def params_of(state: rqvae.State) -> dict[str, chex.ArrayTree]:
  """The parameters of a tokenizer in a training state."""
  return {
    'networks': state.moved['networks'],
    'vectors': state.codebooks['vectors'],
  }


def distinct_rows(features_IxF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The first row of each distinct value, by two 64-bit hashes of its bytes.

  Args:
    features_IxF: float32, in memory or memory-mapped.

  Returns:
    int64 [R] rows in order, and for each row the index of its equal, int64 [I].

  Raises:
    ValueError: a row is not finite; the message names the first.
  """
  width = features_IxF.shape[1]
  rng = np.random.default_rng(0)
  factors = rng.integers(1 << 63, size=(width, 2), dtype=np.uint64) * 2 + 1
  hashes = np.empty((len(features_IxF), 2), np.uint64)
  for begin in range(0, len(features_IxF), CHUNK):
    part = np.ascontiguousarray(features_IxF[begin : begin + CHUNK]) + 0.0
    bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
    if len(bad):
      raise ValueError(
        f'the embedding of item {begin + bad[0]} holds NaN or infinity: check '
        'its text, or the model that embeds it (tokenizer.text_encoder)'
      )
    bits = part.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = bits * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
    bits ^= bits >> np.uint64(29)
    hashes[begin : begin + CHUNK] = bits @ factors
  order = np.lexsort(hashes.T)  # stable: equal rows stay in catalog order
  changes = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
  new = np.concatenate([[True], changes])
  rows, group = order[new], np.cumsum(new) - 1
  rank = np.empty(len(rows), np.int64)  # of each group, by its first row
  rank[np.argsort(rows)] = np.arange(len(rows))
  row_of_item = np.empty(len(order), np.int64)
  row_of_item[order] = rank[group]
  return np.sort(rows), row_of_item
