"""Study: how much of a context a ranker needs, and which.

One ranker, which learned from contexts of which parts were left out, reads the
test slates in every form: whole, cut by rule, thinned by chance, and as the
compressor wrote them. For some forms, those with memory tokens among them, a
policy of their own is distilled from that ranker's answers to the whole; for
some RL goes on from there. Against the whole context (with RL against the whole
with RL), each form keeps so many tokens and loses so much of N@5 and R@1; two
one-sided tests say whether that is less than a margin.

Axes: S seeds, n slates, K candidates.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection
from typing import Any

import ml_collections
import numpy as np

from gr2_jax.compressor import rollouts
from gr2_jax.compressor import writer as writer_lib
from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import statistics
from gr2_jax.pipeline import artifacts, reporting
from gr2_jax.policy import policy, ranking
from gr2_jax.prompts import compressed

TABLE, FIGURE = 'compress.md', 'compress.png'
WHOLE, WRITTEN = 'full', 'text'  # forms of `contexts.parse`
# Whose order, and how a table names it; and what of it.
ORDERS = {'generated': '', 'readout': 'read-out '}
METRICS = ('n@5', 'r@1')
MEASURES = tuple(f'{order} {metric}' for order in ORDERS for metric in METRICS)
# How policies of their own are trained: stage -> how the form's name ends.
TRAINED = {'opd': ', distilled', 'rl': ', RL'}
KINDS = ('cut by rule', 'random', 'compressor', 'distilled', 'RL')


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains what is not trained, and reads the test slates in every form.

  Args:
    config: every section that `compress`, `opd` and what they need read;
      study_compress; seeds.
    inputs: none: the runs are made here.
    workdir: of this stage; its parent gets the runs.

  Returns:
    `rows`, one a form: `tokens` that the ranker read, the mean over seeds and
    slates, and the share of all tokens that is `kept`; and of every one of
    MEASURES the `mean`, what is `lost` to the whole context, with a 95 %
    interval, and a `test` of the gain against the margin
    (`statistics.two_level_equivalence`).
  """
  del inputs
  from matplotlib import figure  # noqa: F401  Fails before the runs, not after.

  stage = config.study_compress
  answers: dict[str, list[_Read]] = {}
  for seed in config.seeds:
    for name, read in _forms(config, seed, workdir).items():
      answers.setdefault(name, []).append(read())
  slates = _slates(config, workdir)[0]

  def measured(name: str) -> dict[str, np.ndarray]:
    """Metric -> [S, n]."""
    found = {}
    for measure in MEASURES:
      order, metric = measure.split()
      found[measure] = np.stack(
        [
          ranking.watch(getattr(r, order), slates.grades, slates.count)[metric]
          for r in answers[name]
        ]
      )
    return found

  rows = []
  for name, reads in answers.items():
    whole = measured(_against(name, answers))
    row: dict[str, Any] = {
      'form': name,
      'tokens': float(np.mean([r.tokens.mean() for r in reads])),
      'kept': float(np.mean([r.tokens.mean() / r.whole.mean() for r in reads])),
    }
    for metric, values in measured(name).items():
      lost = statistics.two_level_bootstrap(
        whole[metric], values, slates.user, resamples=stage.resamples
      )
      # Of the gain: its lower side says that nothing is lost.
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
  results = {
    'rows': rows,
    'margin': stage.margin,
    'n_slates': len(slates),
    'n_users': len(np.unique(slates.user)),
    'seeds': len(config.seeds),
  }
  (workdir / TABLE).write_text(summary(results) + '\n', encoding='utf-8')
  _draw(rows, stage.margin, workdir / FIGURE)
  return results


@dataclasses.dataclass(frozen=True)
class _Read:
  """What a ranker made of the test slates in one form.

  Attributes:
    generated: int32 [n, K], orders, in incoming ranks.
    readout: int32 [n, K].
    tokens: int32 [n], of the context that was read.
    whole: int32 [n], of the whole context.
  """

  generated: np.ndarray
  readout: np.ndarray
  tokens: np.ndarray
  whole: np.ndarray


