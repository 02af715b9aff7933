"""Residual-quantised autoencoder over item vectors.

An encoder maps an item's text vector to a latent; L codebooks quantise the
latent level by level, each the residual of the one before; a decoder
reconstructs the text vector from the sum of the codewords. A step is a pure
function `(state, batch) -> (state, metrics)`.

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

from gr2_jax.semantic_ids import co_engagement, code_losses, quantizer
from gr2_jax.semantic_ids import codebooks as codebook_lib

CODEBOOK_KINDS = ('ema', 'ema_gradient', 'gradient', 'kmeans')


class Autoencoder(nn.Module):
  """A mirrored pair of MLPs around the latent.

  Attributes:
    features: width of an item vector, F.
    hidden: widths of the encoder's hidden layers; the decoder's reversed.
    latent: width of the latent, D; 0: the latent is the item vector itself,
      and there is nothing to learn.
  """

  features: int
  hidden: Sequence[int]
  latent: int

  def setup(self) -> None:
    """Names the two halves."""
    if self.latent:
      self.encoder = _mlp((*self.hidden, self.latent))
      self.decoder = _mlp((*reversed(self.hidden), self.features))

  def encode(self, x_BxF: jax.Array) -> jax.Array:
    """float32 [B, F] -> latents [B, D]."""
    return self.encoder(x_BxF) if self.latent else x_BxF

  def decode(self, latents_BxD: jax.Array) -> jax.Array:
    """Latents [B, D] -> float32 [B, F]."""
    return self.decoder(latents_BxD) if self.latent else latents_BxD

  def __call__(self, x_BxF: jax.Array) -> jax.Array:
    """Encodes and decodes without quantisation."""
    return self.decode(self.encode(x_BxF))


def _mlp(widths: Sequence[int]) -> nn.Sequential:
  layers = []
  for width in widths[:-1]:
    layers += [nn.Dense(width), nn.gelu]
  return nn.Sequential([*layers, nn.Dense(widths[-1])])


@chex.dataclass(frozen=True)
class State:
  """Everything a resumed run needs."""

  step: jax.Array  # int32 []
  moved: Mapping[str, chex.ArrayTree]  # what the optimizer moves
  codebooks: Mapping[str, jax.Array]  # see `start_codebooks`
  opt_state: chex.ArrayTree


def make_optimizer(config) -> optax.GradientTransformation:
  """Adam, linear warm-up, cosine decay to a tenth.

  Args:
    config: the `tokenizer` section: learning_rate, warmup_steps, steps.
  """
  warmup = min(config.warmup_steps, max(config.steps - 1, 0))
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=warmup,
    decay_steps=max(config.steps, warmup + 1),
    end_value=0.1 * config.learning_rate,
  )
  return optax.adam(schedule)


def make_model(config, features: int) -> Autoencoder:
  """The autoencoder that the `tokenizer` section describes."""
  return Autoencoder(
    features=features,
    hidden=tuple(config.hidden),
    latent=0 if config.codebook == 'kmeans' else config.latent,
  )


def check(config) -> None:
  """Raises ValueError naming the field of the section that has no meaning."""
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
  config,
  features_IxF: np.ndarray,
  neighbours: co_engagement.Neighbours | None,
  step: int,
) -> dict[str, np.ndarray]:
  """Items drawn with replacement: a function of (seed, step) alone.

  Args:
    config: the `tokenizer` section: seed, batch_size.
    features_IxF: float32 [I, F]; may lie on disk.
    neighbours: whom partners are drawn from; None: no partners.
    step: of the run.

  Returns:
    items float32 [B, F]; and, with neighbours, rows and partner_rows int32
    [B], and partners float32 [B, F].
  """
  rng = np.random.default_rng([config.seed, step])
  rows = rng.integers(len(features_IxF), size=config.batch_size)
  batch = {'items': features_IxF[rows]}
  if neighbours is not None:
    partners = neighbours.draw(rows, rng)
    batch |= {
      'rows': rows.astype(np.int32),
      'partner_rows': partners,
      'partners': features_IxF[partners],
    }
  return batch


def init(config, features_IxF: np.ndarray, levels: int) -> State:
  """A fresh state: pretrained networks, and codebooks to start from.

  Args:
    config: the `tokenizer` section.
    features_IxF: float32 [I, F] all items; may lie on disk.
    levels: number of fitted levels, L.

  Returns:
    The state at step 0.
  """
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


def init_shapes(config, features: int, levels: int) -> State:
  """A state of the right shapes and of no value, for `jax.eval_shape`."""
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
  config, latents_IxD: np.ndarray | None, levels: int
) -> dict[str, jax.Array]:
  """Codebooks before the first step.

  Args:
    config: the `tokenizer` section: seed, latent, codebook_size, batch_size,
      init_iterations.
    latents_IxD: float32 [I, D] to run k-means on, level by level; None:
      codewords are drawn from a Gaussian of deviation 1 / C.
    levels: L.

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
    found = {
      'vectors': vectors,
      'counts': counts,
      'sums': vectors * counts[..., None],
    }
  else:
    found = quantizer.residual_codebooks(
      latents_IxD,
      levels=levels,
      size=size,
      batch_size=config.batch_size,
      iterations=config.init_iterations,
      seed=config.seed,
    )
  found['idle'] = np.zeros((levels, size), np.int32)
  return jax.tree.map(jnp.asarray, found)


