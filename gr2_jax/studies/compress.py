"""Study: how much of a context a ranker needs, and which parts.

One ranker, trained on contexts with parts left out, reads the test slates in
every form: whole, cut by rule, thinned at random, and as the compressor wrote
them. For some forms, those with memory tokens among them, a policy of its own
is distilled from that ranker's answers to the whole context; for some, RL
continues from there. Each form is compared with the whole context (RL with the
whole context after RL): its tokens, and its loss of N@5 and R@1. Two one-sided
tests show whether the loss is smaller than a margin.

Axes: S seeds, n slates, K candidates.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable, Collection
from typing import Any

import ml_collections
import numpy as np

from gr2_jax.compressor import rollouts
from gr2_jax.compressor import writer as writer_lib
from gr2_jax.compressor.options import CompressorOptions
from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.ops import statistics
from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.policy import answers as answers_lib
from gr2_jax.policy import policy, ranking
from gr2_jax.prompts import compressed
from gr2_jax.studies import study

TABLE, FIGURE = 'compress.md', 'compress.png'
WHOLE, WRITTEN = 'full', 'text'  # forms of `contexts.parse`
# Order -> its prefix in the table.
ORDERS = {'generated': '', 'readout': 'read-out '}
METRICS = ('n@5', 'r@1')
MEASURES = tuple(f'{order} {metric}' for order in ORDERS for metric in METRICS)
# Stage that trains a form's own policy -> the ending of the form's name.
TRAINED = {'opd': ', distilled', 'rl': ', RL'}
# Metrics of every order; tokens of the form and of the whole context, [n] each.
Answers = dict[str, np.ndarray]
KINDS = ('cut by rule', 'random', 'compressor', 'distilled', 'RL')


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains the policies and reads the test slates in every form.

  Args:
    config: every section that `compress`, `opd` and their inputs read;
      study_compress; seeds.
    inputs: none; the study makes its own runs.
    workdir: of this study; the runs go beside it.

  Returns:
    `rows`, one a form: `tokens` that the ranker read, the mean over seeds and
    slates, and the share of all tokens that is `kept`; and for each of MEASURES
    the `mean`, the loss against the whole context (`lost`) with a 95 %
    interval, and a `test` of the gain against the margin
    (`statistics.two_level_equivalence`).
  """
  del inputs
  study.figure(1, 1)  # Fails before the runs, not after.
  stage = config.study_compress
  answers: dict[str, list[Answers]] = {}
  for seed in config.seeds:
    for name, read in _forms(config, seed, workdir).items():
      answers.setdefault(name, []).append(read())
  slates = _slates(config, workdir)[0]

  def measure(name: str) -> dict[str, np.ndarray]:
    """Measure -> [S, n]."""
    values = {}
    for order, metric in itertools.product(ORDERS, METRICS):
      by_seed = [
        ranking.slate_metrics(fields[order], slates.grades, slates.count)
        for fields in answers[name]
      ]
      values[f'{order} {metric}'] = study.stack(by_seed, metric)
    return values

  rows = []
  for name, by_seed in answers.items():
    whole = measure(_base(name, answers))
    shares = [a['tokens'].mean() / a['whole'].mean() for a in by_seed]
    row: dict[str, Any] = {
      'form': name,
      'tokens': float(np.mean([a['tokens'].mean() for a in by_seed])),
      'kept': float(np.mean(shares)),
    }
    for metric, values in measure(name).items():
      lost = statistics.two_level_bootstrap(
        whole[metric], values, slates.user, resamples=stage.resamples
      )
      # Of the gain: its lower side shows that nothing is lost.
      test = statistics.two_level_equivalence(
        values,
        whole[metric],
        slates.user,
        margin=stage.margin,
        resamples=stage.resamples,
      )
      row[metric] = {
        'mean': float(values.mean()),
        'lost': lost._asdict(),
        'test': test._asdict(),
      }
    rows.append(row)
  results = {'rows': rows, 'margin': stage.margin}
  results |= study.size(slates, config.seeds)
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  _draw(rows, stage.margin, workdir / FIGURE)
  return results


