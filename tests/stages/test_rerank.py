"""Bulk re-ranking with a policy of random parameters on a small world."""

import json

import jax
import numpy as np
import pytest

from configs import common
from gr2_jax.data import log as log_lib
from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.ops import parsing
from gr2_jax.pipeline import artifacts, checkpoint
from gr2_jax.policy import policy, ranking
from gr2_jax.semantic_ids import ids
from gr2_jax.serving import answer as answer_lib
from gr2_jax.stages import rerank
from gr2_jax.stages import slates as slates_stage

from .. import tiny_world

CHUNK = 16


class Killed(BaseException):
  """Stands for a kill: no handler runs."""


@pytest.fixture(scope='module')
def config():
  config = common.compose('rerank', 'test,dataset=world')
  config.data.world.update(n_items=40, n_users=40, visits=4, clusters=4)
  config.data.candidates = 6
  config.model.update(
    d_model=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, d_ff=16
  )
  config.prompt.update(history=2, num_slots=8, reasoning_tokens=6)
  config.rerank.update(batch_size=8, chunk=CHUNK)
  return config


@pytest.fixture(scope='module')
def inputs(config, tmp_path_factory):
  """Finished artifacts; the parameters are random."""
  names = ('slates', 'tokenizer', 'backbone', 'rl')
  inputs = {name: tmp_path_factory.mktemp(name) for name in names}
  slates_stage.run(config, {}, inputs['slates'])
  rng = np.random.default_rng(0)
  codes = rng.integers(8, size=(config.data.world.n_items, 2))
  ids.SemanticIds(codes, 8).save(inputs['tokenizer'])
  home = inputs['backbone']
  policy.create_vocabulary(
    config, inputs['slates'], inputs['tokenizer'], home, ('likes',)
  )
  spec = policy.load(config, inputs)
  params = sharding.unbox(
    transformer.init_params(spec.model, jax.random.key(0))
  )
  # Some parts begin at zero, which would make all candidates alike.
  params = jax.tree.map(
    lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params
  )
  checkpoint.save_params(inputs['rl'] / policy.PARAMS, params)
  tiny_world.finish(inputs['rl'], 'rl')
  return inputs


@pytest.fixture(scope='module')
def asked(inputs):
  """Rows of a request file, three chunks long, the last one short."""
  names = slates_lib.read_catalog(inputs['slates']).item_ids
  rng = np.random.default_rng(1)
  rows = []
  for row in range(2 * CHUNK + 5):
    items = rng.permutation(len(names))
    size = 1 if row == 3 else int(rng.integers(2, 7))
    rows.append(
      {
        'id': f'slate-{row}',
        'history': [names[i] for i in items[10 : 10 + row % 5]],
        'candidates': [names[i] for i in items[:size]],
      }
    )
  rows[7]['history'] += ['gone', 'lost']
  return rows


