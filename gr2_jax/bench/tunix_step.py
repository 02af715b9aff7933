"""A step of google-tunix's GRPO, timed by phase.

It calls the public parts of tunix's learner in the learner's order. The library
is an extra, so it is imported inside the function.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax import bench
from gr2_jax.bench import own_step
from gr2_jax.models import transformer
from gr2_jax.train import learner


def make_step(
  model: transformer.TransformerConfig, size: own_step.Size, params: Any
) -> tuple[own_step.Step, own_step.Score, int]:
  """google-tunix's step, its reference's score, and its parameter count.

  The model is Qwen3 with the vanilla sampler. Actor and rollout share weights,
  there is one micro-batch, prompts have the static length, log-probabilities of
  the sampler are not computed again, and there are no logs or checkpoints.

  Args:
    model: the decoder's shape.
    size: of a step.
    params: unboxed parameters of ours, to start from.

  Raises:
    ImportError: google-tunix is not installed.
  """
  try:
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import algo_core, rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout
  except ImportError as e:
    raise bench.missing(e) from e

  def decoder():
    decoder = qwen3.Qwen3(
      qwen3.ModelConfig(
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        embed_dim=model.d_model,
        hidden_dim=model.d_ff,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        num_kv_heads=model.num_kv_heads,
        rope_theta=int(model.rope_base),
        norm_eps=model.norm_eps,
        use_tied_embedding=model.tie_embeddings,
      ),
      rngs=nnx.Rngs(0),
    )
    _copy_params(params, decoder)
    return decoder

  actor = decoder()
  count = sum(x.size for x in jax.tree.leaves(nnx.state(actor, nnx.Param)))
  tokenizer = _Ids(model.vocab_size)
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:1]).reshape(1, 1), ('fsdp', 'tp')
  )
  role = rl_cluster.Role
  cluster = rl_cluster.RLCluster(
    actor=actor,
    reference=decoder(),
    tokenizer=tokenizer,
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys(
        (role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh
      ),
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=learner.make_optimizer(own_step.OPTIMIZER),
        eval_every_n_steps=1_000_000,
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=size.completion,
        max_prompt_length=size.prompt,
        kv_cache_size=size.prompt + size.completion,
        temperature=1.0,
        top_p=1.0,
      ),
    ),
  )
  grpo = grpo_learner.GRPOLearner(
    rl_cluster=cluster,
    algo_config=grpo_learner.GRPOConfig(
      num_generations=size.group, beta=own_step.KL_WEIGHT, epsilon=own_step.CLIP
    ),
    reward_fns=lambda prompts, completions, **_: [
      float(own_step.parity_reward(int(x))) for x in completions
    ],
  )
  pad, eos = cluster.rollout.pad_id(), cluster.rollout.eos_id()

  def step(index: int, prompts: np.ndarray) -> dict[str, float]:
    del index  # tunix's sampler has one key for all its calls.
    clock = own_step.Clock()
    tokenizer.prompts = prompts.tolist()
    texts = [str(i) for i in range(size.prompts) for _ in range(size.group)]
    rollouts = cluster.generate(texts)
    prompt_ids = jnp.array(rollouts.left_padded_prompt_tokens)
    tokens = jnp.array(np.stack(rollouts.tokens))
    clock.end('rollout', (prompt_ids, tokens))
    reference = cluster.get_ref_per_token_logps(prompt_ids, tokens, pad, eos)
    clock.end('reference', reference)
    rewards = grpo.reward_manager(prompts=texts, completions=rollouts.text)
    advantage = algo_core.compute_advantages(rewards['rewards'], size.group)
    clock.end('reward', advantage)
    example = grpo_learner.TrainExample(
      prompt_ids=prompt_ids,
      prompt_mask=prompt_ids != pad,
      completion_ids=tokens,
      completion_mask=tokens != pad,
      ref_per_token_logps=reference,
      advantages=jnp.asarray(advantage),
      old_per_token_logps=None,
    )
    cluster.update_actor([example], None)
    if grpo.should_sync_weights:
      cluster.sync_weights()
    clock.end('update', nnx.state(cluster.actor_trainer.model))
    own_step.check_drawn(np.array([len(x) for x in rollouts.tokens]), size)
    return clock.seconds

  def reference_logp(prompts, tokens):
    logps = cluster.get_ref_per_token_logps(
      jnp.asarray(np.repeat(prompts, size.group, 0)),
      jnp.asarray(tokens.reshape(-1, size.completion)),
      pad,
      eos,
    )
    return np.asarray(logps).reshape(tokens.shape)

  return step, reference_logp, count


class _Ids:
  """A tokenizer whose text is the number of a prompt, or one id.

  End and padding are the first two ids beyond the vocabulary: none is drawn.
  """

  def __init__(self, vocab_size: int):
    self.prompts: list[list[int]] = []
    self._vocab_size = vocab_size

  def encode(self, text: str) -> list[int]:
    return self.prompts[int(text)]

  def decode(self, ids: list[int]) -> str:
    return str(ids[0])

  def bos_id(self) -> int:
    return 0  # tunix reads 0 as none.

  def eos_id(self) -> int:
    return self._vocab_size

  def pad_id(self) -> int:
    return self._vocab_size + 1


def _copy_params(params: Any, decoder: Any) -> None:
  """Copies our parameters into tunix's Qwen3."""
  decoder.embedder.input_embedding.value = jnp.copy(params['embedding'])
  decoder.final_norm.w.value = jnp.copy(params['final_norm']['scale'])
  for i, layer in enumerate(decoder.layers):
    x = jax.tree.map(lambda x, i=i: x[i], params['layers'])
    attention = x['attention']
    layer.input_layernorm.w.value = x['attention_norm']['scale']
    layer.attn.q_proj.w.value = attention['query']
    layer.attn.k_proj.w.value = attention['key']
    layer.attn.v_proj.w.value = attention['value']
    layer.attn.o_proj.w.value = attention['out']
    layer.attn.q_norm.w.value = attention['query_norm']['scale']
    layer.attn.k_norm.w.value = attention['key_norm']['scale']
    layer.post_attention_layernorm.w.value = x['mlp_norm']['scale']
    layer.mlp.gate_proj.kernel.value = x['gate']
    layer.mlp.up_proj.kernel.value = x['up']
    layer.mlp.down_proj.kernel.value = x['down']
