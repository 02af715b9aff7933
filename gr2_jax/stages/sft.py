"""SFT: the teacher's reasoning and a ranking, after the policy's own prompt.

Eq. 3 weighs reasoning and ranking separately. The target of the ranking is the
teacher's order (`rank_by='trace'`) or the order of the policy's own read-out
(`readout`): the same update trains the read-out on the labels and distills it
into the answer.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
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
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains from the mid-trained parameters; validation selects the step.

  Raises a ValueError if `rank_by` or a context is unknown.
  """
  stage = config.sft
  if stage.rank_by not in RANK_BY:
    raise ValueError(f'sft.rank_by={stage.rank_by!r}: must be one of {RANK_BY}')
  spec, mesh = policy.load_with_mesh(config, inputs)
  source = _Traced(
    records.Records(inputs['traces'] / traces.ACCEPTED),
    slates_lib.SlateSource(inputs['slates'], 'train'),
  )
  # Each form of the context has its own prompt length, and so its own batches.
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
    validate=validator(
      'sft', config, inputs, spec.with_context(stage.contexts[-1]), mesh
    ),
    selection_metric='n@5',
    inherited=inputs['midtrain'],
    desc='sft',
  )


def validator(
  name: str,
  config: ConfigDict,
  inputs: dict[str, pathlib.Path],
  spec: policy.PolicySpec,
  mesh: Mesh,
  context: str = 'full',
) -> Callable[[Any], dict[str, float]]:
  """`ranking.validator` by the section `name` of a stage that trains."""
  stage = config[name]
  return ranking.validator(
    spec,
    mesh,
    policy.source(inputs, 'validation', context),
    slates_lib.read(inputs['slates'], 'validation'),
    thinking=stage.thinking,
    order=config.prompt.order,
    num_slates=stage.eval_slates,
    batch_size=stage.eval_batch_size,
  )


def renderer(
  spec: policy.PolicySpec, config: ConfigDict
) -> Callable[..., dict[str, Any]]:
  """Makes `(trace and slate, rng) -> example`, with and without reasoning.

  Both completions train side by side, so that a prompt can request either. The
  control tokens begin a completion here and end the prompt in sampling: the
  sequence is the same. With `privileged` the prompt of a third completion names
  a positive, the first choice of the trace, which the policy learns to rank
  first. A coin decides whether that completion reasons.
  """
  prompter, words, stage = spec.prompter, spec.vocabulary, config.sft
  by_readout = stage.rank_by == 'readout'
  target_tokens = stage.privileged * prompt.TARGET_TOKENS

  def completion(
    ask: list[int],
    reasoning: list[int],
    answer: list[int],
    weights: list[float],
  ) -> examples.Completion:
    """Weights tokens by Eq. 3: the reasoning and the ranking separately."""
    weights = (
      [0.0] * len(ask)
      + [stage.reasoning_weight] * len(reasoning)
      + [stage.ranking_weight * weight for weight in weights]
    )
    return examples.Completion([*ask, *reasoning, *answer], weights)

  def render(record: Any, rng: np.random.Generator) -> dict[str, Any]:
    slate, trace = record['slate'], record['trace']
    order = prompt.presentation(int(slate['count']), config.prompt.order, rng)
    answer = prompter.answer(trace['ranking'], order)
    reasoning = prompter.present(trace['reasoning'], order)
    reasoning.append(words.control['</think>'])
    weight = 0.0 if by_readout else 1.0
    weights = [weight] * (len(answer) - 1) + [1.0]
    completions, modes = [], (('<think>', reasoning), ('<answer>', []))
    for control, span in modes:
      ask = prompter.ask(control)
      completions.append(
        dataclasses.replace(
          completion(ask, span, answer, weights),
          answer_at=len(ask) + len(span) if by_readout else -1,
        )
      )
    if stage.privileged:
      control, span = modes[rng.random() >= 0.5]
      ask = prompter.ask(control, answer[0] - words.slot_base)
      completions.append(completion(ask, span, answer, [1.0, *weights[1:]]))
    return examples.examples(
      prompter.prompt(slate, order, rng),
      completions,
      prompter.prompt_tokens,
      prompter.ask_tokens + target_tokens + prompter.thinking_tokens,
    )

  return render
