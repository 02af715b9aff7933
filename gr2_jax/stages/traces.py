"""Traces: a teacher's reasoning and rankings of the training slates.

With `targeted` (Eq. 1) the teacher sees a positive and puts it first. With
`rejection` (Eq. 2) it does not, and answers until its first choice is a
positive, at most `tries` times. Slates without such an answer are stored
separately. They are no random sample: the results report how hard they are.

A killed run resumes from the traces of a policy in `parts/`, or from the
answers of an endpoint in `answers/` beside the folders of the stages, which
other runs reuse too.
"""

import contextlib
import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import metrics
from gr2_jax.pipeline import reporting
from gr2_jax.policy import policy
from gr2_jax.prompts import prompt
from gr2_jax.teachers import dialogue, endpoint, heuristic, http, ledger
from gr2_jax.teachers import judge as judge_lib
from gr2_jax.teachers import policy as policy_lib

ACCEPTED = 'traces.array_record'
REJECTED = 'rejected.array_record'
PARTS = 'parts'  # folder of a policy's traces until the stage is done
KINDS = ('rejection', 'targeted')
TEACHERS = ('heuristic', 'policy', 'http')

_PART = 256  # traces of a policy per file in `parts/`

Record = dict[str, Any]


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Collects one trace for each training slate.

  Returns:
    Counts, tries, and the share of slates whose first answer is kept (None for
    targeted); hardness of the kept and of the lost slates; verdicts, tokens and
    cost of an endpoint; mean marks of a judge.

  Raises:
    ValueError: an unknown kind or teacher, or no trace that is fit to be kept.
    ArtifactError: the teacher's policy cannot be used.
    endpoint.EndpointError: the endpoint cannot be used.
    ledger.OverLimit: the next request might exceed the limit on tokens.
  """
  stage = config.traces
  for name, known in (('kind', KINDS), ('teacher', TEACHERS)):
    if stage[name] not in known:
      raise ValueError(
        f'traces.{name} is {stage[name]!r}; it must be one of {known}'
      )
  spec = policy.load(config, inputs)
  slates = slates_lib.SlateSource(inputs['slates'], 'train')
  indices = np.arange(len(slates))
  if 0 < stage.slates < len(slates):
    rng = np.random.default_rng(config.seed)
    indices = np.sort(rng.permutation(indices)[: stage.slates])
  system, limit = config.prompt.system, stage.words
  words = dialogue.Dialogue(
    spec.prompter, spec.catalog, system, limit, stage.knowledge
  )
  with contextlib.ExitStack() as stack:
    if stage.teacher == 'http' or stage.judged:
      names = ('endpoint', 'model', 'judge_endpoint', 'judge_model')
      identity = [config.seed, *(stage[name] for name in names)]
      answers = stack.enter_context(
        ledger.from_config('traces', stage, workdir, identity)
      )
    if stage.teacher == 'http':
      settings = endpoint.settings('traces', stage, stage.temperature)
      model = stack.enter_context(endpoint.Endpoint(settings, answers))
      teacher = http.HttpTeacher(words, model, config.prompt.order)
    elif stage.teacher == 'policy':
      teacher = _policy(config, spec, inputs)
    else:
      names = slates_lib.read_meta(inputs['slates'])['evidence']
      columns = tuple(names.index(c) for c in stage.evidence_columns)
      teacher = heuristic.Heuristic(
        spec.prompter, spec.catalog, columns, stage.noise
      )
    parts = workdir / PARTS if stage.teacher == 'policy' else None
    kept, lost = _collect(
      teacher, slates, indices.tolist(), stage, config.seed, parts
    )
    results = _results(
      stage, slates_lib.read(inputs['slates'], 'train'), kept, lost
    )
    if isinstance(teacher, http.HttpTeacher):
      results |= ledger.with_cost(stage, teacher.report())
      if not kept:
        raise ValueError(
          f'{stage.endpoint}, model {stage.model!r}: no answer is fit to be a '
          f'trace: {results["verdicts"]}; see {answers.path}'
        )
    elif not kept:
      raise ValueError(
        f'traces.teacher={stage.teacher!r}: in {stage.tries} tries its first '
        f'choice was right on none of {len(lost)} slates; raise traces.tries, '
        'or choose a better teacher'
      )
    else:
      results['unknown_tokens'] = sum(int(r['unknown']) for r in kept)
      results['clipped_tokens'] = sum(int(r['clipped']) for r in kept)
    if stage.judged:
      model = endpoint.Endpoint(_judge_settings(stage), answers)
      judge = judge_lib.Judge(judge_lib.REASONING, stack.enter_context(model))
      cases = _sample(kept, slates, config)
      results['judge'] = judge_lib.summary(judge(c.shown(words) for c in cases))
  records.write(workdir / REJECTED, lost)
  records.write(workdir / ACCEPTED, kept)
  shutil.rmtree(workdir / PARTS, ignore_errors=True)
  return results


def _policy(
  config: ConfigDict, spec: policy.PolicySpec, inputs: dict[str, pathlib.Path]
) -> policy_lib.PolicyTeacher:
  """Restores the policy that `traces.policy` names."""
  stage = config.traces
  if not stage.policy:
    raise ValueError(
      "traces.teacher='policy' needs traces.policy: the folder of a finished "
      f'run of {", ".join(policy.TRAINERS)}'
    )
  return policy_lib.restore(
    stage.policy,
    config.mesh,
    spec.prompter,
    inputs,
    kind=stage.kind,
    temperature=stage.temperature,
    batch_size=stage.batch_size,
  )


def _collect(
  teacher: heuristic.Teacher,
  slates: slates_lib.SlateSource,
  indices: list[int],
  stage: ConfigDict,
  seed: int,
  parts: pathlib.Path | None,
) -> tuple[list[Record], list[Record]]:
  """Records of the kept and of the lost traces; resumes from `parts`."""
  traces: dict[int, Record] = {}
  for path in parts.glob('*.array_record') if parts else ():
    traces |= {int(r['slate']): r for r in records.Records(path)}
  missing = [index for index in indices if index not in traces]
  part = []
  with reporting.progress(
    len(indices), 'traces', len(indices) - len(missing), unit='slate'
  ) as bar:
    results = teacher.traces(slates, missing, stage.kind, stage.tries, seed)
    with contextlib.closing(results):
      for index, trace in results:
        traces[index] = {
          'slate': np.int32(index),
          'reasoning': np.array(trace.reasoning, np.int32),
          'ranking': trace.ranking,
          'tries': np.int32(trace.tries),
          'verdict': np.int32(heuristic.VERDICTS.index(trace.verdict)),
          'unknown': np.int32(trace.unknown),
          'clipped': np.int32(trace.clipped),
        }
        bar.update()
        part.append(traces[index])
        if parts and len(part) == _PART:
          records.write(parts / f'{len(traces)}.array_record', part)
          part = []
  kept, lost = [], []
  for index in indices:
    verdict = heuristic.VERDICTS[traces[index]['verdict']]
    (kept if verdict in heuristic.KEPT else lost).append(traces[index])
  return kept, lost


def _results(
  stage: ConfigDict,
  slates: slates_lib.Slates,
  kept: list[Record],
  lost: list[Record],
) -> dict[str, Any]:
  """Counts of the kept and of the lost slates.

  Hardness is the mean of each metric of the incoming order, None without
  slates; `first_positive` is a rank from 1. The histogram of tries is from 1.
  """
  grades = slates.grades
  incoming = np.broadcast_to(np.arange(grades.shape[1]), grades.shape)
  ranking = jax.jit(metrics.ranking_metrics)(incoming, grades, slates.count)
  values = {
    'n@5': np.asarray(ranking['n@5']),
    'r@1': np.asarray(ranking['r@1']),
    'first_positive': 1 + np.argmax(grades > 0, -1),
    'positives': np.sum(grades > 0, -1),
  }
  hardness, histogram = {}, {}
  for name, rows in (('kept', kept), ('lost', lost)):
    at = [int(r['slate']) for r in rows]
    hardness[name] = {'slates': len(rows)} | {
      metric: float(np.mean(value[at], dtype=float)) if rows else None
      for metric, value in values.items()
    }
    counts = np.bincount([r['tries'] for r in rows], minlength=2)
    histogram[name] = counts[1:].tolist()
  first = [r['tries'] == 1 for r in kept if stage.kind == 'rejection']
  tries = [r['tries'] for r in (*kept, *lost)]
  return {
    'teacher': stage.teacher,
    'kind': stage.kind,
    'traces': len(kept),
    'rejected': len(lost),
    'tries': float(np.mean(tries)),
    'first_try': sum(first) / len(tries) if first else None,
    'hardness': hardness,
    'tries_histogram': histogram,
  }


def _judge_settings(stage: ConfigDict) -> endpoint.Settings:
  """Settings of the judge; another endpoint never gets the teacher's key."""
  changes = {'model': stage.judge_model or stage.model}
  if stage.judge_endpoint:
    changes['base_url'] = stage.judge_endpoint
    changes['key_variable'] = stage.judge_key_variable
  settings = endpoint.settings('traces', stage, 0.0)
  return dataclasses.replace(settings, **changes)


def _sample(
  kept: list[Record], slates: slates_lib.SlateSource, config: ConfigDict
) -> list[judge_lib.Case]:
  """Draws traces, each with a presentation as in the policy's prompts."""
  rng = np.random.default_rng(config.seed)
  cases = []
  for place in np.sort(rng.permutation(len(kept))[: config.traces.judged]):
    trace = kept[place]
    index = int(trace['slate'])
    slate, rng = slates[index], np.random.default_rng((config.seed, index))
    order = prompt.presentation(int(slate['count']), config.prompt.order, rng)
    cases.append(
      judge_lib.Case(slate, order, trace['reasoning'], trace['ranking'])
    )
  return cases
