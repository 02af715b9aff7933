"""Compress: a policy that rewrites contexts into a fifth of their tokens.

It starts from the parameters of the ranker that will read its output. First it
imitates compressions by rule, for each of the ratios: of several, the one that
changes the ranker's read-out least. Then it learns by RL: its compressions are
verified, read by the frozen ranker, and rewarded (Eq. 10-11). Last it writes
the contexts of all slates, once; later stages read them with `rl.context=text`
and the like.

Axes: n slates.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from gr2_jax.compressor import judge, rollouts, rule, writer
from gr2_jax.compressor.options import CompressorOptions
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
JUDGED, JUDGMENTS = 'validation', 'judged.npz'  # a split, and its judgments


@dataclasses.dataclass(frozen=True)
class _Setup:
  """Arguments of `run`, and what is made from them."""

  config: ConfigDict
  options: CompressorOptions
  inputs: dict[str, pathlib.Path]
  workdir: pathlib.Path
  spec: policy.PolicySpec
  mesh: jax.sharding.Mesh
  ranker: Any  # parameters of the ranker that reads

  @property
  def stage(self) -> ConfigDict:
    """Section `compress`."""
    return self.config.compress


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains the compressor, then writes the contexts of every split.

  Args:
    config: sections prompt, model, mesh, compress; seed.
    inputs: slates, tokenizer, backbone, and the ranker `compress.start`.
    workdir: of this stage; gets one file of `prompts.compressed` per split.

  Returns:
    The best step and its validation metrics; `splits`, the report of each;
    `longest`, tokens of the longest context; `judge`, how well the judge
    agrees with the ranking downstream; and, of a judge behind an endpoint,
    `asked`, its tokens and cost.

  Raises:
    ValueError: a judge or a ratio is invalid.
    endpoint.EndpointError: the endpoint cannot be used.
    ledger.OverLimit: the next request might exceed the limit on tokens.
  """
  options = CompressorOptions.from_config(config.compress)
  spec = policy.load(config, inputs)
  mesh = sharding.make_mesh(**config.mesh)
  with http_judge(config, spec, mesh, workdir) as (judges, usage):
    ranker = spec.load_params(inputs[config.compress.start], mesh)
    setup = _Setup(config, options, inputs, workdir, spec, mesh, ranker)
    return _run(setup, judges) | usage()


@contextlib.contextmanager
def http_judge(
  config: ConfigDict,
  spec: policy.PolicySpec,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
) -> Iterator[tuple[judge.HttpJudge | None, Callable[[], dict[str, Any]]]]:
  """Opens the judge behind an endpoint, and its answers beside `workdir`.

  Yields:
    The judge, None if the ranker judges; and a function that returns, under
    `asked`, the usage of all runs with the same judge and seed.
  """
  stage = config.compress
  if stage.judge != 'remote':
    yield None, dict
    return
  system = config.prompt.system
  words = dialogue.Dialogue(spec.prompter, spec.catalog, system, 0, False)
  if not processes.is_main_process():  # Process 0 sends the requests.
    yield judge.HttpJudge(words, mesh, None), dict
    return
  settings = endpoint.settings('compress', stage, temperature=0.0)
  identity = [config.seed, 'compress', stage.endpoint, stage.model]
  with (
    ledger.from_config('compress', stage, workdir, identity) as answers,
    endpoint.Endpoint(settings, answers) as model,
  ):
    ask = judge_lib.Judge(judge_lib.COMPRESSION, model)
    yield (
      judge.HttpJudge(words, mesh, ask),
      lambda: {'asked': ledger.with_cost(stage, answers.usage())},
    )


