"""A step of RL in this library, timed by phase.

Also what any other side of the comparison must share with it: the size of a
step, the clock, the reward, and the optimizer's numbers.

Axes: P prompts, G group, T time.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gr2_jax.models import transformer
from gr2_jax.ops import advantages
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import sampling
from gr2_jax.train import learner, policy_gradient

PHASES = ('rollout', 'reference', 'reward', 'update')
CLIP = 0.2
KL_WEIGHT = 0.04
OPTIMIZER = ml_collections.ConfigDict(
  dict(
    steps=1000,
    learning_rate=1e-5,
    warmup=1,
    weight_decay=0.01,
    max_grad_norm=1.0,
  )
)
# `step(i, prompts)` takes int32 [P, Tp] and returns the seconds of each phase.
Step = Callable[[int, np.ndarray], dict[str, float]]
# `score(prompts, tokens)` takes int32 [P, Tp] and [P, G, T]; float32 [P, G, T].
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Size:
  """How much one step samples."""

  prompt: int  # tokens
  completion: int  # tokens
  prompts: int = 4
  group: int = 8

  @classmethod
  def parse(cls, text: str) -> 'Size':
    """Reads `192+48`.

    Raises:
      ValueError: the text is no sum of two counts.
    """
    prompt, plus, completion = text.partition('+')
    if not (plus and prompt.isdigit() and completion.isdigit()):
      raise ValueError(
        f'--sizes has {text!r}: write prompt tokens + completion tokens, as in '
        '192+48'
      )
    return cls(int(prompt), int(completion))

  def __str__(self) -> str:
    return f'{self.prompt}+{self.completion}'


class Clock:
  """Seconds of one phase after another."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last = time.perf_counter()

  def end(self, phase: str, results: Any) -> None:
    """Waits for `results`; the phase took the time since the last one."""
    jax.block_until_ready(results)
    now = time.perf_counter()
    self.seconds[phase] = now - self._last
    self._last = now


def check_drawn(lengths: np.ndarray, size: Size) -> None:
  """Both sides must draw the whole budget.

  Raises:
    RuntimeError: a completion is shorter.
  """
  if (lengths != size.completion).any():
    raise RuntimeError(
      f'a completion has {lengths.min()} tokens, not {size.completion}: the '
      'steps do not do the same work'
    )


def parity_reward(first: Any) -> Any:
  """Next to nothing to compute: 1 where the first token's id is odd."""
  return first % 2


def make_step(
  model: transformer.TransformerConfig, size: Size, params: Any
) -> tuple[Step, Score]:
  """This library's step.

  Args:
    model: the decoder's shape.
    size: of a step.
    params: unboxed parameters, to start from; the reference keeps them.

  Returns:
    The step, and the reference's score of completions.
  """
  grammar = grammar_lib.Ranking(
    slot_base=0,
    num_slots=1,
    num_candidates=1,
    think_end=model.vocab_size,  # Ids beyond the vocabulary are never drawn.
    eos=model.vocab_size,
    pad=0,
  )
  sampler = sampling.SamplingOptions(
    group=size.group, max_tokens=size.completion
  )
  optimizer = learner.make_optimizer(OPTIMIZER)
  loss = policy_gradient.make_loss(
    model,
    grammar,
    sampler,
    clip_low=CLIP,
    clip_high=CLIP,
    average='sequence',
    kl_weight=KL_WEIGHT,
  )
  update = learner.make_update(loss, optimizer)
  state = learner.TrainState(  # A copy: the update takes its state away.
    jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params)
  )
  prompt_length = jnp.full(size.prompts, size.prompt, jnp.int32)
  count = jnp.ones(size.prompts, jnp.int32)

  @jax.jit
  def roll_out(params, prompts, key):
    return sampling.sample(
      model, params, prompts, prompt_length, count, key, grammar, sampler
    )

  def as_batch(prompts, tokens, **fields):
    group = tokens.shape[:2]
    return policy_gradient.PolicyBatch(
      prompt=prompts,
      prompt_length=prompt_length,
      facts=count,
      tokens=tokens,
      length=jnp.full(group, size.completion, jnp.int32),
      use=jnp.ones(size.prompts, bool),
      **fields,
    )

  @jax.jit
  def score(params, prompts, tokens):
    batch = as_batch(prompts, tokens, logp=None, advantage=None)
    return policy_gradient.score(model, params, batch, grammar, sampler).logp

  @jax.jit
  def judge(tokens):
    reward = parity_reward(tokens[..., 0]).astype(jnp.float32)
    return advantages.group_advantage(reward, kind='grpo')

  def step(index: int, prompts: np.ndarray) -> dict[str, float]:
    nonlocal state
    clock = Clock()
    prompts = jnp.asarray(prompts)
    rollouts = roll_out(state.params, prompts, jax.random.key(index))
    clock.end('rollout', rollouts)
    reference = score(params, prompts, rollouts.tokens)
    clock.end('reference', reference)
    advantage = judge(rollouts.tokens)
    clock.end('reward', advantage)
    batch = as_batch(
      prompts,
      rollouts.tokens,
      logp=rollouts.logp,
      advantage=advantage,
      teacher_logp=reference,
    )
    state, metrics = update(state, batch)
    clock.end('update', (state, metrics))
    check_drawn(np.asarray(rollouts.length), size)
    return clock.seconds

  def reference_logp(prompts, tokens):
    return np.asarray(score(params, jnp.asarray(prompts), jnp.asarray(tokens)))

  return step, reference_logp
