"""The grammar of a ranking as text, for servers that decode under one.

The dialect is xgrammar's EBNF (from 0.1.33 on), which vLLM accepts. It names
tokens by their ids: a grammar of characters would also allow `<slot3>` to be
spelled by several pieces of text, which is no answer.

Axes: K candidates.
"""

import itertools
from collections.abc import Iterator

from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import sampling

# Candidates of the longest slate whose permutations are written out. There is a
# rule for every set of remaining slots: 2^K rules, and K 2^(K-1) alternatives.
# Slots are single digits in the names of rules.
MOST = 10


def ranking(
  grammar: grammar_lib.Ranking, count: int, sampler: sampling.SamplingOptions
) -> str:
  """EBNF of the rankings of a slate that a constrained sampler can write.

  Rule `root` is the completion without the <eos> that a server adds itself. Up
  to MOST candidates it allows what `grammar.Ranking.allowed` does; beyond, any
  of the slate's slots at each of `count` places, repeats included. Reasoning is
  any tokens but </think>, <eos> and padding, few enough to leave room.

  Args:
    grammar: token ids.
    count: candidates in the slate, at least 1.
    sampler: whether completions reason first, and their budget.
  """
  slots = {k: f'Token({grammar.slot_base + k})' for k in range(count)}
  reasoning = ''
  if sampler.thinking:
    end, most = grammar.think_end, sampler.max_tokens - count - 2
    text = f'ExcludeToken({end}, {grammar.eos}, {grammar.pad})'
    reasoning = f'{text}{{0,{most}}} Token({end}) '
  if count > MOST:
    rules = [
      f'# {count} times any of {count} candidates: repeats are possible.',
      f'root ::= {reasoning}slot{{{count}}}',
      f'slot ::= {" | ".join(slots.values())}',
    ]
  else:
    rules = [
      f'# Each of {count} candidates once.',
      f'root ::= {reasoning}{_name(tuple(slots))}',
    ]
    for size in range(count, 0, -1):
      for left in itertools.combinations(slots, size):
        rules.append(f'{_name(left)} ::= {" | ".join(_first(slots, left))}')
  return '\n'.join(rules) + '\n'


def _name(left: tuple[int, ...]) -> str:
  """The name of the rule of the remaining slots."""
  return 'left-' + ''.join(map(str, left))


def _first(slots: dict[int, str], left: tuple[int, ...]) -> Iterator[str]:
  """Alternatives: each remaining slot, then the rule of the others."""
  for slot in left:
    others = tuple(k for k in left if k != slot)
    yield f'{slots[slot]} {_name(others)}' if others else slots[slot]
