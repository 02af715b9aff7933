"""Embedding rows of symbols that a pretrained model does not have.

Axes: V rows of the model, D width, N new rows.
"""

from collections.abc import Sequence

import numpy as np

KINDS = ('noise', 'mean', 'text')

# Rows that start alike must differ for the output to distinguish them.
_JITTER = 0.1


def new_rows(
  embedding_VxD: np.ndarray,
  texts: Sequence[Sequence[int]],
  kind: str,
  seed: int = 0,
) -> np.ndarray:
  """Initial rows of added symbols: float32 [N, D].

    noise:  s e
    mean:   mean over all rows + s e / 10
    text:   mean over the rows of the symbol's text + s e / 10

  with e standard normal and s the standard deviation of all entries.

  `embedding_VxD` are the model's own rows. `texts` hold for each new symbol the
  ids of words that describe it; a symbol without any starts as in `mean`.
  Raises ValueError where the kind is not of KINDS.
  """
  if kind not in KINDS:
    raise ValueError(f'model.new_rows={kind!r}: must be one of {KINDS}')
  N, D = len(texts), embedding_VxD.shape[1]
  # `np.std` would make a copy of what may be gigabytes.
  square = float(np.linalg.norm(embedding_VxD)) ** 2 / embedding_VxD.size
  spread = (square - np.mean(embedding_VxD, dtype=np.float64) ** 2) ** 0.5
  noise_NxD = np.random.default_rng(seed).normal(0.0, spread, (N, D))
  if kind == 'noise':
    return noise_NxD.astype(np.float32)
  rows_NxD = np.tile(np.mean(embedding_VxD, axis=0, dtype=np.float64), (N, 1))
  if kind == 'text':
    for row_D, ids in zip(rows_NxD, texts, strict=True):
      if len(ids):
        row_D[:] = np.mean(embedding_VxD[np.asarray(ids)], 0, np.float64)
  return (rows_NxD + _JITTER * noise_NxD).astype(np.float32)
