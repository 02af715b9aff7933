"""The loop of every stage that trains the language model.

A stage brings how one step is taken; the loop brings the start, metrics,
validation, the choice of the best parameters, checkpoints, and early stops.
When the machine is to be taken away it saves after the step at hand and leaves;
what goes on from there is bit for bit what would have been.
"""

import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from gr2_jax.distributed import processes, sharding
from gr2_jax.pipeline import checkpoint, reporting
from gr2_jax.policy import policy
from gr2_jax.prompts import examples
from gr2_jax.train import learner

# (state, frozen parameters, step) -> (state, metrics). Draws its own batches.
TakeStep = Callable[
  [learner.TrainState, Any, int], tuple[learner.TrainState, dict[str, Any]]
]


def fit(
  config,
  *,
  spec: policy.PolicySpec,
  mesh: Mesh,
  workdir: pathlib.Path,
  seed: int,
  optimizer: optax.GradientTransformation,
  take_step: TakeStep,
  iterator: Any,
  validate: Callable[[Any], dict[str, float]],
  choose: str,
  inherited: pathlib.Path | None = None,
  desc: str = 'train',
  start_counts: bool = False,
) -> dict[str, Any]:
  """Trains, validates, and leaves the chosen parameters in the workdir.

  Args:
    config: steps, eval_every, resume, init_from, patience,
      reward_divergence_patience.
    spec: shapes, and what trains.
    mesh: where the state lies.
    workdir: gets `checkpoints`, `metrics.jsonl` and `params`.
    seed: of fresh parameters.
    optimizer: of `learner.make_optimizer`.
    take_step: one step; its metrics may hold `reward`, which `divergence`
      watches.
    iterator: the Grain iterator that `take_step` draws from; its position is
      saved with the state.
    validate: whole parameters to named numbers, on held-out data.
    choose: which of them the best parameters have the most of, or `last`.
    inherited: artifact whose parameters training starts from.
    desc: of the progress bar.
    start_counts: whether the parameters before the first step may be chosen;
      without any step they are.

  Returns:
    The chosen step, its validation numbers, and why training stopped.

  Raises:
    Preempted: a signal to terminate came; the step at hand is saved.
  """
  with (
    sharding.activate(mesh),
    processes.handle_preemption(),
    checkpoint.Checkpointer(workdir / 'checkpoints') as checkpoints,
  ):
    state, frozen, done, record = _start(
      config, checkpoints, spec, mesh, optimizer, seed, iterator, inherited
    )
    processes.assert_same_everywhere(
      f'the last saved step of {workdir.name}', done
    )
    join = spec.adapters.joiner()

    def consider(step: int, found: dict[str, float], reward: float | None):
      """Notes a validation, and keeps the parameters if they are the best."""
      value = step if choose == 'last' else found[choose]
      earlier = [entry['held_out'] for entry in record['history']]
      record['history'].append(
        {'step': step, 'held_out': value, 'reward': reward}
      )
      if not record['best'] or value > max(earlier, default=-math.inf):
        record['best'] = {'step': step, 'metrics': found}
        checkpoint.save_params(
          workdir / policy.PARAMS, join(state.params, frozen)
        )

    # The start's own line, of step `done`, comes anew where it is not chosen.
    start_counts |= not config.steps
    judges_start = start_counts and not record['best']
    written = done - 1 if judges_start else done
    with (
      reporting.MetricsWriter(workdir, written) as writer,
      reporting.progress(config.steps, desc, done) as bar,
    ):
      if judges_start:
        found = validate(join(state.params, frozen))
        consider(done, found, None)
        writer.write(done, {f'validation/{k}': v for k, v in found.items()})
      pending, rewards = None, record.pop('rewards', [])
      clock = time.monotonic()
      for step in range(done + 1, config.steps + 1):
        if record['stopped'] != NOT_STOPPED:
          break
        state, metrics = take_step(state, frozen, step)
        # The device works on this step while the one before is written.
        if pending:
          _write_finite(writer, *pending)
        pending = (step, metrics)
        rewards.append(metrics.get('reward'))
        bar.update()
        leaving = processes.preempted(step)
        if step % config.eval_every and step != config.steps:
          if leaving:
            _write_finite(writer, *pending)
            since = [r if r is None else float(r) for r in rewards]
            checkpoints.save(step, state, iterator, record | {'rewards': since})
            raise processes.Preempted(f'{desc}: saved at step {step}')
          continue

        # Validation, the choice, and the checkpoint.
        found = validate(join(state.params, frozen))
        _write_finite(writer, *pending)
        rewards = [float(r) for r in rewards if r is not None]
        mean = sum(rewards) / len(rewards) if rewards else None
        consider(step, found, mean)
        record['stopped'] = stop_reason(
          record['history'], config.patience, config.reward_divergence_patience
        )
        rate = (step - done) / (time.monotonic() - clock)
        pending, rewards, done, clock = None, [], step, time.monotonic()
        named = {f'validation/{k}': v for k, v in found.items()}
        writer.write(step, named | {'steps_per_second': rate})
        value = record['history'][-1]['held_out']
        bar.set_postfix({choose: f'{value:.4f}'}, refresh=False)
        checkpoints.save(step, state, iterator, record)
        if leaving and step != config.steps:
          raise processes.Preempted(f'{desc}: saved at step {step}')
  return record['best'] | {'stopped': record['stopped']}


