"""Warm-up of the embedding: rows of added symbols train first, alone.

New symbols would otherwise disturb what a pretrained model has learned. During
the warm-up every other leaf keeps its bits; after it the optimizer starts anew,
so that all parameters get a whole schedule.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gr2_jax.models import lora
from gr2_jax.train import learner


class RowsFirst(NamedTuple):
  """State of the optimizer."""

  step: jax.Array  # int32 []
  inner: Any


def make_optimizer(
  config: learner.OptimizerOptions, adapters: lora.Adapters, warm_steps: int
) -> optax.GradientTransformation:
  """`learner.make_optimizer`, restarted after the warm-up.

  Args:
    config: the options.
    adapters: which parameters train.
    warm_steps: steps of new rows alone; 0 makes the plain optimizer.
  """
  if not warm_steps:
    return learner.make_optimizer(config)
  inner = learner.make_optimizer(
    dataclasses.replace(config, steps=config.steps - warm_steps)
  )

  def init(params: Any) -> RowsFirst:
    return RowsFirst(jnp.int32(0), inner.init(params))

  def update(
    updates: Any, state: Any, params: Any = None
  ) -> tuple[Any, RowsFirst]:
    rows = new_rows(params, adapters)
    everything = state.step >= warm_steps

    def hold(tree: Any) -> Any:
      return jax.tree.map(
        lambda x, row: jnp.where(row | everything, x, 0), tree, rows
      )

    before = jax.tree.map(
      lambda new, old: jnp.where(state.step == warm_steps, new, old),
      inner.init(params),
      state.inner,
    )
    updates, after = inner.update(hold(updates), before, params)
    return hold(updates), RowsFirst(state.step + 1, after)

  return optax.GradientTransformation(init, update)


def new_rows(params: Any, adapters: lora.Adapters) -> Any:
  """Masks of the added symbols' rows: bools that broadcast to the leaves.

  Args:
    params: the trainable parameters, of `lora.Adapters.start`.
    adapters: which parameters train.
  """

  def mask(path: Any, leaf: jax.Array) -> jax.Array:
    if adapters.rank:  # Their leaf `rows` holds those rows and no others.
      return jnp.bool_(path[0].key == 'rows')
    if path[0].key not in ('embedding', 'unembedding'):
      return jnp.bool_(False)
    return (jnp.arange(len(leaf)) >= adapters.first_row)[:, None]

  return jax.tree_util.tree_map_with_path(mask, params)