def _forms(
  config: ml_collections.ConfigDict, seed: int, workdir: pathlib.Path
) -> dict[str, Callable[[], Answers]]:
  """Form -> the reading of it by a seed's policies, which are trained here."""
  stage, root = config.study_compress, workdir.parent
  start = config.compress.start
  home = artifacts.run_stage(config, 'compress', root, seed)
  plan = artifacts.plan(config, 'compress', seed)
  inputs = {k: a.directory(root) for k, a in plan.inputs.items()}
  whole = policy.load(config, inputs)
  chosen = _slates(config, workdir)[1]
  read = functools.partial(_read, config, workdir, whole)

  def plain(form: str):
    slates = policy.source(inputs, 'test')
    return whole.with_context(form), ranking.Chosen(slates, chosen)

  def written():
    longest = artifacts.read_results(home)['longest']
    slates = policy.source(inputs | {'compress': home}, 'test', 'text')
    return whole.with_context('text', longest), ranking.Chosen(slates, chosen)

  readings = {
    form: functools.partial(
      read, form, functools.partial(plain, form), inputs[start]
    )
    for form in (WHOLE, *stage.forms)
  }
  for ratio in stage.ratios:
    form = written
    if ratio != config.compress.ratio:
      form = functools.partial(
        _write, config, inputs, whole, home, ratio, plain(WHOLE)[1]
      )
    readings[f'compressor, {ratio:.0%}'] = functools.partial(
      read, f'{home.name}-{ratio}', form, inputs[start]
    )
  for trainer, forms in (('opd', stage.distilled), ('rl', stage.reinforced)):
    for form in forms:
      changed = _own_policy(config, form)
      trained = artifacts.run_stage(changed, trainer, root, seed)
      name, reads = form, functools.partial(plain, form)
      if form == WRITTEN:
        name, reads = f'compressor, {config.compress.ratio:.0%}', written
      readings[name + TRAINED[trainer]] = functools.partial(
        read, form, reads, trained
      )
  return readings


def _own_policy(
  config: ml_collections.ConfigDict, form: str
) -> ml_collections.ConfigDict:
  """The config of policies that read a form.

  The teacher of `opd` reads the whole context. `rl` continues from `opd` if the
  form is distilled, and from the ranker otherwise.
  """
  stage, start = config.study_compress, config.compress.start
  changed = config.copy_and_resolve_references()
  changed.opd.update(stage.opd)
  changed.rl.update(stage.rl)
  changed.opd.context = changed.rl.context = form
  changed.opd.start = start
  changed.rl.start = 'opd' if form in stage.distilled else start
  return changed


def _base(name: str, names: Collection[str]) -> str:
  """The form to compare with: the whole context, after RL if this had RL."""
  whole = WHOLE + TRAINED['rl']
  return whole if name.endswith(TRAINED['rl']) and whole in names else WHOLE


