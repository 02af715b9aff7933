"""Evaluate: the table on the test split, with paired intervals.

Every policy has two rows: the order that it generates, and the listwise
read-out of the same prompt (`policy_readout`). The policy that RL started from
is named after its stage: `policy_sft`, `policy_opd`, `policy_midtrain`. A
pretrained model before any training is `policy_start`. Intervals resample
users, whose neighboring slates share positives, and training seeds.

Axes: S seeds, n slates, K candidates.
"""

import pathlib
from collections.abc import Container
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import metrics, parsing, statistics
from gr2_jax.pipeline import reporting
from gr2_jax.policy import answers, policy
from gr2_jax.policy import ranking as ranking_lib
from gr2_jax.stages import baselines

# Rows of the table, in order; rankers that a run lacks have no row.
_POLICIES = ('policy', 'policy_sft', 'policy_opd', 'policy_midtrain')
RANKERS = (
  'incoming',
  'policy_start',
  *(name + kind for name in _POLICIES for kind in ('', '_readout')),
  *('legacy', 'gbdt', 'random', 'best'),
)

# Gains that get an interval where a run has both rankers: the first ranker
# minus the second.
PAIRS = (
  ('policy', 'incoming'),
  ('policy', 'policy_start'),
  *(('policy', other) for other in _POLICIES[1:]),
  *(('policy', other) for other in ('policy_readout', 'legacy', 'gbdt')),
  *((ranker, 'incoming') for ranker in ('policy_sft', 'policy_opd')),
  *((ranker, 'incoming') for ranker in ('policy_readout', 'legacy', 'gbdt')),
)


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Ranks the test slates with every policy and baseline.

  Reads one artifact a seed as `rl@SEED`, and so on. The workdir gets each
  policy's rankings, which a resumed run does not make again.

  Returns:
    `metrics`: ranker -> metric -> mean over slates and seeds, given that a
    positive is in the slate; `unconditional`: times the share of requests
    whose slate has one; `paired`: gains with 95 % intervals, and McNemar's
    p-value for r@1 per seed; `per_seed`; and checks of the policy's behavior.
  """
  slates = slates_lib.read(inputs['slates'], 'test')
  counts = slates_lib.read_meta(inputs['slates'])['counts']['test']
  share = counts['slates'] / counts['requests']

  # Rankings of policies and baselines: [n, K], or [S, n, K].
  stages = {key.partition('@')[0] for key in inputs if '@' in key}
  (before,) = stages - {'rl', 'compress'}
  answers_of = {
    name: [
      _ranked(config, inputs, workdir, f'{source}@{seed}')
      for seed in config.seeds
    ]
    for name, source in (('policy', 'rl'), (f'policy_{before}', before))
  }
  rankings = {}
  for name, seeds in answers_of.items():
    rankings[name] = np.stack([a['generated'] for a in seeds])
    rankings[f'{name}_readout'] = np.stack([a['readout'] for a in seeds])
  if (inputs['backbone'] / policy.PARAMS).is_dir():  # It has no read-out yet.
    start = _ranked(config, inputs, workdir, 'backbone')
    rankings['policy_start'] = start['generated']
  for name, scores in baselines.read_scores(
    inputs['baselines'], 'test'
  ).items():
    rankings[name] = baselines.rankings(scores, slates.count)

  # Metrics per slate: [S, n] each, S = 1 for a ranker without seeds.
  per_slate = {}
  for name, ranking in rankings.items():
    ranking = ranking.reshape(-1, *ranking.shape[-2:])
    grades = np.broadcast_to(slates.grades, ranking.shape)
    count = np.broadcast_to(slates.count, ranking.shape[:-1])
    per_slate[name] = ranking_lib.slate_metrics(ranking, grades, count)
  means = {
    name: {m: float(per_slate[name][m].mean()) for m in metrics.RANKING_METRICS}
    for name in RANKERS
    if name in per_slate
  }
  return {
    'metrics': means,
    'unconditional': {
      name: {m: value * share for m, value in values.items() if m != 'auc'}
      for name, values in means.items()
    },
    'paired': {
      f'{first}-{second}': _gains(
        per_slate[first],
        per_slate[second],
        slates.user,
        config.evaluate.resamples,
      )
      for first, second in _pairs(means)
    },
    'gap_closed': (means['policy']['n@5'] - means['incoming']['n@5'])
    / max(means['best']['n@5'] - means['incoming']['n@5'], 1e-9),
    **_behavior(per_slate['policy'], answers_of['policy'], slates),
    'per_seed': {
      name: {
        m: per_slate[name][m].mean(1).tolist() for m in metrics.RANKING_METRICS
      }
      for name in ('policy', 'policy_readout', f'policy_{before}')
    },
    'n_slates': len(slates),
    'n_users': len(np.unique(slates.user)),
    'seeds': len(config.seeds),
  }


def _ranked(
  config: ConfigDict,
  inputs: dict[str, pathlib.Path],
  workdir: pathlib.Path,
  source: str,
) -> dict[str, np.ndarray]:
  """A policy's answers to the test slates, from disk where it has them."""
  stage, context = config.evaluate, config.rl.context
  seed = source.partition('@')[2]

  def load() -> tuple[policy.Policy, Any]:
    folders = {'compress': inputs.get(f'compress@{seed}')} | inputs
    spec, mesh = policy.load_with_mesh(config, folders, context)
    params = spec.load_params(inputs[source], mesh)
    slates = policy.source(folders, 'test', context)
    return policy.Policy(spec, params, mesh), slates

  extras = ('order_sensitivity', 'free_verdict')
  return answers.ranked(
    workdir / f'{source}.npz',
    load,
    thinking=stage.thinking,
    order=config.prompt.order,
    batch_size=stage.batch_size,
    seed=stage.presentation_seed,
    extras=extras if source.startswith('rl@') else (),
    desc=f'test {source}',
  )