def _init_networks(config, model: Autoencoder) -> chex.ArrayTree:
  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  variables = model.init(key, jnp.zeros((1, model.features)))
  return variables.get('params', {})


def _apply(model: Autoencoder, networks, x, method: str) -> jax.Array:
  return model.apply({'params': networks}, x, method=method)


def _fresh(config, networks, codebooks) -> State:
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
  config, model: Autoencoder, networks, features_IxF: np.ndarray
) -> chex.ArrayTree:
  """Trains the autoencoder alone, so that k-means meets latents that last.

  Without it the encoder leaves the first codebooks behind and codes die.

  Args:
    config: the `tokenizer` section: seed, pretrain_steps, learning_rate and
      batch_size.
    model: the autoencoder.
    networks: its fresh parameters.
    features_IxF: float32 [I, F] all items.

  Returns:
    The parameters after config.pretrain_steps updates.
  """
  if not model.latent:
    return networks
  optimizer = optax.adam(config.learning_rate)

  @jax.jit
  def step(networks, opt_state, batch):
    def loss(networks):
      out = model.apply({'params': networks}, batch)
      return ((out - batch) ** 2).sum(-1).mean()

    grads = jax.grad(loss)(networks)
    updates, opt_state = optimizer.update(grads, opt_state, networks)
    return optax.apply_updates(networks, updates), opt_state

  opt_state = optimizer.init(networks)
  for index in range(config.pretrain_steps):
    # Not the batches of the steps that follow: those count from 0.
    batch = draw_batch(config, features_IxF, None, _PRETRAIN + index)
    networks, opt_state = step(networks, opt_state, batch['items'])
  return networks


_PRETRAIN = 1 << 31


def loss_fn(
  config,
  model: Autoencoder,
  moved: Mapping[str, chex.ArrayTree],
  vectors_LxCxD: jax.Array,
  batch: Mapping[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """What the networks, and gradient codebooks, are trained to make small.

  |x - x'|^2 + beta sum_k |r_k - sg(e_k)|^2, each a sum over features and a
  mean over the batch; + sum_k |sg(r_k) - e_k|^2 where gradients move the
  codewords; + the weighted diversity and InfoNCE of `ops.quantisation`.

  Args:
    config: the `tokenizer` section.
    model: the autoencoder.
    moved: of the state.
    vectors_LxCxD: codewords that quantise; constants.
    batch: of `draw_batch`.

  Returns:
    The loss and a dict with its terms, codes [B, L], residuals and codewords
    [B, L, D].
  """
  latents = _apply(model, moved['networks'], batch['items'], 'encode')
  vectors = jax.lax.stop_gradient(vectors_LxCxD)
  codes, _, words = quantizer.quantise(jax.lax.stop_gradient(latents), vectors)
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
    terms['diversity'] = code_losses.diversity(
      residuals,
      vectors if learned is None else learned,
      config.diversity_temperature,
    )
    loss += config.diversity_weight * terms['diversity']
  if config.contrastive_weight:
    terms['contrastive'] = code_losses.info_nce(
      latents,
      _apply(model, moved['networks'], batch['partners'], 'encode'),
      batch['rows'],
      batch['partner_rows'],
      config.contrastive_temperature,
    )
    loss += config.contrastive_weight * terms['contrastive']
  return loss, terms | {'codes': codes, 'residuals': fixed, 'words': words}


def make_update(
  config, model: Autoencoder
) -> Callable[
  [State, Mapping[str, jax.Array]], tuple[State, dict[str, jax.Array]]
]:
  """The jitted update step `(state, batch) -> (state, metrics)`.

  Batches split over a mesh give the same sums: moving averages, like
  gradients, are over the whole batch.

  Args:
    config: the `tokenizer` section.
    model: the autoencoder.
  """
  optimizer = make_optimizer(config)

  @jax.jit
  def update(state: State, batch: Mapping[str, jax.Array]):
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

    # The codebooks, each in its own way; the counts are kept for the log.
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


def _revive(codebooks, moved, dead_LxC, residuals, words):
  """Moves dead codes everywhere they stand, as if used once."""
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
