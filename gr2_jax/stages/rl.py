"""RL: a group of answers to every slate, rewards, and a policy gradient.

What happens in a step, all of it on the device but the loop itself:

  sample -> parse -> reward -> advantage      `make_act`
  refill groups whose rewards are all equal   `collect`
  reference, importance                       `make_prepare`
  one or several clipped updates              `policy_gradient`
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax import (
  learner,
  policy,
  policy_gradient,
  ranker,
  sampling,
  sharding,
)
from gr2_jax.data import batches
from gr2_jax.data import slates as slates_lib
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
from gr2_jax.stages import training

# Fields of section `rl` that are one of a few names.
CHOICES = {
  'reward': rewards.KINDS,
  'gate': gates.GATES,
  'advantage': advantages.KINDS,
  'average': losses.AVERAGES,
  'credit': ('answer', 'placement'),
}


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains from the SFT parameters; validation chooses.

  Args:
    config: sections prompt, model, mesh, rl; seed.
    inputs: slates, tokenizer, backbone, sft.
    workdir: of this stage.

  Returns:
    The chosen step, its validation numbers, and why training stopped.
  """
  stage = config.rl
  check(stage)

  # Input: rows of slates, each in one presentation or, where the order itself
  # is watched, in two.
  setup = policy.load(
    config, inputs['slates'], inputs['tokenizer'], inputs['backbone']
  )
  render = batches.requests(
    setup.prompter,
    '<think>' if stage.thinking else '<answer>',
    config.prompt.order,
  )
  render = batches.several(render, views(stage))
  train = slates_lib.source(inputs['slates'], 'train')
  drawn = stage.refill_size
  iterator = batches.iterate(
    batches.dataset(train, render, drawn // views(stage), config.seed)
  )

  # Sampler and learner: the same temperature, the same masks.
  sampler = setup.sampling(
    stage.group_size, stage.thinking, stage.temperature, stage.constrained
  )
  act = make_act(setup, sampler, stage)
  prepare = make_prepare(setup, sampler, stage, inputs['sft'])
  optimizer = learner.make_optimizer(stage, stage.epochs * stage.minibatches)
  update = learner.make_update(
    setup.adapters.wrap(
      policy_gradient.make_loss(
        setup.model,
        setup.grammar,
        sampler,
        clip_low=stage.clip_low,
        clip_high=stage.clip_high,
        average=stage.average,
        kl_weight=stage.kl_weight,
      )
    ),
    optimizer,
  )
  join = jax.jit(setup.adapters.join) if setup.adapters.rank else None
  split = jax.jit(policy_gradient.minibatches, static_argnums=(1, 2))

  def draw(size: int):
    """The next `size` rows, from as many of the iterator's as they take."""
    parts = [next(iterator) for _ in range(size // drawn)]
    rows = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    rows = {k: v.reshape(-1, *v.shape[2:]) for k, v in rows.items()}
    return sharding.shard_batch(rows, setup.mesh)

  def take_step(state, frozen, step):
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    params = join(state.params, frozen) if join else state.params
    batch, watches = collect(
      lambda rows, key: act(params, rows, key), draw, key, stage
    )
    batch, watched = prepare(params, batch)
    watches |= watched
    gap = None
    for part in split(batch, stage.epochs, stage.minibatches, key):
      state, found = update(state, frozen, part)
      gap = found['sampler_gap'] if gap is None else gap
    # After the first update the policy is no longer the one that sampled.
    return state, found | {'sampler_gap': gap} | watches

  return training.fit(
    stage,
    setup=setup,
    workdir=workdir,
    seed=config.seed,
    optimizer=optimizer,
    take_step=take_step,
    iterator=iterator,
    validate=ranker.validator(config, setup, inputs['slates'], stage),
    choose=stage.choose,
    inherited=inputs['sft'],
    desc='rl',
    start_counts=True,
  )


def check(stage) -> None:
  """Raises a ValueError that names the field of section `rl` that cannot be."""
  size, drawn = stage.batch_size, stage.refill_size
  if drawn < 1 or size % drawn:
    raise ValueError(
      f'rl.refill_size={drawn} does not divide rl.batch_size={size}'
    )
  if drawn % views(stage):
    raise ValueError(
      f'rl.order_cost={stage.order_cost} shows each slate twice: '
      f'rl.refill_size={drawn} must be even'
    )
  if size % stage.minibatches:
    raise ValueError(
      f'rl.minibatches={stage.minibatches} does not divide rl.batch_size={size}'
    )
  for name, known in CHOICES.items():
    if stage[name] not in known:
      raise ValueError(
        f'rl.{name}={stage[name]!r}: must be one of {", ".join(known)}'
      )
  if stage.order_cost > stage.format_weight and not stage.constrained:
    raise ValueError(
      f'rl.order_cost={stage.order_cost} is more than '
      f'rl.format_weight={stage.format_weight}: an invalid answer, which is '
      'not charged, would be the cheaper one'
    )
  if stage.judge_weight and not stage.thinking:
    raise ValueError(
      f'rl.judge_weight={stage.judge_weight} judges reasoning, but '
      'rl.thinking is False: set one of them otherwise'
    )


def views(stage) -> int:
  """How many presentations of a slate a batch holds, side by side."""
  return 2 if stage.order_cost else 1


def collect(
  act: Callable[..., tuple[policy_gradient.PolicyBatch, dict[str, Any]]],
  draw: Callable[[int], Any],
  key: jax.Array,
  stage,
) -> tuple[policy_gradient.PolicyBatch, dict[str, Any]]:
  """Dynamic sampling: a batch of groups that have something to teach.

  Groups whose rewards are all equal are replaced by fresh ones, `refill_size`
  slates at a time, `refills` times at most; what is flat then is masked. The
  batch keeps its shape, so nothing is compiled again.

  Args:
    act: `(rows, key) -> (batch, watches)`.
    draw: number of rows to rows.
    key: of this step; each refill folds its number in.
    stage: batch_size, refill_size, refills.

  Returns:
    The batch, and the watches of its first, unselected rows, beside `refills`
    and `used_groups`.
  """
  batch, watches = act(draw(stage.batch_size), jax.random.fold_in(key, 0))
  refills = 0
  while refills < stage.refills and not bool(batch.use.all()):
    refills += 1
    fresh, _ = act(draw(stage.refill_size), jax.random.fold_in(key, refills))
    batch = _top_up(batch, fresh)
  counted = {'refills': refills, 'used_groups': batch.use.mean()}
  return batch, watches | counted


_top_up = jax.jit(policy_gradient.top_up)


def make_prepare(
  setup: policy.Setup,
  sampler: sampling.SamplingConfig,
  stage,
  start: pathlib.Path,
) -> Callable[..., tuple[policy_gradient.PolicyBatch, dict[str, Any]]]:
  """Compiles what the options add to a batch before its updates.

  Args:
    setup: tokens and shapes.
    sampler: how the batch was sampled.
    stage: importance_cap, kl_weight, init_from.
    start: artifact whose parameters are the reference.

  Returns:
    `(params, batch) -> (batch, watches)`.
  """

  @jax.jit
  def score(params, batch):
    return policy_gradient.score(
      setup.model, params, batch, setup.grammar, sampler
    ).logp

  @jax.jit
  def weigh(batch, logp):
    """The learner's own log-probabilities, and what they differ by."""
    written = masking.length_mask(batch.length, batch.tokens.shape[-1])
    importance = losses.importance_weights(
      logp, batch.logp, written, cap=stage.importance_cap
    )
    gap = jnp.abs(masking.keep(logp - batch.logp, written)).max()
    watches = {
      'sampler_gap': gap,
      'importance': masking.masked_mean(importance, written),
    }
    return batch.replace(logp=logp, importance=importance), watches

  reference = None
  if stage.kl_weight:
    reference = setup.load_params(stage.init_from or start)

  def prepare(params, batch):
    watches = {}
    if reference is not None:
      batch = batch.replace(reference_logp=score(reference, batch))
    if stage.importance_cap:
      batch, watches = weigh(batch, score(params, batch))
    return batch, watches

  return prepare


def make_act(setup: policy.Setup, sampler: sampling.SamplingConfig, stage):
  """Compiles `(params, rows, key) -> (PolicyBatch, watches)`.

  Args:
    setup: tokens and shapes.
    sampler: how to roll out.
    stage: section `rl`.
  """
  grammar = setup.grammar

  @jax.jit
  def act(params: Any, rows: dict[str, jax.Array], key: jax.Array):
    rollouts = sampling.sample(
      setup.model,
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
    extras, watches = _extras(setup, sampler, stage, rows, rollouts, answer)
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
        normalise=stage.advantage in ('dapo', 'grpo'),
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
      count=rows['count'],
      tokens=rollouts.tokens,
      length=rollouts.length,
      logp=rollouts.logp,
      advantage=advantage,
      use=~flat,
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
  setup: policy.Setup,
  sampler: sampling.SamplingConfig,
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
      _symbols(setup),
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


def _symbols(setup: policy.Setup) -> judge.Symbols:
  """The token ids that the judge of reasoning reads."""
  words = setup.vocabulary
  return judge.Symbols(
    history=words.control['<history>'],
    candidates=words.control['<candidates>'],
    sid_base=words.sid_base,
    levels=words.layout.levels,
    codebook_size=words.layout.codebook_size,
    slot_base=words.slot_base,
    num_slots=words.layout.num_slots,
    think_end=setup.grammar.think_end,
    eos=setup.grammar.eos,
  )
