import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr2_jax.compressor import extracts, rollouts
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.prompts import prompt as prompt_lib

from .. import tiny_data


@pytest.fixture(scope='module')
def prompter(tmp_path_factory):
  return tiny_data.prompter(
    tmp_path_factory.mktemp('words'),
    history_fields=('sid', 'title', 'categories', 'grade', 'age'),
    fields=('sid', 'title', 'categories', 'evidence'),
  )


def test_every_rule_writes_what_the_grammar_allows(prompter):
  grammar, T = rollouts.grammar(prompter, 1), prompter.prompt_tokens

  @jax.jit
  def chances(prompt, length, count, budget, tokens):
    """Whether each token is allowed where it stands."""
    facts = grammar.source(prompt, length, count, budget)
    progress = grammar_lib.replay(grammar, facts, tokens, False)
    left = budget[:, None] - jnp.arange(T)
    menu = grammar.candidate_tokens(facts)
    allowed = grammar.allowed(facts, progress, left, menu.shape[1])
    return (allowed & (menu[:, None] == tokens[..., None])).any(-1)

  rng = np.random.default_rng(0)
  for seed in range(12):
    count = 2 + seed % (tiny_data.K - 1)
    slate, order = tiny_data.slate(seed, count), rng.permutation(count)
    prompt = prompter.prompt(slate, order)['prompt']
    units = extracts.units(prompter.lines(slate).candidates[0])
    ranked = [units[i] for i in rng.permutation(len(units))]
    for budget in (count + 2, count + 9, len(prompt)):
      by_chance = rng if seed % 3 else None
      ids = extracts.extract(prompter, slate, order, budget, ranked, by_chance)
      assert len(ids) <= budget
      assert ids[-1] == grammar.eos
      found = chances(
        prompt_lib.pad(prompt, T, 'prompt')[None],
        *(np.int32([x]) for x in (len(prompt), count, budget)),
        prompt_lib.pad(ids, T, 'ids')[None],
      )
      assert np.asarray(found)[0, : len(ids)].all()


def test_what_is_kept_differs_and_is_of_the_same_places(prompter):
  slate, order = tiny_data.slate(3), np.arange(tiny_data.K)
  ranked = extracts.units(prompter.lines(slate).candidates[0])
  words = prompter.vocabulary
  found = set()
  for seed in range(20):
    ids = extracts.extract(
      prompter, slate, order, tiny_data.K * 3 + 2, ranked,
      np.random.default_rng(seed),
    )  # fmt: skip
    lines, line = [], []
    for token in ids[ids.index(words.control['<candidates>']) + 1 :]:
      if words.is_slot(np.int32(token)):
        lines.append(line)
        line = []
      else:
        line.append(token)
    assert len({len(line) for line in lines}) == 1
    found.add(tuple(ids))
  assert len(found) > 5


def test_without_chance_the_first_units_are_kept(prompter):
  slate, order = tiny_data.slate(3), np.array([1, 0])
  slate = slate | {'count': np.int32(2)}
  lines = prompter.lines(slate).candidates
  words, ranked = prompter.vocabulary, [('evidence', 1), ('sid', 0)]
  for quota in (1, 2):
    ids = extracts.extract(prompter, slate, order, 2 * quota + 4, ranked, None)
    wanted = [words.control['<candidates>']]
    for slot, rank in enumerate(order):
      first, second = lines[rank]['evidence'][1], lines[rank]['sid'][0]
      wanted += [second, first][2 - quota :]  # As the line has them.
      wanted.append(words.slot_base + slot)
    assert ids == [*wanted, words.eos]


def test_an_elimination_is_backward():
  """Not the worst alone goes, but the one that the others do best without."""
  says = {'a': {1, 2, 3}, 'b': {1, 2, 4}, 'c': {3, 4}, 'd': {5, 6}}
  asked = []

  def worth(alternatives):
    asked.append(alternatives)
    return [len(set().union(*(says[u] for u in one))) for one in alternatives]

  assert extracts.most_telling(says, worth) == ['a', 'd', 'b', 'c']
  assert [len(found) for found in asked] == [4, 3, 2]
  assert asked[1] == [['b', 'd'], ['a', 'd'], ['a', 'b']]
  assert extracts.most_telling([], worth) == []


def test_units_are_of_fields_that_are_as_long_for_all(prompter):
  lines = prompter.lines(tiny_data.slate(3)).candidates
  found = extracts.units(lines[0])
  assert {field for field, _ in found} == {'sid', 'evidence'}
  assert all(extracts.units(line) == found for line in lines)
