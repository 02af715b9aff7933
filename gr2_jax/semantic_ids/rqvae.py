"""Residual-quantized autoencoder over item vectors.

An encoder maps an item's text vector to a latent. L codebooks quantize the
latent level by level, each the residual of the level before. A decoder
reconstructs the text vector from the sum of the codewords. `config` is the
section `tokenizer` throughout.

Axis letters: B batch, I items, F text features, D latent width, L levels,
C codebook size.
"""

from collections.abc import Callable, Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from gr2_jax.semantic_ids import co_engagement, quantizer
from gr2_jax.semantic_ids import codebooks as codebook_lib

CODEBOOK_KINDS = ('ema', 'ema_gradient', 'gradient', 'kmeans')
# First step of the batches of `pretrain`; those of training count from 0.
_PRETRAIN = 1 << 31


class Autoencoder(nn.Module):
  """A mirrored pair of MLPs around the latent."""

  features: int  # width of an item vector, F
  hidden: Sequence[int]  # widths of the encoder's layers; the decoder reverses
  latent: int  # D; 0: the latent is the item vector, and nothing is learned

  def setup(self) -> None:
    """Creates the encoder and the decoder."""
    if self.latent:
      self.encoder = _mlp((*self.hidden, self.latent))
      self.decoder = _mlp((*reversed(self.hidden), self.features))

  def encode(self, x_BxF: jax.Array) -> jax.Array:
    """Item vectors -> latents [B, D]."""
    return self.encoder(x_BxF) if self.latent else x_BxF

  def decode(self, latents_BxD: jax.Array) -> jax.Array:
    """Latents -> item vectors [B, F]."""
    return self.decoder(latents_BxD) if self.latent else latents_BxD

  def __call__(self, x_BxF: jax.Array) -> jax.Array:
    """Encodes and decodes without quantization."""
    return self.decode(self.encode(x_BxF))


def _mlp(widths: Sequence[int]) -> nn.Sequential:
  layers = []
  for width in widths[:-1]:
    layers += [nn.Dense(width), nn.gelu]
  return nn.Sequential([*layers, nn.Dense(widths[-1])])


@chex.dataclass(frozen=True)
class State:
  """Training state."""

  step: jax.Array  # int32 []
  moved: Mapping[str, chex.ArrayTree]  # parameters of the optimizer
  codebooks: Mapping[str, jax.Array]  # see `start_codebooks`
  opt_state: chex.ArrayTree


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """Adam with linear warm-up and cosine decay to a tenth."""
  warmup = min(config.warmup_steps, max(config.steps - 1, 0))
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=warmup,
    decay_steps=max(config.steps, warmup + 1),
    end_value=0.1 * config.learning_rate,
  )
  return optax.adam(schedule)


def make_model(config: ConfigDict, features: int) -> Autoencoder:
  """The autoencoder for item vectors of a width."""
  return Autoencoder(
    features=features,
    hidden=tuple(config.hidden),
    latent=0 if config.codebook == 'kmeans' else config.latent,
  )


def check(config: ConfigDict) -> None:
  """Raises ValueError where a field of the section has an invalid value."""
  for field, known in (
    ('codebook', CODEBOOK_KINDS),
    ('estimator', tuple(codebook_lib.ESTIMATORS)),
  ):
    if config[field] not in known:
      raise ValueError(
        f'tokenizer.{field} is {config[field]!r}; it must be one of {known}'
      )
  if config.codebook == 'kmeans' and not config.init_items:
    raise ValueError(
      "tokenizer.codebook='kmeans' needs items to start from: raise "
      'tokenizer.init_items'
    )


def draw_batch(
  config: ConfigDict,
  features_IxF: np.ndarray,
  neighbors: co_engagement.Neighbors | None,
  step: int,
) -> dict[str, np.ndarray]:
  """Items drawn with replacement; a function of (seed, step) alone.

  Returns:
    items float32 [B, F]; with neighbors also rows and partner_rows int32 [B],
    and partners float32 [B, F].
  """
  rng = np.random.default_rng([config.seed, step])
  rows = rng.integers(len(features_IxF), size=config.batch_size)
  batch = {'items': features_IxF[rows]}
  if neighbors is not None:
    partners = neighbors.draw(rows, rng)
    batch |= {
      'rows': rows.astype(np.int32),
      'partner_rows': partners,
      'partners': features_IxF[partners],
    }
  return batch


def init(config: ConfigDict, features_IxF: np.ndarray, levels: int) -> State:
  """The state at step 0: pretrained networks and initial codebooks."""
  model = make_model(config, features_IxF.shape[1])
  networks = pretrain(
    config, model, _init_networks(config, model), features_IxF
  )
  rng = np.random.default_rng([config.seed, levels])
  count = min(len(features_IxF), config.init_items)
  rows = np.sort(rng.permutation(len(features_IxF))[:count])
  latents = None
  if count:
    encode = jax.jit(lambda p, x: _apply(model, p, x, 'encode'))
    latents = np.asarray(encode(networks, features_IxF[rows]))
  return _fresh(config, networks, start_codebooks(config, latents, levels))


