"""Tokenizer: item text -> RQ-VAE -> one semantic ID per item.

Resume: the text vectors are kept once made; the training state is saved every
`checkpoint_every` steps; batches are a function of (seed, step), so a run that
was killed ends bit for bit where an uninterrupted one does.
"""

import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax import checkpoint, reporting
from gr2_jax.data import log as log_lib
from gr2_jax.data import slates, text
from gr2_jax.models import codebooks, rqvae, semantic_ids, sid_assignment


def run(config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path) -> dict:
  """Makes the semantic IDs of the catalog of inputs['slates'].

  Leaves in `workdir`: sids.npz and sids.json (see semantic_ids), sids.jsonl
  (item_id, codes), features.npy (text vectors float32 [I, F]), checkpoints,
  metrics.

  Args:
    config: the run's config; its `tokenizer` section is read.
    inputs: upstream artifact directories; 'slates' is read.
    workdir: this stage's directory.

  Returns:
    SemanticIds.statistics(), reconstruction_r2 of the fitted levels, items
    spilled, and seconds of this process.

  Raises:
    ValueError: a config field has no meaning, the catalog does not fit in the
      code space, an item id occurs twice or a text vector is not finite.
    FloatingPointError: the training diverged.
  """
  started = time.monotonic()
  config = config.tokenizer
  workdir = pathlib.Path(workdir)
  if config.last_level not in sid_assignment.LAST_LEVELS:
    raise ValueError(
      f'tokenizer.last_level is {config.last_level!r}; it must be one of '
      f'{sid_assignment.LAST_LEVELS}'
    )
  drawn = config.last_level != 'fitted'
  if config.levels < 1 + drawn:
    raise ValueError(
      f'tokenizer.levels={config.levels} leaves no level to fit: raise it'
    )

  # ------------------------------------------------------------- Input
  catalog = slates.read_catalog(inputs['slates'])
  semantic_ids.check_item_ids(catalog.item_ids)
  sid_assignment.check_capacity(
    len(catalog), config.levels, config.codebook_size
  )
  features = _text_features(config, catalog, workdir)

  # --------------------------------------------- Model, optimizer, state
  levels = config.levels - drawn
  model = rqvae.make_model(config, features.shape[1])
  optimizer = rqvae.make_optimizer(config)
  update = rqvae.make_update(config, model, optimizer)
  draw = jax.jit(rqvae.draw_batch, static_argnums=1)
  key = jax.random.key(config.seed)
  data = jnp.asarray(features)
  saver = checkpoint.Checkpointer(workdir / 'checkpoints')
  abstract = jax.eval_shape(
    lambda: rqvae.init_shapes(config, features.shape[1], levels)
  )
  # 1. Own workdir: go on from the last checkpoint.  2. Scratch.
  restored = saver.restore(abstract)
  if restored:
    state, first, _ = restored
  else:
    state = rqvae.init(config, features, levels)
    first = 0

  # -------------------------------------------------------------- Train
  with (
    saver,
    reporting.MetricsWriter(workdir, first) as writer,
    reporting.progress(config.steps, 'tokenizer', first) as bar,
  ):
    for step in range(first, config.steps):
      batch = draw(data, config.batch_size, key, state.step)
      state, metrics = update(state, batch)
      done = step + 1
      log = done % config.log_every == 0 or done == config.steps
      save = done % config.checkpoint_every == 0 or done == config.steps
      if log or save:
        reporting.check_finite(done, metrics)
      if log:
        writer.write(done, metrics)
      if save:
        saver.save(done, state)
      bar.update()

  # ------------------------------------------------------ Semantic IDs
  vectors = state.codebooks['vectors']
  latents = rqvae.encode(model, state.params, features)
  fitted = np.asarray(codebooks.quantise(latents, vectors)[0])
  codes, spilled = fitted, 0
  if config.last_level == 'unused':
    codes, spilled = sid_assignment.spill(
      latents, np.asarray(vectors), fitted, levels=config.levels
    )
  if drawn:
    codes = sid_assignment.draw_last_level(
      codes, config.codebook_size, seed=config.seed, kind=config.last_level
    )
  sids = semantic_ids.SemanticIds(codes, config.codebook_size)
  sids.save(workdir)
  sids.export(workdir / 'sids.jsonl', catalog.item_ids)
  return {
    **sids.statistics(),
    'reconstruction_r2': rqvae.reconstruction_r2(
      model, state.params, vectors, features
    ),
    'spilled': spilled,
    'seconds': time.monotonic() - started,
  }


def _text_features(
  config, catalog: log_lib.Catalog, workdir: pathlib.Path
) -> np.ndarray:
  """Text vectors float32 [I, F]: those in the workdir, or fresh ones."""
  path = workdir / 'features.npy'
  if path.exists():
    features = np.load(path)
    if features.shape == (len(catalog), config.text_dim):
      return features
    raise ValueError(
      f'{path}: {features.shape}, but the catalog and tokenizer.text_dim give '
      f'{(len(catalog), config.text_dim)}; delete the file'
    )
  features = text.features(
    catalog.titles,
    catalog.categories,
    catalog.years,
    dim=config.text_dim,
    buckets=config.text_buckets,
    seed=config.seed,
  )
  workdir.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name('features.tmp')
  with temporary.open('wb') as file:
    np.save(file, features)
  os.replace(temporary, path)
  return features
