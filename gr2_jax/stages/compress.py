"""Compress: a policy that rewrites contexts into a fifth of their tokens.

It starts from the parameters of the ranker that is to read it. First it
imitates compressions by rule, of every length that it may be asked for: what
this ranker reads first, of several the one that keeps its view of the whole
best. Then it learns, as any policy here, from its own: each is verified, read
by that ranker, frozen, and paid by what is left of the slate (Eq. 10-11). Last
it writes the contexts of all slates, once and for all: `rl.context=text` and
the like have later stages read them.

Axes: n slates.
"""

import contextlib
import functools
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

from gr2_jax.compressor import extracts, rollouts, rule, writer
from gr2_jax.compressor import judge as compressor_judge
from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import processes, sharding
from gr2_jax.pipeline import artifacts
from gr2_jax.policy import policy, ranking
from gr2_jax.prompts import compressed, examples, prompt
from gr2_jax.teachers import dialogue, endpoint, ledger
from gr2_jax.teachers import judge as judge_lib
from gr2_jax.train import distillation, learner, loop, on_policy

IMITATION = 'imitation'
JUDGED, MARKS = 'validation', 'judged.npz'  # the split whose marks are kept


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains the compressor, then writes the contexts of every split.

  Args:
    config: sections prompt, model, mesh, compress; seed.
    inputs: slates, tokenizer, backbone, and the stage that `compress.start`
      names: the ranker that reads.
    workdir: of this stage; gets one file of `compressions` a split.

  Returns:
    The chosen step and its validation numbers; per split what was written and
    what stayed whole; `longest`, tokens of the longest context; how well
    preservation and the judge's numbers go with the ranking downstream; and of
    a judge behind an endpoint, tokens and cost.

  Raises:
    ValueError: a judge or a share of tokens that cannot be.
    endpoint.EndpointError: the endpoint cannot be used.
    ledger.OverLimit: the next request might exceed the limit on tokens.
  """
  check(config.compress)
  spec = policy.load(config, inputs)
  mesh = sharding.make_mesh(**config.mesh)
  with judge_in_words(config, spec, mesh, workdir) as (judge, spent):
    return _run(config, inputs, workdir, spec, mesh, judge) | spent()


@contextlib.contextmanager
def judge_in_words(
  config,
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
):
  """The judge behind an endpoint, while it is needed.

  Args:
    config: sections prompt, compress; seed.
    spec: the ranker's.
    mesh: where the rows lie.
    workdir: of this stage; the answers are kept beside it.

  Yields:
    A `compressor_judge.Remote`, None where the ranker judges; and a function
    whose result says under `asked` what was asked for so far, in this run and
    in those before it with the same judge and seed.
  """
  stage = config.compress
  if stage.judge != 'remote':
    yield None, dict
    return
  words = dialogue.Dialogue(
    prompter=spec.prompter,
    catalog=spec.catalog,
    system=config.prompt.system,
    words=0,
    knowledge=False,
  )
  if not processes.is_main_process():  # Process 0 asks.
    yield compressor_judge.Remote(words, mesh, None), dict
    return
  settings = endpoint.settings('compress', stage, temperature=0.0)
  who = [config.seed, 'compress', stage.endpoint, stage.model]
  with (
    ledger.from_config('compress', stage, workdir, who) as book,
    endpoint.Endpoint(settings, book) as model,
  ):
    ask = judge_lib.Judge(judge_lib.COMPRESSION, model)
    yield (
      compressor_judge.Remote(words, mesh, ask),
      lambda: {'asked': ledger.with_cost(stage, book.usage())},
    )


def _run(
  config,
  inputs: dict[str, pathlib.Path],
  workdir: pathlib.Path,
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  judge: compressor_judge.Remote | None,
) -> dict[str, Any]:
  """See `run`."""
  stage = config.compress
  grammar = rollouts.grammar(spec.prompter, stage.slack)
  train = policy.source(inputs, 'train')
  ranks = spec.load_params(inputs[stage.start], mesh)
  known = rollouts.budgets(spec.prompter, train, (*stage.keeps, stage.keep))
  budgets = {keep: known[keep] for keep in stage.keeps}
  asked = {stage.keep: known[stage.keep]}
  write = writer.make_write(spec, mesh, ranks, config, stage, asked, judge)
  validate = validator(stage, policy.source(inputs, 'validation'), write)

  # Imitation.
  imitation = workdir / IMITATION
  if not processes.broadcast_flag((imitation / 'done.json').exists()):
    found = _imitate(
      config, inputs, imitation, spec, mesh, budgets, ranks, validate
    )
    logging.info('compress: a line keeps first: %s', found['ranked'])
    if processes.is_main_process():
      (imitation / 'done.json').write_text(json.dumps(found))

  # RL.
  sample = rollouts.sampler(
    grammar,
    budgets,
    group=stage.group_size,
    temperature=stage.temperature,
    constrained=stage.constrained,
  )
  start = spec.load_params(imitation, mesh)
  chosen = on_policy.learn(
    'compress',
    on_policy.OnPolicyOptions.from_config(stage, 'compress'),
    spec=spec,
    mesh=mesh,
    grammar=grammar,
    workdir=workdir,
    seed=config.seed,
    slates=train,
    render=rollouts.requests(
      spec.prompter,
      budgets,
      config.prompt.order,
      remote=judge is not None,
    ),
    sampler=sample,
    rollout_step=rollouts.make_rollout_step(
      spec, grammar, sample, stage, ranks, judge
    ),
    validate=validate,
    start=imitation,
    teacher=distillation.self_teacher(spec, mesh, start)
    if stage.kl_weight
    else None,
  )

  # Write. What is written is judged where `_honesty` reads it.
  params = spec.load_params(workdir, mesh)
  unjudged = writer.make_write(spec, mesh, None, config, stage, asked)
  splits = {}
  for split in ('train', JUDGED, 'test'):
    own = write if split == JUDGED else unjudged
    splits[split] = _write(
      config, inputs, workdir, split, spec, functools.partial(own, params)
    )
    logging.info('compress: %s: %s', split, json.dumps(splits[split]))
  longest = max(found['longest'] for found in splits.values())
  return chosen | {
    'splits': splits,
    'longest': longest,
    'judge': _honesty(config, inputs, workdir, spec, mesh, ranks, longest),
  }


def check(stage) -> None:
  """Raises a ValueError that names the field of `compress` that cannot be."""
  if stage.judge not in compressor_judge.JUDGES:
    raise ValueError(
      f'compress.judge is {stage.judge!r}; it must be one of '
      f'{compressor_judge.JUDGES}'
    )
  if stage.judge_by not in compressor_judge.JUDGED_BY:
    raise ValueError(
      f'compress.judge_by is {stage.judge_by!r}; it must be one of '
      f'{compressor_judge.JUDGED_BY}'
    )
  for keep in (stage.keep, *stage.keeps):
    if not 0 < keep <= 1:
      raise ValueError(
        f'compress.keep={stage.keep}, compress.keeps={tuple(stage.keeps)}: '
        'each must be a share of the tokens, above 0 and at most 1'
      )
  if stage.keep > max(stage.keeps):
    raise ValueError(
      f'compress.keep={stage.keep} is more than any of compress.keeps='
      f'{tuple(stage.keeps)}: it was not learned'
    )


def _imitate(
  config, inputs, workdir: pathlib.Path, spec, mesh, budgets, ranks, validate
):
  """Learns compressions by rule, of several the best; see `extracts`."""
  stage = config.compress
  source = policy.source(inputs, 'train')
  grammar = rollouts.grammar(spec.prompter, stage.slack)
  few = np.random.default_rng(0).permutation(len(source))[: stage.rule_slates]
  ranked = rule.most_telling(
    spec, mesh, ranks, stage, config.prompt.order, ranking.Chosen(source, few)
  )
  data = loop.dataset(
    mesh,
    source,
    imitation_renderer(spec, config, budgets, ranked),
    stage.imitate.batch_size,
    config.seed,
  )
  iterator = examples.iterate(data)
  optimizer = learner.make_optimizer(
    learner.OptimizerOptions.from_config(stage.imitate)
  )
  sample = rollouts.sampler(
    grammar, budgets, temperature=1.0, constrained=stage.constrained
  )
  update = learner.make_update(
    spec.adapters.wrap(rollouts.imitation_loss(spec, grammar, sample, stage)),
    optimizer,
  )

  def take_step(state, frozen, step):
    del step
    rows = sharding.shard_local_rows(next(iterator), mesh)
    return update(state, frozen, ranks, rows)

  found = loop.fit(
    loop.LoopOptions.from_config(stage.imitate),
    spec=spec,
    mesh=mesh,
    workdir=workdir,
    seed=config.seed,
    optimizer=optimizer,
    take_step=take_step,
    iterator=iterator,
    validate=validate,
    selection_metric='reward',
    inherited=inputs[stage.start],
    desc='imitate',
  )
  return found | {'ranked': [f'{field} {place}' for field, place in ranked]}


def imitation_renderer(
  spec: policy.PolicySpec,
  config,
  budgets: Mapping[float, int],
  ranked: Sequence[extracts.Unit],
):
  """`(slate, rng) -> row` of `rollouts.requests`, with answers by rule.

  Args:
    spec: the policy's.
    config: sections prompt and compress.
    budgets: of `rollouts.budgets`.
    ranked: of `rule.most_telling`.

  Returns:
    The rendering; `tokens` int32 [G, T] and `length` int32 [G] are answers, of
    which the best is to be imitated. The first has nothing that is drawn.
  """
  stage, prompter = config.compress, spec.prompter
  ask = rollouts.requests(prompter, budgets, config.prompt.order)
  grammar = rollouts.grammar(prompter, stage.slack)
  room = rollouts.sampler(grammar, budgets).max_tokens

  def render(slate, rng):
    row = ask(slate, rng)
    order = row['incoming'][: int(row['count'])]
    budget = int(row['budget'])
    drawn = [
      extracts.extract(prompter, slate, order, budget, ranked, by_chance)
      for by_chance in (None, *[rng] * (stage.draws - 1))
    ]
    return row | {
      'tokens': np.stack([prompt.pad(d, room, 'draw') for d in drawn]),
      'length': np.array([len(d) for d in drawn], np.int32),
    }

  return render


def validator(stage, slates, write):
  """Greedy compressions of the first validation slates, judged.

  Args:
    stage: section `compress`.
    slates: random access to the validation slates.
    write: of `writer.make_write`.

  Returns:
    `params -> {name: mean}` of `compressor_judge.watch`.
  """
  chosen = np.random.default_rng(0).permutation(len(slates))
  few = ranking.Chosen(slates, chosen[: stage.eval_slates])

  def validate(params) -> dict[str, float]:
    judged = _joined([part.judged for part in write(params, few, 0)])
    return {k: float(v) for k, v in compressor_judge.watch(judged).items()}

  return validate


def _joined(
  parts: list[compressor_judge.Judgement],
) -> compressor_judge.Judgement:
  return compressor_judge.Judgement(
    *(np.concatenate(x) for x in zip(*parts, strict=True))
  )


def _write(
  config,
  inputs: dict[str, pathlib.Path],
  workdir: pathlib.Path,
  split: str,
  spec: policy.PolicySpec,
  write,
) -> dict[str, Any]:
  """Writes a split's contexts, and of one what the judge made of each.

  Args:
    config: section compress; seed.
    inputs: slates.
    workdir: gets the files; one that is there is not made again.
    split: of the slates.
    spec: the ranker's.
    write: `(slates, seed, desc) -> iterator of Written`.

  Returns:
    What `compressed.report` says of them.
  """
  path = compressed.file(workdir, split)
  noted = path.with_suffix('.json')
  if processes.broadcast_flag(noted.exists()):
    return json.loads(noted.read_text())
  slates, most = policy.source(inputs, split), config.compress.train_slates
  if split == 'train' and most:
    slates = ranking.Chosen(slates, np.arange(min(most, len(slates))))
  judged: list[compressor_judge.Judgement] = []

  def noting():
    for part in write(slates, config.seed, f'compress {split}'):
      judged.append(part.judged)
      yield part

  stored = list(writer.store(spec, slates, noting()))
  found = compressed.report(stored)
  if processes.is_main_process():
    records.write(path, stored)
    if split == JUDGED:
      np.savez(workdir / MARKS, **_joined(judged)._asdict())
    noted.write_text(artifacts.dumps(found))
  return found


def _honesty(
  config, inputs, workdir, spec: policy.PolicySpec, mesh, ranks, longest: int
):
  """Whether what the judge pays for is what ranks well downstream.

  The judge reads the scores at the slots; downstream is the order that the
  ranker then writes, on the validation slates.

  Returns:
    `n@5` of orders written after whole and after compressed contexts; and
    Spearman's correlation over slates of each of the judge's numbers with
    `n@5` after the compressed one, which says most of how hard a slate is, and
    with its `change` from that after the whole.
  """
  stage = config.compress
  labels = slates_lib.read(inputs['slates'], JUDGED)

  def ranked(spec: policy.PolicySpec, context: str) -> np.ndarray:
    found = ranking.rank(
      policy.Policy(spec, ranks, mesh),
      policy.source(inputs | {'compress': workdir}, JUDGED, context),
      thinking=False,
      order=config.prompt.order,
      batch_size=stage.eval_batch_size,
      seed=0,
      desc='judge',
    )
    return ranking.slate_metrics(found.generated, labels.grades, labels.count)[
      'n@5'
    ]

  whole = ranked(spec, 'full')
  written = ranked(spec.with_context('text', longest), 'text')
  names = ('preservation', 'ranking', 'judge', 'reward')
  with np.load(workdir / MARKS) as judged:
    numbers = {name: judged[name] for name in names}
  return {
    'n@5': {'whole': float(whole.mean()), 'compressed': float(written.mean())},
    'spearman': {
      'n@5': {k: _spearman(v, written) for k, v in numbers.items()},
      'change': {k: _spearman(v, written - whole) for k, v in numbers.items()},
    },
    'slates': len(labels),
  }


def _spearman(one: np.ndarray, other: np.ndarray) -> float | None:
  """Rank correlation; None where one of them never varies."""
  if min(len(np.unique(one)), len(np.unique(other))) < 2:
    return None
  return float(stats.spearmanr(one, other).statistic)
