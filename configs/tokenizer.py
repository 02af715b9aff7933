"""The tokenizer: item text -> semantic IDs.

`--config=configs/tokenizer.py` runs it and what it needs; `:test` in seconds;
`:sweep` the ablation of its techniques.
"""

from ml_collections import ConfigDict

from configs import common, study_tokenizer


def section(test: bool = False) -> ConfigDict:
  """The `tokenizer` section."""
  config = ConfigDict()
  config.seed = 0  # of the SVD, the networks, the batches and the drawn codes
  config.extends = ''  # tokenizer artifact whose items keep their IDs
  config.levels = 4  # codes per item, the drawn ones included
  config.codebook_size = 32 if test else 256  # codes per level
  # Text vectors.
  config.text_encoder = 'tfidf'  # tfidf (with SVD), minilm, backbone
  config.text_dim = 32 if test else 128  # width of tfidf vectors
  config.text_buckets = 1 << 16  # hash buckets per block of tfidf columns
  config.text_source = ''  # folder of a minilm; folder, .gguf or smollm2
  config.text_batch_size = 64  # texts at a time through minilm or backbone
  # Networks and codebooks.
  config.hidden = (
    (64,) if test else (256,)
  )  # widths of the encoder's hidden layers; the decoder's reversed
  config.latent = 8 if test else 12  # width of the quantised latent
  config.codebook = 'ema'  # moving means; ema_gradient, gradient; kmeans alone
  config.estimator = 'straight_through'  # of gradients; or rotation
  config.decay = 0.95  # of the moving averages, per step
  config.init_items = 20_000  # items k-means starts from; 0: random codewords
  config.init_iterations = 10  # Lloyd iterations after the k-means++ draw
  config.reset_after = 0  # batches without use that kill a code; 0: never
  # Losses beside reconstruction.
  config.commitment = 0.25  # weight of the commitment loss
  config.diversity_weight = 0.0  # of even usage of the codes
  config.diversity_temperature = 1.0  # of its soft assignment
  config.contrastive_weight = 0.0  # of InfoNCE on co-engaged items
  config.contrastive_temperature = 0.1  # of the cosines
  config.contrastive_window = 3  # places in a history that part such items
  # From fitted codes to tuples.
  config.beam = 1  # partial tuples kept in the search for the fitted codes
  config.last_level = 'unused'  # drawn under the prefix; uniform: drawn; digit; sinkhorn: repaired; fitted
  config.drawn_levels = 1  # last levels that unused and uniform draw
  # Training.
  config.pretrain_steps = (
    50 if test else 500
  )  # of the autoencoder before k-means
  config.steps = 100 if test else 1_000  # updates with quantisation
  config.batch_size = 128 if test else 512  # items per update
  config.learning_rate = 1e-3  # peak, of Adam
  config.warmup_steps = 50  # from 0 to the peak; then cosine to a tenth of it
  config.log_every = 50  # steps between two lines of metrics
  config.checkpoint_every = 250  # steps between checkpoints, each measured
  config.eval_items = 20_000  # items they are compared on, at most
  return config


def get_config(arg: str = '') -> ConfigDict:
  """The whole config with this stage, or with `sweep` its study, as target."""
  parts = arg.split(',')
  if 'sweep' in parts:
    parts.remove('sweep')
    return study_tokenizer.get_config(','.join(parts))
  return common.compose('tokenizer', arg)
