"""SFT: the teacher's reasoning and a ranking, after the policy's own prompt.

Eq. 3 weighs reasoning and ranking separately. The target of the ranking is
either the teacher's order (`rank_by='trace'`) or the order of the policy's own
read-out (`readout`), which the same update trains on the labels at the slot
tokens and distills into the answer.
"""

import collections
import dataclasses
import pathlib
from typing import Any

import grain

from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.policy import policy, ranking
from gr2_jax.prompts import examples, prompt
from gr2_jax.stages import traces
from gr2_jax.train import learner, loop

RANK_BY = ('readout', 'trace')


class _Traced:
  """Random access to traces joined with their slates."""

  def __init__(self, accepted: records.Records, slates: slates_lib.SlateSource):
    self._accepted, self._slates = accepted, slates

  def __len__(self) -> int:
    return len(self._accepted)

  def __getitem__(self, index: int) -> dict[str, Any]:
    trace = self._accepted[index]
    return {'trace': trace, 'slate': self._slates[int(trace['slate'])]}


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains from the mid-trained parameters; validation selects the step.

  Args:
    config: sections prompt, model, mesh, sft; seed.
    inputs: slates, tokenizer, backbone, midtrain, traces.
    workdir: of this stage.

  Returns:
    The best step and its validation metrics.

  Raises:
    ValueError: `rank_by` or a context is unknown.
  """
  stage = config.sft
  if stage.rank_by not in RANK_BY:
    raise ValueError(f'sft.rank_by={stage.rank_by!r}: must be one of {RANK_BY}')
  spec = policy.load(config, inputs)
  mesh = sharding.make_mesh(**config.mesh)
  source = _Traced(
    records.Records(inputs['traces'] / traces.ACCEPTED),
    slates_lib.SlateSource(inputs['slates'], 'train'),
  )
  # Each form of the context has its own batches, of its own length.
  forms = collections.Counter(stage.contexts)
  pipelines = [
    loop.dataset(
      mesh,
      source,
      renderer(spec.with_context(form), config),
      stage.batch_size,
      config.seed + number,
    )
    for number, form in enumerate(forms)
  ]
  iterator = examples.iterate(
    grain.MapDataset.mix(pipelines, weights=list(forms.values()))
  )
  optimizer = learner.make_optimizer(
    learner.OptimizerOptions.from_config(stage)
  )
  loss_fn = learner.supervised_loss(
    spec.model,
    spec.grammar,
    listwise_weight=stage.listwise_weight,
    ranking_weight=stage.ranking_weight if stage.rank_by == 'readout' else 0.0,
    sharpness=stage.sharpness,
  )
  return loop.fit(
    loop.LoopOptions.from_config(stage),
    spec=spec,
    mesh=mesh,
    workdir=workdir,
    seed=config.seed,
    optimizer=optimizer,
    take_step=loop.supervised_step(spec, mesh, loss_fn, optimizer, iterator),
    iterator=iterator,
    validate=ranking.validator(
      spec.with_context(stage.contexts[-1]),
      mesh,
      policy.source(inputs, 'validation'),
      slates_lib.read(inputs['slates'], 'validation'),
      thinking=stage.thinking,
      order=config.prompt.order,
      num_slates=stage.eval_slates,
      batch_size=stage.eval_batch_size,
    ),
    selection_metric='n@5',
    inherited=inputs['midtrain'],
    desc='sft',
  )


def renderer(spec: policy.PolicySpec, config):
  """`(trace and slate, rng) -> example`: a thinking and a direct completion.

  Both are trained side by side, so that either can be requested. The control
  tokens begin a completion here and end the prompt in sampling: the sequence is
  the same. With `privileged` a third completion is given a positive, the first
  choice of the trace, and learns to put it first, with reasoning or without, by
  a coin.
  """
  prompter, words, stage = spec.prompter, spec.vocabulary, config.sft
  by_readout = stage.rank_by == 'readout'
  told = stage.privileged * prompt.TARGET_TOKENS

  def completion(ask, reasoning, answer, weights):
    """Weights: l_r on reasoning, l_o on the ranking, 0 on replaced slots."""
    weights = [
      *[0.0] * len(ask),
      *[stage.reasoning_weight] * len(reasoning),
      *[stage.ranking_weight * weight for weight in weights],
    ]
    return examples.Completion([*ask, *reasoning, *answer], weights)

  def render(record, rng):
    slate, trace = record['slate'], record['trace']
    order = prompt.presentation(int(slate['count']), config.prompt.order, rng)
    answer = prompter.answer(trace['ranking'], order)
    reasoning = prompter.present(trace['reasoning'], order)
    reasoning.append(words.control['</think>'])
    weight = 0.0 if by_readout else 1.0
    weights = [weight] * (len(answer) - 1) + [1.0]
    completions = []
    for control, span in (('<think>', reasoning), ('<answer>', [])):
      ask = prompter.ask(control)
      found = completion(ask, span, answer, weights)
      at = len(ask) + len(span) if by_readout else -1
      completions.append(dataclasses.replace(found, answer_at=at))
    if stage.privileged:
      control, span = (
        ('<think>', reasoning) if rng.random() < 0.5 else ('<answer>', [])
      )
      ask = prompter.ask(control, answer[0] - words.slot_base)
      completions.append(completion(ask, span, answer, [1.0, *weights[1:]]))
    return examples.examples(
      prompter.prompt(slate, order, rng),
      completions,
      prompter.prompt_tokens,
      prompter.ask_tokens + told + prompter.thinking_tokens,
    )

  return render
