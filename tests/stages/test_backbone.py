import pathlib
import types

import jax
import numpy as np
import pytest

from configs import common
from gr2_jax import hf
from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import metrics
from gr2_jax.pipeline import artifacts, checkpoint
from gr2_jax.policy import policy
from gr2_jax.prompts import examples, vocabulary
from gr2_jax.stages import backbone, baselines, evaluate, midtrain, sft, traces

from .. import tiny, tiny_pretrained, tiny_world

pytestmark = pytest.mark.slow


def config(source, family, **changes):
  """The world's, for a checkpoint of `tiny_pretrained`."""
  fields = dict(
    model__source=str(source),
    model__qk_norm=family == 'qwen3',
    prompt__fields=('sid', 'title', 'evidence'),
    prompt__history_fields=('sid', 'title'),
  )
  return tiny_world.config(**(fields | changes))


def run(world, own, workdir):
  """The stage's results and where the world has it instead of its own."""
  workdir.mkdir(exist_ok=True)
  results = backbone.run(own, tiny_world.inputs(world, 'backbone'), workdir)
  return results, world | {'backbone': workdir}


@pytest.fixture(scope='module')
def chain(world, tmp_path_factory):
  """backbone -> midtrain -> traces -> sft of a pretrained Qwen3."""
  root = tmp_path_factory.mktemp('chain')
  tiny_pretrained.write(root / 'weights', 'qwen3')
  own = config(root / 'weights', 'qwen3')
  results, found = run(world, own, root / 'backbone')
  for name, stage in (('midtrain', midtrain), ('traces', traces), ('sft', sft)):
    (root / name).mkdir()
    stage.run(own, tiny_world.inputs(found, name), root / name)
    found[name] = root / name
  return types.SimpleNamespace(config=own, results=results, found=found)


def test_a_pretrained_model_goes_through_the_stages(world, chain):
  spec = tiny_world.spec(chain.found, chain.config)
  start, mid, after = (
    spec.load_params(chain.found[name], tiny_world.mesh())
    for name in ('backbone', 'midtrain', 'sft')
  )
  for one, other in ((start, mid), (mid, after)):
    assert np.isfinite(other['embedding']).all()
    assert not np.array_equal(one['layers']['gate'], other['layers']['gate'])
  results = artifacts.dumps(chain.results)
  assert '"family": "qwen3"' in results
  assert chain.results['vocabulary'] == len(spec.vocabulary)
  assert chain.results['parameters'] == sum(
    leaf.size for leaf in jax.tree.leaves(start)
  )
  symbols = chain.results['symbols']
  assert symbols == len(spec.vocabulary.layout.symbols())
  # <think> and </think> are the model's, padding is new.
  assert chain.results['added_rows'] == symbols - 2 + 1


def test_imported_parameters_are_the_checkpoints(chain):
  spec = tiny_world.spec(chain.found, chain.config)
  found = spec.load_params(chain.found['backbone'], tiny_world.mesh())
  model = hf.open_backbone(chain.config.model.source)
  V0 = model.vocab_size
  np.testing.assert_array_equal(
    found['embedding'][:V0], model.read('embedding')
  )
  np.testing.assert_array_equal(
    found['layers']['attention']['query'], model.read('layers.attention.query')
  )
  assert len(found['embedding']) == len(spec.vocabulary)
  spread = np.linalg.norm(found['embedding'][V0:], axis=1)
  assert (spread > 0).all()


def test_midtraining_starts_from_the_backbone(chain, tmp_path):
  own = config(
    chain.config.model.source,
    'qwen3',
    midtrain__steps=2,
    midtrain__learning_rate=1e-12,
  )
  midtrain.run(own, tiny_world.inputs(chain.found, 'midtrain'), tmp_path)
  spec = tiny_world.spec(chain.found, own)
  tiny.assert_trees_close(
    spec.load_params(tmp_path, tiny_world.mesh()),
    spec.load_params(chain.found['backbone'], tiny_world.mesh()),
    1e-9,
  )


