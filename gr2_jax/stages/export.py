"""Export: the policy as a folder that transformers and vLLM serve.

  checkpoint/   weights with joined adapters, config.json,
    generation_config.json, tokenizer with all symbols, chat template if any
  grammars/     N.ebnf: the answers allowed for a slate of N candidates (see
    `ebnf.ranking`), with which a server constrains its sampler
  sids.jsonl    item_id, and sid: its semantic ID as the tokenizer shows it
  example.json  the first test slate, to check a server with:
    item_ids: the candidates as shown; the answer's <slot3> is item_ids[3]
    prompt: ids, text, and whether the tokenizer maps this text to these ids
    max_tokens: room for a completion
    continuation: the policy's greedy completion, with each token's
      log-probability, which a server must reproduce
    answer: the completion under the permutation mask, which a server must
      reproduce under the grammar of that many candidates
  Both completions have ids, text, verdict and ranking (item ids, best first;
  the incoming order if the verdict is not `valid`).

Each file is written atomically, the checkpoint last.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gr2_jax import hf
from gr2_jax.data import files
from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.hf import unigram
from gr2_jax.ops import parsing
from gr2_jax.pipeline import artifacts
from gr2_jax.policy import ebnf, policy, sampling
from gr2_jax.prompts import examples, vocabulary

CHECKPOINT = 'checkpoint'
GRAMMARS = 'grammars'
SIDS = 'sids.jsonl'
EXAMPLE = 'example.json'

# Type of the weights -> type of the activations.
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}

_READ_BACK = 256  # Test prompts whose text is mapped back to ids.


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Writes the checkpoint, its grammars, the semantic IDs and the example.

  Returns:
    Properties of the checkpoint; `permutations_up_to`, the number of candidates
    up to which the grammars allow only permutations; and
    `prompts_exact_as_text`, the share of test prompts whose text the tokenizer
    maps back to their ids.

  Raises:
    ModuleNotFoundError: the extra `hf` is not installed.
    ValueError: the dtype is unknown.
  """
  stage = config.export
  if stage.dtype not in DTYPES:
    raise ValueError(
      f'export.dtype={stage.dtype!r}: must be one of {", ".join(DTYPES)}'
    )
  form = policy.form_of(inputs[stage.start], own_slates=False)
  thinking = _thinks(stage, inputs[stage.start])
  spec, mesh = policy.load_with_mesh(config, inputs, *form)
  model = dataclasses.replace(spec.model, dtype=DTYPES[stage.dtype])
  spec = dataclasses.replace(spec, model=model)
  tokenizer_files = _tokenizer_files(spec.vocabulary, inputs['backbone'])
  test = slates_lib.SlateSource(inputs['slates'], 'test')
  prompts = _prompts(spec, thinking, config.prompt.order, test)
  tokenizer = _Tokenizer(tokenizer_files['tokenizer_json'])

  # Grammars, items and example.
  sampler = spec.sampling(1, thinking, 0.0, constrained=True)
  (workdir / GRAMMARS).mkdir(exist_ok=True)
  for count in range(1, spec.grammar.num_candidates + 1):
    text = ebnf.ranking(spec.grammar, count, sampler)
    with files.atomic_write(workdir / GRAMMARS / f'{count}.ebnf') as file:
      file.write(text)
  sids = zip(spec.catalog.item_ids, spec.prompter.items['sid'], strict=True)
  with files.atomic_write(workdir / SIDS) as file:
    for item, ids in sids:
      row = {'item_id': item, 'sid': tokenizer.text(list(ids))}
      file.write(json.dumps(row, ensure_ascii=False) + '\n')
  params = spec.load_params(inputs[stage.start], mesh)
  ranker = policy.Policy(spec, params, mesh)
  example = _example(ranker, thinking, tokenizer, test[0], prompts[0])
  with files.atomic_write(workdir / EXAMPLE) as file:
    json.dump(example, file, indent=2, ensure_ascii=False)

  # Checkpoint.
  folder = workdir / CHECKPOINT
  for partial in workdir.glob(f'.{CHECKPOINT}.*'):
    shutil.rmtree(partial)
  family = 'qwen3' if model.qk_norm else 'llama'
  longest = _max_positions(config, spec)
  if not folder.exists():
    hf.export(
      folder,
      family,
      params,
      model,
      max_positions=longest,
      dtype=stage.dtype,
      max_shard_bytes=stage.max_shard_bytes,
      **tokenizer_files,
    )
  exact = [tokenizer.is_exact(_ids(prompt)) for prompt in prompts]
  return {
    'family': family,
    'dtype': stage.dtype,
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
    'bytes': sum(file.stat().st_size for file in folder.iterdir()),
    'weight_files': len(list(folder.glob('model*.safetensors'))),
    'vocabulary': len(spec.vocabulary),
    'max_positions': longest,
    'items': len(spec.catalog),
    'thinking': thinking,
    'permutations_up_to': min(spec.grammar.num_candidates, ebnf.MOST),
    'example_verdict': example['continuation']['verdict'],
    'prompts_exact_as_text': float(np.mean(exact)),
  }


