"""Tokenizer: item text -> vectors -> residual quantizer -> semantic IDs.

With `tokenizer.extends` nothing is trained: the items of an earlier artifact
keep their IDs, and new items get IDs from the same quantizer.
"""

import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

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
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Makes the semantic IDs of a catalog.

  Writes sids.npz and sids.json, sids.jsonl and sids.parquet (item_id, codes),
  params (networks and codebooks), and features.npy (text vectors [I, F]).

  Returns:
    SemanticIds.statistics(); of the items that got IDs, reconstruction_r2 and
    the number spilled; the selected step, or, with `extends`, the numbers of
    known, new and retired items.

  Raises:
    ValueError: a config field is invalid, the catalog does not fit in the code
      space, an item id is empty or occurs twice, or a text vector is not
      finite.
    FloatingPointError: the training diverged.
  """
  started = time.monotonic()
  stage = config.tokenizer
  mesh = sharding.make_mesh(**config.mesh)
  workdir.mkdir(parents=True, exist_ok=True)
  catalog = slates_lib.read_catalog(inputs['slates'])
  ids.check_item_ids(catalog.item_ids)
  assignment.check_capacity(len(catalog), stage.levels, stage.codebook_size)
  if stage.extends:
    sids, results = _extend(stage, catalog, mesh, workdir)
  else:
    training.check(stage)
    features = text_encoders.embed(stage, catalog, workdir, mesh=mesh)
    neighbors = None
    if stage.contrastive_weight:
      neighbors = co_engagement.neighbors(
        slates_lib.read(inputs['slates'], 'train'),
        len(catalog),
        window=stage.contrastive_window,
      )
    tokenizer, step = training.train(stage, features, neighbors, mesh, workdir)
    sids, results = training.assign_ids(tokenizer, features)
    results['step'] = step
  sids.save(workdir)
  sids.export(workdir / ids.EXPORT, catalog.item_ids)
  sids.export(workdir / 'sids.parquet', catalog.item_ids)
  seconds = time.monotonic() - started
  return sids.statistics() | results | {'seconds': seconds}


def _extend(
  stage: ConfigDict,
  catalog: log_lib.Catalog,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
) -> tuple[ids.SemanticIds, dict[str, Any]]:
  """IDs of a catalog whose known items keep their IDs.

  Items are matched by item id. An item with changed text keeps its tuple; the
  tuple of an item that is gone is retired and never reused.
  """
  earlier = pathlib.Path(stage.extends)
  if stage.last_level not in ('unused', 'digit'):
    raise ValueError(
      f'tokenizer.extends: last_level={stage.last_level!r} may give a new item '
      "the tuple of another; 'unused' and 'digit' never do"
    )
  if not (earlier / 'results.json').is_file():
    raise ValueError(
      f'tokenizer.extends: {earlier} is not a finished artifact: finish its '
      'run, or give another folder'
    )
  training.check_same(stage, earlier)
  known = ids.load(earlier)
  row_of = {id_: row for row, id_ in enumerate(ids.load_item_ids(earlier))}
  rows = np.array([row_of.get(id_, -1) for id_ in catalog.item_ids])
  shutil.copytree(
    earlier / training.PARAMS, workdir / training.PARAMS, dirs_exist_ok=True
  )
  new = np.flatnonzero(rows < 0)
  codes, results = np.zeros((0, known.levels), np.int32), {}
  if len(new):
    features = text_encoders.embed(
      stage, catalog.take(new), workdir, fitted=earlier, mesh=mesh
    )
    tokenizer = training.load(
      stage, workdir / training.PARAMS, features.shape[1], mesh
    )
    new_ids, results = training.assign_ids(tokenizer, features, known.taken)
    codes = new_ids.codes
  else:  # A later extension of this artifact needs the text vectors' space.
    for file in (text_encoders.RECORD, text_encoders.SPACE):
      if (earlier / file).exists():
        shutil.copyfile(earlier / file, workdir / file)
  sids = known.extend(rows, codes)
  return sids, results | {
    'known': len(rows) - len(new),
    'new': len(new),
    'retired': len(sids.retired),
  }
