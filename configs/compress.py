"""Stage `compress`: contexts in a fifth of their tokens."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with long contexts by default; ends with the study."""
  long = '' if 'context=' in arg else 'context=long'
  return common.compose('compress', ','.join(filter(None, (arg, long))))


def section(test: bool = False) -> ConfigDict:
  """Section `compress`."""
  config = common.rollouts(
    test, batch_size=8, steps=80, learning_rate=1e-4, eval_every=20
  )
  config.eval_slates = 64 if test else 256  # validation slates, fixed sample
  config.eval_batch_size = 8  # slates at a time; 8 fit a CPU's cache
  config.start = 'sft'  # ranker that reads, and initial parameters: sft opd rl
  config.ratio = 0.2  # share of an average context's tokens to keep
  config.ratios = (0.05, 0.1, 0.2)  # ratios to learn
  config.slack = 1  # most tokens that a line may be longer than the first
  config.imitate = common.training(
    steps=6 if test else 150,
    batch_size=8 if test else 16,
    learning_rate=2e-3,
    eval_every=3 if test else 75,
  )  # imitation of the rule, before RL
  config.rule_slates = 8 if test else 256  # training slates that fit the rule
  config.draws = 2 if test else 8  # compressions per slate; imitates the best
  config.compression_weight = 0.2  # a of Eq. 10, weight of the tokens saved
  config.judge = 'ranker'  # judge of Eq. 10: ranker, or remote (an endpoint)
  # Reference of its order: order (its own of the full context), or labels.
  config.judge_by = 'order'
  config.judge_k = 5  # cut-off of the ranker's NDCG
  config.judge_top = 3  # a solvable slate has a positive in these ranks
  # The judge `remote`:
  config.update(common.endpoint())
  config.ellipsis_cost = 1.0  # share of the reward lost by a truncation mark
  config.train_slates = 64 if test else 0  # training slates to write; 0: all
  config.kl_weight = 0.0  # weight of the divergence from the imitation; 0: none
  config.kl_kind = 'k3'  # sampled tokens: k1 k2 k3; exact: reverse forward
  config.selection_metric = 'reward'  # validation metric that selects the step
  return config