def _forms(
  config: ml_collections.ConfigDict, seed: int, workdir: pathlib.Path
) -> dict[str, Callable[[], _Read]]:
  """Form -> how a seed's policies read it; trains what they need."""
  stage, root, start = (
    config.study_compress,
    workdir.parent,
    config.compress.start,
  )
  home = artifacts.run_stage(config, 'compress', root, seed)
  plan = artifacts.plan(config, 'compress', seed)
  inputs = {k: a.directory(root) for k, a in plan.inputs.items()}
  whole = policy.load(config, inputs)
  chosen = _slates(config, workdir)[1]
  read = functools.partial(_read, config, workdir, whole)

  def plain(form: str):
    return whole.reading(form), ranking.Chosen(whole.source('test'), chosen)

  def written():
    longest = artifacts.read_results(home)['longest']
    setup = whole.reading_written(home, longest)
    return setup, ranking.Chosen(setup.source('test'), chosen)

  found = {
    form: functools.partial(
      read, form, functools.partial(plain, form), inputs[start]
    )
    for form in (WHOLE, *stage.forms)
  }
  for keep in stage.keeps:
    form = written
    if keep != config.compress.keep:
      form = functools.partial(
        _write, config, whole, home, keep, plain(WHOLE)[1]
      )
    found[f'compressor, {keep:.0%}'] = functools.partial(
      read, f'{home.name}-{keep}', form, inputs[start]
    )
  for trainer, forms in (('opd', stage.distilled), ('rl', stage.reinforced)):
    for form in forms:
      own = _of_its_own(config, form)
      trained = artifacts.run_stage(own, trainer, root, seed)
      name, reads = form, functools.partial(plain, form)
      if form == WRITTEN:
        name, reads = f'compressor, {config.compress.keep:.0%}', written
      found[name + TRAINED[trainer]] = functools.partial(
        read, form, reads, trained
      )
  return found


def _of_its_own(
  config: ml_collections.ConfigDict, form: str
) -> ml_collections.ConfigDict:
  """Runs whose policy reads a form.

  In `opd` its teacher reads the whole; `rl` goes on from there where the form
  is distilled, or else from the ranker.
  """
  stage, own = config.study_compress, config.copy_and_resolve_references()
  own.opd.update(stage.opd)
  own.rl.update(stage.rl)
  own.opd.context = own.rl.context = form
  own.opd.start = own.rl.start = config.compress.start
  if form in stage.distilled:
    own.rl.start = 'opd'
  return own


def _against(name: str, names: Collection[str]) -> str:
  """What a form is compared with: the whole, of RL too where it had that."""
  whole = WHOLE + TRAINED['rl']
  return whole if name.endswith(TRAINED['rl']) and whole in names else WHOLE


def _slates(config, workdir: pathlib.Path):
  """The test slates of the study, and which they are."""
  plan = artifacts.plan(config, 'slates')
  records = slates_lib.source(plan.directory(workdir.parent), 'test')
  rng = np.random.default_rng(0)
  most = config.study_compress.test_slates
  chosen = np.sort(rng.permutation(len(records))[:most])
  return records.slates().take(chosen), chosen


def _read(
  config,
  workdir: pathlib.Path,
  whole: policy.Setup,
  name: str,
  form: Callable[[], tuple[policy.Setup, Any]],
  source: pathlib.Path,
) -> _Read:
  """Reads the slates in a form, or finds what was made of them before.

  Args:
    config: see `run`.
    workdir: likewise.
    whole: the setup that reads the whole context.
    name: of the form, and of the file.
    form: gives the setup that reads it, and the slates.
    source: artifact of the policy that reads.

  Returns:
    What the policy made of the slates.
  """
  label = name.translate(str.maketrans(':+, ', '____'))
  kept = workdir / f'{source.name}-{label}.npz'
  if not kept.exists():
    setup, slates = form()
    ranked = ranking.rank(
      setup,
      whole.load_params(source),
      slates,
      thinking=False,
      order=config.prompt.order,
      batch_size=config.compress.eval_batch_size,
      seed=1,
      desc=name,
    )
    counted = [_tokens(whole, setup, slates[i], i) for i in range(len(slates))]
    temporary = kept.with_suffix('.tmp.npz')
    np.savez(
      temporary,
      generated=ranked.generated,
      readout=ranked.readout,
      **{
        field: np.array([c[field] for c in counted])
        for field in ('tokens', 'whole')
      },
    )
    temporary.replace(kept)
  with np.load(kept) as found:
    return _Read(**found)


