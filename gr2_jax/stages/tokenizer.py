"""Tokenizer: item text -> vectors -> residual quantiser -> semantic IDs.

Resume: the text vectors are kept once made; the training state is saved every
`checkpoint_every` steps; batches are a function of (seed, step), so a run that
was killed ends bit for bit where an uninterrupted one does.

With `tokenizer.extends` nothing is trained: the items of an earlier artifact
keep their IDs, and new items get IDs from the same quantiser.
"""

import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np

from gr2_jax.data import log as log_lib
from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.semantic_ids import (
  assignment,
  co_engagement,
  ids,
  text_encoders,
  training,
)


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Makes the semantic IDs of the catalog of inputs['slates'].

  Leaves in `workdir`: sids.npz and sids.json (see semantic_ids), sids.jsonl and
  sids.parquet (item_id, codes), params (networks and codebooks), features.npy
  (text vectors float32 [I, F]), checkpoints, metrics.

  Args:
    config: the run's config; its sections `tokenizer` and `mesh` are read.
    inputs: upstream artifact directories; 'slates' is read.
    workdir: this stage's directory.

  Returns:
    SemanticIds.statistics() and seconds of this process; of the items that
    were named here, reconstruction_r2 of the fitted levels and how many were
    spilled; the chosen step, or, where an artifact was extended, how many items
    were known, are new and have left.

  Raises:
    ValueError: a config field has no meaning, the catalog does not fit in the
      code space, an item id is empty or occurs twice, or a text vector is not
      finite.
    FloatingPointError: the training diverged.
  """
  started = time.monotonic()
  stage = config.tokenizer
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  catalog = slates_lib.read_catalog(inputs['slates'])
  ids.check_item_ids(catalog.item_ids)
  assignment.check_capacity(len(catalog), stage.levels, stage.codebook_size)
  if stage.extends:
    sids, found = _extend(stage, catalog, mesh, workdir)
  else:
    training.check(stage)
    features = text_encoders.embed(stage, catalog, workdir, mesh=mesh)
    neighbours = None
    if stage.contrastive_weight:
      neighbours = co_engagement.neighbours(
        slates_lib.read(inputs['slates'], 'train'),
        len(catalog),
        window=stage.contrastive_window,
      )
    tokenizer, step = training.train(stage, features, neighbours, mesh, workdir)
    sids, found = training.name(tokenizer, features)
    found['step'] = step
  sids.save(workdir)
  sids.export(workdir / ids.EXPORT, catalog.item_ids)
  sids.export(workdir / 'sids.parquet', catalog.item_ids)
  seconds = time.monotonic() - started
  return sids.statistics() | found | {'seconds': seconds}


def _extend(
  stage,
  catalog: log_lib.Catalog,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
) -> tuple[ids.SemanticIds, dict[str, Any]]:
  """IDs of a catalog whose known items keep the IDs they have.

  Items are known by their ids. One whose text has changed keeps its tuple; the
  tuple of one that is gone is retired, never to be given again.
  """
  earlier = pathlib.Path(stage.extends)
  if stage.last_level not in ('unused', 'digit'):
    raise ValueError(
      f'tokenizer.extends: last_level={stage.last_level!r} may give a new item '
      "the tuple of another; 'unused' and 'digit' never do"
    )
  if not (earlier / 'results.json').is_file():
    raise ValueError(
      f'tokenizer.extends: {earlier} is no finished artifact: run its stage to '
      'the end, or give the folder of another'
    )
  training.check_same(stage, earlier)
  known = ids.load(earlier)
  row_of = {id_: row for row, id_ in enumerate(ids.load_item_ids(earlier))}
  rows = np.array([row_of.get(id_, -1) for id_ in catalog.item_ids])
  shutil.copytree(
    earlier / training.PARAMS, workdir / training.PARAMS, dirs_exist_ok=True
  )
  new = np.flatnonzero(rows < 0)
  codes, found = np.zeros((0, known.levels), np.int32), {}
  if len(new):
    features = text_encoders.embed(
      stage, catalog.take(new), workdir, fitted=earlier, mesh=mesh
    )
    tokenizer = training.load(
      stage, workdir / training.PARAMS, features.shape[1], mesh
    )
    named, found = training.name(tokenizer, features, known.taken)
    codes = named.codes
  else:  # The space of the vectors stays with what may be extended again.
    for file in (text_encoders.RECORD, text_encoders.SPACE):
      if (earlier / file).exists():
        shutil.copyfile(earlier / file, workdir / file)
  sids = known.extend(rows, codes)
  return sids, found | {
    'known': len(rows) - len(new),
    'new': len(new),
    'retired': len(sids.retired),
  }
