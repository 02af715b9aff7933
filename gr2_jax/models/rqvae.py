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

from gr2_jax.models import codebooks as codebook_lib

CODEBOOK_KINDS = ('ema', 'gradient')


class Autoencoder(nn.Module):
  """A mirrored pair of MLPs around the latent.

  Attributes:
    features: width of an item vector, F.
    hidden: widths of the encoder's hidden layers; the decoder's reversed.
    latent: width of the latent, D.
  """

  features: int
  hidden: Sequence[int]
  latent: int

  def setup(self) -> None:
    """Names the two halves."""
    self.encoder = _mlp((*self.hidden, self.latent))
    self.decoder = _mlp((*reversed(self.hidden), self.features))

  def encode(self, x_BxF: jax.Array) -> jax.Array:
    """float32 [B, F] -> latents [B, D]."""
    return self.encoder(x_BxF)

  def decode(self, latents_BxD: jax.Array) -> jax.Array:
    """Latents [B, D] -> float32 [B, F]."""
    return self.decoder(latents_BxD)

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
  params: chex.ArrayTree  # of the autoencoder
  codebooks: Mapping[str, jax.Array]  # vectors, sums [L,C,D]; counts [L,C]
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
    features=features, hidden=tuple(config.hidden), latent=config.latent
  )


def trainable(params, codebooks, kind: str) -> dict:
  """What the optimizer moves: the networks, and gradient codebooks."""
  if kind not in CODEBOOK_KINDS:
    raise ValueError(
      f'tokenizer.codebook is {kind!r}; it must be one of {CODEBOOK_KINDS}'
    )
  if kind == 'gradient':
    return {'networks': params, 'vectors': codebooks['vectors']}
  return {'networks': params}


def init(config, features_IxF: np.ndarray, levels: int) -> State:
  """A fresh state: pretrained networks, codebooks by k-means on their latents.

  Args:
    config: the `tokenizer` section.
    features_IxF: float32 [I, F] all items.
    levels: number of fitted levels, L.

  Returns:
    The state at step 0.
  """
  model = make_model(config, features_IxF.shape[1])
  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  params = model.init(key, jnp.asarray(features_IxF[:1]))['params']
  params = pretrain(config, model, params, features_IxF)
  rng = np.random.default_rng([config.seed, levels])
  count = min(len(features_IxF), config.init_items)
  rows = np.sort(rng.permutation(len(features_IxF))[:count])
  codebooks = codebook_lib.residual_codebooks(
    encode(model, params, features_IxF[rows]),
    levels=levels,
    size=config.codebook_size,
    batch_size=config.batch_size,
    iterations=config.init_iterations,
    seed=config.seed,
  )
  return _fresh(config, params, jax.tree.map(jnp.asarray, codebooks))


def init_shapes(config, features: int, levels: int) -> State:
  """A state of the right shapes and of no value, for `jax.eval_shape`."""
  model = make_model(config, features)
  params = model.init(jax.random.key(0), jnp.zeros((1, features)))['params']
  size = (levels, config.codebook_size)
  codebooks = {
    'vectors': jnp.zeros((*size, config.latent)),
    'counts': jnp.zeros(size),
    'sums': jnp.zeros((*size, config.latent)),
  }
  return _fresh(config, params, codebooks)


def _fresh(config, params, codebooks) -> State:
  optimizer = make_optimizer(config)
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    codebooks=codebooks,
    opt_state=optimizer.init(trainable(params, codebooks, config.codebook)),
  )


def pretrain(
  config, model: Autoencoder, params, features_IxF: np.ndarray
) -> chex.ArrayTree:
  """Trains the autoencoder alone, so that k-means meets latents that last.

  Without it the encoder leaves the first codebooks behind and codes die.

  Args:
    config: the `tokenizer` section: seed, pretrain_steps, learning_rate and
      batch_size.
    model: the autoencoder.
    params: its fresh parameters.
    features_IxF: float32 [I, F] all items.

  Returns:
    The parameters after config.pretrain_steps updates.
  """
  optimizer = optax.adam(config.learning_rate)
  key = jax.random.fold_in(jax.random.key(config.seed), 1)

  @jax.jit
  def loop(params, features):
    def step(index, carry):
      params, opt_state = carry
      batch = draw_batch(features, config.batch_size, key, index)
      grads = jax.grad(
        lambda p: (
          ((model.apply({'params': p}, batch) - batch) ** 2).sum(-1).mean()
        )
      )(params)
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    return jax.lax.fori_loop(
      0, config.pretrain_steps, step, (params, optimizer.init(params))
    )[0]

  return loop(params, features_IxF)


def draw_batch(
  features_IxF: jax.Array, batch_size: int, key: jax.Array, step: jax.Array
) -> jax.Array:
  """Items drawn with replacement: a function of (key, step) alone.

  Args:
    features_IxF: float32 [I, F].
    batch_size: B.
    key: of the run.
    step: int32 [].

  Returns:
    float32 [B, F].
  """
  rows = jax.random.randint(
    jax.random.fold_in(key, step), (batch_size,), 0, len(features_IxF)
  )
  return features_IxF[rows]