def _tokens(
  whole: policy.Setup, setup: policy.Setup, slate, seed: int
) -> dict[str, int]:
  """Tokens of a slate's context, whole and as a form has it."""
  order, words = np.arange(int(slate['count'])), whole.vocabulary
  rng = np.random.default_rng(seed)
  ids = setup.prompter.prompt(slate, order, rng)['prompt']
  own = rollouts.context_tokens(setup.prompter, ids)
  memory = setup.prompter.context.memory
  if memory:  # What stands before it is read once for a user, and not again.
    own -= int(np.argmax(ids == words.memory_base)) - len(
      whole.prompter.opening
    )
  ids = whole.prompter.prompt(slate, order)['prompt']
  return {
    'tokens': own,
    'whole': rollouts.context_tokens(whole.prompter, ids),
  }


def _write(config, whole, home, keep, slates):
  """The slates with contexts by the compressor, at a share of the tokens."""
  stage = config.compress
  writer = rollouts.of(whole, stage.slack)
  budgets = rollouts.budgets(writer, (keep,))
  write = writer_lib.make_write(writer, None, config, stage, budgets)
  parts = write(
    whole.load_params(home), slates, config.seeds[0], f'compress to {keep:.0%}'
  )
  stored = list(writer_lib.store(whole, slates, parts))
  longest = compressed.report(stored)['longest']
  setup = whole.reading_written(home, longest)
  return setup, compressed.Joined(slates, stored)


def summary(results: dict[str, Any]) -> str:
  """The study as a table and a line, for people."""
  lines = []
  for row in results['rows']:
    line = {
      'form': row['form'],
      'tokens': f'{row["tokens"]:.0f}',
      'kept': f'{row["kept"]:.1%}',
    }
    for order, shown in ORDERS.items():
      for metric in METRICS:
        found, name = row[f'{order} {metric}'], f'{shown}{metric.upper()}'
        line[name] = found['mean']
        line[f'{name} lost'] = reporting.interval(**found['lost'])
      line[f'{shown}within'] = _within(
        [row[f'{order} {metric}']['test'] for metric in METRICS]
      )
    lines.append(line)
  counted = (
    f'{results["n_slates"]} slates of {results["n_users"]} users, '
    f'{results["seeds"]} seed(s); within: N@5 and R@1 are both equivalent to '
    f'those of the whole context, or not worse, by a margin of '
    f'{results["margin"]} (one-sided tests at 5 %)'
  )
  return f'{reporting.table(lines, list(lines[0]))}\n\n{counted}'


def _within(tests: list[dict[str, Any]]) -> str:
  """What tests of all metrics together say."""
  if all(test['equivalent'] for test in tests):
    return 'both'
  return 'not worse' if all(test['not_worse'] for test in tests) else 'no'


def _draw(rows: list[dict[str, Any]], margin: float, path: pathlib.Path):
  """N@5 against the share of the tokens, a colour a kind of form."""
  from matplotlib import figure

  sheet = figure.Figure((7, 4.5), layout='constrained')
  axis = sheet.subplots()
  (whole,) = (row for row in rows if row['form'] == WHOLE)
  level = whole[MEASURES[0]]['mean']
  axis.axhline(level, color='0.4', linewidth=1, label='whole context')
  axis.axhspan(level - margin, level + margin, color='0.5', alpha=0.15)
  for number, kind in enumerate(KINDS):
    own = sorted(
      (row for row in rows if row is not whole and _kind(row['form']) == kind),
      key=lambda row: row['kept'],
    )
    if not own:
      continue
    found = [row[MEASURES[0]] for row in own]
    x, y = [row['kept'] for row in own], [one['mean'] for one in found]
    lost = [one['lost'] for one in found]
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
  """Of KINDS."""
  for kind in KINDS[3:]:
    if form.endswith(f', {kind}'):
      return kind
  for kind in KINDS[1:3]:
    if form.startswith(kind):
      return kind
  return KINDS[0]
