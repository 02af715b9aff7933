"""Residual quantization compared with faiss: same vectors, levels and codes.

python -m gr2_jax.bench.tokenizer

Codebooks by k-means on residuals, and the codes of every vector with a beam of
1 and of 5, once by this library and once by `faiss.ResidualQuantizer`, which by
default trains with a beam of 5, too. The vectors are drawn from clusters within
clusters of unequal sizes and have unit length, like those of catalog texts.
faiss searches codes in two ways, from residuals and from tables of inner
products; the ratios compare with the faster one. The process runs on one core,
each side has one thread, and the two alternate; the first round compiles and
does not count. Seconds are of processor time.

Axes: I vectors, D width, L levels, C codes of a level.
"""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import app, flags, logging

from gr2_jax import bench
from gr2_jax.pipeline import reporting
from gr2_jax.semantic_ids import quantizer as quantizer_lib

_ITEMS = flags.DEFINE_list('items', ['12000', '100000'], 'Numbers of vectors.')
_DIM = flags.DEFINE_integer('dim', 64, 'Width of a vector.', 1)
_LEVELS = flags.DEFINE_integer('levels', 4, 'Codes of a vector.', 1)
_BITS = flags.DEFINE_integer('bits', 8, 'log2 of the codes of a level.', 1, 16)
_ITERATIONS = flags.DEFINE_integer('iterations', 10, 'Of k-means, ours.', 0)
_TRAININGS = flags.DEFINE_integer('trainings', 5, 'Counted trainings.', 1)
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Counted rounds of coding.', 1)

