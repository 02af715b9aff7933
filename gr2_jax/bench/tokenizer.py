"""Residual quantisation beside faiss: same vectors, levels and codes, one core.

python -m gr2_jax.bench.tokenizer

Codebooks by k-means on residuals and the codes of every vector, greedy and with
a beam of 5, once by this library and once by `faiss.ResidualQuantizer` (as it
is by default: a beam of 5 in training, too). Vectors are drawn: clusters within
clusters of unequal sizes, of unit length, as those of catalog texts are. faiss
finds codes in two ways, from residuals and from tables of inner products; the
ratios are taken against the faster one. The process pins itself to one core,
each side has one thread, and the two alternate; the first round compiles and is
not counted. Seconds are of processor time.

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
COLUMNS = (
  'vectors', 'side', 'training', *(f'error {b}' for b in BEAMS),
  *(f'of variance {b}' for b in BEAMS), *(f'vectors/s {b}' for b in BEAMS),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Side:
  """One way to quantise.

  Attributes:
    train: float32 [I, D] -> codebooks float32 [L, C, D], kept for `encode`.
    encode: (float32 [I, D], beam) -> codes int [I, L].
  """

  train: Callable[[np.ndarray], np.ndarray]
  encode: Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Found:
  """Of one side: medians, and the mean squared error by beam."""

  training: float  # seconds
  error: Mapping[int, float]
  relative: Mapping[int, float]  # error over the vectors' variance
  rate: Mapping[int, float]  # vectors coded in a second, by beam


def draw(items: int, width: int, seed: int = 0) -> np.ndarray:
  """Unit vectors in clusters within clusters, float32 [I, D].

  32 topics, and a subject for every 60 vectors, each within a topic; the
  popularity of topics falls with their rank.
  """
  rng = np.random.default_rng(seed)
  topics = rng.normal(size=(32, width))
  share = 1 / np.arange(1, 33)
  of_subject = rng.choice(32, max(items // 60, 1), p=share / share.sum())
  subjects = topics[of_subject]
  subjects += 0.7 * rng.normal(size=subjects.shape)
  x = subjects[rng.integers(len(subjects), size=items)]
  x += 0.5 * rng.normal(size=x.shape)
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def our_side(levels: int, bits: int, iterations: int) -> Side:
  """This library."""
  state = {}

  def train(x):
    state['vectors'] = quantizer_lib.residual_codebooks(
      x,
      levels=levels,
      size=2**bits,
      batch_size=len(x),
      iterations=iterations,
      seed=0,
    )['vectors']
    return state['vectors']

  def encode(x, beam):
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
    raise ImportError(
      f'{e}; the other side of this measurement is an extra: '
      "pip install 'gr2_jax[bench]'"
    ) from e
  faiss.omp_set_num_threads(1)
  quantizer = faiss.ResidualQuantizer(width, levels, bits)
  default_beam = quantizer.max_beam_size

  def train(x):
    quantizer.max_beam_size, quantizer.use_beam_LUT = default_beam, 0
    quantizer.train(x)
    quantizer.compute_codebook_tables()
    codebooks = faiss.vector_to_array(quantizer.codebooks)
    return codebooks.reshape(levels, 2**bits, width)

  def encoder(tables):
    def encode(x, beam):
      quantizer.max_beam_size, quantizer.use_beam_LUT = beam, tables
      packed = quantizer.compute_codes(x)
      return faiss.unpack_bitstrings(packed, levels, bits)

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
  """Compares the two searches on one set of codebooks.

  Args:
    x_IxD: float32 [I, D].
    vectors_LxCxD: the codebooks that `theirs` was trained to.
    theirs: the other side, trained.

  Raises:
    RuntimeError: the mean squared errors differ by more than 0.1%.
  """
  for beam in BEAMS:
    mine = quantizer_lib.assign(x_IxD, vectors_LxCxD, beam=beam)
    other = theirs.encode(x_IxD, beam)
    same = (mine == other).all(axis=1).mean()
    ratio = squared_error(x_IxD, vectors_LxCxD, mine) / squared_error(
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
  """What a call returns, and its seconds of processor time."""
  begin = time.process_time()
  result = function(*args)
  return result, time.process_time() - begin


def measure(
  x_IxD: np.ndarray, ours: Side, theirs: Side, tables: Side
) -> dict[str, Found]:
  """Alternates the sides: trainings first, then rounds of coding.

  Args:
    x_IxD: float32 [I, D].
    ours: this library.
    theirs: faiss, from residuals.
    tables: faiss, from tables; coding alone, with the codebooks of `theirs`.

  Returns:
    Side -> what was found.
  """
  sides = {'gr2_jax': ours, 'faiss': theirs, 'faiss, tables': tables}
  trained_by = {
    'gr2_jax': 'gr2_jax',
    'faiss': 'faiss',
    'faiss, tables': 'faiss',
  }
  vectors, codes = {}, {}
  training = {name: [] for name in ('gr2_jax', 'faiss')}
  coding = {(name, beam): [] for name in sides for beam in BEAMS}
  rounds = _TRAININGS.value + _ROUNDS.value + 2  # The uncounted ones, too.
  with reporting.progress(rounds, 'tokenizer', unit='round') as bar:
    for _ in range(_TRAININGS.value + 1):
      for name, seconds in training.items():
        vectors[name], spent = timed(sides[name].train, x_IxD)
        seconds.append(spent)
      bar.update(1)
    for _ in range(_ROUNDS.value + 1):
      for (name, beam), seconds in coding.items():
        codes[name, beam], spent = timed(sides[name].encode, x_IxD, beam)
        seconds.append(spent)
      bar.update(1)
  check_same_search(x_IxD, vectors['faiss'], theirs)
  print(
    f'first calls, compilation included: training {training["gr2_jax"][0]:.1f} '
    f's, coding {sum(coding["gr2_jax", b][0] for b in BEAMS):.1f} s'
  )
  variance = float(((x_IxD - x_IxD.mean(0)) ** 2).sum(-1).mean())
  found = {}
  for name, by in trained_by.items():
    error = {
      b: squared_error(x_IxD, vectors[by], codes[name, b]) for b in BEAMS
    }
    found[name] = Found(
      training=statistics.median(training[by][1:]),
      error=error,
      relative={b: error[b] / variance for b in BEAMS},
      rate={
        b: len(x_IxD) / statistics.median(coding[name, b][1:]) for b in BEAMS
      },
    )
  return found


def rows(items: int, found: Mapping[str, Found]) -> list[dict[str, object]]:
  """A row of the table a side, with the fields of `COLUMNS`."""
  return [
    {
      'vectors': items,
      'side': name,
      'training': f'{side.training:.1f} s',
      **{f'error {b}': side.error[b] for b in BEAMS},
      **{f'of variance {b}': f'{side.relative[b]:.1%}' for b in BEAMS},
      **{f'vectors/s {b}': f'{side.rate[b]:,.0f}' for b in BEAMS},
    }
    for name, side in found.items()
  ]


def ratio_lines(found: list[Mapping[str, Found]]) -> list[str]:
  """The worst ratio over the sizes, to the better of faiss's two ways."""
  errors, rates = [], []
  for beam in BEAMS:
    worst_error, worst_rate = 0.0, np.inf
    for sides in found:
      ours, *theirs = sides.values()
      least = min(side.error[beam] for side in theirs)
      most = max(side.rate[beam] for side in theirs)
      worst_error = max(worst_error, ours.error[beam] / least)
      worst_rate = min(worst_rate, ours.rate[beam] / most)
    errors.append(f'error ratio beam {beam}: {worst_error:.2f}')
    rates.append(f'throughput ratio beam {beam}: {worst_rate:.2f}')
  return errors + rates