NOT_STOPPED = 'no'


def stop_reason(
  history: list[dict[str, Any]], patience: int, divergence: int
) -> str:
  """Whether to stop before the last step, and why.

  Args:
    history: one entry a validation: `held_out`, and `reward`, the mean training
      reward since the one before (None without rewards).
    patience: validations in a row without a new best; 0 never stops for it.
    divergence: validations in a row in which the reward rose while held-out
      ranking fell, the sign of a hacked reward; 0 never stops for it.

  Returns:
    'no', 'patience' or 'divergence'.
  """
  held_out = [entry['held_out'] for entry in history]
  best = max(range(len(history)), key=held_out.__getitem__)
  if divergence and len(history) > divergence:
    last = history[-divergence - 1 :]
    parted = [
      None not in (a['reward'], b['reward'])
      and b['reward'] > a['reward']
      and b['held_out'] < a['held_out']
      for a, b in zip(last, last[1:], strict=False)
    ]
    if all(parted):
      return 'divergence'
  if patience and len(history) - 1 - best >= patience:
    return 'patience'
  return NOT_STOPPED


def dataset(
  mesh: Mesh,
  source: Any,
  render: Callable[[Any, np.random.Generator], dict[str, np.ndarray]],
  batch_size: int,
  seed: int,
) -> grain.MapDataset:
  """`examples.dataset` of which this process makes the rows it trains on.

  Args:
    mesh: whose devices split a batch.
    source: random access to records.
    render: a record and a generator to a dict of arrays of static shape.
    batch_size: examples a batch over all hosts.
    seed: of order and randomness.

  Returns:
    Endless shuffled batches, for `sharding.shard_local_rows`.

  Raises:
    ValueError: there are fewer records than a batch has, or the devices do not
      divide it.
  """
  rows = sharding.local_rows(mesh, batch_size)
  return examples.dataset(source, render, batch_size, seed, rows)


def supervised_step(
  spec: policy.PolicySpec,
  mesh: Mesh,
  loss_fn: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  optimizer: optax.GradientTransformation,
  iterator: Any,
) -> TakeStep:
  """One update on the next examples.

  Args:
    spec: what trains.
    mesh: where the state lies.
    loss_fn: `(params, examples) -> (loss, metrics)`.
    optimizer: of `learner.make_optimizer`.
    iterator: over dicts with the fields of `learner.Examples`.
  """
  update = learner.make_update(spec.adapters.wrap(loss_fn), optimizer)

  def take_step(state, frozen, step):
    del step
    batch = learner.Examples(**next(iterator))
    return update(state, frozen, sharding.shard_local_rows(batch, mesh))

  return take_step


def _start(
  config,
  checkpoints: checkpoint.Checkpointer,
  spec: policy.PolicySpec,
  mesh: Mesh,
  optimizer: optax.GradientTransformation,
  seed: int,
  iterator: Any,
  inherited: pathlib.Path | None,
) -> tuple[learner.TrainState, Any, int, dict[str, Any]]:
  """State, frozen parameters, finished steps, and the record so far.

  Nothing may have been drawn from the iterator.
  """
  key = jax.random.key(seed)
  record = {'best': {}, 'history': [], 'stopped': NOT_STOPPED}
  state, _ = learner.init_state(spec.model, optimizer, key, mesh)
  frozen = {}
  source = config.init_from or inherited
  if spec.adapters.rank:
    frozen = spec.load_params(source, mesh) if source else state.params
    trainable = spec.adapters.start(frozen, key)
    state = learner.TrainState(
      state.step, trainable, jax.jit(optimizer.init)(trainable)
    )
  # 1. This workdir: the same run goes on, bit for bit.
  if found := checkpoints.restore(state, iterator):
    return found[0], frozen, *found[1:]
  # 2. `resume`: another run's checkpoints go on here, iterator included.
  if config.resume:
    with checkpoint.Checkpointer(config.resume) as other:
      found = other.restore(state, iterator)
    if not found:
      raise ValueError(f'resume={config.resume}: no checkpoint there')
    state, step, _ = found
    if step >= config.steps:
      raise ValueError(
        f'resume={config.resume}: stands at step {step}, nothing is left of '
        f'steps={config.steps}: raise it'
      )
    return state, frozen, step, record  # The best of it lies over there.
  # 3. `init_from`: parameters alone, from any artifact.
  # 4. The parameters of the stage before; else from scratch.
  if source and not spec.adapters.rank:
    state = state.replace(params=spec.load_params(source, mesh))
  return state, frozen, 0, record


def _write_finite(
  writer: reporting.MetricsWriter, step: int, metrics: dict[str, Any]
) -> None:
  """Writes a step's metrics, or stops the run at the first non-finite one."""
  reporting.check_finite(step, metrics)
  writer.write(step, metrics)