def test_rows_start_at_the_words_of_a_symbol(chain):
  spec = tiny_world.spec(chain.found, chain.config)
  words, items = spec.vocabulary, spec.prompter.items
  texts = backbone.symbol_texts(spec)
  assert len(texts) == len(words) - words.first_symbol

  def text(id):
    return words.decode(texts[id - words.first_symbol])

  assert text(words.slot_base + 3) == '3'
  assert text(words.bin_base + 2) == 'incoming rank 2'
  assert text(words.by_base + 1) == 'by popularity raw'
  assert text(words.control['<candidates>']) == 'candidates'
  for id in (words.sid_base, words.sid_base + 9):
    wanted = [
      token
      for codes, title in zip(items['sid'], items['title'], strict=True)
      for token in title
      if id in codes
    ]
    assert texts[id - words.first_symbol] == wanted
  assert any(texts[words.sid_base - words.first_symbol :])


def test_an_untied_model_gets_rows_for_both_embeddings(world, tmp_path):
  tiny_pretrained.write(tmp_path / 'weights', 'llama', tie_embeddings=False)
  own = config(
    tmp_path / 'weights',
    'llama',
    model__tie_embeddings=False,
    model__new_rows='mean',
  )
  results, found = run(world, own, tmp_path / 'stage')
  assert results['family'] == 'llama'
  params = tiny_world.spec(found, own).load_params(
    found['backbone'], tiny_world.mesh()
  )
  V0 = results['vocabulary'] - results['added_rows']
  for name in ('embedding', 'unembedding'):
    rows = np.asarray(params[name])
    far = np.linalg.norm(rows[V0:] - rows[:V0].mean(0), axis=1)
    assert (far < 0.1 * rows[:V0].std() * 16**0.5 * 3).all()
  assert not np.allclose(
    params['embedding'][V0:], params['unembedding'][V0:], atol=1e-3
  )


