"""Bins of evidence and ages, which become tokens.

Edges are quantiles over the training slates, fitted once with the vocabulary.

Axes: n slates, K candidates, E evidence columns.
"""

import dataclasses
import json
import os
import pathlib

import numpy as np

from gr2_jax.data import files
from gr2_jax.data import slates as slates_lib

RAW = ':raw'


@dataclasses.dataclass(frozen=True)
class EvidenceBins:
  """Turns evidence columns into a few bins each.

  A column is centered and scaled within its slate, so that it compares the
  candidates; one named `column:raw` keeps its own scale, so that it compares
  slates too.
  """

  columns: tuple[str, ...]  # as configured, some with `:raw`
  index: np.ndarray  # int [E], their places in the slates' evidence
  edges: np.ndarray  # float64 [E, bins - 1], ascending
  age_edges: np.ndarray  # float64 [bins - 1], of the ages of a history

  def __call__(self, evidence_KxE: np.ndarray, count: int) -> np.ndarray:
    """Bins of the first `count` candidates, 0 in the padding: int32 [K, E]."""
    values = self._prepare(evidence_KxE[None], np.array([count]))[0]
    bins = (values[..., None] >= self.edges).sum(-1)
    bins[count:] = 0
    return bins.astype(np.int32)

  def ages(self, ages: np.ndarray) -> np.ndarray:
    """Bins of ages: int32 [...]."""
    return np.searchsorted(self.age_edges, ages, side='right').astype(np.int32)

  def _prepare(self, evidence: np.ndarray, count: np.ndarray) -> np.ndarray:
    values = evidence[..., self.index].astype(np.float64)
    real = (np.arange(evidence.shape[1]) < count[:, None])[..., None]
    n = count[:, None, None]
    mean = (values * real).sum(1, keepdims=True) / n
    var = (((values - mean) ** 2) * real).sum(1, keepdims=True) / n
    centered = (values - mean) / (np.sqrt(var) + 1e-6)
    raw = np.array([name.endswith(RAW) for name in self.columns], bool)
    return np.where(raw, values, centered)

  @classmethod
  def fit(
    cls,
    slates: slates_lib.Slates,
    names: list[str],
    columns: tuple[str, ...],
    bins: int,
  ) -> 'EvidenceBins':
    """Takes quantiles over the real candidates of the training slates.

    Raises:
      ValueError: the slates lack a column.
    """
    for column in columns:
      if column.removesuffix(RAW) not in names:
        raise ValueError(
          f'prompt.evidence: no column {column!r} in the slates; known: '
          f'{", ".join(names)} (each also with the suffix {RAW!r}); new in '
          'the code? build the slates in another --workdir'
        )
    index = np.array([names.index(c.removesuffix(RAW)) for c in columns], int)
    shares = np.linspace(0, 1, bins + 1)[1:-1]
    known = slates.history_ages[slates.history_ages >= 0]
    age_edges = np.quantile(known, shares) if len(known) else np.zeros(bins - 1)
    empty = cls(columns, index, np.zeros((len(columns), bins - 1)), age_edges)
    values = empty._prepare(slates.evidence, slates.count)
    real = np.arange(values.shape[1]) < slates.count[:, None]
    edges = np.quantile(values[real], shares, axis=0).T
    return dataclasses.replace(
      empty, edges=edges.reshape(len(columns), bins - 1)
    )


def save(path: os.PathLike[str] | str, bins: EvidenceBins) -> None:
  """Writes the bins as JSON."""
  values = {
    'columns': bins.columns,
    'index': bins.index.tolist(),
    'edges': bins.edges.tolist(),
    'age_edges': bins.age_edges.tolist(),
  }
  with files.atomic_write(path) as file:
    json.dump(values, file)


def load(path: os.PathLike[str] | str) -> EvidenceBins:
  """Reads what `save` wrote."""
  values = json.loads(pathlib.Path(path).read_text())
  columns = tuple(values['columns'])
  return EvidenceBins(
    columns,
    np.array(values['index'], int),
    np.array(values['edges'], np.float64).reshape(len(columns), -1),
    np.array(values['age_edges'], np.float64),
  )
