import dataclasses

import jax
import numpy as np
import optax

from gr2_jax.models import lora
from gr2_jax.train import embedding_warmup, learner

from .. import tiny

FIRST = 30  # the tiny model's rows from here on are new
STAGE = learner.OptimizerOptions(
  steps=12,
  learning_rate=0.05,
  warmup=3,
  weight_decay=0.1,
  max_grad_norm=1.0,
)
UNTIED = dataclasses.replace(tiny.MODEL, tie_embeddings=False)


def train(optimizer, params, steps, first=0):
  """Parameters before and after every step, of random gradients; the state."""

  @jax.jit
  def step(params, state, gradients):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  state, seen = optimizer.init(params), [jax.device_get(params)]
  for number in range(first, first + steps):
    rng = np.random.default_rng(number)
    gradients = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32),  # noqa: B023
      params,
    )
    params, state = step(params, state, gradients)
    seen.append(jax.device_get(params))
  return seen, jax.device_get(state)


def changed(before, after):
  """Leaf -> which of its rows moved, a bit at least."""
  flat = zip(
    jax.tree_util.tree_leaves_with_path(before),
    jax.tree.leaves(after),
    strict=True,
  )
  return {
    jax.tree_util.keystr(path): (
      x.view(np.int32) != y.view(np.int32)
    ).reshape(len(x), -1).any(1)
    for (path, x), y in flat
  }  # fmt: skip


def test_new_rows_train_alone_until_the_border():
  trained = lora.Adapters(first_row=FIRST)
  optimizer = embedding_warmup.make_optimizer(STAGE, trained, 4)
  seen, _ = train(optimizer, tiny.params(UNTIED), 7)
  moved = changed(seen[0], seen[4])
  for name in ("['embedding']", "['unembedding']"):
    assert not moved[name][:FIRST].any()
    assert moved[name][FIRST:].any()
  assert moved["['unembedding']"][FIRST:].all()
  assert not any(
    rows.any() for name, rows in moved.items() if 'embedding' not in name
  )
  # The schedule begins anew, at zero; then everything moves.
  assert not any(rows.any() for rows in changed(seen[4], seen[5]).values())
  moved = changed(seen[5], seen[6])
  assert all(rows.any() for rows in moved.values())
  assert moved["['unembedding']"].all()


def test_after_the_border_it_is_a_run_of_its_own():
  """Rows have no moments, and the schedule no steps, from before."""
  trained = lora.Adapters(first_row=FIRST)
  optimizer = embedding_warmup.make_optimizer(STAGE, trained, 4)
  seen, state = train(optimizer, tiny.params(UNTIED), 9)
  plain = learner.make_optimizer(dataclasses.replace(STAGE, steps=8))
  wanted, other = train(plain, seen[4], 5, first=4)
  tiny.assert_trees_close(seen[9], wanted[5], 1e-6)
  tiny.assert_trees_close(state.inner, other, 1e-6)


def test_with_adapters_rows_alone_too():
  trained = lora.Adapters(rank=2, first_row=FIRST)
  start = trained.start(tiny.params(UNTIED), jax.random.key(0))
  optimizer = embedding_warmup.make_optimizer(STAGE, trained, 3)
  seen, _ = train(optimizer, start, 6)
  moved = changed(seen[0], seen[3])
  rows = [name for name in moved if name.startswith("['rows']")]
  assert len(rows) == 2
  for name, which in moved.items():
    assert which.any() == (name in rows), name
  moved = changed(seen[4], seen[6])
  assert all(which.any() for which in moved.values())


def test_without_steps_it_is_the_plain_optimizer():
  params = tiny.params(UNTIED)
  plain = learner.make_optimizer(STAGE).init(params)
  found = embedding_warmup.make_optimizer(STAGE, lora.Adapters(), 0).init(
    params
  )
  tiny.assert_trees_equal(found, plain)
