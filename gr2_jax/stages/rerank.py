"""Rerank: JSONL of slates in, JSONL of permutations with reasoning out.

Each line of `output.jsonl` answers the slate at the same place in the input;
`serving/schema.py` describes its fields.

The stage checks the whole input first. It appends answers chunk by chunk to
`output.partial.jsonl`; a killed run resumes after its last whole chunk, and
ends with the same bytes.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from gr2_jax.ops import parsing
from gr2_jax.pipeline import reporting
from gr2_jax.policy import policy, ranking
from gr2_jax.serving import answer, described_items, knowledge
from gr2_jax.serving import request as requests_lib

REQUESTS = 'requests.jsonl'
OUTPUT = 'output.jsonl'
PARTIAL = 'output.partial.jsonl'


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Ranks every slate of `rerank.input`, or the test slates.

  Returns:
    Counts and shares, and `slates_per_second` of this process with compilation,
    None if it ranked nothing.

  Raises:
    DataError: the input is invalid; nothing was ranked.
  """
  finished = (workdir / OUTPUT).exists()
  rate = None if finished else _rank(config, inputs, workdir)
  return _summary(workdir / OUTPUT) | {'slates_per_second': rate}


def _rank(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> float | None:
  """Writes OUTPUT; returns slates per second."""
  stage = config.rerank
  if stage.chunk < 1:
    raise ValueError(f'rerank.chunk={stage.chunk}: must be at least 1')
  form = policy.form_of(inputs[stage.start], own_slates=False)
  spec, mesh = policy.load_with_mesh(config, inputs, *form)
  width = spec.prompter.num_candidates
  reader, unreadable = described_items.load(
    spec, mesh, inputs['tokenizer'], config.prompt.title_tokens
  )

  # Check the whole input before anything that takes time.
  source = pathlib.Path(stage.input or workdir / REQUESTS)

  def read() -> Iterator[requests_lib.Request]:
    return requests_lib.read(source, spec.catalog, width, unreadable)

  total = sum(1 for _ in read()) if stage.input else 0
  data = knowledge.load(inputs['slates'], spec.catalog, config.data)
  if not stage.input:
    statistics = data.facts.statistics
    requests_lib.write_test(source, data.log, config.data, statistics)
    total = sum(1 for _ in read())

  # Rank the rest.
  params = spec.load_params(inputs[stage.start], mesh)
  partial = workdir / PARTIAL
  done = start = _keep_whole_chunks(partial, stage.chunk)
  pending = itertools.islice(read(), done, None)
  clock = time.monotonic()
  with (
    partial.open('ab') as file,
    reporting.progress(total, 'rerank', done, unit='slate') as bar,
  ):
    while chunk := list(itertools.islice(pending, stage.chunk)):
      slates = requests_lib.to_slates(
        chunk, data.log, data.facts, width, config.data.history
      )
      shown = spec
      if len(items := requests_lib.described(chunk)):
        shown = dataclasses.replace(spec, prompter=reader.prompts_of(items))
      ranked = ranking.rank(
        policy.Policy(shown, params, mesh),
        answer.records(slates),
        thinking=stage.thinking,
        order=config.prompt.order,
        batch_size=stage.batch_size,
        seed=stage.presentation_seed,
        first=done,
      )
      for row, request in enumerate(chunk):
        line = json.dumps(answer.answer(spec, request, ranked, row))
        file.write(f'{line}\n'.encode())
      file.flush()
      os.fsync(file.fileno())
      done += len(chunk)
      bar.update(len(chunk))
  os.replace(partial, workdir / OUTPUT)
  return (done - start) / (time.monotonic() - clock) if done > start else None


def _keep_whole_chunks(path: pathlib.Path, chunk: int) -> int:
  """Truncates the file to whole chunks; returns the number of lines left."""
  if not path.exists():
    return 0
  lines = size = whole = 0
  with path.open('r+b') as file:
    for line in file:
      if not line.endswith(b'\n'):
        break
      lines, size = lines + 1, size + len(line)
      if lines % chunk == 0:
        whole = size
    file.truncate(whole)
  return lines - lines % chunk


def _summary(path: pathlib.Path) -> dict[str, Any]:
  """Counts over a finished output."""
  slates = changed = unknown = 0
  verdicts = dict.fromkeys(parsing.VERDICTS, 0)
  with path.open(encoding='utf-8') as file:
    for line in map(json.loads, file):
      slates += 1
      verdicts[line['verdict']] += 1
      changed += line['order'][0] != 0
      unknown += line['unknown_history']
  return {
    'slates': slates,
    'verdicts': {name: n / slates for name, n in verdicts.items()},
    'first_pick_changed': changed / slates,
    'unknown_history': unknown,
  }
