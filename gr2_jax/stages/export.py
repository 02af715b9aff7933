"""Export: the policy as a folder that transformers and vLLM serve.

  checkpoint/   weights (adapters are joined already), config.json,
    generation_config.json, tokenizer with all symbols, chat template if any
  grammars/     N.ebnf: what may be written of a slate of N candidates, as
    `ebnf.ranking` has it; the mask of a constrained sampler, for a server
  sids.jsonl    item_id, and sid: its semantic ID as the tokenizer shows it
  example.json  the first test slate, to check a server against:
    item_ids: the candidates as shown; the answer's <slot3> is item_ids[3]
    prompt: ids, text, and whether the tokenizer makes these ids of this text
    max_tokens: room for a completion
    continuation: what the policy writes greedily, with each token's
      log-probability: what a server must give
    answer: the same under the permutation mask, as stage `rerank` has it, and
      a server under the grammar of so many candidates
  Both completions have ids, text, verdict and ranking (item ids, best first;
  the incoming order where the verdict is not `valid`).

Everything appears whole or not at all, the checkpoint last.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gr2_jax import hf
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

# Type of the weights -> of the activations that go with them.
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}

_LOOKED_AT = 256  # Test prompts whose text is read back.


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Writes the checkpoint, its grammars, the semantic IDs and the example.

  Args:
    config: sections prompt, model, mesh, export.
    inputs: slates, tokenizer, backbone, and the stage named by `export.start`.
    workdir: of this stage; gets CHECKPOINT, GRAMMARS, SIDS and EXAMPLE.

  Returns:
    What the checkpoint is, its size, up to how many candidates the grammars let
    nothing but permutations through, whether example and grammars reason, and
    the share of test prompts that the tokenizer reads back from their text.

  Raises:
    ModuleNotFoundError: the extra `hf` is not installed.
    ValueError: no such dtype.
  """
  stage = config.export
  if stage.dtype not in DTYPES:
    raise ValueError(
      f'export.dtype={stage.dtype!r}: must be one of {", ".join(DTYPES)}'
    )
  form = policy.form_of(inputs[stage.start], own=False)
  thinking = _thinks(stage, inputs[stage.start])
  setup = policy.load(config, inputs, *form)
  model = dataclasses.replace(setup.model, dtype=DTYPES[stage.dtype])
  setup = dataclasses.replace(setup, model=model)
  files = _tokenizer_files(setup.vocabulary, inputs['backbone'])
  test = slates_lib.source(inputs['slates'], 'test')
  prompts = _prompts(setup, thinking, config.prompt.order, test)
  tokenizer = _Shown(files['tokenizer_json'])

  # Grammars, items and example.
  sampler = setup.sampling(1, thinking, 0.0, constrained=True)
  (workdir / GRAMMARS).mkdir(exist_ok=True)
  for count in range(1, setup.grammar.num_candidates + 1):
    text = ebnf.ranking(setup.grammar, count, sampler)
    _write(workdir / GRAMMARS / f'{count}.ebnf', text)
  _write(workdir / SIDS, ''.join(_sids(setup, tokenizer)))
  params = setup.load_params(inputs[config.export.start])
  example = _example(setup, thinking, params, tokenizer, test[0], prompts[0])
  _write(workdir / EXAMPLE, json.dumps(example, indent=2, ensure_ascii=False))

  # Checkpoint.
  folder = workdir / CHECKPOINT
  for torn in workdir.glob(f'.{CHECKPOINT}.*'):
    shutil.rmtree(torn)
  family = 'qwen3' if model.qk_norm else 'llama'
  longest = _max_positions(config, setup)
  if not folder.exists():
    hf.export(
      folder,
      family,
      params,
      model,
      max_positions=longest,
      dtype=stage.dtype,
      max_shard_bytes=stage.max_shard_bytes,
      **files,
    )
  exact = [tokenizer.is_exact(_ids(prompt)) for prompt in prompts]
  return {
    'family': family,
    'dtype': stage.dtype,
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
    'bytes': sum(file.stat().st_size for file in folder.iterdir()),
    'weight_files': len(list(folder.glob('model*.safetensors'))),
    'vocabulary': len(setup.vocabulary),
    'max_positions': longest,
    'items': len(setup.catalog),
    'thinking': thinking,
    'permutations_up_to': min(setup.grammar.num_candidates, ebnf.MOST),
    'example_verdict': example['continuation']['verdict'],
    'prompts_exact_as_text': float(np.mean(exact)),
  }


def _thinks(stage, start: pathlib.Path) -> bool:
  """Whether answers reason: as `export` says, or as the policy was trained."""
  if stage.thinking is not None:
    return stage.thinking
  found = artifacts.read_run(start)
  return found['config'][found['stage']].get('thinking', True)


