"""Traces: what the teacher says about the training slates.

`targeted` (Eq. 1) sees a positive and puts it first; `rejection` (Eq. 2) does
not, and is asked again until its first choice is one, `tries` times at most;
then the slate is dropped, kept apart and counted. What is lost is not a random
draw: the results say how hard the slates were that were kept and lost.

The teacher is a heuristic, a policy of this codebase or a model behind an
endpoint. A policy's answers are kept in `parts/` until the stage is done, so
that a killed run goes on. What an endpoint answers is kept in `answers/`
beside the stages' folders, by request: not only a killed run, but also one with
another limit or another length of reasoning asks for nothing twice.
"""

import contextlib
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import metrics
from gr2_jax.pipeline import reporting
from gr2_jax.policy import policy
from gr2_jax.prompts import prompt
from gr2_jax.teachers import dialogue, endpoint, heuristic, http, remote
from gr2_jax.teachers import judge as judge_lib
from gr2_jax.teachers import policy as policy_lib

ACCEPTED = 'traces.array_record'
REJECTED = 'rejected.array_record'
PARTS = 'parts'  # a folder of what a policy said, until all is said
KINDS = ('rejection', 'targeted')
TEACHERS = ('heuristic', 'policy', 'http')

_PART = 256  # slates that a killed run of a policy has to ask about again


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Asks the teacher about every training slate.

  Args:
    config: sections prompt, model, mesh, traces; seed.
    inputs: slates, tokenizer, backbone.
    workdir: of this stage. Both files appear whole or not at all. A trace of
      the heuristic teacher is a function of (seed, slate): a killed run starts
      again. A policy's is one too, up to rounding: what it has said is read
      from `parts/`. An endpoint's answers are read from its ledger.

  Returns:
    Counts, tries, and how often the teacher's own first choice is a positive
    (None where it was shown one); how hard the slates were that were kept and
    lost; of an endpoint, verdicts, tokens and cost; of a judge, its mean marks.

  Raises:
    ValueError: an unknown kind or teacher, or a teacher of whose answers none
      could be kept.
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
  with contextlib.ExitStack() as stack:
    words = dialogue.Dialogue(
      prompter=spec.prompter,
      catalog=spec.catalog,
      system=config.prompt.system,
      words=stage.words,
      knowledge=stage.knowledge,
    )
    if stage.teacher == 'http' or stage.judged:
      kept_answers = stack.enter_context(
        remote.book('traces', stage, workdir, _asked(config))
      )
    if stage.teacher == 'http':
      asked = stack.enter_context(
        endpoint.Endpoint(
          remote.settings('traces', stage, stage.temperature), kept_answers
        )
      )
      teacher = http.Remote(words, asked, config.prompt.order)
    elif stage.teacher == 'policy':
      teacher = _policy(config, spec, inputs)
    else:
      names = slates_lib.read_meta(inputs['slates'])['evidence']
      teacher = heuristic.Heuristic(
        prompter=spec.prompter,
        catalog=spec.catalog,
        columns=tuple(names.index(c) for c in stage.believes),
        noise=stage.noise,
      )
    parts = workdir / PARTS if stage.teacher == 'policy' else None
    kept, lost = _ask(
      teacher, slates, indices.tolist(), stage, config.seed, parts
    )
    results = _results(stage, kept, lost)
    results |= _hardness(slates_lib.read(inputs['slates'], 'train'), kept, lost)
    if stage.teacher == 'http':
      results |= remote.spent(stage, teacher.report())
      if not kept:
        raise ValueError(
          f'{stage.endpoint}, model {stage.model!r}: no answer is fit to be a '
          f'trace: {results["verdicts"]}; see {kept_answers.path}'
        )
    elif not kept:
      raise ValueError(
        f'traces.teacher={stage.teacher!r}: in {stage.tries} tries its first '
        f'choice was right on none of {len(lost)} slates; raise traces.tries, '
        'or take a better teacher'
      )
    else:
      results |= _left_out(kept)
    if stage.judged:
      judge = stack.enter_context(
        endpoint.Endpoint(_judge_settings(stage), kept_answers)
      )
      sample = _sample(kept, slates, config)
      results['judge'] = judge_lib.summary(
        judge_lib.judge(sample, words, judge)
      )
  records.write(workdir / REJECTED, lost)
  records.write(workdir / ACCEPTED, kept)
  shutil.rmtree(workdir / PARTS, ignore_errors=True)
  return results


def _policy(
  config, spec: policy.PolicySpec, inputs
) -> policy_lib.PolicyTeacher:
  """The policy that `traces.policy` names, as a teacher of this one."""
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