def pin() -> None:
  """Starts the process again on one core, unless it is on one already.

  The libraries size their thread pools at import: from within it is too late.
  """
  cores = os.sched_getaffinity(0)
  if len(cores) > 1:
    os.sched_setaffinity(0, {max(cores)})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(argv: list[str]) -> None:
  """Entry point of `app.run`: the table, then the ratios."""
  del argv
  logging.set_verbosity(logging.ERROR)
  pin()
  levels, bits = _LEVELS.value, _BITS.value
  table, every = [], []
  for items in map(int, _ITEMS.value):
    x = draw(items, _DIM.value)
    ours = our_side(levels, bits, _ITERATIONS.value)
    found = measure(x, ours, *their_sides(_DIM.value, levels, bits).values())
    table += rows(items, found)
    every.append(found)
  load = ', '.join(f'{x:.1f}' for x in os.getloadavg())
  print(reporting.table(table, COLUMNS))
  print(
    f'beams of {" and ".join(map(str, BEAMS))}; {_DIM.value} wide, {levels} '
    f'levels of {2**bits} codes; medians of {_TRAININGS.value} trainings and '
    f'{_ROUNDS.value} rounds of coding, seconds of one core; load {load} '
    '(1, 5, 15 minutes)'
  )
  print('\n'.join(ratio_lines(every)))


if __name__ == '__main__':
  app.run(main)