def _run(setup: _Setup, judges: judge.HttpJudge | None) -> dict[str, Any]:
  """Imitation, RL, and writing; see `run`."""
  stage, spec, ranker = setup.stage, setup.spec, setup.ranker
  train = policy.source(setup.inputs, 'train')
  tokens = rollouts.budgets(spec.prompter, train, (*stage.ratios, stage.ratio))
  budgets = {ratio: tokens[ratio] for ratio in stage.ratios}
  budget = {stage.ratio: tokens[stage.ratio]}
  make_write = functools.partial(writer.make_write, spec, setup.mesh)
  order, options = setup.config.prompt.order, setup.options
  write = make_write(ranker, order, options, budget, judges)
  validate = _validator(setup, write)

  # Imitation.
  imitation = setup.workdir / IMITATION
  if not processes.broadcast_flag((imitation / 'done.json').exists()):
    results = _imitate(setup, budgets, validate)
    logging.info('compress: units by importance: %s', results['ranked'])
    if processes.is_main_process():
      (imitation / 'done.json').write_text(json.dumps(results))

  # RL.
  grammar = rollouts.grammar(spec.prompter, stage.slack)
  sampler = rollouts.sampler(
    grammar,
    budgets,
    group=stage.group_size,
    temperature=stage.temperature,
    constrained=stage.constrained,
  )
  teacher = None
  start = spec.load_params(imitation, setup.mesh)
  if stage.kl_weight:
    teacher = distillation.self_teacher(spec, setup.mesh, start)
  training = on_policy.learn(
    'compress',
    on_policy.OnPolicyOptions.from_config(stage, 'compress'),
    spec=spec,
    mesh=setup.mesh,
    grammar=grammar,
    workdir=setup.workdir,
    seed=setup.config.seed,
    slates=train,
    render=rollouts.generation_rows(
      spec.prompter, budgets, order, judges is not None
    ),
    sampler=sampler,
    rollout_step=rollouts.make_rollout_step(
      spec, sampler, options, ranker, judges
    ),
    validate=validate,
    start=imitation,
    teacher=teacher,
  )

  # Writing. Only the split that `_agreement` reads is judged.
  params = spec.load_params(setup.workdir, setup.mesh)
  unjudged = make_write(None, order, options, budget)
  splits = {}
  for split in ('train', JUDGED, 'test'):
    write_split = write if split == JUDGED else unjudged
    splits[split] = _write(setup, split, functools.partial(write_split, params))
    logging.info('compress: %s: %s', split, json.dumps(splits[split]))
  longest = max(report['longest'] for report in splits.values())
  judged = _agreement(setup, longest)
  return training | {'splits': splits, 'longest': longest, 'judge': judged}


def _imitate(
  setup: _Setup,
  budgets: Mapping[float, int],
  validate: Callable[[Any], dict[str, float]],
) -> dict[str, Any]:
  """Imitates compressions by rule."""
  stage, spec, mesh = setup.stage, setup.spec, setup.mesh
  slates = policy.source(setup.inputs, 'train')
  sampler = rollouts.sampler(
    rollouts.grammar(spec.prompter, stage.slack),
    budgets,
    temperature=1.0,
    constrained=stage.constrained,
  )
  order = setup.config.prompt.order
  chosen = np.random.default_rng(0).permutation(len(slates))
  sample = ranking.Chosen(slates, chosen[: stage.rule_slates])
  ranked = rule.rank_units(
    spec, mesh, setup.ranker, setup.options, order, sample
  )
  data = loop.dataset(
    mesh,
    slates,
    _renderer(setup, budgets, ranked, sampler.max_tokens),
    stage.imitate.batch_size,
    setup.config.seed,
  )
  iterator = examples.iterate(data)
  optimizer = learner.make_optimizer(
    learner.OptimizerOptions.from_config(stage.imitate)
  )
  loss = functools.partial(
    rollouts.imitation_loss, spec, sampler, setup.options
  )
  update = learner.make_update(spec.adapters.wrap(loss), optimizer)

  def take_step(state, frozen, step):
    del step
    rows = sharding.shard_local_rows(next(iterator), mesh)
    return update(state, frozen, setup.ranker, rows)

  results = loop.fit(
    loop.LoopOptions.from_config(stage.imitate),
    spec=spec,
    mesh=mesh,
    workdir=setup.workdir / IMITATION,
    seed=setup.config.seed,
    optimizer=optimizer,
    take_step=take_step,
    iterator=iterator,
    validate=validate,
    selection_metric='reward',
    inherited=setup.inputs[stage.start],
    desc='imitate',
  )
  return results | {'ranked': [f'{field} {place}' for field, place in ranked]}


