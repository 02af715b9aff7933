"""Trains the quantizer of a catalog, and loads a trained one.

Resume: the training state is saved every `checkpoint_every` steps; batches are
a function of (seed, step), so a run that was killed ends bit for bit where an
uninterrupted one does.
"""

import pathlib
from typing import Any

import jax
import numpy as np

from gr2_jax.distributed import sharding
from gr2_jax.pipeline import artifacts, checkpoint, reporting
from gr2_jax.semantic_ids import (
  assignment,
  co_engagement,
  ids,
  rqvae,
)
from gr2_jax.semantic_ids import tokenizer as tokenizer_lib

PARAMS = 'params'

# Fields that an item's tuple depends on once the quantiser is trained.
NAMING = (
  'seed',
  'levels',
  'codebook_size',
  'text_encoder',
  'text_dim',
  'text_buckets',
  'text_source',
  'hidden',
  'latent',
  'codebook',
  'beam',
  'last_level',
  'drawn_levels',
)


def check(stage) -> None:
  """Raises ValueError naming the field of the section that has no meaning."""
  rqvae.check(stage)
  if stage.last_level not in assignment.LAST_LEVELS:
    raise ValueError(
      f'tokenizer.last_level is {stage.last_level!r}; it must be one of '
      f'{assignment.LAST_LEVELS}'
    )
  if stage.last_level in ('unused', 'uniform') and stage.drawn_levels < 1:
    raise ValueError(
      f'tokenizer.drawn_levels={stage.drawn_levels}: '
      f'last_level={stage.last_level!r} draws at least 1'
    )
  if stage.codebook_size**stage.levels > 2**63 - 1:
    raise ValueError(
      f'tokenizer.levels={stage.levels} of tokenizer.codebook_size='
      f'{stage.codebook_size} codes do not fit in 63 bits: lower one of them'
    )
  if stage.levels <= appended(stage):
    raise ValueError(
      f'tokenizer.levels={stage.levels} leaves no level to fit: raise it'
    )


def appended(stage) -> int:
  """Levels that are given after the fit: drawn ones, or a digit."""
  return {'unused': stage.drawn_levels, 'uniform': stage.drawn_levels}.get(
    stage.last_level, int(stage.last_level == 'digit')
  )


def train(
  stage,
  features: np.ndarray,
  neighbours: co_engagement.Neighbours | None,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
) -> tuple[tokenizer_lib.SidTokenizer, int]:
  """Fits the quantiser to a catalog's vectors.

  Args:
    stage: section `tokenizer`.
    features: float32 [I, F]; may lie on disk.
    neighbours: of every item, for the contrastive loss.
    mesh: batches are split over it.
    workdir: gets `checkpoints`, `metrics.jsonl` and `params`.

  Returns:
    The tokenizer with the chosen parameters, and the step they are of.
  """
  levels = stage.levels - appended(stage)
  steps = 0 if stage.codebook == 'kmeans' else stage.steps
  width = features.shape[1]
  model = rqvae.make_model(stage, width)
  update = rqvae.make_update(stage, model)
  sample = _sample(stage, features)

  def consider(step: int, state: rqvae.State, best: dict) -> dict:
    """Measures the fit; keeps its parameters if it is the best so far."""
    own = tokenizer_lib.SidTokenizer(
      stage, model, tokenizer_lib.params_of(state), mesh
    )
    codes = own.fitted_codes(sample)
    found = {
      'uniqueness': float(
        ids.SemanticIds(codes, stage.codebook_size).unique().mean()
      ),
      'r2': own.reconstruction_r2(sample, codes),
    }
    writer.write(step, {f'catalog/{k}': v for k, v in found.items()})
    if not best or _merit(found) > _merit(best):
      best = found | {'step': step}
      checkpoint.save_params(workdir / PARAMS, own.params)
    return best

  with checkpoint.Checkpointer(workdir / 'checkpoints') as saver:
    # 1. Own workdir: go on from the last checkpoint.  2. Scratch.
    restored = saver.restore(_abstract(stage, width, mesh))
    if restored:
      state, first, best = restored
    else:
      state = rqvae.init(stage, features, levels)
      state = jax.device_put(state, sharding.replicated(mesh))
      first, best = 0, {}
    with (
      reporting.MetricsWriter(workdir, first if restored else -1) as writer,
      reporting.progress(steps, 'tokenizer', first) as bar,
    ):
      if not steps:
        best = consider(0, state, best)
      for step in range(first, steps):
        batch = rqvae.draw_batch(stage, features, neighbours, step)
        state, metrics = update(state, sharding.shard_batch(batch, mesh))
        done = step + 1
        save = done % stage.checkpoint_every == 0 or done == steps
        if save or done % stage.log_every == 0:
          reporting.check_finite(done, metrics)
          writer.write(done, metrics)
        if save:
          best = consider(done, state, best)
          saver.save(done, state, meta=best)
        bar.update()
  return load(stage, workdir / PARAMS, width, mesh), best['step']


def _merit(found: dict[str, float]) -> tuple[float, float]:
  """Uniqueness first; within a tenth of a per cent, reconstruction."""
  return round(found['uniqueness'], 3), found['r2']


def _sample(stage, features: np.ndarray) -> np.ndarray:
  """The vectors that checkpoints are compared on: a fixed draw."""
  if len(features) <= stage.eval_items:
    return features
  rng = np.random.default_rng(stage.seed)
  rows = np.sort(rng.permutation(len(features))[: stage.eval_items])
  return features[rows]


def name(
  tokenizer: tokenizer_lib.SidTokenizer,
  features: np.ndarray,
  taken: np.ndarray | None = None,
) -> tuple[ids.SemanticIds, dict[str, Any]]:
  """Semantic IDs of items, none of them taken, and how it went."""
  fitted = tokenizer.fitted_codes(features)
  sids, spilled = tokenizer.complete(features, fitted, taken)
  return sids, {
    'spilled': spilled,
    'reconstruction_r2': tokenizer.reconstruction_r2(features, fitted),
  }


def load(
  stage, params: pathlib.Path, width: int, mesh: jax.sharding.Mesh
) -> tokenizer_lib.SidTokenizer:
  """A trained tokenizer.

  Args:
    stage: section `tokenizer` that it was trained with.
    params: folder that `train` left.
    width: of the text vectors, F.
    mesh: batches are split over it.
  """
  model = rqvae.make_model(stage, width)
  state = _abstract(stage, width, mesh)
  wanted = tokenizer_lib.params_of(state)
  return tokenizer_lib.SidTokenizer(
    stage, model, checkpoint.load_params(params, wanted), mesh
  )


def _abstract(stage, width: int, mesh: jax.sharding.Mesh) -> rqvae.State:
  """Shapes and shardings of the training state."""
  levels = stage.levels - appended(stage)
  shapes = jax.eval_shape(lambda: rqvae.init_shapes(stage, width, levels))
  whole = sharding.replicated(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
  )


def check_same(stage, earlier: pathlib.Path) -> None:
  """Raises ValueError naming a field that would give new items other codes."""
  theirs = artifacts.read_config(earlier).get('tokenizer', {})
  ours = stage.to_dict()
  for field in NAMING:
    value = ours[field]
    value = list(value) if isinstance(value, tuple) else value
    if theirs.get(field) != value:
      raise ValueError(
        f'tokenizer.{field} is {ours[field]!r}, but {earlier} was made with '
        f'{theirs.get(field)!r}: items of one catalog need one tokenizer'
      )
