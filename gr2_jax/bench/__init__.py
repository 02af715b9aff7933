"""Measurements, most of them beside other libraries."""

import os


def machine() -> str:
  """The cores of this process and the load of its machine, for a report."""
  load = ', '.join(f'{x:.1f}' for x in os.getloadavg())
  cores = len(os.sched_getaffinity(0))
  return f'{cores} cores, load {load} (1, 5, 15 minutes)'


def missing(error: ImportError) -> ImportError:
  """An error that names the extra with the libraries to compare with."""
  return ImportError(
    f'{error}; the other side of this measurement is an extra: '
    "pip install 'gr2_jax[bench]'"
  )