def init_shapes(config: ConfigDict, features: int, levels: int) -> State:
  """A state with the shapes of `init`, for `jax.eval_shape`."""
  model = make_model(config, features)
  size = (levels, config.codebook_size)
  codebooks = {
    'vectors': jnp.zeros((*size, model.latent or features)),
    'sums': jnp.zeros((*size, model.latent or features)),
    'counts': jnp.zeros(size),
    'idle': jnp.zeros(size, jnp.int32),
  }
  return _fresh(config, _init_networks(config, model), codebooks)


def start_codebooks(
  config: ConfigDict, latents_IxD: np.ndarray | None, levels: int
) -> dict[str, jax.Array]:
  """Codebooks before the first step.

  k-means on each level, or, without latents, codewords from a Gaussian of
  deviation 1 / C.

  Returns:
    vectors float32 [L, C, D]; counts float32 [L, C] and sums [L, C, D] of the
    moving average; idle int32 [L, C], batches since a code was used.
  """
  size = config.codebook_size
  if latents_IxD is None:
    rng = np.random.default_rng([config.seed, levels, size])
    vectors = rng.standard_normal((levels, size, config.latent), np.float32)
    vectors /= size
    counts = np.full((levels, size), config.batch_size / size, np.float32)
    sums = vectors * counts[..., None]
    codebooks = {'vectors': vectors, 'counts': counts, 'sums': sums}
  else:
    codebooks = quantizer.residual_codebooks(
      latents_IxD,
      levels=levels,
      size=size,
      batch_size=config.batch_size,
      iterations=config.init_iterations,
      seed=config.seed,
    )
  codebooks['idle'] = np.zeros((levels, size), np.int32)
  return jax.tree.map(jnp.asarray, codebooks)


def _init_networks(config: ConfigDict, model: Autoencoder) -> chex.ArrayTree:
  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  variables = model.init(key, jnp.zeros((1, model.features)))
  return variables.get('params', {})


def _apply(
  model: Autoencoder, networks: chex.ArrayTree, x: chex.Array, method: str
) -> jax.Array:
  return model.apply({'params': networks}, x, method=method)


def _fresh(
  config: ConfigDict, networks: chex.ArrayTree, codebooks: dict[str, jax.Array]
) -> State:
  """The state at step 0 with given networks and codebooks."""
  moved = {'networks': networks}
  if config.codebook in ('gradient', 'ema_gradient'):
    moved['vectors'] = codebooks['vectors']
  return State(
    step=jnp.zeros((), jnp.int32),
    moved=moved,
    codebooks=codebooks,
    opt_state=make_optimizer(config).init(moved),
  )


def pretrain(
  config: ConfigDict,
  model: Autoencoder,
  networks: chex.ArrayTree,
  features_IxF: np.ndarray,
) -> chex.ArrayTree:
  """Trains the autoencoder alone, before k-means initializes the codebooks.

  Without it the encoder moves away from the first codebooks and codes die.
  Returns the parameters after config.pretrain_steps updates.
  """
  if not model.latent:
    return networks
  optimizer = optax.adam(config.learning_rate)

  def loss(networks: chex.ArrayTree, batch: jax.Array) -> jax.Array:
    out = model.apply({'params': networks}, batch)
    return ((out - batch) ** 2).sum(-1).mean()

  @jax.jit
  def step(
    networks: chex.ArrayTree, opt_state: chex.ArrayTree, batch: jax.Array
  ) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    grads = jax.grad(loss)(networks, batch)
    updates, opt_state = optimizer.update(grads, opt_state, networks)
    return optax.apply_updates(networks, updates), opt_state

  opt_state = optimizer.init(networks)
  for index in range(config.pretrain_steps):
    batch = draw_batch(config, features_IxF, None, _PRETRAIN + index)
    networks, opt_state = step(networks, opt_state, batch['items'])
  return networks


