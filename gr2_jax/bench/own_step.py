"""A step of RL in this library, timed by phase.

Also what both sides of the comparison share: the size of a step, the clock, the
reward, and the settings of the optimizer.

Axes: P prompts, G group, T time.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.models import transformer
from gr2_jax.ops import advantages
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import sampling
from gr2_jax.train import distillation, learner, policy_gradient

PHASES = ('rollout', 'reference', 'reward', 'update')
CLIP = 0.2
KL_WEIGHT = 0.04
OPTIMIZER = learner.OptimizerOptions(
  steps=1000, learning_rate=1e-5, warmup=1, weight_decay=0.01, max_grad_norm=1.0
)
# `step(i, prompts)` takes int32 [P, Tp] and returns the seconds of each phase.
Step = Callable[[int, np.ndarray], dict[str, float]]
# `score(prompts, tokens)` takes int32 [P, Tp] and [P, G, T]; float32 [P, G, T].
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Size:
  """Sizes of a step."""

  prompt: int  # tokens
  completion: int  # tokens
  prompts: int = 4
  group: int = 8

  @classmethod
  def parse(cls, text: str) -> 'Size':
    """Reads `192+48`.

    Raises:
      ValueError: the text is not a sum of two counts.
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
  """Measures the seconds of consecutive phases."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}
    self._last = time.perf_counter()

  def end(self, phase: str, results: Any) -> None:
    """Waits for the results of a phase, and records its seconds."""
    jax.block_until_ready(results)
    now = time.perf_counter()
    self.seconds[phase] = now - self._last
    self._last = now


def check_drawn(lengths: np.ndarray, size: Size) -> None:
  """Raises RuntimeError if a completion is shorter than the budget."""
  if (lengths != size.completion).any():
    raise RuntimeError(
      f'a completion has {lengths.min()} tokens, not {size.completion}: the '
      'steps do not do the same work'
    )


def parity_reward(first: Any) -> Any:
  """A reward that costs nothing: 1 where the first token's id is odd."""
  return first % 2


def make_step(
  model: transformer.TransformerConfig, size: Size, params: Any
) -> tuple[Step, Score]:
  """This library's step, and the reference's score of completions.

  Args:
    model: the decoder's shape.
    size: of a step.
    params: unboxed; the policy starts from them, the reference keeps them.
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
    policy_gradient.PolicyGradientOptions(
      batch_size=size.prompts,
      refill_size=size.prompts,
      refills=0,
      advantage='grpo',
      clip_low=CLIP,
      clip_high=CLIP,
      average='sequence',
      epochs=1,
      minibatches=1,
      importance_cap=0.0,
      kl_weight=KL_WEIGHT,
      kl_kind='k3',
    ),
    distillation.SampledTokens(None, grammar, sampler, 'k3'),
  )
  update = learner.make_update(loss, optimizer)
  state = learner.TrainState(  # A copy: the update donates its state.
    jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params)
  )
  prompt_length = jnp.full(size.prompts, size.prompt, jnp.int32)
  count = jnp.ones(size.prompts, jnp.int32)

  @jax.jit
  def roll_out(params: Any, prompts: jax.Array, key: jax.Array):
    return sampling.sample(
      model, params, prompts, prompt_length, count, key, grammar, sampler
    )

  def as_batch(prompts: jax.Array, tokens: jax.Array, **fields: Any):
    group = tokens.shape[:2]
    return policy_gradient.PolicyBatch(
      prompt=prompts,
      prompt_length=prompt_length,
      constraint_inputs=count,
      tokens=tokens,
      length=jnp.full(group, size.completion, jnp.int32),
      use=jnp.ones(size.prompts, bool),
      **fields,
    )

  @jax.jit
  def score(params: Any, prompts: jax.Array, tokens: jax.Array) -> jax.Array:
    batch = as_batch(prompts, tokens, logp=None, advantage=None)
    return policy_gradient.score(model, params, batch, grammar, sampler).logp

  @jax.jit
  def compute_advantage(tokens: jax.Array) -> jax.Array:
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
    advantage = compute_advantage(rollouts.tokens)
    clock.end('reward', advantage)
    batch = as_batch(
      prompts,
      rollouts.tokens,
      logp=rollouts.logp,
      advantage=advantage,
      teacher_scores=distillation.SampledScores(
        reference, jnp.ones(reference.shape, bool)
      ),
    )
    state, metrics = update(state, batch)
    clock.end('update', (state, metrics))
    check_drawn(np.asarray(rollouts.length), size)
    return clock.seconds

  def reference_logp(prompts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(score(params, jnp.asarray(prompts), jnp.asarray(tokens)))

  return step, reference_logp