def test_without_a_source_there_is_a_vocabulary_and_no_model(world):
  results = artifacts.read_results(world['backbone'])
  words = tiny_world.spec(world).vocabulary
  assert results['vocabulary'] == len(words)
  assert results['symbols'] == len(words.layout.symbols())
  assert (world['backbone'] / vocabulary.TRAINED).exists()
  assert not (world['backbone'] / policy.PARAMS).exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'model__d_ff': 32, 'model__rope_base': 1e4},
      r'model.d_ff is 24 there; .* with --config\.model\.d_ff=24$',
    ),
    ({'model__num_kv_heads': 1}, r'--config\.model\.num_kv_heads=2'),
  ],
)
def test_a_model_of_another_shape_says_how_to_name_it(
  world, chain, tmp_path, changes, message
):
  own = config(chain.config.model.source, 'qwen3', **changes)
  with pytest.raises(ValueError, match=message):
    run(world, own, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_stretched_model_must_be_named_and_another_may_be_stretched(
  world, chain, tmp_path
):
  stretch = dict(rope_scaling='linear', rope_factor=2.0)
  tiny_pretrained.write(tmp_path / 'weights', 'qwen3', **stretch)
  own = config(tmp_path / 'weights', 'qwen3')
  with pytest.raises(ValueError, match='--config.model.rope_scaling=linear'):
    run(world, own, tmp_path / 'stage')
  changes = {f'model__{name}': value for name, value in stretch.items()}
  own = config(chain.config.model.source, 'qwen3', **changes)
  results, _ = run(world, own, tmp_path / 'other')
  assert results['added_rows'] > 0


@pytest.mark.parametrize('pretrained', [False, True])
def test_a_kill_between_vocabulary_and_bins_starts_them_again(
  world, chain, tmp_path, monkeypatch, pretrained
):
  own = chain.config if pretrained else tiny_world.config()

  def dying(*_, **__):
    raise KeyboardInterrupt

  made = 'extend' if pretrained else 'train'
  for module, name in (
    (vocabulary, made), (policy.bins_lib, 'save'),
    (checkpoint, 'save_params'),
  ):  # fmt: skip
    with monkeypatch.context() as patch:
      patch.setattr(module, name, dying)
      if name == 'save_params' and not pretrained:
        continue
      with pytest.raises(KeyboardInterrupt):
        run(world, own, tmp_path)
    assert not (tmp_path / policy.PARAMS).exists()
  results, found = run(world, own, tmp_path)
  whole = chain.found if pretrained else world
  assert results['vocabulary'] == len(tiny_world.spec(found, own).vocabulary)
  for path in (vocabulary.find(tmp_path), tmp_path / policy.BINS):
    wanted = whole['backbone'] / path.name
    assert path.read_bytes() == wanted.read_bytes()
  if pretrained:
    spec = tiny_world.spec(found, own)
    tiny.assert_trees_equal(
      spec.load_params(tmp_path, tiny_world.mesh()),
      spec.load_params(whole['backbone'], tiny_world.mesh()),
    )


def test_the_weights_count_like_the_config(chain):
  old = artifacts.plan(chain.config, 'backbone').fingerprint
  path = pathlib.Path(chain.config.model.source) / 'config.json'
  content = path.read_bytes()
  path.write_bytes(content + b' ')
  new = artifacts.plan(chain.config, 'backbone').fingerprint
  path.write_bytes(content)
  assert new != old
  own = common.compose('rl', 'test,model=smollm2_135m')
  assert artifacts.plan(own, 'rl')  # A name is no file.


@pytest.mark.parametrize('pretrained', [False, True])
def test_the_table_has_the_start_where_there_is_one(
  world, chain, tmp_path, monkeypatch, pretrained
):
  found = chain.found if pretrained else world
  own = chain.config if pretrained else tiny_world.config()
  slates = slates_lib.read(world['slates'], 'test')
  n, K = slates.grades.shape
  incoming = np.tile(np.arange(K, dtype=np.int32), (n, 1))
  asked = []

  def ranked(config, inputs, workdir, source):
    asked.append(source)
    return {
      'generated': incoming,
      'readout': incoming,
      'verdict': np.zeros(n, np.int32),
      'free_verdict': np.zeros(n, np.int32),
      'order_sensitivity': np.zeros(n),
    }

  scores = {
    name: np.tile(-np.arange(K, dtype=np.float32), (n, 1))
    for name in ('incoming', 'random', 'best', 'gbdt', 'legacy')
  }
  monkeypatch.setattr(evaluate, '_ranked', ranked)
  monkeypatch.setattr(baselines, 'read_scores', lambda *_: scores)
  inputs = {name: found[name] for name in ('slates', 'tokenizer', 'backbone')}
  inputs |= {'baselines': tmp_path, 'sft@0': tmp_path, 'rl@0': tmp_path}
  results = evaluate.run(own, inputs, tmp_path)
  others = {'policy_start'} if not pretrained else set()
  for stage in ('opd', 'midtrain'):
    others |= {f'policy_{stage}', f'policy_{stage}_readout'}
  rows = [r for r in evaluate.RANKERS if r not in others]
  assert set(results['metrics']) == set(rows)
  assert set(asked) == {'rl@0', 'sft@0'} | (
    {'backbone'} if pretrained else set()
  )
  assert ('policy-policy_start' in results['paired']) == pretrained
  table = evaluate.summary(results).splitlines()
  names = [line.split('|')[1].strip() for line in table if '|' in line]
  assert names[2 : 2 + len(rows)] == rows
  assert set(results['metrics']['incoming']) == set(metrics.RANKING_METRICS)


def test_sft_learns_the_sequence_that_sampling_asks_for(chain):
  spec = tiny_world.spec(chain.found, chain.config)
  own = spec.prompter
  assert own.ask_tokens > 1
  kept = records.Records(chain.found['traces'] / traces.ACCEPTED)[0]
  slates = slates_lib.SlateSource(chain.found['slates'], 'train')
  slate = slates[int(kept['slate'])]
  config = tiny_world.config(prompt__order='incoming')
  rng = np.random.default_rng(0)
  row = sft.renderer(spec, config)({'trace': kept, 'slate': slate}, rng)
  learned = row['prompt'][: row['prompt_length']].tolist()
  for which, control in enumerate(('<think>', '<answer>')):
    render = examples.generation_rows(own, control, 'incoming')
    asked = render(slate, rng)
    asked = asked['prompt'][: asked['prompt_length']].tolist()
    ids = [*learned, *row['completion'][which].tolist()]
    assert ids[: len(asked)] == asked
    # Nobody is taught to ask.
    n = len(own.asks[control])
    assert not row['weights'][which, :n].any()
    assert row['weights'][which].sum() > 0