def loss_fn(
  config: ConfigDict,
  model: Autoencoder,
  moved: Mapping[str, chex.ArrayTree],
  vectors_LxCxD: jax.Array,
  batch: Mapping[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The training loss of networks and gradient codebooks.

  |x - x'|^2 + beta sum_k |r_k - sg(e_k)|^2, each a sum over features and a
  mean over the batch; + sum_k |sg(r_k) - e_k|^2 where gradients move the
  codewords; + the weighted diversity and InfoNCE of `codebooks`. The codewords
  `vectors_LxCxD` that quantize are constants.

  Returns:
    The loss, and a dict with its terms, codes [B, L], residuals and codewords
    [B, L, D].
  """
  latents = _apply(model, moved['networks'], batch['items'], 'encode')
  vectors = jax.lax.stop_gradient(vectors_LxCxD)
  codes, _, words = quantizer.quantize(jax.lax.stop_gradient(latents), vectors)
  # Residuals depend on the encoder alone: earlier codewords are constants.
  residuals = latents[:, None] - (jnp.cumsum(words, axis=1) - words)
  estimate = codebook_lib.ESTIMATORS[config.estimator]
  out = _apply(
    model, moved['networks'], estimate(latents, words.sum(1)), 'decode'
  )
  terms = {
    'reconstruction': ((batch['items'] - out) ** 2).sum(-1).mean(),
    'commitment': ((residuals - words) ** 2).sum((1, 2)).mean(),
  }
  loss = terms['reconstruction'] + config.commitment * terms['commitment']
  fixed = jax.lax.stop_gradient(residuals)
  learned = moved.get('vectors')
  if learned is not None:
    chosen = learned[jnp.arange(codes.shape[1]), codes]
    loss += ((fixed - chosen) ** 2).sum((1, 2)).mean()
  if config.diversity_weight:
    terms['diversity'] = codebook_lib.diversity(
      residuals,
      vectors if learned is None else learned,
      config.diversity_temperature,
    )
    loss += config.diversity_weight * terms['diversity']
  if config.contrastive_weight:
    terms['contrastive'] = codebook_lib.info_nce(
      latents,
      _apply(model, moved['networks'], batch['partners'], 'encode'),
      batch['rows'],
      batch['partner_rows'],
      config.contrastive_temperature,
    )
    loss += config.contrastive_weight * terms['contrastive']
  return loss, terms | {'codes': codes, 'residuals': fixed, 'words': words}


def make_update(
  config: ConfigDict, model: Autoencoder
) -> Callable[
  [State, Mapping[str, jax.Array]], tuple[State, dict[str, jax.Array]]
]:
  """The jitted update step `(state, batch) -> (state, metrics)`.

  Moving averages, like gradients, are over the whole batch, so splitting a
  batch over a mesh changes no result.
  """
  optimizer = make_optimizer(config)

  @jax.jit
  def update(
    state: State, batch: Mapping[str, jax.Array]
  ) -> tuple[State, dict[str, jax.Array]]:
    (loss, aux), grads = jax.value_and_grad(
      lambda moved: loss_fn(
        config, model, moved, state.codebooks['vectors'], batch
      ),
      has_aux=True,
    )(state.moved)
    codes, residuals, words = (
      aux.pop(name) for name in ('codes', 'residuals', 'words')
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.moved)
    moved = optax.apply_updates(state.moved, updates)

    # The moving average runs for every kind: its counts are logged.
    codebooks = codebook_lib.ema_update(
      state.codebooks, codes, residuals, decay=config.decay
    )
    if config.codebook == 'gradient':
      codebooks['vectors'] = moved['vectors']
    elif config.codebook == 'ema_gradient':
      codebooks['vectors'] = optax.incremental_update(
        moved['vectors'], state.codebooks['vectors'], 1 - config.decay
      )
    idle = codebook_lib.count_idle(state.codebooks['idle'], codes)
    codebooks['idle'] = idle
    if config.reset_after:
      dead = idle >= config.reset_after
      codebooks, moved = _revive(codebooks, moved, dead, residuals, words)
      aux['revived'] = dead.sum()

    share = codebooks['counts'] / codebooks['counts'].sum(-1, keepdims=True)
    entropy = -(share * jnp.log(share + 1e-9)).sum(-1)
    metrics = aux | {
      'loss': loss,
      'grad_norm': optax.tree.norm(grads),
      'update_norm': optax.tree.norm(updates),
      'perplexity': jnp.exp(entropy).mean(),
    }
    return State(
      step=state.step + 1, moved=moved, codebooks=codebooks, opt_state=opt_state
    ), metrics

  return update


def _revive(
  codebooks: Mapping[str, jax.Array],
  moved: Mapping[str, chex.ArrayTree],
  dead_LxC: jax.Array,
  residuals: jax.Array,
  words: jax.Array,
) -> tuple[dict[str, jax.Array], Mapping[str, chex.ArrayTree]]:
  """Replaces dead codes in codebooks and parameters, with a count of 1."""
  vectors = codebook_lib.revive(
    codebooks['vectors'], dead_LxC, residuals, words
  )
  counts = jnp.where(dead_LxC, 1.0, codebooks['counts'])
  sums = jnp.where(dead_LxC[..., None], vectors, codebooks['sums'])
  if 'vectors' in moved:
    learned = jnp.where(dead_LxC[..., None], vectors, moved['vectors'])
    moved = moved | {'vectors': learned}
  return {
    'vectors': vectors,
    'counts': counts,
    'sums': sums,
    'idle': jnp.where(dead_LxC, 0, codebooks['idle']),
  }, moved
