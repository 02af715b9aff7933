"""From slates to rollouts with advantages: sample, parse, reward, compare.

All of it is one compiled function, so that nothing leaves the device between a
sampled token and its advantage.

Axes: P prompts, G group, K candidates, T completion time.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gr2_jax.ops import (
  advantages,
  judge,
  losses,
  masking,
  metrics,
  parsing,
  placement,
  rewards,
)
from gr2_jax.policy import policy, sampling
from gr2_jax.train import policy_gradient

# Fields of rows that are for a teacher's eyes alone.
_TEACHERS = ('teacher_prompt', 'teacher_prompt_length', 'teacher_slots')


def make_act(spec: policy.PolicySpec, sampler: sampling.SamplingOptions, stage):
  """Compiles `(params, rows, key) -> (PolicyBatch, watches)`.

  Args:
    spec: tokens and shapes.
    sampler: how to roll out.
    stage: section `rl` or `opd`.
  """
  grammar = spec.grammar

  @jax.jit
  def act(params: Any, rows: dict[str, jax.Array], key: jax.Array):
    rollouts = sampling.sample(
      spec.model,
      params,
      rows['prompt'],
      rows['prompt_length'],
      rows['count'],
      key,
      grammar,
      sampler,
    )

    def spread(x):
      return jnp.broadcast_to(
        x[:, None], (*rollouts.length.shape, *x.shape[1:])
      )

    count, incoming = spread(rows['count']), spread(rows['incoming'])
    grades = spread(rows['grades'])
    answer = sampling.parse(
      grammar, sampler, rollouts.tokens, rollouts.length, count, incoming
    )
    extras, watches = _extras(spec, sampler, stage, rows, rollouts, answer)
    reward = rewards.reward(
      answer.ranking,
      answer.verdict,
      grades,
      count,
      incoming,
      kind=stage.reward,
      k=stage.k,
      gate=stage.gate,
      format_weight=stage.format_weight,
      extras=extras,
    )
    flat = advantages.zero_variance(reward.total)
    advantage = advantages.group_advantage(reward.total, kind=stage.advantage)
    if stage.credit == 'placement':
      slate = (answer.ranking, grades, count)
      by_placement = placement.placement_advantage(
        reward.total,
        placement.expected_if_shuffled(*slate, kind=stage.reward, k=stage.k),
        _settled(stage, answer, grades, count, incoming),
        normalize=stage.advantage in ('dapo', 'grpo'),
      )
      advantage = placement.spread_over_tokens(
        advantage,
        by_placement,
        rollouts.length,
        count,
        answer.verdict == parsing.VALID,
        sampler.max_tokens,
      )
    batch = policy_gradient.PolicyBatch(
      prompt=rows['prompt'],
      prompt_length=rows['prompt_length'],
      facts=rows['count'],
      tokens=rollouts.tokens,
      length=rollouts.length,
      logp=rollouts.logp,
      advantage=advantage,
      use=~flat,
      slots=rows['slots'],
      **{name: rows[name] for name in _TEACHERS if name in rows},
    )
    written = masking.length_mask(rollouts.length, sampler.max_tokens)
    first = jnp.take_along_axis(incoming, answer.ranking[..., :1], -1)[..., 0]
    quality = metrics.ranking_metrics(answer.ranking, grades, count)
    shown = (answer.ranking, incoming, count)
    watches |= {
      'reward': reward.total.mean(),
      'reward_rank': reward.rank.mean(),
      'n@5': quality['n@5'].mean(),
      'r@1': quality['r@1'].mean(),
      'copy_rate': reward.copied.mean(),
      'top3_unchanged': metrics.top_unchanged(*shown, k=3).mean(),
      'kendall_tau': metrics.kendall_tau(*shown).mean(),
      'first_pick': first.mean(),
      'flat_groups': flat.mean(),
      'length': rollouts.length.mean(),
      'sampler_entropy': masking.masked_mean(rollouts.entropy, written),
    }
    picks = metrics.first_pick_histogram(
      answer.ranking, incoming, jnp.ones(first.shape, bool)
    )
    watches |= {f'first_pick/{i}': n / first.size for i, n in enumerate(picks)}
    watches |= {
      f'answer/{name}': share
      for name, share in metrics.verdict_shares(answer.verdict).items()
    }
    return batch, watches

  return act


def _settled(
  stage,
  answer: parsing.Answer,
  grades: jax.Array,
  count: jax.Array,
  incoming: jax.Array,
) -> jax.Array:
  """Ranks [P, G, K] at which no placement can change the whole reward."""
  if stage.gate == 'v1' or stage.order_cost or stage.judge_weight:
    return ~masking.length_mask(count, grades.shape[-1])
  settled = placement.settled(answer.ranking, grades, count)
  if stage.gate == 'none':
    return settled
  real = masking.length_mask(count, grades.shape[-1])
  waits = placement.repeats(answer.ranking, incoming, count) & real
  return settled & ~waits


def _extras(
  spec: policy.PolicySpec,
  sampler: sampling.SamplingOptions,
  stage,
  rows: dict[str, jax.Array],
  rollouts: sampling.Rollouts,
  answer: parsing.Answer,
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
  """Terms [P, G] beside the ranking reward, already weighted; their watches."""
  extras, watches = [], {}
  if stage.overlong_buffer:
    penalty = losses.overlong_penalty(
      rollouts.length,
      max_length=sampler.max_tokens,
      buffer=stage.overlong_buffer,
    )
    extras.append(stage.overlong_weight * penalty)
    watches['overlong_penalty'] = penalty.mean()
  if stage.order_cost:
    disagreement = _order_disagreement(rows, answer)
    extras.append(-stage.order_cost * disagreement)
    watches['order_disagreement'] = disagreement.mean()
  if stage.judge_weight:
    quality = judge.judge(
      rollouts.tokens,
      rollouts.length,
      rows['prompt'],
      rows['prompt_length'],
      rows['count'],
      answer.ranking,
      answer.verdict,
      _symbols(spec),
    )
    extras.append(stage.judge_weight * quality.total)
    watches |= {
      f'judge/{name}': axis.mean() for name, axis in quality._asdict().items()
    }
  return extras, watches


def _order_disagreement(
  rows: dict[str, jax.Array], answer: parsing.Answer
) -> jax.Array:
  """Of each answer with those to the slate's other presentation: [P, G].

  The two presentations stand side by side among the P prompts.
  """
  P, G, K = answer.ranking.shape
  incoming = jnp.broadcast_to(rows['incoming'][:, None], (P, G, K))
  ranking = metrics.in_incoming_ranks(answer.ranking, incoming)
  valid = answer.verdict == parsing.VALID
  preferred = metrics.preferences(ranking, rows['count'], valid)
  twin = preferred.reshape(P // 2, 2, K, K)[:, ::-1].reshape(P, K, K)
  return metrics.order_disagreement(ranking, twin, rows['count'], valid)


def _symbols(spec: policy.PolicySpec) -> judge.Symbols:
  """The token ids that the judge of reasoning reads."""
  words = spec.vocabulary
  return judge.Symbols(
    history=words.control['<history>'],
    candidates=words.control['<candidates>'],
    sid_base=words.sid_base,
    levels=words.layout.levels,
    codebook_size=words.layout.codebook_size,
    slot_base=words.slot_base,
    num_slots=words.layout.num_slots,
    think_end=spec.grammar.think_end,
    eos=spec.grammar.eos,
  )
