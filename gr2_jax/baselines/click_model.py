"""The ranker that re-ranking replaces: pointwise clicks, embeddings and an MLP.

Each candidate is scored alone, from its learned embedding, the mean embedding
of the user's history and the slate's evidence as context; the loss is that of
a click. A step is a pure function `(state, batch) -> (state, metrics)`.

Axis letters: B batch of slates, K candidates, H history, E evidence columns,
I items, D embedding width; n slates of a split.
"""

from collections.abc import Callable, Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import masking

CLIP = 5.0  # Standard deviations beyond which a feature is cut.
SCORED_AT_ONCE = 4096  # Slates; one shape, so that scoring compiles once.


class Ranker(nn.Module):
  """Scores candidates one by one."""

  items: int  # Size of the catalog, I.
  embedding: int  # Width of an item's vector, D.
  hidden: Sequence[int]  # Widths of the hidden layers.
  dropout: float  # Share of the first layer's inputs that training drops.

  @nn.compact
  def __call__(
    self,
    candidates_BxK: jax.Array,
    history_BxH: jax.Array,
    features_BxKxE: jax.Array,
    training: bool = False,
  ) -> jax.Array:
    """Logits of a click: float32 [B, K], without meaning at padding.

    Items int32 are -1 at padding; features are standardized. `training` drops
    inputs, with the random stream `dropout`.
    """
    table_IxD = self.param(
      'items', nn.initializers.normal(0.01), (self.items, self.embedding)
    )
    item_BxKxD = table_IxD[jnp.maximum(candidates_BxK, 0)]
    real_BxHx1 = (history_BxH >= 0)[..., None]
    past_BxHxD = table_IxD[jnp.maximum(history_BxH, 0)]
    past_BxHxD = jnp.where(real_BxHx1, past_BxHxD, 0.0)
    length_Bx1 = jnp.maximum(jnp.sum(real_BxHx1, axis=1), 1)
    user_BxD = jnp.sum(past_BxHxD, axis=1) / length_Bx1
    user_BxKxD = jnp.broadcast_to(user_BxD[:, None], item_BxKxD.shape)
    x = jnp.concatenate(
      [item_BxKxD, user_BxKxD, item_BxKxD * user_BxKxD, features_BxKxE], -1
    )
    x = nn.Dropout(self.dropout, deterministic=not training)(x)
    for width in self.hidden:
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(1)(x)[..., 0]


@chex.dataclass(frozen=True)
class State:
  """Everything a resumed run needs, except the choice that validation made."""

  step: jax.Array  # int32 []
  params: chex.ArrayTree
  opt_state: chex.ArrayTree


@chex.dataclass(frozen=True)
class Batch:
  """Inputs of the ranker, and the clicks on which it is trained."""

  candidates: jax.Array  # int32 [B, K]
  history: jax.Array  # int32 [B, H]
  features: jax.Array  # float32 [B, K, E]
  count: jax.Array  # int32 [B]
  clicks: jax.Array  # float32 [B, K], 0 or 1


@chex.dataclass(frozen=True)
class Scaler:
  """Mean and deviation of each evidence column."""

  mean: np.ndarray  # float32 [E]
  deviation: np.ndarray  # float32 [E]


def fit_scaler(slates: slates_lib.Slates) -> Scaler:
  """Statistics of the real candidates; a constant column has deviation 1."""
  real = slates.evidence[slates.candidates >= 0].astype(np.float64)
  mean, deviation = real.mean(axis=0), real.std(axis=0)
  deviation = np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32)
  return Scaler(mean=mean.astype(np.float32), deviation=deviation)


def make_batch(
  slates: slates_lib.Slates, rows: np.ndarray, scaler: Scaler
) -> Batch:
  """Rows [B] of a split, scaled as the train split.

  Features are within `CLIP` deviations, and 0 at padding.
  """
  candidates = slates.candidates[rows]
  scaled = (slates.evidence[rows] - scaler.mean) / scaler.deviation
  scaled = np.clip(scaled, -CLIP, CLIP)
  scaled = np.where(candidates[..., None] >= 0, scaled, 0.0)
  return Batch(
    candidates=candidates,
    history=slates.history[rows],
    features=scaled.astype(np.float32),
    count=slates.count[rows],
    clicks=(slates.grades[rows] > 0).astype(np.float32),
  )


def batch_rows(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
  """Rows of a step's batch: epoch after epoch, each in its own order.

  Returns int64 [min(B, n)], a function of the arguments alone. The rows of an
  epoch after its last whole batch are skipped.
  """
  size = min(batch_size, n)
  epoch, place = divmod(step, n // size)
  order = np.random.default_rng([seed, epoch]).permutation(n)
  return order[place * size : (place + 1) * size]


def make_model(config, items: int) -> Ranker:
  """The ranker of section `baselines.legacy`, for a catalog of `items`."""
  return Ranker(items, config.embedding, tuple(config.hidden), config.dropout)


def make_optimizer(config) -> optax.GradientTransformation:
  """AdamW; the decay also keeps rare items near zero."""
  return optax.adamw(config.learning_rate, weight_decay=config.weight_decay)


def init(
  model: Ranker,
  optimizer: optax.GradientTransformation,
  batch: Batch,
  seed: int,
) -> State:
  """The state before the first step; `batch` gives the shapes."""
  params = model.init(
    jax.random.key(seed), batch.candidates, batch.history, batch.features
  )['params']
  step, opt_state = jnp.zeros((), jnp.int32), optimizer.init(params)
  return State(step=step, params=params, opt_state=opt_state)


def make_update(
  model: Ranker, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
  """The jitted step `(state, batch) -> (state, {'loss', 'grad_norm'})`.

  The loss is the sigmoid cross-entropy of clicks, a mean over the real
  candidates. Dropout is a function of (seed, step).
  """

  def loss_fn(params: chex.ArrayTree, batch: Batch, key: jax.Array):
    logits_BxK = model.apply(
      {'params': params},
      batch.candidates,
      batch.history,
      batch.features,
      training=True,
      rngs={'dropout': key},
    )
    loss_BxK = optax.sigmoid_binary_cross_entropy(logits_BxK, batch.clicks)
    real_BxK = masking.length_mask(batch.count, loss_BxK.shape[-1])
    return masking.masked_sum(loss_BxK, real_BxK).mean()

  @jax.jit
  def update(state: State, batch: Batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = State(step=state.step + 1, params=params, opt_state=opt_state)
    return state, {'loss': loss, 'grad_norm': optax.tree.norm(grads)}

  return update


def make_score(
  model: Ranker,
) -> Callable[[chex.ArrayTree, slates_lib.Slates, Scaler], np.ndarray]:
  """A scorer `(params, slates, scaler) -> float32 [n, K]` of whole splits.

  Scores are logits of a click; -inf at padding.
  """
  forward = jax.jit(
    lambda params, batch: model.apply(
      {'params': params}, batch.candidates, batch.history, batch.features
    )
  )

  def score(
    params: chex.ArrayTree, slates: slates_lib.Slates, scaler: Scaler
  ) -> np.ndarray:
    n = len(slates)
    scores = np.full(slates.candidates.shape, -np.inf, np.float32)
    for start in range(0, n, SCORED_AT_ONCE):
      # The last rows are repeated: their scores are written twice.
      rows = np.minimum(np.arange(start, start + SCORED_AT_ONCE), n - 1)
      rows = rows if n > SCORED_AT_ONCE else np.arange(n)
      batch = make_batch(slates, rows, scaler)
      scores[rows] = forward(params, batch)
    return np.where(slates.candidates >= 0, scores, -np.inf)

  return score
