"""RL: DAPO on verifiable ranking rewards (Eq. 5-9).

A step samples a group of answers to every slate, rewards them, and takes one
clipped policy-gradient step. Nothing leaves the device in between: rewards,
gates and advantages are operations on the sampled ids.
"""

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from gr2_jax import (
  checkpoint,
  learner,
  policy,
  ranker,
  reporting,
  sampling,
  sharding,
)
from gr2_jax.data import batches
from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import advantages, masking, metrics, rewards
from gr2_jax.stages import supervised


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains from the SFT parameters; validation chooses.

  Args:
    config: sections prompt, model, mesh, rl; seed.
    inputs: slates, tokenizer, midtrain, sft.
    workdir: of this stage.

  Returns:
    The chosen step and its validation numbers.
  """
  stage = config.rl

  # Input.
  setup = policy.load(
    config, inputs['slates'], inputs['tokenizer'], inputs['midtrain']
  )
  render = batches.requests(
    setup.prompter,
    '<think>' if stage.thinking else '<answer>',
    config.prompt.shuffle,
  )
  train = slates_lib.source(inputs['slates'], 'train')
  iterator = batches.iterate(
    batches.dataset(train, render, stage.batch_size, config.seed)
  )
  validate = ranker.validator(config, setup, inputs['slates'], stage)

  # Sampler and learner: the same temperature, the same masks.
  sampler = setup.sampling(
    stage.group_size, stage.thinking, stage.temperature, stage.constrained
  )
  act = make_act(setup, sampler, stage)
  optimizer = learner.make_optimizer(stage)
  update = learner.make_update(
    learner.policy_loss(
      setup.model,
      setup.grammar,
      sampler,
      clip_low=stage.clip_low,
      clip_high=stage.clip_high,
    ),
    optimizer,
  )

  with (
    sharding.activate(setup.mesh),
    checkpoint.Checkpointer(workdir / 'checkpoints') as checkpoints,
  ):
    # State; randomness is a function of (seed, step).
    key = jax.random.key(config.seed)
    state, _ = learner.init_state(setup.model, optimizer, key, setup.mesh)
    state, done, best = supervised.restore(
      stage, checkpoints, setup, state, iterator, inputs['sft']
    )
    if not best:  # The start itself is a candidate.
      best = {'step': 0, 'metrics': validate(state.params)}
      checkpoint.save_params(workdir / policy.PARAMS, state.params)

    # Loop.
    with (
      reporting.MetricsWriter(workdir, done) as writer,
      reporting.progress(stage.steps, 'rl', done) as bar,
    ):
      if not done:
        writer.write(
          0, {f'validation/{k}': v for k, v in best['metrics'].items()}
        )
      pending, clock = None, time.monotonic()
      for step in range(done + 1, stage.steps + 1):
        rows = sharding.shard_batch(next(iterator), setup.mesh)
        batch, watches = act(state.params, rows, jax.random.fold_in(key, step))
        state, losses = update(state, batch)
        if pending:
          supervised.write_finite(writer, *pending)
        pending = (step, watches | losses)
        bar.update()
        if step % stage.eval_every and step != stage.steps:
          continue

        # Validation, the choice, and the checkpoint.
        found = validate(state.params)
        if found[stage.choose] > best['metrics'][stage.choose]:
          best = {'step': step, 'metrics': found}
          checkpoint.save_params(workdir / policy.PARAMS, state.params)
        supervised.write_finite(writer, *pending)
        rate = (step - done) / (time.monotonic() - clock)
        pending, done, clock = None, step, time.monotonic()
        named = {f'validation/{k}': v for k, v in found.items()}
        writer.write(step, named | {'steps_per_second': rate})
        bar.set_postfix(
          {stage.choose: f'{found[stage.choose]:.4f}'}, refresh=False
        )
        checkpoints.save(step, state, iterator, best)
  return best


def make_act(setup: policy.Setup, sampler: sampling.SamplingConfig, stage):
  """Compiles `(params, rows, key) -> (PolicyBatch, watches)`.

  Args:
    setup: tokens and shapes.
    sampler: how to roll out.
    stage: section `rl`: reward, k, gate, format_weight, advantage.
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
    )
    flat = advantages.zero_variance(reward.total)
    batch = learner.PolicyBatch(
      prompt=rows['prompt'],
      prompt_length=rows['prompt_length'],
      count=rows['count'],
      tokens=rollouts.tokens,
      length=rollouts.length,
      logp=rollouts.logp,
      advantage=advantages.group_advantage(reward.total, kind=stage.advantage),
      use=~flat,
    )
    written = masking.length_mask(rollouts.length, sampler.max_tokens)
    first = jnp.take_along_axis(incoming, answer.ranking[..., :1], -1)[..., 0]
    quality = metrics.ranking_metrics(answer.ranking, grades, count)
    slate = (answer.ranking, incoming, count)
    watches = {
      'reward': reward.total.mean(),
      'reward_rank': reward.rank.mean(),
      'n@5': quality['n@5'].mean(),
      'r@1': quality['r@1'].mean(),
      'copy_rate': reward.copied.mean(),
      'top3_unchanged': metrics.top_unchanged(*slate, k=3).mean(),
      'kendall_tau': metrics.kendall_tau(*slate).mean(),
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
