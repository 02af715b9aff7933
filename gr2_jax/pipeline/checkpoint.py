"""Checkpoints: the state that a run resumes from bit for bit, and parameters.

Orbax writes a temporary sibling and renames it, so a killed process leaves no
partial checkpoint. Saves are synchronous. All processes that act together call
these functions together, and each writes its own parts of the arrays. A
checkpoint can be restored on any mesh and any number of processes.
"""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gr2_jax.distributed import processes


class Checkpointer:
  """The resumable state of one stage: arrays, data iterator, metadata.

  Args:
    directory: holds one folder a step; created if missing.
    keep: number of latest checkpoints to keep.
  """

  def __init__(self, directory: os.PathLike[str] | str, keep: int = 2):
    self._directory = pathlib.Path(directory).absolute()
    self._directory.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=False,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
        multiprocessing_options=_processes(),
      ),
    )

  def save(
    self,
    step: int,
    state: Any,
    iterator: Any = None,
    meta: dict[str, Any] | None = None,
  ) -> None:
    """Saves, and deletes all but the latest `keep` checkpoints.

    Args:
      step: finished steps; larger than any saved before, else a ValueError.
      state: tree of jax.Arrays, typed PRNG keys included.
      iterator: Grain iterator that yields the next batch; its state is a
        position, the same on every process.
      meta: values that JSON can hold.
    """
    latest = self._manager.latest_step()
    if latest is not None and step <= latest:
      raise ValueError(
        f'{self._directory}: step {step} is not after {latest}, the last '
        'saved step'
      )
    items = {
      'state': ocp.args.StandardSave(_to_save(state)),
      'meta': ocp.args.JsonSave(meta or {}),
    }
    if iterator is not None:
      items['data'] = ocp.args.JsonSave(iterator.get_state())
    self._manager.save(step, args=ocp.args.Composite(**items))
    self._manager.wait_until_finished()

  def restore(
    self, abstract_state: Any, iterator: Any = None
  ) -> tuple[Any, int, dict[str, Any]] | None:
    """Restores the latest checkpoint.

    Args:
      abstract_state: tree of ShapeDtypeStructs or arrays, whose shardings the
        restored arrays get.
      iterator: Grain iterator to set to the saved position, in place. Nothing
        may have been drawn from it, or Grain silently starts from the top.

    Returns:
      (state, step, meta), or None without any checkpoint.

    Raises:
      ValueError: a leaf is missing, superfluous or of another shape.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    file = self._directory / str(step) / 'state'
    _check_matches(file, abstract_state)
    items = {
      'state': ocp.args.StandardRestore(_abstract(abstract_state)),
      'meta': ocp.args.JsonRestore(),
    }
    if iterator is not None:
      if not (self._directory / str(step) / 'data').exists():
        raise ValueError(
          f'{self._directory / str(step)}: saved without a data iterator, so '
          'none can resume from it'
        )
      items['data'] = ocp.args.JsonRestore()
    saved: Any = self._manager.restore(step, args=ocp.args.Composite(**items))
    if iterator is not None:
      iterator.set_state(saved.data)
    return saved.state, step, saved.meta

  def close(self) -> None:
    """Releases the manager's threads."""
    self._manager.close()

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    self.close()


def save_params(path: os.PathLike[str] | str, params: Any) -> None:
  """Writes a tree of parameters atomically; replaces the folder `path`."""
  with ocp.StandardCheckpointer(
    multiprocessing_options=_processes()
  ) as checkpointer:
    checkpointer.save(
      pathlib.Path(path).absolute(), _to_save(params), force=True
    )


def load_params(path: os.PathLike[str] | str, abstract_params: Any) -> Any:
  """Reads parameters that `save_params` wrote.

  Args:
    path: the checkpoint's folder.
    abstract_params: tree of ShapeDtypeStructs or arrays, whose shardings the
      result gets.

  Raises:
    FileNotFoundError: there is no checkpoint at `path`.
    ValueError: a leaf is missing, superfluous or of another shape.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    raise FileNotFoundError(f'{path}: no checkpoint there')
  _check_matches(path, abstract_params)
  with ocp.StandardCheckpointer(
    multiprocessing_options=_processes()
  ) as checkpointer:
    return checkpointer.restore(path, _abstract(abstract_params))


def _processes() -> ocp.options.MultiprocessingOptions:
  """All processes take part in a save, or process 0 while the others wait."""
  if not processes.is_main_process_only():
    return ocp.options.MultiprocessingOptions()
  return ocp.options.MultiprocessingOptions(
    active_processes={0}, barrier_sync_key_prefix='alone'
  )


def _to_save(tree: Any) -> Any:
  """Fetches arrays that only process 0 has: Orbax refuses to save these."""
  return (
    jax.tree.map(np.asarray, tree) if processes.is_main_process_only() else tree
  )


def _abstract(tree: Any) -> Any:
  """Shapes and shardings; leaves without a sharding get the first device."""
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def one(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, 'sharding', None) or default
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, tree)


def _check_matches(path: pathlib.Path, abstract: Any) -> None:
  """Raises a ValueError unless names and shapes of the leaves agree."""
  try:
    handler: Any = ocp.StandardCheckpointHandler()
    saved = _shapes(handler.metadata(path).tree)
  except (OSError, ValueError) as e:
    raise ValueError(f'{path}: not a readable checkpoint; delete it') from e
  expected = _shapes(abstract)
  for name, shape in expected.items():
    if name not in saved:
      raise ValueError(f'{path}: leaf {name} {shape} is not in the checkpoint')
    if saved[name] != shape:
      raise ValueError(
        f'{path}: leaf {name} has shape {saved[name]} in the checkpoint, but '
        f'{shape} in the config'
      )
  extra = sorted(set(saved) - set(expected))
  if extra:
    raise ValueError(
      f'{path}: leaf {extra[0]} {saved[extra[0]]} is in the checkpoint, but '
      'not in the model of the config'
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Leaf name (keys joined by dots) -> shape."""
  shapes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    shapes[name] = tuple(leaf.shape)
  return shapes
