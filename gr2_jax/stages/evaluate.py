"""Evaluate: the table on the test split, with paired intervals.

Every policy is read twice: in the order it generates, and by the listwise
read-out of the same prompt (`policy_readout`). Intervals resample users, whose
neighbouring slates share positives, and training seeds. A pretrained model has
one more row, `policy_start`: it itself, before any training. What RL started
from is named after its stage: `policy_sft`, `policy_opd`, `policy_midtrain`.

Axes: S seeds, n slates, K candidates.
"""

import pathlib
from collections.abc import Container
from typing import Any

import numpy as np

from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.ops import metrics, parsing, statistics
from gr2_jax.pipeline import reporting
from gr2_jax.policy import answers, policy
from gr2_jax.policy import ranking as ranking_lib
from gr2_jax.stages import baselines

# Rows of the table, in order; of what a run does not have there is no row.
RANKERS = (
  'incoming',
  'policy_start',
  'policy',
  'policy_readout',
  'policy_sft',
  'policy_sft_readout',
  'policy_opd',
  'policy_opd_readout',
  'policy_midtrain',
  'policy_midtrain_readout',
  'legacy',
  'gbdt',
  'random',
  'best',
)

# Which gains get an interval: a ranker and what it is compared with, where a
# run has both.
PAIRS = (
  ('policy', 'incoming'),
  ('policy', 'policy_start'),
  ('policy', 'policy_sft'),
  ('policy', 'policy_opd'),
  ('policy', 'policy_midtrain'),
  ('policy', 'policy_readout'),
  ('policy', 'legacy'),
  ('policy', 'gbdt'),
  ('policy_sft', 'incoming'),
  ('policy_opd', 'incoming'),
  ('policy_readout', 'incoming'),
  ('legacy', 'incoming'),
  ('gbdt', 'incoming'),
)


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Ranks the test slates with every policy and baseline.

  Args:
    config: sections prompt, model, mesh, rl, evaluate; seeds.
    inputs: slates, tokenizer, backbone, baselines, and of every seed rl, the
      stage that it started from, and the one that wrote what it reads, if any.
    workdir: of this stage; gets each policy's rankings, which a run that was
      killed does not make again.

  Returns:
    `metrics`: ranker -> metric -> mean over slates and seeds, given that a
    positive is in the slate; `unconditional`: times the share of requests
    whose slate has one; `paired`: gains with 95 % intervals, and McNemar's
    p-value for r@1 per seed; the watches of the policy; `per_seed`.
  """
  stage = config.evaluate
  slates = slates_lib.read(inputs['slates'], 'test')
  counts = slates_lib.read_meta(inputs['slates'])['counts']['test']

  # Policies.
  trained = {key.partition('@')[0] for key in inputs if '@' in key}
  (before,) = trained - {'rl', 'compress'}
  policies = {
    name: [
      _ranked(config, inputs, workdir, f'{source}@{seed}')
      for seed in config.seeds
    ]
    for name, source in (('policy', 'rl'), (f'policy_{before}', before))
  }
  rankings = {}
  for name, seeds in policies.items():
    rankings[name] = np.stack([a['generated'] for a in seeds])
    rankings[f'{name}_readout'] = np.stack([a['readout'] for a in seeds])
  if (inputs['backbone'] / policy.PARAMS).is_dir():  # It has no read-out yet.
    start = _ranked(config, inputs, workdir, 'backbone')
    rankings['policy_start'] = start['generated']

  # Baselines.
  scores = baselines.read_scores(inputs['baselines'], 'test')
  for name, values in scores.items():
    rankings[name] = baselines.rankings(values, slates.count)

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
  share = counts['slates'] / counts['requests']

  # Gains.
  paired = {}
  for first, second in _pairs(means):
    paired[f'{first}-{second}'] = {
      m: _gain(
        per_slate[first][m], per_slate[second][m], slates.user, stage.resamples
      )
      for m in metrics.RANKING_METRICS
    }
    if len(per_slate[second]['r@1']) == 1:
      base = per_slate[second]['r@1'][0] > 0
      paired[f'{first}-{second}']['r@1']['mcnemar_p'] = [
        float(statistics.mcnemar(seed > 0, base).p_value)
        for seed in per_slate[first]['r@1']
      ]

  # Watches.
  mine = per_slate['policy']
  gap = means['best']['n@5'] - means['incoming']['n@5']
  free = np.stack([a['free_verdict'] for a in policies['policy']])
  histogram = np.bincount(
    mine['first_pick'].astype(int).ravel(), minlength=slates.grades.shape[1]
  )
  return {
    'metrics': means,
    'unconditional': {
      name: {m: value * share for m, value in values.items() if m != 'auc'}
      for name, values in means.items()
    },
    'paired': paired,
    'gap_closed': (means['policy']['n@5'] - means['incoming']['n@5'])
    / max(gap, 1e-9),
    'copy_rate': float(mine['copied'].mean()),
    'top3_unchanged': float(mine['top3_unchanged'].mean()),
    'kendall_tau': float(mine['kendall_tau'].mean()),
    'first_pick': (histogram / histogram.sum()).tolist(),
    'order_sensitivity': float(
      np.mean([a['order_sensitivity'].mean() for a in policies['policy']])
    ),
    'valid_rate': float(
      np.mean(
        [(a['verdict'] == parsing.VALID).mean() for a in policies['policy']]
      )
    ),
    'valid_rate_unmasked': float((free == parsing.VALID).mean()),
    'verdicts_unmasked': {
      name: float((free == code).mean())
      for code, name in enumerate(parsing.VERDICTS)
    },
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
  config,
  inputs: dict[str, pathlib.Path],
  workdir: pathlib.Path,
  source: str,
) -> dict[str, np.ndarray]:
  """A policy's answers to the test slates, from disk where it has them."""
  stage = config.evaluate
  seed = source.partition('@')[2]

  def load() -> tuple[policy.Policy, Any]:
    own = {'compress': inputs.get(f'compress@{seed}')} | inputs
    context = config.rl.context
    spec = policy.load(config, own, context)
    mesh = sharding.make_mesh(**config.mesh)
    params = spec.load_params(inputs[source], mesh)
    slates = policy.source(own, 'test', context)
    return policy.Policy(spec, params, mesh), slates

  watched = source.startswith('rl@')
  return answers.ranked(
    workdir / f'{source}.npz',
    load,
    thinking=stage.thinking,
    order=config.prompt.order,
    batch_size=stage.batch_size,
    seed=stage.presentation_seed,
    extras=('order_sensitivity', 'free_verdict') if watched else (),
    desc=f'test {source}',
  )


def _pairs(rankers: Container[str]) -> list[tuple[str, str]]:
  """PAIRS that a run has both of."""
  return [p for p in PAIRS if p[0] in rankers and p[1] in rankers]


def _gain(
  first: np.ndarray, second: np.ndarray, users: np.ndarray, resamples: int
) -> dict[str, Any]:
  """Mean gain and its interval, over seeds and users."""
  if len(first) != len(second):  # Other seeds: they have no partner.
    second = second.mean(0, keepdims=True)
  if len(second) == 1:
    second = second[0]
  found = statistics.two_level_bootstrap(
    first, second, users, resamples=resamples
  )
  return {'delta': found.estimate, 'ci': [found.low, found.high]}


def summary(results: dict[str, Any]) -> str:
  """The results as two tables and a line, for people."""
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
