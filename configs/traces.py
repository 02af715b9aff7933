"""Stage `traces`: a teacher's reasoning about the training slates."""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The whole config, with `traces` as the target."""
  return common.compose('traces', arg)


def section(test: bool = False) -> ConfigDict:
  """Section `traces`."""
  config = ConfigDict()
  config.teacher = 'heuristic'  # heuristic, policy, or http (an endpoint)
  config.slates = 0  # training slates, a random sample; 0: all
  config.kind = 'rejection'  # rejection (Eq. 2) or targeted (Eq. 1)
  config.tries = 8  # most answers per slate before it is dropped
  config.evidence_columns = (  # of the heuristic teacher
    'co_short',
    'directed',
    'genre',
    'text_mean',
    'popularity',
  )
  config.noise = 1.0  # standard deviation of that teacher's error
  config.temperature = 0.7  # sampling temperature of policy and http
  # The teacher `policy`:
  config.policy = ''  # finished artifact of midtrain, sft, opd or rl
  config.batch_size = 16 if test else 64  # slates at a time
  # The teacher `http`:
  config.update(common.endpoint())
  config.knowledge = False  # whether its prompt has general rules (KP)
  config.words = 80  # longest reasoning, in words
  # A judge over HTTP that marks the reasoning of any teacher:
  config.judged = 0  # traces to mark, a random sample; 0: no judge
  config.judge_endpoint = ''  # like endpoint; '': the teacher's, with its key
  config.judge_model = ''  # like model; '': the teacher's
  config.judge_key_variable = ''  # as key_variable, for judge_endpoint
  return config