def _renderer(
  setup: _Setup,
  budgets: Mapping[float, int],
  ranked: Sequence[rule.Unit],
  max_tokens: int,
) -> Callable[..., dict[str, np.ndarray]]:
  """Rows of `rollouts.generation_rows` with compressions by rule.

  A row has `tokens` int32 [G, T] and `length` int32 [G]. Its first compression
  is not random.
  """
  prompter, order = setup.spec.prompter, setup.config.prompt.order
  render_row = rollouts.generation_rows(prompter, budgets, order)

  def render(slate, rng):
    row = render_row(slate, rng)
    shown = row['incoming'][: int(row['count'])]
    drawn = [
      rule.extract(prompter, slate, shown, int(row['budget']), ranked, source)
      for source in (None, *[rng] * (setup.stage.draws - 1))
    ]
    return row | {
      'tokens': np.stack([prompt.pad(d, max_tokens, 'draw') for d in drawn]),
      'length': np.array([len(d) for d in drawn], np.int32),
    }

  return render


def _validator(
  setup: _Setup, write: Callable[..., Iterator[writer.Written]]
) -> Callable[[Any], dict[str, float]]:
  """`params -> judge.metrics` of a sample of the validation slates."""
  slates = policy.source(setup.inputs, 'validation')
  chosen = np.random.default_rng(0).permutation(len(slates))
  sample = ranking.Chosen(slates, chosen[: setup.stage.eval_slates])

  def validate(params) -> dict[str, float]:
    judgments = _joined([part.judged for part in write(params, sample, 0)])
    return {k: float(v) for k, v in judge.metrics(judgments).items()}

  return validate


def _joined(parts: list[judge.Judgment]) -> judge.Judgment:
  return judge.Judgment(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _write(
  setup: _Setup, split: str, write: Callable[..., Iterator[writer.Written]]
) -> dict[str, Any]:
  """Writes a split, unless it is written, and returns its report."""
  path = compressed.file(setup.workdir, split)
  report_path = path.with_suffix('.json')
  if processes.broadcast_flag(report_path.exists()):
    return json.loads(report_path.read_text())
  slates, limit = policy.source(setup.inputs, split), setup.stage.train_slates
  if split == 'train' and limit:
    slates = ranking.Chosen(slates, np.arange(min(limit, len(slates))))
  parts = list(write(slates, setup.config.seed, f'compress {split}'))
  stored = list(writer.store(setup.spec, slates, parts))
  report = compressed.report(stored)
  if processes.is_main_process():
    records.write(path, stored)
    if split == JUDGED:
      judgments = _joined([part.judged for part in parts])
      np.savez(setup.workdir / JUDGMENTS, **judgments._asdict())
    report_path.write_text(artifacts.dumps(report))
  return report


def _agreement(setup: _Setup, longest: int) -> dict[str, Any]:
  """How well the judge agrees with the ranking downstream.

  The judge reads the read-out; downstream is the order that the ranker
  generates, on the validation slates.

  Returns:
    `n@5` of generated orders with full and with compressed contexts; and
    Spearman's correlation, over slates, of the judge's numbers with the latter
    `n@5`, which mostly reflects how hard a slate is, and with its `change` from
    the full context.
  """
  spec, inputs = setup.spec, setup.inputs | {'compress': setup.workdir}
  labels = slates_lib.read(inputs['slates'], JUDGED)

  def ndcg(spec: policy.PolicySpec, context: str) -> np.ndarray:
    answers = ranking.rank(
      policy.Policy(spec, setup.ranker, setup.mesh),
      policy.source(inputs, JUDGED, context),
      thinking=False,
      order=setup.config.prompt.order,
      batch_size=setup.stage.eval_batch_size,
      seed=0,
      desc='judge',
    )
    orders = answers.generated
    return ranking.slate_metrics(orders, labels.grades, labels.count)['n@5']

  whole = ndcg(spec, 'full')
  written = ndcg(spec.with_context('text', longest), 'text')
  names = ('preservation', 'ranking', 'judge', 'reward')
  with np.load(setup.workdir / JUDGMENTS) as judgments:
    numbers = {name: judgments[name] for name in names}
  return {
    'n@5': {'whole': float(whole.mean()), 'compressed': float(written.mean())},
    'spearman': {
      'n@5': {k: _spearman(v, written) for k, v in numbers.items()},
      'change': {k: _spearman(v, written - whole) for k, v in numbers.items()},
    },
    'slates': len(labels),
  }


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
  """Rank correlation; None if one of them is constant."""
  if min(len(np.unique(x)), len(np.unique(y))) < 2:
    return None
  return float(stats.spearmanr(x, y).statistic)
