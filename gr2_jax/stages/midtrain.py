"""Mid-training: the catalog's language, its users' habits, and pointing.

Four tasks are documents, packed into rows ahead of time and mixed by tokens
(see `prompts/documents.py`):

* `sequence`: semantic IDs of a history in the order of engagement;
* `persona`: a history, and the user in words; either from the other;
* `caption`: an item's title and category path from its semantic ID, and the
  other way round;
* `text`: general text of a file, so that a pretrained model keeps its language.

The fifth, `pointing`, sorts the candidates of a slate by a named evidence
column. Its answers are free and unlimited, and it trains the circuit that
compares candidates and copies a slot.

The rows added to a pretrained backbone's embedding first train alone, so that
they do not disturb the rest.

Validation measures a held-out loss for each task, and retrieval: how high a
beam search over the catalog ranks the next item of a held-out history,
compared with the most popular items.
"""

import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.policy import policy, retrieval
from gr2_jax.prompts import documents, examples, packing, prompt
from gr2_jax.semantic_ids import ids as ids_lib
from gr2_jax.train import embedding_warmup, learner, loop


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains the backbone's parameters, or random ones where it has none.

  Returns:
    The best step and its held-out metrics; `shares` of the tasks; `packed`, the
    report of the packing; `popularity`, the baseline of retrieval; and
    `warm_rows`, the number of steps that trained new rows alone.

  Raises:
    DataError: `text_file` is missing or no text.
    ValueError: a share is negative or none is positive, or a row is too short.
  """
  stage = config.midtrain
  spec, mesh = policy.load_with_mesh(config, inputs, stage.context)
  pretrained = (inputs['backbone'] / policy.PARAMS).is_dir()
  mixture = shares(stage)
  packed = {k: v for k, v in mixture.items() if k in packing.TASKS}
  train, held_out = documents.sources(
    inputs['slates'], stage, len(spec.catalog)
  )
  renders = documents.renderers(
    spec.prompter,
    spec.catalog,
    stage.sequence_items,
    config.prompt.title_tokens,
    stage.row_tokens,
  )
  pointing = pointing_renderer(spec.prompter, stage.pointers)

  # Input: whole batches of packed rows, and whole batches of slates.
  pipelines, weights, report = [], [], {}
  if packed:  # Written before the first step; a resumed run reads them.
    rows = stage.steps * stage.rows * sum(packed.values())
    report = packing.write(
      workdir,
      packing.rows(packed, train, renders, stage.row_tokens, config.seed),
      stage.row_tokens,
      int(np.ceil(rows)) + stage.rows,
    )
    logging.info('midtrain: packed %s', json.dumps(report))
    pipelines.append(
      packing.dataset(
        records.Records(workdir / packing.ROWS),
        spec.prompter,
        stage.rows,
        sharding.local_rows(mesh, stage.rows),
      )
    )
    weights.append(sum(packed.values()))
  if 'pointing' in mixture:
    pipelines.append(
      loop.dataset(
        mesh, train['pointing'], pointing, stage.batch_size, config.seed
      )
    )
    weights.append(mixture['pointing'])
  iterator = examples.iterate(grain.MapDataset.mix(pipelines, weights=weights))

  # Loss, and validation by held-out losses and retrieval.
  loss_fn = learner.supervised_loss(
    spec.model, spec.grammar, listwise_weight=0.0
  )
  batches = {
    task: _held_out_rows(task, held_out, renders, spec.prompter, stage)
    for task in packed
  }
  if 'pointing' in mixture:
    batches['pointing'] = examples.first_batches(
      held_out['pointing'],
      pointing,
      stage.batch_size,
      stage.eval_batches,
      seed=1,
    )
  retrieve, baseline = None, {}
  if 'sequence' in mixture:
    retrieve, baseline = retriever(inputs, spec, mesh, stage)
  measure = jax.jit(lambda params, batch: loss_fn(params, batch)[0])

  def validate(params: Any) -> dict[str, float]:
    metrics = {}
    for task in mixture:
      losses = [
        measure(params, sharding.shard_batch(learner.Examples(**row), mesh))
        for row in batches[task]
      ]
      metrics[f'{task}_loss'] = float(np.mean([float(x) for x in losses]))
    mean = np.average(list(metrics.values()), weights=list(mixture.values()))
    metrics['score'] = -float(mean)
    if retrieve:
      metrics |= {
        f'retrieval_{name}': x for name, x in retrieve(params).items()
      }
    return metrics

  # Training.
  warm = warm_steps(stage, pretrained)
  optimizer = embedding_warmup.make_optimizer(
    learner.OptimizerOptions.from_config(stage), spec.adapters, warm
  )
  result = loop.fit(
    loop.LoopOptions.from_config(stage),
    spec=spec,
    mesh=mesh,
    workdir=workdir,
    seed=config.seed,
    optimizer=optimizer,
    take_step=loop.supervised_step(spec, mesh, loss_fn, optimizer, iterator),
    iterator=iterator,
    validate=validate,
    selection_metric='score',
    inherited=inputs['backbone'] if pretrained else None,
    desc='midtrain',
  )
  return result | {
    'shares': mixture,
    'packed': report,
    'popularity': baseline,
    'warm_rows': warm,
  }


def shares(stage: ConfigDict) -> dict[str, float]:
  """Task -> its share of the mixture; the shares sum to one.

  Without a `text_file`, `text` has no share. Raises a ValueError if a share is
  negative, or none is positive.
  """
  given = stage.mixture.to_dict()
  for task, share in given.items():
    if share < 0:
      raise ValueError(f'midtrain.mixture.{task}={share}: must be 0 or more')
  if given['text'] and not stage.text_file:
    logging.info(
      'midtrain: without midtrain.text_file the share of general text, %g, '
      'goes to the other tasks',
      given['text'],
    )
    given['text'] = 0.0
  total = sum(given.values())
  if not total:
    raise ValueError(
      'midtrain.mixture: no task has a share'
      + ('' if stage.text_file else ' (text needs midtrain.text_file)')
    )
  return {task: share / total for task, share in given.items() if share}


def pointing_renderer(
  prompter: prompt.Prompter, pointers: int
) -> Callable[..., dict[str, np.ndarray]]:
  """Makes `(slate, rng) -> example`: a slate sorted by `pointers` columns."""
  words = prompter.vocabulary

  def render(slate: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    count = int(slate['count'])
    order = prompt.presentation(count, 'shuffled', rng)
    bins = prompter.bins(slate['evidence'], count)[order]
    columns = rng.choice(
      bins.shape[1], pointers, replace=bins.shape[1] < pointers
    )
    completions = []
    for column in columns:
      ranking = np.argsort(-bins[:, column], kind='stable')
      slots = (words.slot_base + ranking).tolist()
      ids = [words.by_base + int(column), *slots, words.eos]
      weights = [0.0] + [1.0] * (count + 1)
      completions.append(examples.Completion(ids, weights))
    return examples.examples(
      prompter.prompt(slate, order, rng),
      completions,
      prompter.prompt_tokens,
      1 + prompter.answer_tokens,
    )

  return render


def retriever(
  inputs: dict[str, pathlib.Path],
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  stage: ConfigDict,
) -> tuple[retrieval.Retriever | None, dict[str, float]]:
  """Held-out retrieval, and the popularity baseline on the same questions.

  Returns:
    `params -> metrics`, and the baseline's metrics; None and {} where every
    held-out history ends in an item that it had before.
  """
  questions = retrieval.questions(
    slates_lib.read(inputs['slates'], 'validation'),
    [spec.vocabulary.bos, spec.vocabulary.control['<next>']],
    spec.prompter.items['sid'],
    stage.sequence_items - 1,
    stage.retrieval_histories,
  )
  if not len(questions):
    return None, {}
  popular = retrieval.popular(
    slates_lib.read(inputs['slates'], 'train'), questions.seen, stage.beams
  )
  baseline = retrieval.summary(popular, questions.target)
  sids = ids_lib.load(inputs['tokenizer'])
  retrieve = retrieval.Retriever(
    spec, mesh, sids, questions, stage.batch_size, stage.beams
  )
  return retrieve, baseline | {'histories': len(questions)}


def _held_out_rows(
  task: str,
  source: Any,
  renders: Any,
  prompter: prompt.Prompter,
  stage: ConfigDict,
) -> list[dict[str, np.ndarray]]:
  """Batches of one task's held-out rows, the same at every call."""
  rows = packing.rows({task: 1.0}, source, renders, stage.row_tokens, seed=1)
  encoded = [
    packing.encode(next(rows), stage.row_tokens)
    for _ in range(stage.eval_batches * stage.rows)
  ]
  data = packing.dataset(encoded, prompter, stage.rows)
  return [data[i] for i in range(stage.eval_batches)]


def warm_steps(stage: ConfigDict, pretrained: bool) -> int:
  """Steps in which new rows train alone: `warm_rows`, at most a quarter.

  None from scratch, where every row is new, or from `init_from`, whose rows
  have been trained.
  """
  if not pretrained or stage.init_from:
    return 0
  return min(stage.warm_rows, stage.steps // 4)
