"""The loop of every stage that trains the language model.

A stage supplies the step; `fit` adds where parameters start, validation, the
choice of the best parameters, early stops, and resuming.
"""

import dataclasses
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
from gr2_jax.pipeline import checkpoint, options
from gr2_jax.pipeline import loop as loop_lib
from gr2_jax.policy import policy
from gr2_jax.prompts import examples
from gr2_jax.train import learner

NOT_STOPPED = 'no'

# (state, frozen parameters, step) -> (state, metrics). Draws its own batches.
TakeStep = Callable[
  [learner.TrainState, Any, int], tuple[learner.TrainState, dict[str, Any]]
]


@dataclasses.dataclass(frozen=True)
class LoopOptions:
  """How long to train, and from where; fields of a config section."""

  steps: int
  eval_every: int
  patience: int  # validations without a new best before a stop; 0: never
  # Validations in a row with a rising reward and a falling ranking before a
  # stop, the sign of a hacked reward; 0: never.
  reward_divergence_patience: int
  resume: str  # checkpoints of another run to continue from; '': none
  init_from: str  # artifact whose parameters to start from; '': none

  @classmethod
  def from_config(cls, section: Any) -> 'LoopOptions':
    """Reads a config section."""
    return options.read(cls, section)


def fit(
  config: LoopOptions,
  *,
  spec: policy.PolicySpec,
  mesh: Mesh,
  workdir: pathlib.Path,
  seed: int,
  optimizer: optax.GradientTransformation,
  take_step: TakeStep,
  iterator: Any,
  validate: Callable[[Any], dict[str, float]],
  selection_metric: str,
  inherited: pathlib.Path | None = None,
  desc: str = 'train',
  start_counts: bool = False,
) -> dict[str, Any]:
  """Trains, validates, and leaves the best parameters in the workdir.

  Args:
    config: how long to train, and from where.
    spec: shapes, and what trains.
    mesh: devices of the state.
    workdir: gets `checkpoints`, `metrics.jsonl` and `params`.
    seed: of fresh parameters.
    optimizer: of `learner.make_optimizer`.
    take_step: one step; it may report a metric `reward`.
    iterator: the Grain iterator that `take_step` draws from; its position is
      saved with the state.
    validate: whole parameters to metrics on held-out data.
    selection_metric: the metric that the best parameters maximize, or `last`.
    inherited: artifact whose parameters to start from.
    desc: label of the progress bar.
    start_counts: whether the parameters before the first step may be the best.
      Without any step they are.

  Returns:
    `step` and validation `metrics` of the best parameters, and `stopped`, why
    training ended early.

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
    rewards = record.pop('rewards', [])  # since the last validation
    clock, since = time.monotonic(), done

    def step_and_note_reward(state: learner.TrainState, step: int):
      state, metrics = take_step(state, frozen, step)
      rewards.append(metrics.get('reward'))
      return state, metrics

    def evaluate(state: learner.TrainState, step: int) -> loop_lib.Evaluation:
      """Validates, and keeps the parameters if they are the best so far."""
      nonlocal clock, since
      metrics = validate(join(state.params, frozen))
      value = step if selection_metric == 'last' else metrics[selection_metric]
      earlier = [entry['held_out'] for entry in record['history']]
      known = [float(reward) for reward in rewards if reward is not None]
      mean = sum(known) / len(known) if known else None
      record['history'].append(
        {'step': step, 'held_out': value, 'reward': mean}
      )
      if not record['best'] or value > max(earlier, default=-math.inf):
        record['best'] = {'step': step, 'metrics': metrics}
        checkpoint.save_params(
          workdir / policy.PARAMS, join(state.params, frozen)
        )
      record['stopped'] = stop_reason(
        record['history'], config.patience, config.reward_divergence_patience
      )
      lines = {f'validation/{name}': x for name, x in metrics.items()}
      if step > since:
        rate = (step - since) / (time.monotonic() - clock)
        lines['steps_per_second'] = rate
      rewards.clear()
      clock, since = time.monotonic(), step
      return loop_lib.Evaluation(
        state, lines, {selection_metric: f'{value:.4f}'}
      )

    def meta() -> dict[str, Any]:
      if not rewards:
        return record
      values = [r if r is None else float(r) for r in rewards]
      return record | {'rewards': values}

    loop_lib.run(
      desc,
      workdir,
      checkpoints,
      state=state,
      done=done,
      steps=config.steps,
      eval_every=config.eval_every,
      take_step=step_and_note_reward,
      evaluate=evaluate,
      meta=meta,
      stopped=lambda step: record['stopped'] != NOT_STOPPED,
      iterator=iterator,
      evaluate_start=(start_counts or not config.steps) and not record['best'],
      preemptible=True,
    )
  return record['best'] | {'stopped': record['stopped']}


def stop_reason(
  history: list[dict[str, Any]], patience: int, reward_divergence_patience: int
) -> str:
  """'no', or why to stop before the last step: 'patience' or 'divergence'.

  The history has one entry a validation: `held_out`, and `reward`, the mean
  training reward since the validation before, None without rewards.
  """
  held_out = [entry['held_out'] for entry in history]
  best = max(range(len(history)), key=held_out.__getitem__)
  n = reward_divergence_patience
  if n and len(history) > n:
    last = history[-n - 1 :]
    diverges = [
      None not in (a['reward'], b['reward'])
      and b['reward'] > a['reward']
      and b['held_out'] < a['held_out']
      for a, b in zip(last, last[1:], strict=False)
    ]
    if all(diverges):
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
  """`examples.dataset`, of which this process renders only its own rows.

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
  """Makes the step of one update on the iterator's next `learner.Examples`."""
  update = learner.make_update(spec.adapters.wrap(loss_fn), optimizer)

  def take_step(state: learner.TrainState, frozen: Any, step: int):
    del step
    batch = learner.Examples(**next(iterator))
    return update(state, frozen, sharding.shard_local_rows(batch, mesh))

  return take_step


def _start(
  config: LoopOptions,
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
  # 1. This workdir has a checkpoint: the same run continues, bit for bit.
  if saved := checkpoints.restore(state, iterator):
    return saved[0], frozen, *saved[1:]
  # 2. `resume`: another run's checkpoint continues here, iterator included.
  if config.resume:
    with checkpoint.Checkpointer(config.resume) as other:
      saved = other.restore(state, iterator)
    if not saved:
      raise ValueError(f'resume={config.resume}: no checkpoint there')
    state, step, _ = saved
    if step >= config.steps:
      raise ValueError(
        f'resume={config.resume}: that run is at step {step}, and '
        f'steps={config.steps} leaves nothing to train: raise steps'
      )
    return state, frozen, step, record  # The other run keeps its own best.
  # 3. `init_from`: the parameters alone, from any artifact.
  # 4. The parameters of the stage before; else fresh ones.
  if source and not spec.adapters.rank:
    state = dataclasses.replace(state, params=spec.load_params(source, mesh))
  return state, frozen, 0, record
