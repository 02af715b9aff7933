"""The same policy in `transformers`: a peer for `bench.serve`.

It shares the slates' checks, the data, the evidence and the prompts with the
policy, and loads the weights from an exported checkpoint. `generate` decodes
greedily with a key-value cache, under the mask of `grammar.Ranking`. The scores
are our read-out vector times the hidden states at the slots. Nothing is
compiled, so batches are not padded to a few sizes, and prompts only to the
longest of their batch.

Axes: B batch, T time, K candidates, V vocabulary, D model width.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from gr2_jax import hf
from gr2_jax.hf import unigram
from gr2_jax.pipeline import artifacts
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import policy as policy_lib
from gr2_jax.prompts import vocabulary
from gr2_jax.serving import reranker as reranker_lib
from gr2_jax.stages import export


class PermutationMask(transformers.LogitsProcessor):
  """Masks tokens as `grammar.Ranking.allowed` does.

  Args:
    grammar: token ids.
    count_B: int, candidates of each slate.
    begin: position of the first token of a completion.
    budget: tokens of a completion.
    thinking: whether it begins with reasoning.
  """

  def __init__(
    self,
    grammar: grammar_lib.Ranking,
    count_B: torch.Tensor,
    begin: int,
    budget: int,
    thinking: bool,
  ):
    self._grammar, self._count = grammar, count_B
    self._begin, self._budget, self._thinking = begin, budget, thinking

  def __call__(
    self, input_ids: torch.Tensor, scores: torch.Tensor
  ) -> torch.Tensor:
    """Sets the logits [B, V] of forbidden tokens to -inf, for ids [B, T]."""
    g, K = self._grammar, self._grammar.num_candidates
    written = input_ids[:, self._begin :]
    # Slots named in the reasoning do not count as listed.
    answering = (written == g.think_end).cumsum(1) > 0
    if not self._thinking:
      answering = torch.ones_like(answering)
    slot = written - g.slot_base
    listed = answering & (slot >= 0) & (slot < K)
    place = torch.where(listed, slot, K)
    left = torch.arange(K) < self._count[:, None]
    left &= ~torch.nn.functional.one_hot(place, K + 1).any(1)[:, :K]
    allowed = torch.zeros_like(scores, dtype=torch.bool)
    allowed[:, g.slot_base : g.slot_base + K] = left
    allowed[:, g.eos] = ~left.any(1)
    if self._thinking:
      room = self._budget - written.shape[1]
      text = torch.zeros_like(allowed)
      closes = room <= self._count + 2
      text[~closes] = True
      text[:, [g.eos, g.pad]] = False
      text[closes, g.think_end] = True
      allowed = torch.where(answering.any(1, keepdim=True), allowed, text)
    return scores.masked_fill(~allowed, -torch.inf)


def beside(
  policy: reranker_lib.Reranker, modes: Sequence[str], largest_batch: int
) -> reranker_lib.Reranker:
  """Replaces the policy's programs by those of `transformers`.

  Args:
    policy: a re-ranker, with or without programs.
    modes: of `ranking.MODES`.
    largest_batch: slates at a time.

  Returns:
    A re-ranker whose params are the model and the read-out vector.

  Raises:
    ValueError: prompts have memory tokens, which `transformers` cannot mask.
  """
  spec = policy.policy.spec
  if spec.prompter.context.memory:
    raise ValueError(
      f'{policy.artifact}: this policy reads histories through memory tokens, '
      'and transformers has no mask for them: leave this peer out'
    )
  mesh = policy.policy.mesh
  devices = mesh.shape['data'] * mesh.shape['fsdp']
  return dataclasses.replace(
    policy,
    policy=policy_lib.Policy(spec, _load(policy), mesh),
    programs={
      mode: dict.fromkeys(
        range(devices, largest_batch + 1, devices),
        functools.partial(_answer, spec, mode),
      )
      for mode in modes
    },
  )


def _load(
  policy: reranker_lib.Reranker,
) -> tuple[transformers.PreTrainedModel, torch.Tensor]:
  """The model and the read-out vector [D], from an exported checkpoint."""
  spec, params = policy.policy.spec, policy.policy.params
  pieces = spec.vocabulary.pieces
  if isinstance(pieces, vocabulary.PretrainedPieces):
    tokenizer_json = pieces.json
  else:
    inputs = artifacts.read_run(policy.artifact)['inputs']
    home = policy.artifact.parent / inputs['backbone']
    tokenizer_json = unigram.tokenizer_json(vocabulary.find(home).read_bytes())
  dtypes = {dtype: name for name, dtype in export.DTYPES.items()}
  prompter = spec.prompter
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root, export.CHECKPOINT)
    hf.export(
      folder,
      'qwen3' if spec.model.qk_norm else 'llama',
      params,
      spec.model,
      tokenizer_json,
      max_positions=prompter.prompt_tokens + prompter.thinking_tokens,
      dtype=dtypes[spec.model.dtype],
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=getattr(torch, spec.model.dtype)
    )
  return model.eval(), torch.tensor(np.asarray(params['readout']))


@torch.inference_mode()
def _answer(
  spec: policy_lib.PolicySpec, mode: str, params: Any, batch: Any
) -> dict[str, np.ndarray]:
  """A program of `Reranker`: rows of a batch -> fields of `Ranked`."""
  model, readout_D = params
  host = {name: np.asarray(values) for name, values in batch.items()}
  incoming, count, slots = host['incoming'], host['count'], host['slots']
  length = host['prompt_length']
  width = int(length.max())
  prompts = host['prompt'][:, :width].astype(np.int64)
  if mode == 'score':
    # The padding comes last, so nothing reads it.
    hidden = model.model(torch.tensor(prompts), use_cache=False)[0]
  else:
    # Completions follow the last column, so the padding comes first.
    pad = width - length
    prompts = np.stack(
      [np.roll(*row) for row in zip(prompts, pad, strict=True)]
    )
    slots = slots + pad[:, None]
    hidden, tokens = _generate(
      spec, mode == 'reason', model, prompts, pad, count
    )
  at_slots = hidden[torch.arange(len(slots))[:, None], torch.tensor(slots)]
  scores = (at_slots.float() @ readout_D).numpy()
  real = np.arange(scores.shape[1]) < count[:, None]
  falling = np.argsort(np.where(real, -scores, np.inf), -1, 'stable')
  ranked = dict(
    readout=np.take_along_axis(incoming, falling, -1),
    scores=np.take_along_axis(scores, np.argsort(incoming, -1), -1),
    presented=incoming,
    count=count,
    verdict=np.zeros_like(count),  # `valid`, because of the mask.
  )
  if mode == 'score':
    return ranked | dict(
      generated=ranked['readout'],
      tokens=np.zeros((len(count), 1), np.int32),
      length=np.zeros_like(count),
    )
  grammar = spec.grammar
  written = np.argmax(tokens == grammar.eos, -1) + 1
  order = np.tile(np.arange(scores.shape[1]), (len(count), 1))
  for row, (end, n) in enumerate(zip(written - 1, count, strict=True)):
    order[row, :n] = tokens[row, end - n : end] - grammar.slot_base
  return ranked | dict(
    generated=np.take_along_axis(incoming, order, -1),
    tokens=tokens,
    length=written,
  )


def _generate(
  spec: policy_lib.PolicySpec,
  thinking: bool,
  model: transformers.PreTrainedModel,
  prompts_BxT: np.ndarray,
  pad_B: np.ndarray,
  count_B: np.ndarray,
) -> tuple[torch.Tensor, np.ndarray]:
  """Hidden states of left-padded prompts [B, T, D], and completions."""
  grammar, width = spec.grammar, prompts_BxT.shape[1]
  budget = spec.sampling(1, thinking, 0.0, True).max_tokens
  seen = []
  hook = model.model.norm.register_forward_hook(
    lambda unused_module, unused_inputs, hidden: seen.append(hidden)
  )
  try:
    tokens = model.generate(
      torch.tensor(prompts_BxT),
      attention_mask=torch.tensor(np.arange(width) >= pad_B[:, None]),
      logits_processor=[
        PermutationMask(
          grammar,
          torch.tensor(count_B),
          width,
          budget,
          thinking,
        )
      ],
      max_new_tokens=budget,
      do_sample=False,
      eos_token_id=grammar.eos,
      pad_token_id=grammar.pad,
    )
  finally:
    hook.remove()
  return seen[0], tokens[:, width:].numpy()
