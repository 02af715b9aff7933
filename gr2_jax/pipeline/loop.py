"""The loop of everything that trains: metrics, evaluation, checkpoints.

A run that was killed continues bit for bit from its last checkpoint, because a
step depends on the state, the step's number and the saved data iterator alone.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from gr2_jax.distributed import processes
from gr2_jax.pipeline import checkpoint, reporting


class Evaluation(NamedTuple):
  """The outcome of an evaluation.

  Attributes:
    state: the state to continue from; it may carry the best parameters.
    metrics: what goes to `metrics.jsonl`.
    shown: what the progress bar shows.
  """

  state: Any
  metrics: dict[str, Any]
  shown: dict[str, str] = {}


def run(
  desc: str,
  workdir: pathlib.Path,
  checkpoints: checkpoint.Checkpointer,
  *,
  state: Any,
  done: int,
  steps: int,
  eval_every: int,
  take_step: Callable[[Any, int], tuple[Any, dict[str, Any]]],
  evaluate: Callable[[Any, int], Evaluation],
  meta: Callable[[], dict[str, Any]],
  stopped: Callable[[int], bool] = lambda step: False,
  iterator: Any = None,
  log_every: int = 1,
  evaluate_start: bool = False,
  preemptible: bool = False,
) -> Any:
  """Trains from a state to the last step, or until `stopped`.

  Args:
    desc: label of the progress bar.
    workdir: gets `metrics.jsonl`.
    checkpoints: gets a checkpoint after every evaluation.
    state: after `done` steps.
    done: finished steps.
    steps: the last step; it is always evaluated.
    eval_every: steps between evaluations.
    take_step: `(state, step) -> (state, metrics)`, steps counting from 1.
    evaluate: `(state, step) -> Evaluation`; may keep the best parameters.
    meta: JSON-able facts, saved beside the state.
    stopped: whether to stop early, by the number of finished steps.
    iterator: the Grain iterator that `take_step` draws from, if any; its
      position is saved with the state.
    log_every: steps between lines of metrics.
    evaluate_start: whether to evaluate the state before the first step.
    preemptible: whether a signal to terminate saves the run after the step at
      hand. Only for stages that all processes run.

  Returns:
    The last state.

  Raises:
    FloatingPointError: a metric is not finite; the step is not saved.
    Preempted: a signal to terminate came; the step at hand is saved.
  """
  with (
    reporting.MetricsWriter(workdir, done - evaluate_start) as writer,
    reporting.progress(steps, desc, done) as bar,
  ):

    def flush(step: int, metrics: dict[str, Any]) -> None:
      reporting.check_finite(step, metrics)
      writer.write(step, metrics)

    if evaluate_start:
      state, metrics, _ = evaluate(state, done)
      writer.write(done, metrics)
    pending = None
    for step in range(done + 1, steps + 1):
      if stopped(step - 1):
        break
      state, metrics = take_step(state, step)
      # The device computes this step while the last one's metrics are written.
      if pending:
        flush(*pending)
      evaluates = step % eval_every == 0 or step == steps
      logs = evaluates or step % log_every == 0
      pending = (step, metrics) if logs else None
      bar.update()
      leaving = preemptible and processes.preempted(step)
      if not evaluates and not leaving:
        continue
      if pending:
        flush(*pending)
      pending = None
      if evaluates:
        state, metrics, shown = evaluate(state, step)
        writer.write(step, metrics)
        bar.set_postfix(shown, refresh=False)
      checkpoints.save(step, state, iterator, meta())
      if leaving and step != steps:
        raise processes.Preempted(f'{desc}: saved at step {step}')
  return state
