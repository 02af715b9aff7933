"""Exports served by `transformers`, beside the policy itself."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr2_jax import hf
from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.pipeline import artifacts
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import policy, ranking
from gr2_jax.stages import backbone, export, midtrain

from .. import tiny_pretrained, tiny_world

pytestmark = pytest.mark.slow

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
xgrammar = pytest.importorskip('xgrammar')
xgrammar_hf = pytest.importorskip('xgrammar.contrib.hf')

_ROOT = pathlib.Path(__file__).parent.parent.parent
POLICIES = ('scratch', 'llama', 'qwen3')


def pretrained(root, world, family):
  """Config and artifacts of a policy that began as a pretrained model."""
  tie = family == 'qwen3'
  tiny_pretrained.write(root / 'weights', family, tie_embeddings=tie)
  own = tiny_world.config(
    model__source=str(root / 'weights'),
    model__qk_norm=family == 'qwen3',
    model__tie_embeddings=tie,
    model__lora_rank=2 if family == 'qwen3' else 0,
    prompt__fields=('sid', 'title', 'evidence'),
    prompt__history_fields=('sid', 'title'),
    midtrain__steps=2,
    midtrain__learning_rate=0.1,
  )
  found = world | {'backbone': root / 'backbone', 'rl': root / 'backbone'}
  found['backbone'].mkdir()
  backbone.run(own, tiny_world.inputs(found, 'backbone'), found['backbone'])
  if own.model.lora_rank:
    found['rl'] = root / 'midtrain'  # A stage that trains adapters.
    found['rl'].mkdir()
    midtrain.run(own, tiny_world.inputs(found, 'midtrain'), found['rl'])
  tiny_world.finish(found['rl'], 'rl')
  return own, found


def trained_to(folder, stage, thinking):
  """Makes a folder look as if that stage had trained it to answer so."""
  tiny_world.finish(folder, stage)
  run = json.loads((folder / 'config.json').read_text())
  run['config'][stage]['thinking'] = thinking
  (folder / 'config.json').write_text(json.dumps(run))


def run(own, found, workdir):
  workdir.mkdir(exist_ok=True)
  names = ('slates', 'tokenizer', 'backbone', own.export.start)
  return export.run(own, {name: found[name] for name in names}, workdir)


@pytest.fixture(scope='module', params=POLICIES)
def exported(request, world, tmp_path_factory):
  """A finished export, read back, and the policy that it is of."""
  root = tmp_path_factory.mktemp(request.param)
  own, found = tiny_world.config(), world
  if request.param != 'scratch':
    own, found = pretrained(root, world, request.param)
  results = run(own, found, root / 'export')
  spec = tiny_world.spec(found, own)
  folder = root / 'export' / export.CHECKPOINT
  return types.SimpleNamespace(
    name=request.param,
    config=own,
    found=found,
    workdir=root / 'export',
    folder=folder,
    results=results,
    spec=spec,
    params=spec.load_params(found['rl'], tiny_world.mesh()),
    example=json.loads((root / 'export' / export.EXAMPLE).read_text()),
    theirs=transformers.AutoModelForCausalLM.from_pretrained(folder),
    tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
  )


def their_logits(model, ids):
  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0].float().numpy()


def encode(tokenizer, text):
  return tokenizer(text, add_special_tokens=False).input_ids


def test_transformers_has_the_logits_of_the_policy(exported):
  ids = exported.example['prompt']['ids']
  spec, params = exported.spec, exported.params
  with sharding.activate(tiny_world.mesh()):
    hidden, _ = transformer.encode_prompt(
      spec.model, params, np.array([ids]), np.array([len(ids)])
    )
  ours = hidden[0] @ transformer.output_embedding(params).T
  wanted = their_logits(exported.theirs, ids)
  assert wanted.std() > 0.01
  np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_transformers_writes_the_continuation_of_the_example(exported):
  example = exported.example
  ids, wanted = example['prompt']['ids'], example['continuation']
  written = exported.theirs.generate(
    torch.tensor([ids]),
    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
    max_new_tokens=example['max_tokens'],
  )[0].tolist()
  assert written == ids + wanted['ids']
  logits = their_logits(exported.theirs, written)[len(ids) - 1 : -1]
  logp = torch.log_softmax(torch.tensor(logits), -1).numpy()
  logp = np.take_along_axis(logp, np.array(wanted['ids'])[:, None], 1)[:, 0]
  np.testing.assert_allclose(wanted['logp'], logp, atol=1e-4)


def test_their_tokenizer_reads_and_shows_the_example(exported):
  example, tokenizer = exported.example, exported.tokenizer
  for part in ('prompt', 'answer', 'continuation'):
    ids, text = example[part]['ids'], example[part]['text']
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
  prompt = example['prompt']
  assert prompt['text_is_exact']
  assert encode(tokenizer, prompt['text']) == prompt['ids']
  assert 0.8 < exported.results['prompts_exact_as_text'] <= 1
  words = exported.spec.vocabulary
  assert tokenizer.eos_token_id == words.eos
  assert tokenizer.pad_token_id == words.pad
  assert exported.theirs.generation_config.eos_token_id == words.eos
  assert exported.theirs.generation_config.do_sample is False


def test_the_example_has_the_answer_that_reranking_gives(exported):
  spec, example = exported.spec, exported.example
  slates = slates_lib.SlateSource(exported.found['slates'], 'test')
  ranked = ranking.rank(
    policy.Policy(spec, exported.params, tiny_world.mesh()),
    [slates[0]],
    thinking=True,
    order=exported.config.prompt.order,
    batch_size=1,
    seed=exported.config.rerank.presentation_seed,
  )
  items = slates[0]['candidates']
  names = [spec.catalog.item_ids[i] for i in items[ranked.generated[0]]]
  answer = example['answer']
  assert answer['verdict'] == 'valid'
  assert answer['ids'] == ranked.tokens[0, : ranked.length[0]].tolist()
  assert answer['ranking'] == names
  # As a server's client reads it.
  text = exported.tokenizer.decode(answer['ids'], skip_special_tokens=True)
  slots = re.findall(r'<slot(\d+)>', text.partition('</think>')[2])
  assert [example['item_ids'][int(k)] for k in slots] == names


def under(workdir, count, model, tokenizer):
  """The grammar of so many candidates, as a server compiles it."""
  text = (workdir / export.GRAMMARS / f'{count}.ebnf').read_text()
  info = xgrammar.TokenizerInfo.from_huggingface(
    tokenizer, vocab_size=model.config.vocab_size
  )
  return xgrammar.GrammarCompiler(info).compile_grammar(text)


def write_under(grammar, model, example):
  """What transformers writes."""
  prompt = torch.tensor([example['prompt']['ids']])
  return model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    max_new_tokens=example['max_tokens'],
    logits_processor=[xgrammar_hf.LogitsProcessor(grammar)],
  )[0, prompt.shape[1] :].tolist()


def test_transformers_under_the_grammar_writes_the_answer(exported):
  example, model = exported.example, exported.theirs
  grammar = under(exported.workdir, 5, model, exported.tokenizer)
  found = write_under(grammar, model, example)
  assert found == example['answer']['ids']
  assert found != example['continuation']['ids']


@pytest.mark.parametrize('count', [3, 5])
def test_xgrammar_masks_every_token_as_the_policys_sampler(exported, count):
  grammar = exported.spec.grammar
  slots = [grammar.slot_base + k for k in reversed(range(count))]
  budget = exported.example['max_tokens']
  thought = [exported.spec.vocabulary.encode('so')[0], slots[0]]
  reasoning = (thought * budget)[: budget - count - 2]
  tokens = jnp.array([[*reasoning, grammar.think_end, *slots, grammar.eos]])
  facts = jnp.array([count])
  ours = grammar.allowed(
    facts,
    grammar_lib.replay(grammar, facts, tokens, thinking=True),
    budget - jnp.arange(budget)[None],
    len(exported.spec.vocabulary),
  )
  compiled = under(exported.workdir, count, exported.theirs, exported.tokenizer)
  matcher = xgrammar.GrammarMatcher(compiled)
  words = xgrammar.allocate_token_bitmask(1, ours.shape[-1])
  for token, mask in zip(tokens[0].tolist(), ours[0], strict=True):
    matcher.fill_next_token_bitmask(words)
    bits = np.unpackbits(words.numpy().view(np.uint8), bitorder='little')
    np.testing.assert_array_equal(bits[: len(mask)], mask)
    assert matcher.accept_token(token)
  assert matcher.is_terminated()


def test_the_continuation_is_judged_as_what_it_is(exported):
  found = exported.example['continuation']
  assert found['verdict'] == exported.results['example_verdict']
  assert sorted(found['ranking']) == sorted(exported.example['item_ids'])
  slots = re.findall(r'<slot(\d+)>', found['text'].partition('</think>')[2])
  is_valid = sorted(slots) == [str(k) for k in range(5)]
  assert (found['verdict'] == 'valid') <= is_valid


def test_every_item_has_its_semantic_id_as_text(exported):
  spec = exported.spec
  lines = (exported.workdir / export.SIDS).read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row['item_id'] for row in rows] == list(spec.catalog.item_ids)
  assert rows[0]['sid'].startswith('<a')
  for row, ids in zip(rows, spec.prompter.items['sid'], strict=True):
    assert encode(exported.tokenizer, row['sid']) == list(ids)


def test_weights_are_the_policys_with_adapters_joined(exported):
  ours = np.asarray(exported.params['layers']['gate'])
  gate = exported.theirs.model.layers[0].mlp.gate_proj.weight
  np.testing.assert_array_equal(gate.detach().numpy().T, ours[0])
  if exported.config.model.lora_rank:
    start = exported.spec.load_params(
      exported.found['backbone'], tiny_world.mesh()
    )
    assert np.abs(ours - start['layers']['gate']).max() > 1e-3


def test_results_say_what_the_checkpoint_is(exported):
  results, config = exported.results, exported.theirs.config
  assert results['family'] == config.model_type
  assert results['family'] == {'scratch': 'qwen3'}.get(
    exported.name, exported.name
  )
  count = exported.theirs.num_parameters() + config.hidden_size
  assert results['parameters'] == count  # The read-out is not theirs.
  assert results['vocabulary'] == config.vocab_size
  longest = config.max_position_embeddings
  assert results['max_positions'] == longest
  needed = len(exported.example['prompt']['ids'])
  assert longest >= needed + exported.example['max_tokens']
  assert (longest == 32768) == (exported.name != 'scratch')
  size = sum(f.stat().st_size for f in exported.folder.iterdir())
  assert results['bytes'] == size
  files = (exported.workdir / export.GRAMMARS).iterdir()
  assert {file.name for file in files} == {f'{n}.ebnf' for n in range(1, 6)}
  assert results['permutations_up_to'] == 5
  assert results['thinking'] is True
  json.loads(artifacts.dumps(results))


def test_it_is_a_model_to_train_on(exported):
  again = hf.open_backbone(str(exported.folder))
  assert again.model.d_model == exported.spec.model.d_model
  params = hf.import_params(
    again,
    again.model,
    jax.tree.map(
      lambda x: x.sharding, exported.spec.abstract_params(tiny_world.mesh())
    ),
  )
  jax.tree.map(np.testing.assert_array_equal, params, exported.params)


def test_a_chat_template_travels(exported):
  template = exported.tokenizer.chat_template
  assert (
    template
    == {
      'scratch': None,
      'llama': tiny_pretrained.CHATML,
      'qwen3': tiny_pretrained.THINKING,
    }[exported.name]
  )


def test_a_stretched_context_is_as_much_longer(world, tmp_path):
  tiny_pretrained.write(tmp_path, 'llama')
  spec = tiny_world.spec(world)

  def longest(**changes):
    own = tiny_world.config(model__source=str(tmp_path), **changes)
    return export._max_positions(own, spec)

  assert longest() == 32768
  stretch = dict(model__rope_scaling='linear', model__rope_factor=1.5)
  assert longest(**stretch) == 49152


def test_half_precision_in_parts_and_an_answer_at_once(world, tmp_path):
  own = tiny_world.config(
    export__dtype='BF16',
    export__max_shard_bytes=4000,
    export__start='internalize',
  )
  start, workdir = tmp_path / 'internalize', tmp_path / 'export'
  shutil.copytree(world['rl'], start)
  trained_to(start, 'internalize', thinking=False)
  results = run(own, world | {'internalize': start}, workdir)
  assert results['thinking'] is False
  folder = workdir / export.CHECKPOINT
  files = sorted(folder.glob('model-*.safetensors'))
  assert results['weight_files'] == len(files) > 1
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  assert theirs.dtype == torch.bfloat16
  example = json.loads((workdir / export.EXAMPLE).read_text())
  assert example['prompt']['text'].endswith('<answer>')
  assert re.fullmatch(r'(<slot\d>){5}</s>', example['answer']['text'])
  assert example['max_tokens'] == len(example['answer']['ids'])
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  grammar = under(workdir, 5, theirs, tokenizer)
  assert write_under(grammar, theirs, example) == example['answer']['ids']


@pytest.mark.parametrize('trained', [True, False])
def test_it_reasons_as_it_was_trained_or_as_it_is_told(tmp_path, trained):
  trained_to(tmp_path, 'rl', trained)

  def thinks(**changes):
    return export._thinks(tiny_world.config(**changes).export, tmp_path)

  assert thinks() is trained
  assert thinks(export__thinking=True) is True
  assert thinks(export__thinking=False) is False


def test_an_unknown_type_is_refused_before_anything_is_written(world, tmp_path):
  own = tiny_world.config(export__dtype='float32')
  message = "export.dtype='float32': must be one of F32, BF16, F16"
  with pytest.raises(ValueError, match=message):
    run(own, world, tmp_path)
  assert not list(tmp_path.iterdir())


KILLED = """
import os, signal
from absl import app
from gr2_jax import main
from gr2_jax.pipeline import flags
from gr2_jax.hf import config
config.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
app.run(main.main, flags_parser=flags.parse)
"""


def test_a_killed_export_leaves_no_checkpoint_and_is_done_once(world, tmp_path):
  for stage in ('slates', 'tokenizer', 'backbone', 'midtrain', 'traces',
                'sft', 'rl'):  # fmt: skip
    (tmp_path / world[stage].name).symlink_to(world[stage])
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      KILLED,
      '--config=configs/export.py:test,dataset=world',
      *tiny_world.OVERRIDES,
      f'--workdir={tmp_path}',
    ],
    cwd=_ROOT,
    env=os.environ | {'PYTHONPATH': str(_ROOT), 'JAX_NUM_CPU_DEVICES': '8'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  (workdir,) = tmp_path.glob('export-*')
  (torn,) = workdir.glob('.checkpoint.*')
  assert (torn / 'model.safetensors').exists()
  assert not (workdir / export.CHECKPOINT).exists()
  on_eight = json.loads((workdir / export.EXAMPLE).read_text())

  def again():
    said = []
    found = artifacts.run_stage(
      tiny_world.config(), 'export', tmp_path, 0, said.append
    )
    assert found == workdir
    return said[-1]

  assert ' done in ' in again()
  on_one = json.loads((workdir / export.EXAMPLE).read_text())
  np.testing.assert_allclose(
    on_one['continuation'].pop('logp'),
    on_eight['continuation'].pop('logp'),
    atol=1e-5,
  )
  assert on_one == on_eight
  left = {
    file: file.stat().st_mtime_ns
    for file in workdir.rglob('*')
    if file.is_file()
  }
  assert {path.name for path in workdir.iterdir()} == {
    'config.json',
    'results.json',
    export.CHECKPOINT,
    export.EXAMPLE,
    export.GRAMMARS,
    export.SIDS,
  }
  assert 'finished before' in again()
  assert left == {
    file: file.stat().st_mtime_ns
    for file in workdir.rglob('*')
    if file.is_file()
  }
  assert transformers.AutoConfig.from_pretrained(workdir / export.CHECKPOINT)


def test_a_whole_checkpoint_of_a_killed_stage_is_kept(
  world, tmp_path, monkeypatch
):
  own = tiny_world.config()
  first = run(own, world, tmp_path)
  file = tmp_path / export.CHECKPOINT / 'model.safetensors'
  stamp = file.stat().st_mtime_ns
  monkeypatch.setattr(hf, 'export', None)
  assert run(own, world, tmp_path) == first
  assert file.stat().st_mtime_ns == stamp
