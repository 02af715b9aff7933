import dataclasses
import shutil

import jax
import numpy as np
import pytest

from gr2_jax.distributed import sharding
from gr2_jax.policy import policy

from .. import tiny_world


@pytest.fixture(scope='module')
def spec(world):
  return tiny_world.spec(world)


def test_the_parts_of_a_spec_share_one_vocabulary(spec):
  words, grammar = spec.vocabulary, spec.grammar
  assert spec.model.vocab_size == len(words)
  assert words.decode([grammar.slot_base]) == '<slot0>'
  assert words.decode([grammar.think_end]) == '</think>'
  assert (grammar.num_candidates, grammar.num_slots) == (5, 6)
  assert (grammar.eos, grammar.pad) == (words.eos, words.pad)
  assert len(spec.prompter.items['sid']) == len(spec.catalog) == 60


def test_budgets_are_what_the_grammar_needs(spec):
  direct = spec.sampling(4, False, 0.7, True)
  assert dataclasses.astuple(direct) == (4, 6, 0.7, False, True)
  assert spec.sampling(1, True, 1.0, False).max_tokens == 6 + 1 + 6


def test_parameters_are_found_in_an_artifact_or_its_folder(world, spec):
  one = spec.load_params(world['sft'], tiny_world.mesh())
  two = spec.load_params(world['sft'] / policy.PARAMS, tiny_world.mesh())
  wanted = spec.abstract_params(tiny_world.mesh())
  assert jax.tree.structure(one) == jax.tree.structure(wanted)
  for x, y, z in zip(*map(jax.tree.leaves, (one, two, wanted)), strict=True):
    np.testing.assert_array_equal(x, y)
    assert (x.shape, x.dtype) == (z.shape, z.dtype)
    assert x.sharding.is_equivalent_to(z.sharding, x.ndim)


def test_parameters_load_onto_another_mesh(world, spec):
  meshes = tiny_world.mesh(), sharding.make_mesh(4, 2, 1)
  one, two = (spec.load_params(world['sft'], mesh) for mesh in meshes)
  assert two['embedding'].addressable_shards[0].data.shape[1] == 8
  np.testing.assert_array_equal(one['embedding'], two['embedding'])


def test_parameters_of_another_shape_are_named(world):
  config = tiny_world.config(model__d_ff=32)
  with pytest.raises(ValueError, match=r'layers\.(down|gate|up).*in the conf'):
    tiny_world.spec(world, config).load_params(world['sft'], tiny_world.mesh())


def test_a_prompt_config_of_another_vocabulary_is_refused(world):
  config = tiny_world.config(prompt__bins=5)
  with pytest.raises(ValueError, match='was trained with another prompt'):
    tiny_world.spec(world, config)


@pytest.mark.parametrize('name', ['fields', 'history_fields'])
def test_an_unknown_field_of_a_line_is_named(world, name):
  config = tiny_world.config(**{f'prompt__{name}': ('sid', 'titel')})
  message = rf"prompt\.{name}: no field 'titel'; known: sid, title"
  with pytest.raises(ValueError, match=message):
    tiny_world.spec(world, config)


def test_a_home_without_a_vocabulary_is_named(world, tmp_path):
  shutil.copy(world['backbone'] / policy.BINS, tmp_path)
  with pytest.raises(FileNotFoundError, match='neither vocabulary.json nor'):
    tiny_world.spec(world | {'backbone': tmp_path})


def test_more_candidates_than_slots_are_refused(world, tmp_path):
  config = tiny_world.config(prompt__num_slots=4)
  with pytest.raises(ValueError, match='prompt.num_slots=4 is less than the 5'):
    policy.create_vocabulary(
      config, world['slates'], world['tokenizer'], tmp_path, ()
    )
  assert not list(tmp_path.iterdir())
