"""Stage `sft`: imitation of the teacher's reasoning and of a ranking."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `sft` as the target."""
  return common.compose('sft', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `sft`."""
  config = common.training(
    steps=10 if test else 4000,
    batch_size=16 if test else 8,
    learning_rate=2e-3,
    eval_every=5 if test else 1000,
  )
  config.update(common.validation(test))
  config.rank_by = 'readout'  # ranking to imitate: readout, or the trace's
  # Forms of the context (gr2_jax/prompts/context.py), one per batch in turn.
  # Validation uses the last one.
  config.contexts = ('full',)
  config.privileged = False  # also train on prompts that name a positive
  config.reasoning_weight = 0.2  # l_r of Eq. 3
  config.ranking_weight = 4.0  # l_o of Eq. 3
  config.listwise_weight = 1.0  # softmax loss of the read-out on the labels
  config.sharpness = 4.0  # factor on the read-out scores of the ranking
  return config
