"""Warm-up of the embedding: rows of added symbols train first, alone.

What is new to a pretrained model would otherwise disturb what is not. Until
the border every other leaf keeps its bits; there the optimizer begins anew, so
that the rest has a schedule and moments as from the start.
"""

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
  stage, trained: lora.Adapters, warm: int
) -> optax.GradientTransformation:
  """`learner.make_optimizer`; begun anew when the rest joins the new rows.

  Args:
    stage: section `midtrain`.
    trained: which parameters train.
    warm: steps of new rows alone; 0 makes the plain one.
  """
  if not warm:
    return learner.make_optimizer(stage)
  rest = stage.copy_and_resolve_references()
  rest.steps = stage.steps - warm
  inner = learner.make_optimizer(rest)

  def init(params):
    return RowsFirst(jnp.int32(0), inner.init(params))

  def update(gradients, state, params):
    chosen = new_rows(params, trained)
    everything = state.step >= warm

    def hold(tree):
      return jax.tree.map(
        lambda x, row: jnp.where(row | everything, x, 0), tree, chosen
      )

    # A new schedule and new moments: the rest warms up as from the start.
    before = jax.tree.map(
      lambda new, old: jnp.where(state.step == warm, new, old),
      inner.init(params),
      state.inner,
    )
    updates, after = inner.update(hold(gradients), before, params)
    return hold(updates), RowsFirst(state.step + 1, after)

  return optax.GradientTransformation(init, update)


def new_rows(params: Any, trained: lora.Adapters) -> Any:
  """Where the rows of added symbols are: bools that broadcast to the leaves.

  Args:
    params: what trains, of `lora.Adapters.start`.
    trained: likewise.
  """

  def one(path, leaf):
    if trained.rank:  # Whose `rows` are those rows and no others.
      return jnp.bool_(path[0].key == 'rows')
    if path[0].key not in ('embedding', 'unembedding'):
      return jnp.bool_(False)
    return (jnp.arange(len(leaf)) >= trained.first_row)[:, None]

  return jax.tree_util.tree_map_with_path(one, params)
