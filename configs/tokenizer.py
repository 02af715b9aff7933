"""The tokenizer: item text -> semantic IDs.

`--config=configs/tokenizer.py` runs it and what it needs; `:test` in seconds.
"""

from ml_collections import ConfigDict

from configs import common


def section(test: bool = False) -> ConfigDict:
  """The `tokenizer` section."""
  config = ConfigDict()
  config.seed = 0  # of the SVD, the networks, the batches and the drawn codes
  config.levels = 4  # codes per item, the drawn one included
  config.codebook_size = 32 if test else 256  # codes per level
  config.last_level = 'unused'  # drawn among codes 'unused' under the prefix, drawn 'uniform', or 'fitted'
  config.text_dim = 32 if test else 128  # width of the text vectors
  config.text_buckets = 1 << 16  # hash buckets per block of text features
  config.hidden = (
    (64,) if test else (256,)
  )  # widths of the encoder's hidden layers; the decoder's reversed
  config.latent = 16 if test else 64  # width of the quantised latent
  config.codebook = 'ema'  # 'ema' of the assigned residuals, or 'gradient'
  config.decay = 0.95  # of the EMA, per step
  config.commitment = 0.25  # weight of the commitment loss
  config.init_items = 20_000  # items that k-means starts from, at most
  config.init_iterations = 10  # Lloyd iterations after the k-means++ draw
  config.pretrain_steps = (
    50 if test else 500
  )  # of the autoencoder before k-means
  config.steps = 100 if test else 1_000  # updates with quantisation
  config.batch_size = 128 if test else 512  # items per update
  config.learning_rate = 1e-3  # peak, of Adam
  config.warmup_steps = 50  # from 0 to the peak; then cosine to a tenth of it
  config.log_every = 50  # steps between two lines of metrics
  config.checkpoint_every = 250  # steps between two checkpoints
  return config


def get_config(arg: str = '') -> ConfigDict:
  """The whole config with this stage as the target."""
  return common.compose('tokenizer', arg)
