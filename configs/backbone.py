"""Stage `backbone`: the vocabulary and the initial model.

It reads the sections `prompt` and `model`, and has none of its own.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `backbone` as the target."""
  return common.compose('backbone', arg)
