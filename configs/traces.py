"""Stage `traces`: what a teacher says about the training slates."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `traces` as the target."""
  return common.compose('traces', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `traces`."""
  config = ConfigDict()
  config.teacher = 'heuristic'  # heuristic, policy, or http: at an endpoint
  config.slates = 0  # training slates to ask about, a random draw; 0: all
  config.kind = 'rejection'  # rejection (Eq. 2) or targeted (Eq. 1)
  config.tries = 8  # answers per slate before it is dropped
  config.believes = (  # evidence columns that the heuristic teacher reads
    'co_short',
    'directed',
    'genre',
    'text_mean',
    'popularity',
  )
  config.noise = 1.0  # standard deviation of its error, in column units
  config.temperature = 0.7  # of the answers of a policy or an endpoint
  # What the teacher `policy` is, and how it is asked:
  config.policy = ''  # finished artifact: midtrain, sft, opd or rl, of any size
  config.batch_size = 16 if test else 64  # slates asked about at once
  # What the teacher `http` is, and how it is asked:
  config.update(common.endpoint())
  config.knowledge = False  # it is told what tends to hold in any catalog (KP)
  config.words = 80  # of reasoning that it is asked for, at most
  # Who marks the reasoning, over HTTP; either teacher's:
  config.judged = 0  # traces that are marked, a random draw; 0: no judge
  config.judge_endpoint = ''  # as endpoint; empty: that one, with its key
  config.judge_model = ''  # empty: that of the teacher
  config.judge_key_variable = ''  # as key_variable, for judge_endpoint
  return config
