"""Stage `backbone`: the vocabulary, and the model that training starts from.

It has no section of its own: `prompt` and `model` say it all.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `backbone` as the target."""
  return common.compose('backbone', arg)
