"""Trains the quantizer of a catalog, and loads a trained one.

Resume: the training state is saved every `checkpoint_every` steps and batches
are a function of (seed, step), so a killed run ends with the same bits as an
uninterrupted one. `stage` is the section `tokenizer` throughout.
"""

import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gr2_jax.distributed import sharding
from gr2_jax.pipeline import artifacts, checkpoint, loop
from gr2_jax.semantic_ids import assignment, co_engagement, ids, rqvae
from gr2_jax.semantic_ids import tokenizer as tokenizer_lib

PARAMS = 'params'
# Fields that determine an item's tuple under a trained quantizer.
NAMING = (
  'seed', 'levels', 'codebook_size', 'text_encoder', 'text_dim', 'text_buckets',
  'text_source', 'hidden', 'latent', 'codebook', 'beam', 'last_level',
  'drawn_levels',
)  # fmt: skip


def check(stage: ConfigDict) -> None:
  """Raises ValueError where a field of the section has an invalid value."""
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
  if stage.levels <= completed_levels(stage):
    raise ValueError(
      f'tokenizer.levels={stage.levels} leaves no level to fit: raise it'
    )


def completed_levels(stage: ConfigDict) -> int:
  """Number of levels that are assigned after the fit: drawn ones or a digit."""
  if stage.last_level in ('unused', 'uniform'):
    return stage.drawn_levels
  return int(stage.last_level == 'digit')


def train(
  stage: ConfigDict,
  features_IxF: np.ndarray,
  neighbors: co_engagement.Neighbors | None,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
) -> tuple[tokenizer_lib.SidTokenizer, int]:
  """Fits the quantizer to a catalog's vectors.

  Args:
    stage: the section.
    features_IxF: float32, in memory or memory-mapped.
    neighbors: of every item, for the contrastive loss.
    mesh: batches are split over it.
    workdir: gets `checkpoints`, `metrics.jsonl` and `params`.

  Returns:
    The tokenizer with the chosen parameters, and the step of these.
  """
  levels = stage.levels - completed_levels(stage)
  steps = 0 if stage.codebook == 'kmeans' else stage.steps
  width = features_IxF.shape[1]
  model = rqvae.make_model(stage, width)
  update = rqvae.make_update(stage, model)
  sample = _sample(stage, features_IxF)

  def take_step(state: rqvae.State, step: int):
    batch = rqvae.draw_batch(stage, features_IxF, neighbors, step - 1)
    return update(state, sharding.shard_batch(batch, mesh))

  def evaluate(state: rqvae.State, step: int) -> loop.Evaluation:
    """Measures a state; saves its parameters if it is the best so far."""
    tokenizer = tokenizer_lib.SidTokenizer(
      stage, model, tokenizer_lib.params_of(state), mesh
    )
    codes = tokenizer.fitted_codes(sample)
    measures = {
      'uniqueness': float(
        ids.SemanticIds(codes, stage.codebook_size).unique().mean()
      ),
      'r2': tokenizer.reconstruction_r2(sample, codes),
    }
    if not best or _merit(measures) > _merit(best):
      best.update(measures | {'step': step})
      checkpoint.save_params(workdir / PARAMS, tokenizer.params)
    return loop.Evaluation(
      state, {f'catalog/{name}': x for name, x in measures.items()}
    )

  with checkpoint.Checkpointer(workdir / 'checkpoints') as checkpoints:
    # Resume from this workdir's last checkpoint, or start from scratch.
    restored = checkpoints.restore(_abstract(stage, width, mesh))
    if restored:
      state, done, best = restored
    else:
      state = rqvae.init(stage, features_IxF, levels)
      state = jax.device_put(state, sharding.replicated(mesh))
      done, best = 0, {}
    loop.run(
      'tokenizer',
      workdir,
      checkpoints,
      state=state,
      done=done,
      steps=steps,
      eval_every=stage.checkpoint_every,
      take_step=take_step,
      evaluate=evaluate,
      meta=lambda: best,
      log_every=stage.log_every,
      evaluate_start=not steps,
    )
  return load(stage, workdir / PARAMS, width, mesh), best['step']


def _merit(measures: dict[str, float]) -> tuple[float, float]:
  """Uniqueness to a tenth of a percent, then reconstruction."""
  return round(measures['uniqueness'], 3), measures['r2']


def _sample(stage: ConfigDict, features_IxF: np.ndarray) -> np.ndarray:
  """A fixed draw of vectors that checkpoints are compared on."""
  if len(features_IxF) <= stage.eval_items:
    return features_IxF
  rng = np.random.default_rng(stage.seed)
  rows = np.sort(rng.permutation(len(features_IxF))[: stage.eval_items])
  return features_IxF[rows]


def assign_ids(
  tokenizer: tokenizer_lib.SidTokenizer,
  features_IxF: np.ndarray,
  taken: np.ndarray | None = None,
) -> tuple[ids.SemanticIds, dict[str, Any]]:
  """Semantic IDs of items, and measures of the assignment.

  Args:
    tokenizer: trained.
    features_IxF: float32 text vectors.
    taken: int32 [T, levels], tuples that no item here may get.

  Returns:
    The IDs; `spilled`, items moved out of full prefixes, and
    `reconstruction_r2` of the fitted levels.
  """
  fitted = tokenizer.fitted_codes(features_IxF)
  sids, spilled = tokenizer.complete(features_IxF, fitted, taken)
  return sids, {
    'spilled': spilled,
    'reconstruction_r2': tokenizer.reconstruction_r2(features_IxF, fitted),
  }


def load(
  stage: ConfigDict, params: pathlib.Path, width: int, mesh: jax.sharding.Mesh
) -> tokenizer_lib.SidTokenizer:
  """The tokenizer whose parameters `train` saved, for vectors of a width."""
  model = rqvae.make_model(stage, width)
  state = _abstract(stage, width, mesh)
  wanted = tokenizer_lib.params_of(state)
  return tokenizer_lib.SidTokenizer(
    stage, model, checkpoint.load_params(params, wanted), mesh
  )


def _abstract(
  stage: ConfigDict, width: int, mesh: jax.sharding.Mesh
) -> rqvae.State:
  """Shapes and shardings of the training state."""
  levels = stage.levels - completed_levels(stage)
  shapes = jax.eval_shape(lambda: rqvae.init_shapes(stage, width, levels))
  whole = sharding.replicated(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
  )


def check_same(stage: ConfigDict, earlier: pathlib.Path) -> None:
  """Raises ValueError where a field of NAMING differs from an artifact's."""
  stored = artifacts.read_config(earlier).get('tokenizer', {})
  section = stage.to_dict()
  for field in NAMING:
    value = section[field]
    value = list(value) if isinstance(value, tuple) else value
    if stored.get(field) != value:
      raise ValueError(
        f'tokenizer.{field} is {section[field]!r}, but {earlier} was made with '
        f'{stored.get(field)!r}: all items of a catalog need one tokenizer'
      )
