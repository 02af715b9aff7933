"""Typed options of the section `compress`."""

import dataclasses
from typing import Any

from gr2_jax.pipeline import options as options_lib

# The judge of Eq. 10, and the reference of its order.
CHOICES = {'judge': ('ranker', 'remote'), 'judge_by': ('order', 'labels')}


@dataclasses.dataclass(frozen=True)
class CompressorOptions:
  """The fields that rollouts, rule, judge and writer read."""

  slack: int  # most tokens that a line may be longer than the first
  constrained: bool  # whether only valid compressions can be sampled
  advantage: str  # one of `advantages.KINDS`
  compression_weight: float  # a of Eq. 10
  ellipsis_cost: float  # share of the reward that a truncation mark costs
  judge: str
  judge_by: str
  judge_k: int  # cut-off of the ranker's NDCG
  judge_top: int  # a solvable slate has a positive in these ranks
  eval_batch_size: int  # slates at a time

  @classmethod
  def from_config(cls, section: Any) -> 'CompressorOptions':
    """Reads and checks the section.

    Raises:
      ValueError: a field is none of its choices, or the ratios are not shares.
    """
    options = options_lib.read(cls, section)
    options_lib.check_choices(options, 'compress', CHOICES)
    ratio, ratios = section.ratio, tuple(section.ratios)
    if not all(0 < x <= 1 for x in (ratio, *ratios)):
      raise ValueError(
        f'compress.ratio={ratio}, compress.ratios={ratios}: each must be a '
        'share of the tokens, above 0 and at most 1'
      )
    if ratio > max(ratios):
      raise ValueError(
        f'compress.ratio={ratio} is larger than all compress.ratios={ratios}, '
        'so it is not learned'
      )
    return options