class _Shown:
  """The exported tokenizer, special tokens and symbols shown as text."""

  def __init__(self, tokenizer_json: str):
    import tokenizers  # Of the extra `hf`.

    self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)

  def text(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def is_exact(self, ids: list[int]) -> bool:
    """Whether the text of ids becomes these ids."""
    text = self.text(ids)
    return self._tokenizer.encode(text, add_special_tokens=False).ids == ids


def _tokenizer_files(
  words: vocabulary.Vocabulary, home: pathlib.Path
) -> dict[str, str | None]:
  """Tokenizer, chat template and special tokens, as `hf.export` takes them."""
  pieces = words.pieces
  if isinstance(pieces, vocabulary.PretrainedPieces):
    return {
      'tokenizer_json': pieces.json,
      'chat_template': pieces.chat_template,
      **pieces.names,
    }
  model = vocabulary.find(home).read_bytes()
  return {
    'tokenizer_json': unigram.tokenizer_json(model),
    'bos_token': '<s>',
    'eos_token': '</s>',
    'pad_token': '<pad>',
  }


def _max_positions(config, setup: policy.Setup) -> int:
  """The longest context: the pretrained model's; else prompt and completion."""
  own = setup.prompter.prompt_tokens + setup.prompter.thinking_tokens
  if not config.model.source:
    return own
  base = hf.open_backbone(config.model.source)
  ours = config.model.rope_scaling and not base.fields['rope_scaling']
  stretch = config.model.rope_factor if ours else 1.0
  return max(own, int(base.max_positions * stretch))


def _sids(setup: policy.Setup, tokenizer: _Shown) -> Iterator[str]:
  """Lines of SIDS, in the order of the catalog."""
  sids = setup.prompter.items['sid']
  for item, ids in zip(setup.catalog.item_ids, sids, strict=True):
    row = {'item_id': item, 'sid': tokenizer.text(list(ids))}
    yield json.dumps(row, ensure_ascii=False) + '\n'


def _prompts(
  setup: policy.Setup, thinking: bool, order: str, slates
) -> list[dict[str, Any]]:
  """The first test slates as `rerank` would ask for them, in batches of one."""
  control = '<think>' if thinking else '<answer>'
  render = examples.requests(setup.prompter, control, order)
  few = [slates[i] for i in range(min(len(slates), _LOOKED_AT))]
  return [batch for _, batch in examples.in_order(few, render, 1, seed=0)]


def _ids(prompt: dict[str, np.ndarray]) -> list[int]:
  return prompt['prompt'][0, : prompt['prompt_length'][0]].tolist()


_sample = jax.jit(sampling.sample, static_argnums=(0, 6, 7))


def _example(
  setup: policy.Setup,
  thinking: bool,
  params: Any,
  tokenizer: _Shown,
  slate: dict[str, np.ndarray],
  prompt: dict[str, np.ndarray],
) -> dict[str, Any]:
  """EXAMPLE's content."""
  count = int(slate['count'])
  shown = slate['candidates'][prompt['incoming'][0, :count]]
  names = [setup.catalog.item_ids[item] for item in shown]
  asked = {
    name: np.repeat(prompt[name], setup.mesh.size, 0)
    for name in ('prompt', 'prompt_length', 'count', 'incoming')
  }
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
    sampler = setup.sampling(1, thinking, 0.0, constrained)
    with (
      sharding.activate(setup.mesh),
      jax.default_matmul_precision('float32'),
    ):
      batch = sharding.shard_batch(asked, setup.mesh)
      found = _sample(
        setup.model,
        params,
        batch['prompt'],
        batch['prompt_length'],
        batch['count'],
        jax.random.key(0),
        setup.grammar,
        sampler,
      )
      read = sampling.parse(
        setup.grammar,
        sampler,
        found.tokens[:, 0],
        found.length[:, 0],
        batch['count'],
        batch['incoming'],
      )
    written = int(found.length[0, 0])
    tokens = np.asarray(found.tokens)[0, 0, :written].tolist()
    example['max_tokens'] = sampler.max_tokens
    example[kind] = {
      'ids': tokens,
      'text': tokenizer.text(tokens),
      'verdict': parsing.VERDICTS[int(read.verdict[0])],
      'ranking': [names[i] for i in np.asarray(read.ranking)[0, :count]],
    }
    if not constrained:
      logp = np.asarray(found.logp)[0, 0, :written]
      example[kind]['logp'] = [round(x, 6) for x in logp.tolist()]
  return example


def _write(path: pathlib.Path, text: str) -> None:
  """Writes a file that appears whole or not at all."""
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
