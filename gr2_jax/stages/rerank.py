"""Rerank: JSONL of slates in, JSONL of permutations with reasoning out.

A line of `output.jsonl` answers the line of the input at the same place:

  id: the request's
  ranking: item ids, best first
  order: the same in incoming ranks, 0 for the first candidate given
  reasoning: what the policy wrote before the ranking; <slot3> is the
    candidate of incoming rank 3
  verdict: `valid`, or what was wrong with the answer; the ranking is then the
    incoming order
  scores: the listwise read-out's, one per candidate as given; larger is better
  unknown_history: items of the history of which nothing is known
  described_candidates: ids of those that the catalog lacks and the line
    describes; they are ranked with the others

The input is checked as a whole first. Answers are appended chunk by chunk to
`output.partial.jsonl`; a run that was killed goes on after its last whole
chunk and ends in the same bytes.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from gr2_jax.ops import parsing
from gr2_jax.pipeline import reporting
from gr2_jax.policy import policy, ranking
from gr2_jax.serving import answer, cold_items, knowledge
from gr2_jax.serving import request as requests_lib

REQUESTS = 'requests.jsonl'
OUTPUT = 'output.jsonl'
PARTIAL = 'output.partial.jsonl'


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Ranks every slate of `rerank.input`, or the test slates.

  Args:
    config: sections data, prompt, model, mesh, rerank; seed.
    inputs: slates, tokenizer, backbone, and the stage named by `rerank.start`.
    workdir: of this stage; gets OUTPUT, and REQUESTS where the test slates
      are ranked.

  Returns:
    Counts and shares; slates a second of what this process ranked, compiling
    and evidence included, or None where it ranked nothing.

  Raises:
    DataError: the input is bad; nothing was ranked.
  """
  rate = None
  if not (workdir / OUTPUT).exists():
    rate = _rank(config, inputs, workdir)
  return _summary(workdir / OUTPUT) | {'slates_per_second': rate}


def _rank(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> float | None:
  """Writes OUTPUT; returns slates a second."""
  stage = config.rerank
  if stage.chunk < 1:
    raise ValueError(f'rerank.chunk={stage.chunk}: it must be at least 1')
  form = policy.form_of(inputs[stage.start], own=False)
  setup = policy.load(config, inputs, *form)
  source = pathlib.Path(stage.input or workdir / REQUESTS)
  width = setup.prompter.num_candidates
  reader, unreadable = cold_items.load(
    setup, inputs['tokenizer'], config.prompt.title_tokens
  )

  def read() -> Iterator[requests_lib.Request]:
    return requests_lib.read(source, setup.catalog, width, unreadable)

  # Check the whole input, before anything that takes time.
  if stage.input:
    total = sum(1 for _ in read())

  # Evidence.
  found = knowledge.load(inputs['slates'], setup.catalog, config.data)
  log, facts = found.log, found.facts
  if not stage.input:
    requests_lib.write_test(source, log, config.data, facts.statistics)
    total = sum(1 for _ in read())

  # Rank what is left.
  params = setup.load_params(inputs[stage.start])
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
        chunk, log, facts, width, config.data.history
      )
      items = requests_lib.described(chunk)
      shown = setup
      if len(items):
        prompter = reader.prompts_of(items)
        shown = dataclasses.replace(setup, prompter=prompter)
      ranked = ranking.rank(
        shown,
        params,
        answer.records(slates),
        thinking=stage.thinking,
        order=config.prompt.order,
        batch_size=stage.batch_size,
        seed=stage.presentation_seed,
        first=done,
      )
      lines = [
        json.dumps(answer.answer(setup, request, ranked, row))
        for row, request in enumerate(chunk)
      ]
      file.write(''.join(f'{line}\n' for line in lines).encode())
      file.flush()
      os.fsync(file.fileno())
      done += len(chunk)
      bar.update(len(chunk))
  os.replace(partial, workdir / OUTPUT)
  if done == start:
    return None
  return (done - start) / (time.monotonic() - clock)


def _keep_whole_chunks(path: pathlib.Path, chunk: int) -> int:
  """Cuts off what a kill has torn; returns the lines left.

  A last chunk that is shorter than the others is whole as well, but cannot be
  told from a torn one, and is ranked again.
  """
  if not path.exists():
    return 0
  lines = size = whole = 0
  with path.open('r+b') as file:
    for line in file:
      if not line.endswith(b'\n'):
        break
      lines += 1
      size += len(line)
      if lines % chunk == 0:
        whole = size
    file.truncate(whole)
  return lines - lines % chunk


def _summary(path: pathlib.Path) -> dict[str, Any]:
  """Counts over a finished output."""
  slates = changed = unknown = 0
  verdicts = dict.fromkeys(parsing.VERDICTS, 0)
  with path.open(encoding='utf-8') as file:
    for line in file:
      found = json.loads(line)
      slates += 1
      verdicts[found['verdict']] += 1
      changed += found['order'][0] != 0
      unknown += found['unknown_history']
  return {
    'slates': slates,
    'verdicts': {name: n / slates for name, n in verdicts.items()},
    'first_pick_changed': changed / slates,
    'unknown_history': unknown,
  }
