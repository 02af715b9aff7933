"""The grammar as text against the permutation mask it stands for."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gr2_jax.policy import ebnf, sampling
from gr2_jax.policy import grammar as grammar_lib

PAD, EOS, END, WORD, OTHER = range(5)
BASE, SLOTS = 5, 6
GRAMMAR = grammar_lib.Ranking(
  slot_base=BASE,
  num_slots=SLOTS,
  num_candidates=SLOTS,
  think_end=END,
  eos=EOS,
  pad=PAD,
)
VOCABULARY = frozenset(range(BASE + SLOTS))


def written(count, reasoning=None, grammar=GRAMMAR):
  """A grammar with room for so many tokens of reasoning, or without."""
  sampler = sampling.SamplingOptions(
    group=1,
    max_tokens=count + 1 + (0 if reasoning is None else reasoning + 1),
    thinking=reasoning is not None,
    constrained=True,
  )
  return ebnf.ranking(grammar, count, sampler), sampler


class Rules:
  """What a grammar of tokens lets through, one token after another."""

  def __init__(self, text):
    self._rules = {}
    for line in text.splitlines():
      if not line.startswith('#'):
        name, _, body = line.partition(' ::= ')
        assert name not in self._rules
        self._rules[name] = [self._sequence(part) for part in body.split(' | ')]

  def _sequence(self, text):
    """Terms, each with the least and the most times that it comes."""
    found = []
    for term in re.finditer(r'([\w-]+(?:\([\d, ]+\))?)(?:\{(.+?)\})?', text):
      times = (term[2] or '1').split(',')
      found.append((term[1], int(times[0]), int(times[-1])))
    return tuple(found)

  def _moves(self, terms):
    """(token, what is left after it); <eos> where nothing need follow."""
    if not terms:
      yield EOS, None
      return
    (term, least, most), *rest = terms
    if not least:
      yield from self._moves(rest)
    if not most:
      return
    rest = (term, max(least - 1, 0), most - 1), *rest
    kind, _, ids = term.partition('(')
    if ids:
      ids = set(map(int, ids[:-1].split(',')))
      tokens = {'Token': ids, 'ExcludeToken': VOCABULARY - ids}[kind]
      yield from ((token, rest) for token in tokens)
      return
    for sequence in self._rules[term]:
      yield from self._moves((*sequence, *rest))

  def start(self):
    return {(('root', 1, 1),)}

  def next(self, states):
    """Token -> the states after it."""
    found = {}
    for state in states:
      for token, left in self._moves(state):
        found.setdefault(token, set()).add(left)
    return found


def prefixes(text):
  """Everything that may begin a completion -> the tokens after it."""
  rules = Rules(text)
  level, found = {(): rules.start()}, {}
  while level:
    after = {prefix: rules.next(states) for prefix, states in level.items()}
    found |= {prefix: frozenset(tokens) for prefix, tokens in after.items()}
    level = {
      (*prefix, token): states
      for prefix, tokens in after.items()
      for token, states in tokens.items()
      if token != EOS
    }
  return found


@pytest.mark.parametrize('count', [1, 2, 4, 5])
def test_the_answers_are_the_permutations(count):
  text, _ = written(count)
  slots = range(BASE, BASE + count)
  answers = [prefix for prefix, after in prefixes(text).items() if EOS in after]
  assert sorted(answers) == sorted(itertools.permutations(slots))


def masks(sampler, count, found):
  """bool [prefixes, V], what the constrained sampler may write next."""
  length = np.array([len(prefix) for prefix in found])
  tokens = np.full((len(found), sampler.max_tokens), PAD)
  for row, prefix in zip(tokens, found, strict=True):
    row[: len(prefix)] = prefix
  facts = jnp.full(len(found), count)
  progress = grammar_lib.replay(GRAMMAR, facts, tokens, sampler.thinking)
  here = jax.tree.map(lambda x: x[np.arange(len(found)), length], progress)
  left = jnp.asarray(sampler.max_tokens - length)
  return np.asarray(GRAMMAR.allowed(facts, here, left, len(VOCABULARY)))


@pytest.mark.parametrize(
  ('count', 'reasoning'),
  [(6, None), (3, None), (1, 0), (2, 0), (2, 3), (3, 2)],
)
def test_it_lets_through_what_the_mask_does(count, reasoning):
  text, sampler = written(count, reasoning)
  found = prefixes(text)
  assert max(map(len, found)) == sampler.max_tokens - 1
  mask = masks(sampler, count, found)
  for after, row in zip(found.values(), mask, strict=True):
    assert after == frozenset(np.flatnonzero(row))


def test_more_candidates_than_have_rules_may_repeat_and_are_of_the_slate():
  count = ebnf.MOST + 1
  wide = grammar_lib.Ranking(BASE, 20, 20, END, EOS, PAD)
  most, _ = written(ebnf.MOST, grammar=wide)
  text, _ = written(count, 3, grammar=wide)
  assert len(most.splitlines()) == 2**ebnf.MOST + 1
  assert 'repeats are possible' in text
  assert 'repeats' not in most
  rules = Rules(text)
  states = rules.start()
  for token in (WORD, BASE, END):
    states = rules.next(states)[token]
  for _ in range(count):
    after = rules.next(states)
    assert set(after) == set(range(BASE, BASE + count))
    states = after[BASE]
  assert set(rules.next(states)) == {EOS}
