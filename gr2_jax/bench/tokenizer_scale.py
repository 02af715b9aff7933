"""The cost of semantic IDs as a catalog grows, extrapolated to a billion.

python -m gr2_jax.bench.tokenizer_scale

Vectors in clusters of unequal sizes are written to disk. Texts repeat, the most
frequent ten thousand times, so that prefixes overflow. Another process trains
the tokenizer on them, as its stage does, from disk, and gives every item a
tuple. Memory is the peak of that process.

Axes: I items, F width of a vector, R distinct texts.
"""

import json
import multiprocessing
import pathlib
import resource
import tempfile
import time
from typing import Any

import numpy as np
from absl import app, flags, logging

from configs import tokenizer as tokenizer_config
from gr2_jax import bench
from gr2_jax.distributed import sharding
from gr2_jax.pipeline import reporting
from gr2_jax.semantic_ids import training

_CATALOGS = flags.DEFINE_list(
  'catalogs', ['10000', '100000', '1000000'], 'Sizes of the catalog.'
)
_WIDTH = flags.DEFINE_integer('width', 128, 'Width of a vector.', 1)
_UPDATES = flags.DEFINE_integer('updates', 1000, 'Of training.', 1)
_FOLDER = flags.DEFINE_string('folder', '', "Where vectors go; '': temporary.")

CLUSTERS = 1000
MAX_REPEATS = 10_000  # items that share a text
BILLION = 10**9
PHASES = ('train', 'assign', 'complete')


def write_vectors(path: pathlib.Path, items: int, dim: int, seed: int) -> int:
  """Writes float32 [I, F] unit vectors of a catalog with repeated texts.

  Texts are drawn around Zipf-sized clusters. Half of the items have a text of
  their own; the others share theirs, in groups of Pareto sizes.

  Returns:
    The number of texts.
  """
  rng = np.random.default_rng(seed)
  sizes = [1] * (items // 2)
  left = items - len(sizes)
  while left:
    size = int(min(2 * (1 + rng.pareto(0.8)), MAX_REPEATS, left))
    sizes.append(size)
    left -= size
  text_of_item = np.repeat(np.arange(len(sizes)), sizes)
  rng.shuffle(text_of_item)
  centers = rng.standard_normal((CLUSTERS, dim), np.float32)
  share = 1 / np.arange(1, CLUSTERS + 1)
  cluster = rng.choice(CLUSTERS, len(sizes), p=share / share.sum())
  texts = centers[cluster]
  texts += 0.5 * rng.standard_normal(texts.shape, np.float32)
  texts /= np.linalg.norm(texts, axis=1, keepdims=True)
  out = np.lib.format.open_memmap(
    path, mode='w+', dtype=np.float32, shape=(items, dim)
  )
  for begin in range(0, items, 1 << 16):
    part = slice(begin, begin + (1 << 16))
    out[part] = texts[text_of_item[part]]
  out.flush()
  return len(sizes)


def name_catalog(vectors: str, workdir: str, steps: int) -> dict[str, Any]:
  """Trains on a file of vectors and gives its items tuples, in a fresh process.

  Returns:
    Seconds of each of PHASES, uniqueness, spilled items, and the process's
    peak memory in GiB.
  """
  clock = [time.perf_counter()]
  stage = tokenizer_config.section()
  stage.steps = steps
  features = np.load(vectors, mmap_mode='r')
  fitted, _ = training.train(
    stage, features, None, sharding.make_mesh(), pathlib.Path(workdir)
  )
  clock.append(time.perf_counter())
  codes = fitted.fitted_codes(features)
  clock.append(time.perf_counter())
  sids, spilled = fitted.complete(features, codes)
  clock.append(time.perf_counter())
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return {
    **dict(zip(PHASES, np.diff(clock).tolist(), strict=True)),
    'uniqueness': float(sids.unique().mean()),
    'spilled': spilled,
    'memory': peak / 2**20,
  }


def measure(items: int, dim: int, steps: int, folder: str) -> dict[str, Any]:
  """Draws a catalog, and runs `name_catalog` in a process of its own.

  Raises:
    RuntimeError: the process failed; its message is above.
  """
  with tempfile.TemporaryDirectory(dir=folder or None) as home:
    path = pathlib.Path(home, 'vectors.npy')
    texts = write_vectors(path, items, dim, seed=0)
    results = pathlib.Path(home, 'results.json')
    process = multiprocessing.get_context('spawn').Process(
      target=_write_figures, args=(str(path), home, steps, str(results))
    )
    process.start()
    process.join()
    if process.exitcode:
      raise RuntimeError(f'naming {items} items: exit code {process.exitcode}')
    return {'items': items, 'texts': texts} | json.loads(results.read_text())


def _write_figures(vectors: str, home: str, steps: int, results: str) -> None:
  logging.set_verbosity(logging.ERROR)
  figures = name_catalog(vectors, home, steps)
  pathlib.Path(results).write_text(json.dumps(figures))


def billion(rows: list[dict[str, Any]], dim: int) -> str:
  """Extrapolates the largest catalog to a billion items.

  Training takes constant time, assignment grows as n, completion as n log n,
  because it sorts.
  """
  last = max(rows, key=lambda row: row['items'])
  factor = BILLION / last['items']
  growth = np.log2(BILLION) / np.log2(last['items'])
  assign = last['assign'] * factor / 3600
  complete = last['complete'] * factor * growth / 3600
  memory = BILLION * (4 * 4 + 5 * 8) / 2**30  # codes, and keys being sorted
  return (
    f'a billion items, computed from {last["items"]:,}: '
    f'{BILLION * dim * 4 / 1e12:.1f} TB of vectors on disk; training '
    f'{last["train"]:.0f} s, unchanged; assignment {assign:.1f} h here, '
    f'divided by the number of such machines; completion {complete:.1f} h and '
    f'{memory:.0f} GiB on one host, or by ranges of the first code, which '
    f'share nothing; 256^4 tuples are {256**4 / BILLION:.1f} for each item: '
    'take 5 levels'
  )


def naming_seconds(row: dict[str, Any]) -> float:
  """From vectors to tuples, once the tokenizer is trained."""
  return row['assign'] + row['complete']


def main(argv: list[str]) -> None:
  """Prints a row for each size, then the extrapolation."""
  del argv
  rows = []
  for items in map(int, _CATALOGS.value):
    rows.append(measure(items, _WIDTH.value, _UPDATES.value, _FOLDER.value))
    print(json.dumps(rows[-1]), flush=True)
  table = [
    {
      'items': f'{row["items"]:,}',
      'texts': f'{row["texts"]:,}',
      **{f'{phase} s': f'{row[phase]:.1f}' for phase in PHASES},
      'us an item': f'{1e6 * naming_seconds(row) / row["items"]:.1f}',
      'unique': f'{100 * row["uniqueness"]:.2f} %',
      'moved': f'{row["spilled"]:,}',
      'GiB': f'{row["memory"]:.2f}',
    }
    for row in rows
  ]
  print(reporting.table(table, tuple(table[0])))
  print(bench.machine())
  print(billion(rows, _WIDTH.value))


if __name__ == '__main__':
  app.run(main)
