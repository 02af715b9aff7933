"""Reads the text of optimised HLO: computations, instructions, shapes."""

import dataclasses
import functools
import math
import re

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.+)$')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\]')
# The same with its layout, to see which memory it lies in.
_PLACED = re.compile(r'\b[a-z]\w*\[[\d,<=]*\](?:\{[^}]*\})?')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)'
  r'|(?:branch|called)_computations=\{([^}]*)\}'
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  def attribute(self, pattern: str) -> str | None:
    """The first group of a pattern in the attributes, or None."""
    found = re.search(pattern, self.attributes)
    return found.group(1) if found else None

  @property
  def called(self) -> list[str]:
    """Computations that this one runs, a loop's condition left out."""
    names = []
    for one, several in _CALLED.findall(self.attributes):
      names += [one] if one else re.findall(r'[\w.\-]+', several)
    return names

  @property
  def literal(self) -> int | None:
    """The value of an integer constant, or None."""
    if self.opcode != 'constant':
      return None
    found = self.attribute(r'^value=(-?\d+)(?![\d.])')
    return int(found) if found else None


# Its instructions by name, in their order.
Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """Splits a module into computations.

  Args:
    text: `compiled.as_text()`.

  Returns:
    The computations by name, and the name of the entry.

  Raises:
    ValueError: there is no entry computation in the text.
  """
  computations: dict[str, Computation] = {}
  entry = inside = None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      inside = computations[header.group(2)] = {}
      entry = header.group(2) if header.group(1) else entry
    elif inside is not None and (found := _INSTRUCTION.match(line)):
      one = _instruction(*found.groups())
      inside[one.name] = one
  if entry is None:
    raise ValueError('no ENTRY computation: this is no HLO module')
  return computations, entry


def root(within: Computation) -> Instruction:
  """What a computation returns."""
  return next(one for one in within.values() if one.is_root)


def behind(within: Computation, name: str) -> Instruction:
  """The instruction that a chain of copies begins with."""
  one = within[name]
  while one.opcode in ('copy', 'bitcast', 'convert') and one.operands:
    one = within[one.operands[0]]
  return one


def arrays(shape: str) -> list[tuple[float, tuple[int, ...]]]:
  """Bytes of an element and dimensions of each array in a shape's text."""
  return [
    (_itemsize(dtype), tuple(int(d.strip('<=')) for d in dims.split(',') if d))
    for dtype, dims in _ARRAY.findall(shape)
  ]


def size(shape: str) -> int:
  """Bytes of a shape's text, tuples summed: `(f32[2,3]{1,0}, s32[])` is 28."""
  return int(sum(item * math.prod(dims) for item, dims in arrays(shape)))


def stored(shape: str) -> float:
  """Bytes of a shape's arrays that lie in main memory: no space S(n)."""
  found = _PLACED.findall(shape)
  return float(sum(size(array) for array in found if 'S(' not in array))


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
  """Splits `shape opcode(operands), attributes`."""
  cut = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:cut], rest[cut:].lstrip()
  begin = rest.index('(')
  end = _closing(rest, begin)
  inside = rest[begin + 1 : end]
  opcode = rest[:begin]
  operands = tuple(re.findall(r'%([\w.\-]+)', inside))
  attributes = rest[end + 1 :]
  if opcode in ('constant', 'parameter'):
    attributes = f'value={inside}{attributes}'
  return Instruction(name, shape, opcode, operands, attributes, bool(root))


def _closing(text: str, begin: int) -> int:
  """Index of the parenthesis that closes the one at `begin`."""
  depth = 0
  for match in re.compile('[()]').finditer(text, begin):
    depth += 1 if match.group() == '(' else -1
    if not depth:
      return match.start()
  raise ValueError(f'a parenthesis is not closed: {text[:80]!r}')


@functools.cache
def _itemsize(dtype: str) -> float:
  """Bytes of an element; 0 for what is no array, as `token`."""
  if dtype == 'pred':
    return 1.0
  bits = re.fullmatch(r'(?:bf|f|s|u|c)(\d+)\w*', dtype)
  return int(bits.group(1)) / 8 if bits else 0.0