def loss_fn(
  model: Autoencoder,
  moved: Mapping[str, chex.ArrayTree],
  vectors_LxCxD: jax.Array,
  batch_BxF: jax.Array,
  commitment: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Reconstruction + commitment (+ codebook, where gradients move it).

  |x - x'|^2 + beta sum_k |r_k - sg(e_k)|^2 (+ sum_k |sg(r_k) - e_k|^2), each a
  sum over features and a mean over the batch.

  Args:
    model: the autoencoder.
    moved: what `trainable` gives.
    vectors_LxCxD: codebooks, read where `moved` has none.
    batch_BxF: float32 [B, F].
    commitment: beta.

  Returns:
    The loss and a dict with its terms, codes [B, L] and residuals [B, L, D].
  """
  learned = 'vectors' in moved
  variables = {'params': moved['networks']}
  latents = model.apply(variables, batch_BxF, method='encode')
  vectors = moved['vectors'] if learned else vectors_LxCxD
  codes, _, words = codebook_lib.quantise(latents, vectors)
  # Residuals depend on the encoder alone: earlier codewords are constants.
  fixed = jax.lax.stop_gradient(words)
  residuals = latents[:, None] - (jnp.cumsum(fixed, axis=1) - fixed)
  out = model.apply(
    variables,
    codebook_lib.straight_through(latents, words.sum(1)),
    method='decode',
  )
  reconstruction = ((batch_BxF - out) ** 2).sum(-1).mean()
  commit = ((residuals - fixed) ** 2).sum((1, 2)).mean()
  loss = reconstruction + commitment * commit
  if learned:
    loss += ((jax.lax.stop_gradient(residuals) - words) ** 2).sum((1, 2)).mean()
  return loss, {
    'reconstruction': reconstruction,
    'commitment': commit,
    'codes': codes,
    'residuals': jax.lax.stop_gradient(residuals),
  }


def make_update(
  config,
  model: Autoencoder,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh | None = None,
) -> Callable[[State, jax.Array], tuple[State, dict[str, jax.Array]]]:
  """The jitted update step `(state, batch [B, F]) -> (state, metrics)`.

  Args:
    config: the `tokenizer` section: codebook, decay, commitment.
    model: the autoencoder.
    optimizer: as the state was made with.
    mesh: if given, the batch is split over its 'data' axis and the state is
      replicated; otherwise everything lives on one device.
  """

  def update(state: State, batch_BxF: jax.Array):
    moved = trainable(state.params, state.codebooks, config.codebook)
    (loss, aux), grads = jax.value_and_grad(
      lambda moved: loss_fn(
        model, moved, state.codebooks['vectors'], batch_BxF, config.commitment
      ),
      has_aux=True,
    )(moved)
    updates, opt_state = optimizer.update(grads, state.opt_state, moved)
    moved = optax.apply_updates(moved, updates)
    codebooks = codebook_lib.ema_update(
      state.codebooks, aux['codes'], aux['residuals'], decay=config.decay
    )
    if config.codebook == 'gradient':  # the counts are kept for the log only
      codebooks['vectors'] = moved['vectors']
    share = codebooks['counts'] / codebooks['counts'].sum(-1, keepdims=True)
    entropy = -(share * jnp.log(share + 1e-9)).sum(-1)
    metrics = {
      'loss': loss,
      'reconstruction': aux['reconstruction'],
      'commitment': aux['commitment'],
      'grad_norm': optax.tree.norm(grads),
      'update_norm': optax.tree.norm(updates),
      'perplexity': jnp.exp(entropy).mean(),
    }
    return State(
      step=state.step + 1,
      params=moved['networks'],
      codebooks=codebooks,
      opt_state=opt_state,
    ), metrics

  if mesh is None:
    return jax.jit(update)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  return jax.jit(
    update, in_shardings=(whole, split), out_shardings=(whole, whole)
  )


def encode(model: Autoencoder, params, features_IxF: np.ndarray) -> np.ndarray:
  """Latents of a whole catalog; equal rows give bit-equal latents.

  Args:
    model: the autoencoder.
    params: its parameters.
    features_IxF: float32 [I, F].

  Returns:
    float32 [I, D].

  Raises:
    ValueError: an item vector is not finite; the message names the first.
  """
  bad = np.flatnonzero(~np.isfinite(features_IxF).all(axis=1))
  if len(bad):
    raise ValueError(
      f'the embedding of item {bad[0]} holds NaN or infinity ({len(bad)} such '
      'items): check its text or the file the embeddings came from'
    )
  rows, of_item = np.unique(features_IxF, axis=0, return_inverse=True)
  encoded = jax.jit(lambda p, x: model.apply({'params': p}, x, method='encode'))
  return np.asarray(encoded(params, rows))[of_item.reshape(-1)]


def reconstruction_r2(
  model: Autoencoder,
  params,
  vectors_LxCxD: np.ndarray,
  features_IxF: np.ndarray,
) -> float:
  """Share of the vectors' variance that the codewords' sum explains.

  1 - sum |x - x'|^2 / sum |x - mean x|^2 over the catalog.
  """

  @jax.jit
  def residual(params, vectors, x):
    variables = {'params': params}
    latents = model.apply(variables, x, method='encode')
    _, _, words = codebook_lib.quantise(latents, vectors)
    return x - model.apply(variables, words.sum(1), method='decode')

  error = np.asarray(residual(params, vectors_LxCxD, features_IxF), np.float64)
  centred = features_IxF - features_IxF.mean(0, keepdims=True)
  total = float((centred.astype(np.float64) ** 2).sum())
  return 1.0 - float((error**2).sum()) / max(total, 1e-12)
