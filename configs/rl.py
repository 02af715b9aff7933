"""Stage `rl`: DAPO on verifiable ranking rewards. The main job."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config; evaluates once the policy is trained."""
  return common.compose('rl', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `rl`."""
  batch = 8 if test else 32
  config = common.training(
    steps=6 if test else 100,
    batch_size=batch,
    learning_rate=5e-5,
    eval_every=3 if test else 50,
  )
  config.update(common.validation(test))
  config.group_size = 4 if test else 8  # rollouts of one slate
  config.temperature = 1.0  # of the sampler and of the learner
  config.constrained = True  # permutation mask while training, as in serving
  # Groups whose rewards are all equal are replaced by fresh ones:
  config.refill_size = batch if test else batch // 4  # slates at a time
  config.refills = 4  # at most so many times a step; 0: never
  config.reward = 'auc+ndcg'  # auc, ndcg, auc+ndcg, promotion, rr, recall
  config.k = 5  # cut-off of ndcg and recall
  config.gate = 'v2'  # none, v1, v2: what a copied or invalid answer earns
  config.format_weight = 0.2  # a: reward of a valid answer
  config.order_cost = 0.0  # of answers that depend on the presentation
  config.overlong_buffer = 0  # last tokens of the budget that cost, 0: none
  config.overlong_weight = 1.0  # what the whole buffer costs
  config.judge_weight = 0.0  # of the quality of the reasoning, 0: no judge
  config.advantage = 'dapo'  # dapo, grpo, dr_grpo, rloo
  config.average = 'token'  # of token losses: token, sequence, fixed
  config.credit = 'answer'  # advantage of the whole answer, or by placement
  config.epochs = 1  # times each rollout is trained on
  config.minibatches = 1  # updates an epoch
  config.clip_low = 0.2  # how far a probability ratio may fall
  config.clip_high = 0.28  # how far it may rise
  config.importance_cap = 0.0  # truncated importance weights, 0: none
  config.kl_weight = 0.0  # of KL(policy || start), 0: no reference
  config.choose = 'n@5'  # validation metric that chooses the step, or last
  return config
