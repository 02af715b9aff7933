"""Stage `tokenizer`: item text -> semantic IDs.

`configs/tokenizer.py:sweep` is the ablation of its techniques.
"""

from ml_collections import ConfigDict

from configs import common, study_tokenizer


def section(test: bool = False) -> ConfigDict:
  """Section `tokenizer`."""
  config = ConfigDict()
  config.seed = 0  # seed of SVD, networks, batches and drawn codes
  config.extends = ''  # tokenizer artifact whose items keep their IDs
  config.levels = 4  # codes per item, including drawn ones
  config.codebook_size = 32 if test else 256  # codes per level
  # Text vectors.
  config.text_encoder = 'tfidf'  # tfidf (with SVD), minilm, backbone
  config.text_dim = 32 if test else 128  # width of tfidf vectors
  config.text_buckets = 1 << 16  # hash buckets per block of tfidf columns
  config.text_source = ''  # minilm: folder; backbone: folder, .gguf or smollm2
  config.text_batch_size = 64  # texts at a time; minilm and backbone
  # Networks and codebooks.
  # Widths of the encoder's hidden layers; the decoder reverses them.
  config.hidden = (64,) if test else (256,)
  config.latent = 8 if test else 12  # width of the quantized latent
  config.codebook = 'ema'  # ema, ema_gradient, gradient; kmeans alone
  config.estimator = 'straight_through'  # gradient estimator; or rotation
  config.decay = 0.95  # decay of the moving averages per step
  config.init_items = 20_000  # items of the k-means init; 0: random codewords
  config.init_iterations = 10  # Lloyd iterations after k-means++
  config.reset_after = 0  # unused batches after which a code is reset; 0: never
  # Losses besides reconstruction.
  config.commitment = 0.25  # weight of the commitment loss
  config.diversity_weight = 0.0  # weight of even usage of the codes
  config.diversity_temperature = 1.0  # temperature of its soft assignment
  config.contrastive_weight = 0.0  # weight of InfoNCE on co-engaged items
  config.contrastive_temperature = 0.1  # temperature of the cosines
  config.contrastive_window = 3  # largest distance of co-engaged items
  # From fitted codes to tuples.
  config.beam = 1  # beam width of the search for fitted codes
  # unused: drawn among the codes unused under the prefix; uniform: drawn;
  # digit: counted; sinkhorn: repaired; fitted.
  config.last_level = 'unused'
  config.drawn_levels = 1  # last levels drawn by unused and uniform
  # Training.
  config.pretrain_steps = 50 if test else 500  # autoencoder, before k-means
  config.steps = 100 if test else 1_000  # updates with quantization
  config.batch_size = 128 if test else 512  # items per update
  config.learning_rate = 1e-3  # peak learning rate of Adam
  config.warmup_steps = 50  # steps to the peak; then cosine to a tenth of it
  config.log_every = 50  # steps between lines of metrics
  config.checkpoint_every = 250  # steps between checkpoints and measurements
  config.eval_items = 20_000  # most items to measure on
  return config


def get_config(arg: str = '') -> ConfigDict:
  """The whole config; the target is this stage, or with `sweep` its study."""
  parts = arg.split(',')
  if 'sweep' in parts:
    parts.remove('sweep')
    return study_tokenizer.get_config(','.join(parts))
  return common.compose('tokenizer', arg)
