"""From slates to rollouts with advantages: sample, parse, reward, advantage.

All of it is one compiled function, so that nothing leaves the device between a
sampled token and its advantage.

Axes: P prompts, G group, K candidates, T completion time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gr2_jax.ops import (
  advantages,
  gates,
  judge,
  losses,
  masking,
  metrics,
  parsing,
  placement,
  rewards,
)
from gr2_jax.pipeline import options as options_lib
from gr2_jax.policy import policy, sampling
from gr2_jax.train.policy_gradient import PolicyBatch

CHOICES = {
  'reward': rewards.KINDS,
  'gate': gates.GATES,
  'credit': ('answer', 'placement'),
}

# Fields of rows for the teacher alone.
_TEACHER_ROWS = ('teacher_prompt', 'teacher_prompt_length', 'teacher_slots')


@dataclasses.dataclass(frozen=True)
class RewardOptions:
  """The reward of a ranking; fields of a section that learns to rank."""

  reward: rewards.Kind
  k: int  # cut-off of ndcg and recall
  gate: gates.Gate
  format_weight: float  # a: reward of a valid answer
  credit: str  # advantage of the whole answer, or by placement
  overlong_buffer: int  # last tokens of the budget that cost; 0: none
  overlong_weight: float  # cost of the whole buffer
  order_cost: float  # of answers that depend on the presentation
  judge_weight: float  # of the quality of the reasoning; 0: no judge

  @classmethod
  def from_config(cls, section: Any, name: str) -> 'RewardOptions':
    """Reads and checks a config section.

    Raises:
      ValueError: a field has no meaning; the message names it.
    """
    options = options_lib.read(cls, section)
    cost, weight = options.order_cost, options.format_weight
    if cost > weight and not section.constrained:
      raise ValueError(
        f'{name}.order_cost={cost} is more than {name}.format_weight={weight}: '
        'an invalid answer, which is not charged, would be the cheaper one'
      )
    if section.refill_size % options.views:
      raise ValueError(
        f'{name}.order_cost={cost} shows each slate twice: '
        f'{name}.refill_size={section.refill_size} must be even'
      )
    if options.judge_weight and not section.thinking:
      raise ValueError(
        f'{name}.judge_weight={options.judge_weight} judges reasoning, but '
        f'{name}.thinking is False: change one of them'
      )
    options_lib.check_choices(options, name, CHOICES)
    return options

  @property
  def views(self) -> int:
    """Presentations of a slate that a batch holds, side by side."""
    return 2 if self.order_cost else 1


def make_rollout_step(
  spec: policy.PolicySpec,
  sampler: sampling.SamplingOptions,
  options: RewardOptions,
  advantage_kind: advantages.Kind,
) -> Callable[..., tuple[PolicyBatch, dict[str, jax.Array]]]:
  """Compiles `(params, rows, key) -> (PolicyBatch, metrics)`."""
  grammar = spec.grammar

  @jax.jit
  def rollout_step(params: Any, rows: dict[str, jax.Array], key: jax.Array):
    # Sample a group of answers to each slate.
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
    # Parse.
    count, incoming, grades = (
      jnp.broadcast_to(x[:, None], (*rollouts.length.shape, *x.shape[1:]))
      for x in (rows['count'], rows['incoming'], rows['grades'])
    )
    answer = sampling.parse(
      grammar, sampler, rollouts.tokens, rollouts.length, count, incoming
    )
    # Reward.
    extras, extra_metrics = _auxiliary_rewards(
      spec, sampler, options, rows, rollouts, answer
    )
    reward = rewards.reward(
      answer.ranking,
      answer.verdict,
      grades,
      count,
      incoming,
      kind=options.reward,
      k=options.k,
      gate=options.gate,
      format_weight=options.format_weight,
      extras=extras,
    )
    # Advantage within the group.
    flat = advantages.zero_variance(reward.total)
    advantage = advantages.group_advantage(reward.total, kind=advantage_kind)
    if options.credit == 'placement':
      by_placement = placement.placement_advantage(
        reward.total,
        placement.expected_if_shuffled(
          answer.ranking, grades, count, kind=options.reward, k=options.k
        ),
        _reward_is_decided(options, answer, grades, count, incoming),
        normalize=advantage_kind in ('dapo', 'grpo'),
      )
      advantage = placement.spread_over_tokens(
        advantage,
        by_placement,
        rollouts.length,
        count,
        answer.verdict == parsing.VALID,
        sampler.max_tokens,
      )
    batch = PolicyBatch(
      prompt=rows['prompt'],
      prompt_length=rows['prompt_length'],
      constraint_inputs=rows['count'],
      tokens=rollouts.tokens,
      length=rollouts.length,
      logp=rollouts.logp,
      advantage=advantage,
      use=~flat,
      slots=rows['slots'],
      **{name: rows[name] for name in _TEACHER_ROWS if name in rows},
    )
    return batch, extra_metrics | _metrics(
      rollouts, answer, reward, flat, grades, count, incoming
    )

  return rollout_step


def _metrics(
  rollouts: sampling.Rollouts,
  answer: parsing.Answer,
  reward: rewards.Reward,
  flat: jax.Array,
  grades: jax.Array,
  count: jax.Array,
  incoming: jax.Array,
) -> dict[str, jax.Array]:
  """Means over a batch of rollouts."""
  written = masking.length_mask(rollouts.length, rollouts.tokens.shape[-1])
  first = jnp.take_along_axis(incoming, answer.ranking[..., :1], -1)[..., 0]
  quality = metrics.ranking_metrics(answer.ranking, grades, count)
  shown = (answer.ranking, incoming, count)
  means = {
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
  means |= {f'first_pick/{i}': n / first.size for i, n in enumerate(picks)}
  shares = metrics.verdict_shares(answer.verdict)
  return means | {f'answer/{name}': share for name, share in shares.items()}


def _reward_is_decided(
  options: RewardOptions,
  answer: parsing.Answer,
  grades: jax.Array,
  count: jax.Array,
  incoming: jax.Array,
) -> jax.Array:
  """Ranks [P, G, K] at which no placement can change the whole reward."""
  real = masking.length_mask(count, grades.shape[-1])
  if options.gate == 'v1' or options.order_cost or options.judge_weight:
    return ~real
  decided = placement.settled(answer.ranking, grades, count)
  if options.gate == 'none':
    return decided
  may_copy = placement.repeats(answer.ranking, incoming, count) & real
  return decided & ~may_copy


def _auxiliary_rewards(
  spec: policy.PolicySpec,
  sampler: sampling.SamplingOptions,
  options: RewardOptions,
  rows: dict[str, jax.Array],
  rollouts: sampling.Rollouts,
  answer: parsing.Answer,
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
  """Weighted terms [P, G] beside the ranking reward, and their metrics."""
  extras, means = [], {}
  if options.overlong_buffer:
    penalty = losses.overlong_penalty(
      rollouts.length,
      max_length=sampler.max_tokens,
      buffer=options.overlong_buffer,
    )
    extras.append(options.overlong_weight * penalty)
    means['overlong_penalty'] = penalty.mean()
  if options.order_cost:
    disagreement = _order_disagreement(rows, answer)
    extras.append(-options.order_cost * disagreement)
    means['order_disagreement'] = disagreement.mean()
  if options.judge_weight:
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
    extras.append(options.judge_weight * quality.total)
    means |= {
      f'judge/{name}': axis.mean() for name, axis in quality._asdict().items()
    }
  return extras, means


def _order_disagreement(
  rows: dict[str, jax.Array], answer: parsing.Answer
) -> jax.Array:
  """Disagreement [P, G] with the answers to the slate's other presentation.

  The two presentations are neighbors among the P prompts.
  """
  P, G, K = answer.ranking.shape
  incoming = jnp.broadcast_to(rows['incoming'][:, None], (P, G, K))
  ranking = metrics.in_incoming_ranks(answer.ranking, incoming)
  valid = answer.verdict == parsing.VALID
  preferred = metrics.preferences(ranking, rows['count'], valid)
  twin = preferred.reshape(P // 2, 2, K, K)[:, ::-1].reshape(P, K, K)
  return metrics.order_disagreement(ranking, twin, rows['count'], valid)


def _symbols(spec: policy.PolicySpec) -> judge.Symbols:
  """The token ids for the judge of reasoning."""
  words, grammar = spec.vocabulary, spec.grammar
  return judge.Symbols(
    history=words.control['<history>'],
    candidates=words.control['<candidates>'],
    sid_base=words.sid_base,
    levels=words.layout.levels,
    codebook_size=words.layout.codebook_size,
    slot_base=words.slot_base,
    num_slots=words.layout.num_slots,
    think_end=grammar.think_end,
    eos=grammar.eos,
  )
