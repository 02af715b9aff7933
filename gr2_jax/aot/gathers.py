"""What a collective puts together of parts that lie on several devices.

A compiler writes a gather in one of three forms:

* an all-gather;
* an all-reduce of arrays that are zero but for each device's own part;
* a ring: a loop that hands parts round with collective-permutes and works on
  each as it comes by. Few of them are there at once; all of them are counted.
"""

import dataclasses
from typing import Self

from gr2_jax.aot import hlo_text

# Opcodes whose result is their first operand, in another place or form.
_SAME = frozenset(
  (
    'bitcast',
    'bitcast-convert',
    'convert',
    'copy',
    'copy-done',
    'copy-start',
    'reshape',
    'transpose',
  )
)
_PERMUTES = frozenset(
  (
    'collective-permute',
    'collective-permute-start',
    'collective-permute-done',
  )
)


@dataclasses.dataclass(frozen=True)
class Scope:
  """A computation, and who runs it."""

  computations: dict[str, hlo_text.Computation]
  name: str
  call: hlo_text.Instruction | None = None
  outer: Self | None = None

  @property
  def within(self) -> hlo_text.Computation:
    """Its instructions."""
    return self.computations[self.name]

  def inner(self, call: hlo_text.Instruction, name: str) -> 'Scope':
    """One of the computations that an instruction runs."""
    return Scope(self.computations, name, call, self)


def padded(scope: Scope, name: str) -> bool:
  """Whether an array is zero but for a part that depends on the device.

  Args:
    scope: where the array is.
    name: of the array.

  Returns:
    True where it is a part laid into zeros, or a choice between a part and
    zeros.
  """
  scope, one = _origin(scope, name)
  if one.opcode == 'dynamic-update-slice':
    return _zero(scope, one.operands[0])
  if one.opcode == 'select':
    return any(_zero(scope, branch) for branch in one.operands[1:])
  return False


def handed_round(scope: Scope) -> dict[str, int]:
  """Permutes of a loop's rings.

  Args:
    scope: the body of a loop.

  Returns:
    The name of each permute (or of its start) whose result goes, as it is,
    into the next round in the place it was taken from -> its bytes.
  """
  found = {}
  result = hlo_text.root(scope.within)
  if result.opcode != 'tuple':
    return {}
  for place, name in enumerate(result.operands):
    one, chain = scope.within[name], {}
    while one.opcode in _SAME | _PERMUTES:
      if one.opcode in _PERMUTES and not one.opcode.endswith('-done'):
        chain[one.name] = hlo_text.size(scope.within[one.operands[0]].shape)
      one = scope.within[one.operands[0]]
    if one.opcode != 'get-tuple-element' or place != _index(one):
      continue
    if scope.within[one.operands[0]].opcode == 'parameter':
      found |= chain
  return found


def _origin(scope: Scope, name: str) -> tuple[Scope, hlo_text.Instruction]:
  """What made an array, seen through copies and the walls of fusions."""
  one = scope.within[name]
  while True:
    if one.opcode in _SAME:
      one = scope.within[one.operands[0]]
    elif one.opcode == 'parameter' and _given(scope.call):
      place = int(one.attribute(r'^value=(\d+)'))
      name, scope = scope.call.operands[place], scope.outer
      one = scope.within[name]
    elif _fuses(one):
      scope = scope.inner(one, one.called[0])
      one = hlo_text.root(scope.within)
    elif one.opcode == 'get-tuple-element':
      source = scope.within[one.operands[0]]
      if _fuses(source):
        scope = scope.inner(source, source.called[0])
        source = hlo_text.root(scope.within)
      if source.opcode != 'tuple':
        return scope, one
      one = scope.within[source.operands[_index(one)]]
    else:
      return scope, one


def _zero(scope: Scope, name: str) -> bool:
  """Whether an array is zero everywhere."""
  scope, one = _origin(scope, name)
  if one.opcode == 'broadcast':
    return _zero(scope, one.operands[0])
  return one.literal == 0


def _index(one: hlo_text.Instruction) -> int:
  return int(one.attribute(r'index=(\d+)'))


def _given(call: hlo_text.Instruction | None) -> bool:
  """Whether parameters are the operands of who runs the computation."""
  return call is not None and call.opcode in ('fusion', 'call', 'async-start')


def _fuses(one: hlo_text.Instruction) -> bool:
  """Whether a result is that of the computation it runs."""
  return one.opcode in ('fusion', 'call')