BEAMS = (1, 5)
# Side -> the side whose codebooks it codes with.
SIDES = {'gr2_jax': 'gr2_jax', 'faiss': 'faiss', 'faiss, tables': 'faiss'}
COLUMNS = (
  'vectors', 'side', 'training', *(f'error {b}' for b in BEAMS),
  *(f'of variance {b}' for b in BEAMS), *(f'vectors/s {b}' for b in BEAMS),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Side:
  """One quantizer.

  Attributes:
    train: float32 [I, D] -> codebooks float32 [L, C, D], kept for `encode`.
    encode: (float32 [I, D], beam) -> codes int [I, L].
  """

  train: Callable[[np.ndarray], np.ndarray]
  encode: Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Result:
  """Medians of one side, and its mean squared error by beam."""

  training: float  # seconds
  error: Mapping[int, float]
  relative: Mapping[int, float]  # error over the vectors' variance
  rate: Mapping[int, float]  # vectors coded in a second, by beam


def draw(items: int, width: int, seed: int = 0) -> np.ndarray:
  """Draws unit vectors in clusters within clusters, float32 [I, D].

  There are 32 topics and a subject for every 60 vectors, each within a topic;
  the popularity of topics falls with their rank.
  """
  rng = np.random.default_rng(seed)
  topics = rng.normal(size=(32, width))
  share = 1 / np.arange(1, 33)
  topic = rng.choice(32, max(items // 60, 1), p=share / share.sum())
  subjects = topics[topic]
  subjects += 0.7 * rng.normal(size=subjects.shape)
  x = subjects[rng.integers(len(subjects), size=items)]
  x += 0.5 * rng.normal(size=x.shape)
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def our_side(levels: int, bits: int, iterations: int) -> Side:
  """The quantizer of this library."""
  state = {}

  def train(x: np.ndarray) -> np.ndarray:
    state['vectors'] = quantizer_lib.residual_codebooks(
      x,
      levels=levels,
      size=2**bits,
      batch_size=len(x),
      iterations=iterations,
      seed=0,
    )['vectors']
    return state['vectors']

  def encode(x: np.ndarray, beam: int) -> np.ndarray:
    return quantizer_lib.assign(x, state['vectors'], beam=beam)

  return Side(train, encode)


def their_sides(width: int, levels: int, bits: int) -> dict[str, Side]:
  """faiss, from residuals and from tables; both encode with one training.

  Raises:
    ImportError: faiss is not installed.
  """
  try:
    import faiss
  except ImportError as e:
    raise bench.missing(e) from e
  faiss.omp_set_num_threads(1)
  quantizer = faiss.ResidualQuantizer(width, levels, bits)
  default_beam = quantizer.max_beam_size

  def train(x: np.ndarray) -> np.ndarray:
    quantizer.max_beam_size, quantizer.use_beam_LUT = default_beam, 0
    quantizer.train(x)
    quantizer.compute_codebook_tables()
    codebooks = faiss.vector_to_array(quantizer.codebooks)
    return codebooks.reshape(levels, 2**bits, width)

  def encoder(tables: int) -> Callable[[np.ndarray, int], np.ndarray]:
    def encode(x: np.ndarray, beam: int) -> np.ndarray:
      quantizer.max_beam_size, quantizer.use_beam_LUT = beam, tables
      return faiss.unpack_bitstrings(quantizer.compute_codes(x), levels, bits)

    return encode

  return {
    'faiss': Side(train, encoder(0)),
    'faiss, tables': Side(train, encoder(1)),
  }


def squared_error(
  x_IxD: np.ndarray, vectors_LxCxD: np.ndarray, codes_IxL: np.ndarray
) -> float:
  """Mean over vectors of |x - sum of its codewords|^2."""
  error = x_IxD.astype(np.float64)
  for vectors, codes in zip(vectors_LxCxD, codes_IxL.T, strict=True):
    error -= vectors[codes]
  return float((error**2).sum(-1).mean())


def check_same_search(
  x_IxD: np.ndarray, vectors_LxCxD: np.ndarray, theirs: Side
) -> None:
  """Compares the two searches on the codebooks that `theirs` was trained to.

  Raises:
    RuntimeError: the mean squared errors differ by more than 0.1%.
  """
  for beam in BEAMS:
    ours = quantizer_lib.assign(x_IxD, vectors_LxCxD, beam=beam)
    other = theirs.encode(x_IxD, beam)
    same = (ours == other).all(axis=1).mean()
    ratio = squared_error(x_IxD, vectors_LxCxD, ours) / squared_error(
      x_IxD, vectors_LxCxD, other
    )
    print(
      f'{len(x_IxD)} vectors, codebooks of faiss, beam {beam}: {same:.2%} have '
      f'the same codes, error ratio {ratio:.6f}'
    )
    if not abs(ratio - 1) < 1e-3:
      raise RuntimeError(
        f'on the same codebooks the errors differ by a factor of {ratio}: the '
        'two sides would not do the same work'
      )


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
  """The result of a call, and its seconds of processor time."""
  begin = time.process_time()
  result = function(*args)
  return result, time.process_time() - begin


def measure(x_IxD: np.ndarray, *sides: Side) -> dict[str, Result]:
  """Alternates the sides: trainings first, then rounds of coding.

  Args:
    x_IxD: float32 [I, D].
    *sides: in the order of SIDES.

  Returns:
    Side -> result.
  """
  by_name = dict(zip(SIDES, sides, strict=True))
  vectors, codes = {}, {}
  training = {name: [] for name in ('gr2_jax', 'faiss')}
  coding = {(name, beam): [] for name in SIDES for beam in BEAMS}
  rounds = _TRAININGS.value + _ROUNDS.value + 2  # The uncounted ones, too.
  with reporting.progress(rounds, 'tokenizer', unit='round') as bar:
    for _ in range(_TRAININGS.value + 1):
      for name, seconds in training.items():
        vectors[name], spent = timed(by_name[name].train, x_IxD)
        seconds.append(spent)
      bar.update(1)
    for _ in range(_ROUNDS.value + 1):
      for (name, beam), seconds in coding.items():
        codes[name, beam], spent = timed(by_name[name].encode, x_IxD, beam)
        seconds.append(spent)
      bar.update(1)
  check_same_search(x_IxD, vectors['faiss'], by_name['faiss'])
  print(
    f'first calls, compilation included: training {training["gr2_jax"][0]:.1f} '
    f's, coding {sum(coding["gr2_jax", b][0] for b in BEAMS):.1f} s'
  )
  variance = float(((x_IxD - x_IxD.mean(0)) ** 2).sum(-1).mean())
  results = {}
  for name, trained_by in SIDES.items():
    error = {
      b: squared_error(x_IxD, vectors[trained_by], codes[name, b])
      for b in BEAMS
    }
    medians = {b: statistics.median(coding[name, b][1:]) for b in BEAMS}
    results[name] = Result(
      training=statistics.median(training[trained_by][1:]),
      error=error,
      relative={b: error[b] / variance for b in BEAMS},
      rate={b: len(x_IxD) / medians[b] for b in BEAMS},
    )
  return results


def rows(items: int, results: Mapping[str, Result]) -> list[dict[str, object]]:
  """A row for each side, with the fields of `COLUMNS`."""
  return [
    {
      'vectors': items,
      'side': name,
      'training': f'{side.training:.1f} s',
      **{f'error {b}': side.error[b] for b in BEAMS},
      **{f'of variance {b}': f'{side.relative[b]:.1%}' for b in BEAMS},
      **{f'vectors/s {b}': f'{side.rate[b]:,.0f}' for b in BEAMS},
    }
    for name, side in results.items()
  ]


def ratio_lines(results: list[Mapping[str, Result]]) -> list[str]:
  """The worst ratio over the sizes, to the better of faiss's two ways."""
  errors, rates = [], []
  for beam in BEAMS:
    by_size = [list(sides.values()) for sides in results]
    error = max(
      ours.error[beam] / min(side.error[beam] for side in theirs)
      for ours, *theirs in by_size
    )
    rate = min(
      ours.rate[beam] / max(side.rate[beam] for side in theirs)
      for ours, *theirs in by_size
    )
    errors.append(f'error ratio beam {beam}: {error:.2f}')
    rates.append(f'throughput ratio beam {beam}: {rate:.2f}')
  return errors + rates


def pin() -> None:
  """Restarts the process on one core, unless it runs on one already.

  A restart, because the libraries size their thread pools at import.
  """
  cores = os.sched_getaffinity(0)
  if len(cores) > 1:
    os.sched_setaffinity(0, {max(cores)})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(argv: list[str]) -> None:
  """Prints the table, then the ratios."""
  del argv
  logging.set_verbosity(logging.ERROR)
  pin()
  levels, bits = _LEVELS.value, _BITS.value
  table, results = [], []
  for items in map(int, _ITEMS.value):
    x = draw(items, _DIM.value)
    ours = our_side(levels, bits, _ITERATIONS.value)
    theirs = their_sides(_DIM.value, levels, bits).values()
    results.append(measure(x, ours, *theirs))
    table += rows(items, results[-1])
  print(reporting.table(table, COLUMNS))
  print(
    f'beams of {" and ".join(map(str, BEAMS))}; {_DIM.value} wide, {levels} '
    f'levels of {2**bits} codes; medians of {_TRAININGS.value} trainings and '
    f'{_ROUNDS.value} rounds of coding, seconds of one core; {bench.machine()}'
  )
  print('\n'.join(ratio_lines(results)))


if __name__ == '__main__':
  app.run(main)