def _behavior(
  per_slate: dict[str, np.ndarray],
  seeds: list[dict[str, np.ndarray]],
  slates: slates_lib.Slates,
) -> dict[str, Any]:
  """How the policy's answers differ from the incoming order, and how valid."""
  free = np.stack([a['free_verdict'] for a in seeds])
  picks = np.bincount(
    per_slate['first_pick'].astype(int).ravel(),
    minlength=slates.grades.shape[1],
  )
  valid = [(a['verdict'] == parsing.VALID).mean() for a in seeds]
  sensitivity = [a['order_sensitivity'].mean() for a in seeds]
  return {
    'copy_rate': float(per_slate['copied'].mean()),
    'top3_unchanged': float(per_slate['top3_unchanged'].mean()),
    'kendall_tau': float(per_slate['kendall_tau'].mean()),
    'first_pick': (picks / picks.sum()).tolist(),
    'order_sensitivity': float(np.mean(sensitivity)),
    'valid_rate': float(np.mean(valid)),
    'valid_rate_unmasked': float((free == parsing.VALID).mean()),
    'verdicts_unmasked': {
      name: float((free == code).mean())
      for code, name in enumerate(parsing.VERDICTS)
    },
  }


def _pairs(rankers: Container[str]) -> list[tuple[str, str]]:
  """The PAIRS of which a run has both rankers."""
  return [p for p in PAIRS if p[0] in rankers and p[1] in rankers]


def _gains(
  first: dict[str, np.ndarray],
  second: dict[str, np.ndarray],
  users: np.ndarray,
  resamples: int,
) -> dict[str, dict[str, Any]]:
  """Metric -> mean gain and its interval, over seeds and users."""
  gains = {}
  for metric in metrics.RANKING_METRICS:
    ours, theirs = first[metric], second[metric]
    if len(ours) != len(theirs):  # Seeds without partners.
      theirs = theirs.mean(0, keepdims=True)
    if len(theirs) == 1:
      theirs = theirs[0]
    gain = statistics.two_level_bootstrap(
      ours, theirs, users, resamples=resamples
    )
    gains[metric] = {'delta': gain.estimate, 'ci': [gain.low, gain.high]}
  if len(second['r@1']) == 1:
    base = second['r@1'][0] > 0
    gains['r@1']['mcnemar_p'] = [
      float(statistics.mcnemar(seed > 0, base).p_value) for seed in first['r@1']
    ]
  return gains


def summary(results: dict[str, Any]) -> str:
  """Two tables and a line of text that present the results."""
  means = results['metrics']
  rows = [{'ranker': k} | means[k] for k in RANKERS if k in means]
  quality = reporting.table(rows, ['ranker', *metrics.RANKING_METRICS])
  gains = [
    {'gain': f'{first}-{second}'}
    | {
      m: reporting.interval(v['delta'], *v['ci'])
      for m, v in results['paired'][f'{first}-{second}'].items()
    }
    for first, second in _pairs(means)
  ]
  shown = reporting.table(gains, ['gain', 'r@1', 'r@3', 'n@5', 'auc'])
  line = (
    f'{results["n_slates"]} slates of {results["n_users"]} users, '
    f'{results["seeds"]} seed(s); copy rate {results["copy_rate"]:.3f}, top 3 '
    f'unchanged {results["top3_unchanged"]:.3f}, valid '
    f'{results["valid_rate"]:.4f} ({results["valid_rate_unmasked"]:.4f} '
    f'without the mask), order sensitivity '
    f'{results["order_sensitivity"]:.3f}, gap closed '
    f'{results["gap_closed"]:.2f}'
  )
  return f'{quality}\n\nGains with 95 % intervals:\n{shown}\n\n{line}'
