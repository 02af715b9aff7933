import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr2_jax import compressor, grammars
from gr2_jax.data import extracts, prompts

from .. import tiny_data


@pytest.fixture(scope='module')
def prompter(tmp_path_factory):
  return tiny_data.prompter(
    tmp_path_factory.mktemp('words'),
    history_fields=('sid', 'title', 'categories', 'grade', 'age'),
    fields=('sid', 'title', 'categories', 'evidence'),
  )


def test_every_rule_writes_what_the_grammar_allows(prompter):
  grammar, T = compressor.grammar(prompter, 1), prompter.prompt_tokens

  @jax.jit
  def chances(prompt, length, count, budget, tokens):
    """Whether each token is allowed where it stands."""
    facts = grammar.source(prompt, length, count, budget)
    progress = grammars.replay(grammar, facts, tokens, False)
    left = budget[:, None] - jnp.arange(T)
    menu = grammar.menu(facts)
    allowed = grammar.allowed(facts, progress, left, menu.shape[1])
    return (allowed & (menu[:, None] == tokens[..., None])).any(-1)

  rng = np.random.default_rng(0)
  for seed in range(12):
    count = 2 + seed % (tiny_data.K - 1)
    slate, order = tiny_data.slate(seed, count), rng.permutation(count)
    prompt = prompter.prompt(slate, order)['prompt']
    weights = rng.random(len(prompter.bins.columns))
    for budget in (count + 2, count + 9, len(prompt)):
      ids = extracts.extract(prompter, slate, order, budget, weights, rng)
      assert len(ids) <= budget
      assert ids[-1] == grammar.eos
      found = chances(
        prompts.pad(prompt, T, 'prompt')[None],
        *(np.int32([x]) for x in (len(prompt), count, budget)),
        prompts.pad(ids, T, 'ids')[None],
      )
      assert np.asarray(found)[0, : len(ids)].all()


def test_what_is_kept_differs_and_is_of_the_same_places(prompter):
  slate, order = tiny_data.slate(3), np.arange(tiny_data.K)
  weights = np.ones(len(prompter.bins.columns))
  words = prompter.vocabulary
  found = set()
  for seed in range(20):
    ids = extracts.extract(
      prompter, slate, order, tiny_data.K * 3 + 2, weights,
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


def test_telling_columns_are_found():
  slates = tiny_data.many()
  rng = np.random.default_rng(0)
  evidence = rng.normal(size=slates.evidence.shape).astype(np.float32)
  evidence[..., 1] = -slates.grades
  slates = type(slates)(**{**vars(slates), 'evidence': evidence})
  found = extracts.telling(slates, np.array([0, 1]))
  assert found[1] == 1
  assert found[0] < 0.5