def _ask(
  teacher: heuristic.Teacher,
  slates,
  indices: list[int],
  stage,
  seed: int,
  parts: pathlib.Path | None,
):
  """Records of the traces that are kept and of those that are not.

  Args:
    teacher: who is asked.
    slates: random access to records.
    indices: of the slates in question.
    stage: section `traces`.
    seed: of all that is drawn.
    parts: folder for what is known so far; None to begin anew each time.
  """
  found = _known(parts) if parts else {}
  left = [index for index in indices if index not in found]
  new = []
  with reporting.progress(
    len(indices), 'traces', len(indices) - len(left), unit='slate'
  ) as bar:
    traces = teacher.traces(slates, left, stage.kind, stage.tries, seed)
    with contextlib.closing(traces):
      for index, trace in traces:
        found[index] = {
          'slate': np.int32(index),
          'reasoning': np.array(trace.reasoning, np.int32),
          'ranking': trace.ranking,
          'tries': np.int32(trace.tries),
          'verdict': np.int32(heuristic.VERDICTS.index(trace.verdict)),
          'unknown': np.int32(trace.unknown),
          'clipped': np.int32(trace.clipped),
        }
        bar.update()
        new.append(found[index])
        if parts and len(new) == _PART:
          records.write(parts / f'{len(found)}.array_record', new)
          new = []
  kept, lost = [], []
  for index in indices:
    verdict = heuristic.VERDICTS[found[index]['verdict']]
    (kept if verdict in heuristic.KEPT else lost).append(found[index])
  return kept, lost


def _known(parts: pathlib.Path) -> dict[int, dict[str, np.ndarray]]:
  """Records that a killed run left, by the index of their slates."""
  found = {}
  for path in parts.glob('*.array_record'):
    part = records.Records(path)
    found |= {int(record['slate']): record for record in part}
  return found


def _results(stage, kept, lost) -> dict[str, Any]:
  first = [r['tries'] == 1 for r in kept if stage.kind == 'rejection']
  tries = [r['tries'] for r in (*kept, *lost)]
  return {
    'teacher': stage.teacher,
    'kind': stage.kind,
    'traces': len(kept),
    'rejected': len(lost),
    'tries': float(np.mean(tries)),
    'first_try': sum(first) / len(tries) if first else None,
  }


def _hardness(slates: slates_lib.Slates, kept, lost) -> dict[str, Any]:
  """What the slates of two piles of traces were like, in the incoming order.

  Returns:
    hardness: pile -> number of slates, and means over them (None without any):
    n@5 and r@1 of the incoming order, rank of the first positive in it (from
    1), positives. tries: pile -> how many took 1, 2, .. tries.
  """
  grades = slates.grades
  incoming = np.broadcast_to(np.arange(grades.shape[1]), grades.shape)
  found = jax.jit(metrics.ranking_metrics)(incoming, grades, slates.count)
  values = {
    'n@5': np.asarray(found['n@5']),
    'r@1': np.asarray(found['r@1']),
    'first_positive': 1 + np.argmax(grades > 0, -1),
    'positives': np.sum(grades > 0, -1),
  }
  hardness, tries = {}, {}
  for pile, rows in (('kept', kept), ('lost', lost)):
    at = [int(r['slate']) for r in rows]
    hardness[pile] = {'slates': len(rows)} | {
      name: float(np.mean(value[at], dtype=float)) if rows else None
      for name, value in values.items()
    }
    counted = np.bincount([r['tries'] for r in rows], minlength=2)
    tries[pile] = counted[1:].tolist()
  return {'hardness': hardness, 'tries_histogram': tries}


def _left_out(kept) -> dict[str, int]:
  """Tokens that the kept traces lack; an endpoint's teacher reports them."""
  return {
    'unknown_tokens': sum(int(r['unknown']) for r in kept),
    'clipped_tokens': sum(int(r['clipped']) for r in kept),
  }


def _judge_settings(stage) -> endpoint.Settings:
  """How the judge is asked; a key goes to no endpoint but its own."""
  own = stage.copy_and_resolve_references()
  with own.unlocked():
    own.model = stage.judge_model or stage.model
    if stage.judge_endpoint:
      own.endpoint = stage.judge_endpoint
      own.key_variable = stage.judge_key_variable
  return remote.settings('traces', own, 0.0)


def _asked(config) -> list[object]:
  """Whom the stage asks, and for which seed."""
  names = ('endpoint', 'model', 'judge_endpoint', 'judge_model')
  return [config.seed, *(config.traces[name] for name in names)]


def _sample(kept, slates, config) -> list[judge_lib.Case]:
  """A draw of the traces, each as one reader of the policy's prompts saw it."""
  rng = np.random.default_rng(config.seed)
  cases = []
  for place in np.sort(rng.permutation(len(kept))[: config.traces.judged]):
    record = kept[place]
    slate = slates[int(record['slate'])]
    own = np.random.default_rng((config.seed, int(record['slate'])))
    cases.append(
      judge_lib.Case(
        slate=slate,
        order=prompt.presentation(
          int(slate['count']), config.prompt.order, own
        ),
        reasoning=record['reasoning'],
        ranking=record['ranking'],
      )
    )
  return cases
