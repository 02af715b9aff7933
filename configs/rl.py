"""Stage `rl`: DAPO on verifiable ranking rewards. The main job."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config; evaluates once the policy is trained."""
  return common.compose('rl', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `rl`."""
  config = common.training(
    steps=6 if test else 100,
    batch_size=8 if test else 32,
    learning_rate=5e-5,
    eval_every=3 if test else 50,
  )
  config.update(common.validation(test))
  config.group_size = 4 if test else 8  # rollouts of one slate
  config.temperature = 1.0  # of the sampler and of the learner
  config.constrained = True  # permutation mask while training, as in serving
  config.reward = 'auc+ndcg'  # auc, ndcg, auc+ndcg, promotion, rr, recall
  config.k = 5  # cut-off of ndcg and recall
  config.gate = 'v2'  # none, v1, v2: what a copied or invalid answer earns
  config.format_weight = 0.2  # a: reward of a valid answer
  config.advantage = 'dapo'  # dapo, grpo, dr_grpo, rloo
  config.clip_low = 0.2  # how far a probability ratio may fall
  config.clip_high = 0.28  # how far it may rise
  config.choose = 'n@5'  # validation metric that chooses the parameters
  return config
