"""Stage `compress`: contexts in a fifth of their tokens."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, of long contexts unless told; draws the frontier."""
  long = '' if 'context=' in arg else 'context=long'
  return common.compose('compress', ','.join(filter(None, (arg, long))))


def section(test: bool = False) -> ConfigDict:
  """Section `compress`."""
  config = common.rollouts(
    test, batch_size=8, steps=80, learning_rate=1e-4, eval_every=20
  )
  config.eval_slates = 64 if test else 256  # validation slates, a fixed draw
  config.eval_batch_size = 8  # of them at a time; 8 stay in a CPU's cache
  # The ranker that reads, from whose parameters it starts: sft opd rl.
  config.start = 'sft'
  config.keep = 0.2  # share of an average context's tokens that is left
  config.keeps = (0.05, 0.1, 0.2)  # shares that are learned
  # Tokens by which a candidate's line may be longer than the first one.
  config.slack = 1
  config.imitate = common.training(
    steps=6 if test else 150,
    batch_size=8 if test else 16,
    learning_rate=2e-3,
    eval_every=3 if test else 75,
  )  # of compressions by rule, before RL
  # Training slates on which is measured what of a line its ranker reads first.
  config.rule_slates = 8 if test else 256
  config.draws = 2 if test else 8  # of them a slate; the best is imitated
  config.compression_weight = 0.2  # a of Eq. 10, of the tokens saved
  config.judge = 'ranker'  # of Eq. 10: ranker, or remote: at an endpoint
  # What its order is held against: the labels, or its own order of the whole.
  config.judge_by = 'order'
  config.judge_k = 5  # cut-off of the ranker's NDCG
  config.judge_top = 3  # ranks in which it must find a positive
  # How the judge `remote` is asked:
  config.update(common.endpoint())
  config.ellipsis_cost = 1.0  # share of the reward that a truncation mark costs
  config.train_slates = (
    64 if test else 0
  )  # of the training split to write; 0: all
  config.kl_weight = 0.0  # of a divergence from the imitation, 0: none
  config.kl_kind = 'k3'  # on sampled tokens: k1 k2 k3; exact: reverse forward
  config.choose = 'reward'  # validation number that chooses the step, or last
  return config
