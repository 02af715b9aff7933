"""The supervised loop of mid-training and SFT, and how a stage resumes."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from gr2_jax import checkpoint, learner, policy, reporting, sharding


def restore(
  config,
  checkpoints: checkpoint.Checkpointer,
  setup: policy.Setup,
  state: learner.TrainState,
  iterator: Any,
  inherited: pathlib.Path | None,
) -> tuple[learner.TrainState, int, dict[str, Any]]:
  """Where a stage starts: its own checkpoint, or the nearest thing to it.

  Args:
    config: the stage's section, with `resume` and `init_from`.
    checkpoints: of the stage's own workdir.
    setup: shapes of the parameters.
    state: fresh; its parameters are kept only where nothing else is given.
    iterator: nothing drawn from it yet.
    inherited: artifact of the stage before, if parameters come from one.

  Returns:
    State, finished steps, and the facts saved with them.
  """
  # 1. This workdir: the same run goes on, bit for bit.
  if found := checkpoints.restore(state, iterator):
    return found
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
    return state, step, {}  # The best so far has its parameters over there.
  # 3. `init_from`: parameters alone, from any artifact.
  # 4. The parameters of the stage before; else from scratch.
  if source := config.init_from or inherited:
    state = state.replace(params=setup.load_params(source))
  return state, 0, {}


def fit(
  config,
  *,
  setup: policy.Setup,
  workdir: pathlib.Path,
  seed: int,
  loss_fn: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  iterator: Any,
  validate: Callable[[Any], dict[str, float]],
  choose: str,
  inherited: pathlib.Path | None = None,
  desc: str = 'train',
) -> dict[str, Any]:
  """Trains, validates, and leaves the chosen parameters in the workdir.

  Args:
    config: steps, eval_every, resume, init_from and the optimizer's fields.
    setup: tokens, shapes, mesh.
    workdir: gets `checkpoints`, `metrics.jsonl` and `params`.
    seed: of the parameters.
    loss_fn: `(params, examples) -> (loss, metrics)`.
    iterator: Grain iterator over dicts with the fields of `Examples`.
    validate: parameters to named numbers, on held-out data.
    choose: which of them the best parameters have the most of.
    inherited: artifact whose parameters training starts from.
    desc: of the progress bar.

  Returns:
    The chosen step and its validation numbers.
  """
  optimizer = learner.make_optimizer(config)
  update = learner.make_update(loss_fn, optimizer)
  with (
    sharding.activate(setup.mesh),
    checkpoint.Checkpointer(workdir / 'checkpoints') as checkpoints,
  ):
    key = jax.random.key(seed)
    state, _ = learner.init_state(setup.model, optimizer, key, setup.mesh)
    state, done, best = restore(
      config, checkpoints, setup, state, iterator, inherited
    )
    with (
      reporting.MetricsWriter(workdir, done) as writer,
      reporting.progress(config.steps, desc, done) as bar,
    ):
      pending, clock = None, time.monotonic()
      for step in range(done + 1, config.steps + 1):
        batch = learner.Examples(**next(iterator))
        state, metrics = update(state, sharding.shard_batch(batch, setup.mesh))
        # The device works on this step while the one before is written.
        if pending:
          write_finite(writer, *pending)
        pending = (step, metrics)
        bar.update()
        if step % config.eval_every and step != config.steps:
          continue
        found = validate(state.params)
        if not best or found[choose] > best['metrics'][choose]:
          best = {'step': step, 'metrics': found}
          checkpoint.save_params(workdir / policy.PARAMS, state.params)
        write_finite(writer, *pending)
        rate = (step - done) / (time.monotonic() - clock)
        pending, done, clock = None, step, time.monotonic()
        named = {f'validation/{k}': v for k, v in found.items()}
        writer.write(step, named | {'steps_per_second': rate})
        bar.set_postfix({choose: f'{found[choose]:.4f}'}, refresh=False)
        checkpoints.save(step, state, iterator, best)
  return best


def write_finite(
  writer: reporting.MetricsWriter, step: int, metrics: dict[str, jax.Array]
) -> None:
  """Writes a step's metrics, or stops the run at the first non-finite one."""
  reporting.check_finite(step, metrics)
  writer.write(step, metrics)
