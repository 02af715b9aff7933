"""Mid-training: the catalog's language, its users' habits, and pointing.

Three tasks, mixed batch by batch:

* `sequence`: semantic IDs of a history in the order of engagement;
* `caption`: an item's text from its semantic ID, and the other way round;
* `pointing`: the candidates of a slate sorted by a named evidence column. Its
  answers are free and unlimited, and it builds the circuit that compares
  candidates and copies a slot.
"""

import pathlib
from typing import Any

import grain
import jax
import numpy as np

from gr2_jax import learner, policy, sharding
from gr2_jax.data import batches, prompts
from gr2_jax.data import slates as slates_lib
from gr2_jax.stages import training


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains the backbone's parameters, or random ones where it has none.

  Args:
    config: sections prompt, model, mesh, midtrain; seed.
    inputs: slates, tokenizer, backbone.
    workdir: of this stage.

  Returns:
    Held-out loss per task and the chosen step.
  """
  stage = config.midtrain
  setup = policy.load(
    config, inputs['slates'], inputs['tokenizer'], inputs['backbone']
  )
  pretrained = (inputs['backbone'] / policy.PARAMS).is_dir()

  # Input: one pipeline a task, mixed in whole batches of one shape each.
  train = slates_lib.source(inputs['slates'], 'train')
  held_out = slates_lib.source(inputs['slates'], 'validation')
  shares = {k: v for k, v in stage.mixture.items() if v > 0}
  renders = renderers(setup, stage)
  pipelines = {
    task: batches.dataset(
      range(len(setup.catalog)) if task == 'caption' else train,
      renders[task],
      stage.batch_size,
      config.seed,
    )
    for task in shares
  }
  mixed = grain.MapDataset.mix(
    list(pipelines.values()), weights=list(shares.values())
  )
  iterator = batches.iterate(mixed)

  # Loss and held-out losses.
  loss_fn = learner.supervised_loss(
    setup.model, setup.grammar, listwise_weight=0.0
  )
  held = {
    task: batches.first_batches(
      range(len(setup.catalog)) if task == 'caption' else held_out,
      renders[task],
      stage.batch_size,
      stage.eval_batches,
      seed=1,
    )
    for task in shares
  }
  measure = jax.jit(lambda params, batch: loss_fn(params, batch)[0])

  def validate(params):
    found = {}
    for task, rows in held.items():
      each = [
        measure(
          params, sharding.shard_batch(learner.Examples(**row), setup.mesh)
        )
        for row in rows
      ]
      found[f'{task}_loss'] = float(np.mean([float(x) for x in each]))
    mean = np.average(list(found.values()), weights=list(shares.values()))
    return found | {'score': -float(mean)}

  optimizer = learner.make_optimizer(stage)
  return training.fit(
    stage,
    setup=setup,
    workdir=workdir,
    seed=config.seed,
    optimizer=optimizer,
    take_step=training.supervised_step(setup, loss_fn, optimizer, iterator),
    iterator=iterator,
    validate=validate,
    choose='score',
    inherited=inputs['backbone'] if pretrained else None,
    desc='midtrain',
  )


def renderers(setup: policy.Setup, stage) -> dict[str, Any]:
  """Task -> `(record, rng) -> example`.

  Args:
    setup: tokens.
    stage: section `midtrain`.
  """
  prompter, words = setup.prompter, setup.vocabulary
  sids = prompter.items['sid']
  titles = prompter.items['title']
  levels = words.layout.levels

  def text(ids: list[int], length: int) -> dict[str, np.ndarray]:
    """A row without a slate: the prompt is <bos>, the rest is learned."""
    ids = ids[:length]
    K = prompter.num_candidates
    prompt = {
      'prompt': np.array([words.bos], np.int32),
      'slots': np.zeros(K, np.int32),
      'grades': np.zeros(K, np.float32),
      'count': np.int32(0),
    }
    row = batches.Completion(ids, [1.0] * len(ids))
    return batches.examples(prompt, [row], 1, length)

  def sequence(slate, rng):
    del rng
    items = slate['history'][: int(slate['history_length'])]
    items = items[-stage.sequence_items :]
    ids = [words.control['<next>']]
    for item in items:
      ids.extend(sids[item])
    return text(ids, 1 + stage.sequence_items * levels)

  def caption(item, rng):
    ids: list[int] = []
    while len(ids) < stage.caption_tokens:
      both = [list(sids[item]), list(titles[item])]
      if rng.random() < 0.5:
        both.reverse()
      ids += [words.control['<caption>'], *both[0], *both[1], words.eos]
      item = int(rng.integers(len(sids)))
    return text(ids, stage.caption_tokens)

  def pointing(slate, rng):
    count = int(slate['count'])
    order = prompts.presentation(count, 'shuffled', rng)
    bins = prompter.bins(slate['evidence'], count)[order]
    columns = rng.choice(
      bins.shape[1], stage.pointers, replace=bins.shape[1] < stage.pointers
    )
    completions = []
    for column in columns:
      ranking = np.argsort(-bins[:, column], kind='stable')
      slots = (words.slot_base + ranking).tolist()
      ids = [words.by_base + int(column), *slots, words.eos]
      weights = [0.0] + [1.0] * (count + 1)
      completions.append(batches.Completion(ids, weights))
    return batches.examples(
      prompter.prompt(slate, order),
      completions,
      prompter.prompt_tokens,
      1 + prompter.answer_tokens,
    )

  return {'sequence': sequence, 'caption': caption, 'pointing': pointing}