def with_input(config, path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  config = config.copy_and_resolve_references()
  config.rerank.input = str(path)
  return config


@pytest.fixture(scope='module')
def finished(config, inputs, asked, tmp_path_factory):
  """Config, workdir and results of a whole run, and its traces."""
  workdir = tmp_path_factory.mktemp('rerank')
  config = with_input(config, workdir / 'slates.jsonl', asked)
  before = ranking._answer._cache_size()
  results = rerank.run(config, inputs, workdir)
  return config, workdir, results, ranking._answer._cache_size() - before


def output(workdir):
  lines = (workdir / rerank.OUTPUT).read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_answers_are_permutations_in_the_order_of_the_input(finished, asked):
  _, workdir, _, _ = finished
  answers = output(workdir)
  assert [a['id'] for a in answers] == [row['id'] for row in asked]
  for answer, row in zip(answers, asked, strict=True):
    given = row['candidates']
    assert sorted(answer['ranking']) == sorted(given)
    assert [given[rank] for rank in answer['order']] == answer['ranking']
    assert len(answer['scores']) == len(given)
    assert answer['verdict'] == 'valid'
  assert any(a['order'] != sorted(a['order']) for a in answers)
  assert not (workdir / rerank.PARTIAL).exists()


def test_one_candidate_passes_through(finished, asked):
  _, workdir, _, _ = finished
  answer = output(workdir)[3]
  assert answer['ranking'] == asked[3]['candidates']
  assert answer['order'] == [0]


def test_results_summarize_the_output(finished):
  _, workdir, results, traces = finished
  answers = output(workdir)
  assert results['slates'] == len(answers)
  assert set(results['verdicts']) == set(parsing.VERDICTS)
  assert results['verdicts']['valid'] == 1.0
  assert results['unknown_history'] == answers[7]['unknown_history'] == 2
  changed = np.mean([a['order'][0] > 0 for a in answers])
  assert results['first_pick_changed'] == pytest.approx(changed)
  assert results['slates_per_second'] > 0
  assert traces == 1
  json.loads(artifacts.dumps(results))


def test_reasoning_names_candidates_by_incoming_rank(config, inputs):
  spec = policy.load(config, inputs)
  words = spec.vocabulary
  slots = words.slot_base + np.array([0, 2, 1, 5])
  tokens = [*words.encode('likes'), *slots, words.control['</think>'], slots[0]]
  text = answer_lib._reasoning(spec, np.array(tokens), np.array([2, 0, 1]))
  assert text.replace(' ', '') == 'likes<slot2><slot1><slot0><slot5>'
  assert answer_lib._reasoning(spec, slots, np.array([2, 0, 1])) == ''


@pytest.mark.parametrize(
  'torn', [b'', b'{"id": "slate-16", "rank', b'{}\n' * 3]
)
def test_a_killed_run_ends_in_the_same_bytes(
  finished, inputs, tmp_path, monkeypatch, torn
):
  config, workdir, _, _ = finished
  rank, ranked = ranking.rank, []

  def die_at_the_second(*args, **kwargs):
    if kwargs['first'] == CHUNK:
      raise Killed
    return rank(*args, **kwargs)

  def watch(*args, **kwargs):
    ranked.append(kwargs['first'])
    return rank(*args, **kwargs)

  monkeypatch.setattr(ranking, 'rank', die_at_the_second)
  with pytest.raises(Killed):
    rerank.run(config, inputs, tmp_path)
  assert not (tmp_path / rerank.OUTPUT).exists()
  with (tmp_path / rerank.PARTIAL).open('ab') as file:
    file.write(torn)
  monkeypatch.setattr(ranking, 'rank', watch)
  rerank.run(config, inputs, tmp_path)
  assert ranked == [CHUNK, 2 * CHUNK]
  whole = (workdir / rerank.OUTPUT).read_bytes()
  assert (tmp_path / rerank.OUTPUT).read_bytes() == whole


def test_a_finished_output_is_not_ranked_again(finished, inputs):
  config, workdir, results, _ = finished
  again = rerank.run(config, inputs, workdir)
  assert again == results | {'slates_per_second': None}


def test_bad_input_is_refused_before_anything_is_ranked(
  config, inputs, asked, tmp_path
):
  bad = with_input(config, tmp_path / 'in.jsonl', [*asked, {'history': []}])
  workdir = tmp_path / 'work'
  workdir.mkdir()
  message = f'in.jsonl, line {len(asked) + 1}, .*candidates'
  with pytest.raises(log_lib.DataError, match=message):
    rerank.run(bad, inputs, workdir)
  assert not list(workdir.iterdir())


def test_descriptions_need_a_tokenizer_that_reads_text(
  config, inputs, tmp_path
):
  # Of this tokenizer there are the semantic IDs alone.
  items = [{'item_id': 'new', 'title': 'New'}]
  row = {'history': [], 'candidates': ['new'], 'items': items}
  described = with_input(config, tmp_path / 'in.jsonl', [row])
  message = r"'new' is not in the catalog.*\(not here: .*no whole tokenizer"
  with pytest.raises(log_lib.DataError, match=message):
    rerank.run(described, inputs, tmp_path)


def test_another_catalog_is_refused(finished, inputs, tmp_path):
  config, *_ = finished
  config = config.copy_and_resolve_references()
  config.data.world.n_items += 1
  with pytest.raises(log_lib.DataError, match='no longer those of'):
    rerank.run(config, inputs, tmp_path)


def test_without_input_the_test_slates_are_ranked(config, inputs, tmp_path):
  results = rerank.run(config, inputs, tmp_path)
  stored = slates_lib.read(inputs['slates'], 'test')
  names = slates_lib.read_catalog(inputs['slates']).item_ids
  answers = output(tmp_path)
  assert results['slates'] == len(stored) == len(answers)
  spec, mesh = policy.load(config, inputs), tiny_world.mesh()
  direct = ranking.rank(
    policy.Policy(spec, spec.load_params(inputs['rl'], mesh), mesh),
    slates_lib.SlateSource(inputs['slates'], 'test'),
    thinking=True,
    order='shuffled',
    batch_size=8,
    seed=0,
  )
  for row, answer in enumerate(answers):
    order = direct.generated[row, : stored.count[row]]
    assert answer['order'] == order.tolist()
    items = stored.candidates[row, order]
    assert answer['ranking'] == [names[i] for i in items]
    by_score = direct.readout[row, : stored.count[row]]
    falling = np.diff(np.array(answer['scores'])[by_score])
    assert (falling <= 0).all()
    assert (falling < 0).any()


def test_a_changed_input_file_is_another_run(finished, asked, tmp_path):
  config, *_ = finished
  config = with_input(config, tmp_path / 'in.jsonl', asked)
  first = artifacts.plan(config, 'rerank').fingerprint
  with_input(config, tmp_path / 'in.jsonl', asked[:-1])
  assert artifacts.plan(config, 'rerank').fingerprint != first