def _thinks(stage: ConfigDict, start: pathlib.Path) -> bool:
  """Whether answers reason: `export.thinking`, else as in training."""
  if stage.thinking is not None:
    return stage.thinking
  run = artifacts.read_run(start)
  return run['config'][run['stage']].get('thinking', True)


class _Tokenizer:
  """The exported tokenizer; it shows special tokens and symbols as text."""

  def __init__(self, tokenizer_json: str):
    import tokenizers  # Needs the extra `hf`.

    self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)

  def text(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def is_exact(self, ids: list[int]) -> bool:
    """Whether the tokenizer maps the text of ids back to these ids."""
    text = self.text(ids)
    return self._tokenizer.encode(text, add_special_tokens=False).ids == ids


def _tokenizer_files(
  words: vocabulary.Vocabulary, home: pathlib.Path
) -> dict[str, str | None]:
  """Tokenizer, chat template and special tokens: arguments of `hf.export`."""
  pieces = words.pieces
  if isinstance(pieces, vocabulary.PretrainedPieces):
    return dict(
      tokenizer_json=pieces.json,
      chat_template=pieces.chat_template,
      **pieces.names,
    )
  model = vocabulary.find(home).read_bytes()
  names = dict(bos_token='<s>', eos_token='</s>', pad_token='<pad>')
  return dict(tokenizer_json=unigram.tokenizer_json(model), **names)


def _max_positions(config: ConfigDict, spec: policy.PolicySpec) -> int:
  """The longest context: the pretrained model's, or prompt and completion."""
  needed = spec.prompter.prompt_tokens + spec.prompter.thinking_tokens
  if not config.model.source:
    return needed
  base = hf.open_backbone(config.model.source)
  stretched = config.model.rope_scaling and not base.fields['rope_scaling']
  factor = config.model.rope_factor if stretched else 1.0
  return max(needed, int(base.max_positions * factor))


def _prompts(
  spec: policy.PolicySpec, thinking: bool, order: str, slates: Any
) -> list[dict[str, Any]]:
  """The first test slates as prompts of `rerank`, in batches of one."""
  control = '<think>' if thinking else '<answer>'
  render = examples.generation_rows(spec.prompter, control, order)
  first = [slates[i] for i in range(min(len(slates), _READ_BACK))]
  return [batch for _, batch in examples.in_order(first, render, 1, seed=0)]


def _ids(prompt: dict[str, np.ndarray]) -> list[int]:
  return prompt['prompt'][0, : prompt['prompt_length'][0]].tolist()


_sample = jax.jit(sampling.sample, static_argnums=(0, 6, 7))


def _example(
  ranker: policy.Policy,
  thinking: bool,
  tokenizer: _Tokenizer,
  slate: dict[str, np.ndarray],
  prompt: dict[str, np.ndarray],
) -> dict[str, Any]:
  """The content of EXAMPLE, by greedy sampling with and without the mask."""
  spec, mesh = ranker.spec, ranker.mesh
  count = int(slate['count'])
  shown = slate['candidates'][prompt['incoming'][0, :count]]
  names = [spec.catalog.item_ids[item] for item in shown]
  fields = ('prompt', 'prompt_length', 'count', 'incoming')
  rows = {name: np.repeat(prompt[name], mesh.size, 0) for name in fields}
  ids = _ids(prompt)
  example = {
    'item_ids': names,
    'prompt': {
      'ids': ids,
      'text': tokenizer.text(ids),
      'text_is_exact': tokenizer.is_exact(ids),
    },
  }
  for kind, constrained in (('continuation', False), ('answer', True)):
    sampler = spec.sampling(1, thinking, 0.0, constrained)
    with sharding.activate(mesh), jax.default_matmul_precision('float32'):
      batch = sharding.shard_batch(rows, mesh)
      drawn = _sample(
        spec.model,
        ranker.params,
        batch['prompt'],
        batch['prompt_length'],
        batch['count'],
        jax.random.key(0),
        spec.grammar,
        sampler,
      )
      answer = sampling.parse(
        spec.grammar,
        sampler,
        drawn.tokens[:, 0],
        drawn.length[:, 0],
        batch['count'],
        batch['incoming'],
      )
    length = int(drawn.length[0, 0])
    tokens = np.asarray(drawn.tokens)[0, 0, :length].tolist()
    example['max_tokens'] = sampler.max_tokens
    example[kind] = {
      'ids': tokens,
      'text': tokenizer.text(tokens),
      'verdict': parsing.VERDICTS[int(answer.verdict[0])],
      'ranking': [names[i] for i in np.asarray(answer.ranking)[0, :count]],
    }
    if not constrained:
      logp = np.asarray(drawn.logp)[0, 0, :length]
      example[kind]['logp'] = [round(x, 6) for x in logp.tolist()]
  return example