def _slates(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> tuple[slates_lib.Slates, np.ndarray]:
  """The test slates of the study, and their places in the split."""
  slates = artifacts.plan(config, 'slates').directory(workdir.parent)
  source, chosen = study.draw(slates, config.study_compress.test_slates)
  return source.slates().take(chosen), chosen


def _read(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  whole: policy.PolicySpec,
  name: str,
  form: Callable[[], tuple[policy.PolicySpec, Any]],
  source: pathlib.Path,
) -> Answers:
  """Ranks the slates in a form; answers of an earlier call are read again.

  Args:
    config: see `run`.
    workdir: see `run`.
    whole: the spec that reads the whole context.
    name: of the form, and of the file.
    form: returns the spec that reads the form, and the slates.
    source: artifact of the policy that reads.
  """

  def load() -> tuple[policy.Policy, Any]:
    spec, slates = form()
    mesh = sharding.make_mesh(**config.mesh)
    return policy.Policy(spec, whole.load_params(source, mesh), mesh), slates

  def count(ranker: policy.Policy, slates: Any) -> dict[str, np.ndarray]:
    counts = [
      _tokens(whole, ranker.spec, slates[i], i) for i in range(len(slates))
    ]
    return dict(zip(('tokens', 'whole'), np.array(counts).T, strict=True))

  label = name.translate(str.maketrans(':+, ', '____'))
  return answers_lib.ranked(
    workdir / f'{source.name}-{label}.npz',
    load,
    thinking=False,
    order=config.prompt.order,
    batch_size=config.compress.eval_batch_size,
    seed=1,
    also=count,
    desc=name,
  )


def _tokens(
  whole: policy.PolicySpec,
  spec: policy.PolicySpec,
  slate: dict[str, np.ndarray],
  seed: int,
) -> tuple[int, int]:
  """Tokens of a slate's context, in a form and whole."""
  order, words = np.arange(int(slate['count'])), whole.vocabulary
  rng = np.random.default_rng(seed)
  ids = spec.prompter.prompt(slate, order, rng)['prompt']
  tokens = rollouts.context_tokens(spec.prompter, ids)
  if spec.prompter.context.memory:
    # The tokens before the memory are read once a user, not once a slate.
    memory_at = int(np.argmax(ids == words.memory_base))
    tokens -= memory_at - len(whole.prompter.opening)
  ids = whole.prompter.prompt(slate, order)['prompt']
  return tokens, rollouts.context_tokens(whole.prompter, ids)


def _write(config, inputs, whole, home, ratio, slates):
  """Compresses the contexts of slates to a share of the tokens."""
  options = CompressorOptions.from_config(config.compress)
  budgets = rollouts.budgets(
    whole.prompter, policy.source(inputs, 'train'), (ratio,)
  )
  mesh = sharding.make_mesh(**config.mesh)
  write = writer_lib.make_write(
    whole, mesh, None, config.prompt.order, options, budgets
  )
  parts = write(
    whole.load_params(home, mesh),
    slates,
    config.seeds[0],
    f'compress to {ratio:.0%}',
  )
  stored = list(writer_lib.store(whole, slates, parts))
  longest = compressed.report(stored)['longest']
  spec = whole.with_context('text', longest)
  return spec, compressed.Joined(slates, stored)


def summary(results: dict[str, Any]) -> str:
  """The study as a table and a line of counts."""
  lines = []
  for row in results['rows']:
    line = {
      'form': row['form'],
      'tokens': f'{row["tokens"]:.0f}',
      'kept': f'{row["kept"]:.1%}',
    }
    for order, shown in ORDERS.items():
      for metric in METRICS:
        values, name = row[f'{order} {metric}'], f'{shown}{metric.upper()}'
        line[name] = values['mean']
        line[f'{name} lost'] = reporting.interval(**values['lost'])
      line[f'{shown}within'] = _within(
        [row[f'{order} {metric}']['test'] for metric in METRICS]
      )
    lines.append(line)
  counted = (
    f'{study.size_in_words(results)}; within: N@5 and R@1 are both equivalent '
    f'to those of the whole context, or not worse, by a margin of '
    f'{results["margin"]} (one-sided tests at 5 %)'
  )
  return f'{reporting.table(lines, list(lines[0]))}\n\n{counted}'


def _within(tests: list[dict[str, Any]]) -> str:
  """The common result of the tests of all metrics."""
  if all(test['equivalent'] for test in tests):
    return 'both'
  return 'not worse' if all(test['not_worse'] for test in tests) else 'no'


def _draw(rows: list[dict[str, Any]], margin: float, path: pathlib.Path):
  """Draws N@5 against the share of the tokens, a color a kind of form."""
  sheet = study.figure(7, 4.5)
  axis = sheet.subplots()
  (whole,) = (row for row in rows if row['form'] == WHOLE)
  level = whole[MEASURES[0]]['mean']
  axis.axhline(level, color='0.4', linewidth=1, label='whole context')
  axis.axhspan(level - margin, level + margin, color='0.5', alpha=0.15)
  for number, kind in enumerate(KINDS):
    members = sorted(
      (row for row in rows if row is not whole and _kind(row['form']) == kind),
      key=lambda row: row['kept'],
    )
    if not members:
      continue
    x = [row['kept'] for row in members]
    y = [row[MEASURES[0]]['mean'] for row in members]
    lost = [row[MEASURES[0]]['lost'] for row in members]
    low = [one['estimate'] - one['low'] for one in lost]
    high = [one['high'] - one['estimate'] for one in lost]
    axis.errorbar(
      x, y, yerr=[high, low], color=f'C{number}', label=kind, capsize=2,
      marker='o', linestyle='-' if kind in KINDS[1:3] else '',
    )  # fmt: skip
  axis.set_xscale('log')
  axis.set_xlabel('share of the tokens read')
  axis.set_ylabel('N@5 on test slates')
  axis.legend(fontsize='small')
  sheet.savefig(path, dpi=110)


def _kind(form: str) -> str:
  """The one of KINDS that a form is of."""
  for kind in KINDS[3:]:
    if form.endswith(f', {kind}'):
      return kind
  for kind in KINDS[1:3]:
    if form.startswith(kind):
      return kind
  return KINDS[0]
