"""Traces: what the teacher says about the training slates.

`targeted` (Eq. 1) sees a positive and puts it first; `rejection` (Eq. 2) does
not, and is asked again until its first choice is one, `tries` times at most;
then the slate is dropped, kept apart and counted.
"""

import pathlib
from typing import Any

import numpy as np

from gr2_jax import policy, reporting
from gr2_jax.data import records, teachers
from gr2_jax.data import slates as slates_lib

ACCEPTED = 'traces.array_record'
REJECTED = 'rejected.array_record'
KINDS = ('rejection', 'targeted')


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Asks the teacher about every training slate.

  Args:
    config: sections prompt, model, mesh, traces; seed.
    inputs: slates, tokenizer, backbone.
    workdir: of this stage. Both files appear whole or not at all, and each
      trace is a function of (seed, slate): a killed run starts again.

  Returns:
    Counts, mean tries, and how often the teacher's own first choice is a
    positive (None where it was shown one).
  """
  stage = config.traces
  if stage.kind not in KINDS:
    raise ValueError(
      f'traces.kind is {stage.kind!r}; it must be one of {KINDS}'
    )
  setup = policy.load(
    config, inputs['slates'], inputs['tokenizer'], inputs['backbone']
  )
  names = slates_lib.read_meta(inputs['slates'])['evidence']
  slates = slates_lib.source(inputs['slates'], 'train')
  teacher = teachers.Heuristic(
    prompter=setup.prompter,
    catalog=setup.catalog,
    columns=tuple(names.index(c) for c in stage.believes),
    noise=stage.noise,
  )
  kept, lost, tries = [], [], []
  with reporting.progress(len(slates), 'traces', unit='slate') as bar:
    for index in range(len(slates)):
      rng = np.random.default_rng((config.seed, index))
      slate = slates[index]
      if stage.kind == 'targeted':
        trace = teacher.targeted(slate, rng)
      else:
        trace = teacher.rejection(slate, rng, stage.tries)
      tries.append(trace.tries)
      record = {
        'slate': np.int32(index),
        'reasoning': np.array(trace.reasoning, np.int32),
        'ranking': trace.ranking,
        'tries': np.int32(trace.tries),
        'verdict': np.int32(teachers.VERDICTS.index(trace.verdict)),
      }
      (lost if trace.verdict == 'rejected' else kept).append(record)
      bar.update()
  first = [r['tries'] == 1 for r in kept if stage.kind == 'rejection']
  records.write(workdir / REJECTED, lost)
  records.write(workdir / ACCEPTED, kept)
  return {
    'teacher': 'heuristic',
    'kind': stage.kind,
    'traces': len(kept),
    'rejected': len(lost),
    'tries': float(np.mean(tries)),
    'first_try': sum(first) / len(slates) if first else None,
  }
