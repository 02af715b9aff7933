"""Work of one device in a program: FLOPs, bytes moved and collectives.

XLA's `cost_analysis()` counts the body of a loop once, and a decoder's layers
are a loop. Here a loop counts as often as it runs. FLOPs come from the traced
program, bytes and collectives from the text of the compiled one.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

from jax.extend import core

KINDS = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
  'collective-permute',
)  # fmt: skip

# Opcodes that move no bytes themselves.
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all',
  'iota', 'partition-id', 'replica-id', 'while', 'conditional', 'call',
  'opt-barrier',
}  # fmt: skip
_SLICES = {'dynamic-slice', 'slice', 'gather'}

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_INSTRUCTION = re.compile(
  r'^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$'
)
# Data type, dimensions and layout, where `S(n)` is a memory other than HBM.
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)'
  r'|(?:branch|called)_computations=\{([^}]*)\}'
)


class Collective(NamedTuple):
  """One collective instruction, and how often a device runs it."""

  kind: str  # of KINDS
  bytes: int  # of its operands or its result, whichever is larger
  times: float


@dataclasses.dataclass
class Costs:
  """Counts of one device in one call of a compiled program."""

  bytes: float = 0.0  # to and from main memory
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  unknown_loops: int = 0  # loops whose trip count depends on the data

  @property
  def largest(self) -> Collective | None:
    """The collective of the most bytes."""
    return max(self.collectives, key=lambda c: c.bytes, default=None)

  @property
  def sent(self) -> float:
    """Upper bound of the bytes sent; an all-reduce sends its bytes twice."""
    return sum(
      c.times * c.bytes * (2 if c.kind == 'all-reduce' else 1)
      for c in self.collectives
    )

  def by_kind(self) -> dict[str, tuple[float, float]]:
    """Kind -> number of collectives run, and their bytes."""
    totals = {}
    for kind, size, times in self.collectives:
      count, total = totals.get(kind, (0.0, 0.0))
      totals[kind] = (count + times, total + times * size)
    return dict(sorted(totals.items()))


def flops(jaxpr: core.Jaxpr, unknown_trips: int = 1) -> float:
  """FLOPs of a traced program's matrix products, summed over devices.

  A multiply-add is two FLOPs. Every branch of a conditional counts.

  Args:
    jaxpr: `jitted.trace(...).jaxpr.jaxpr`.
    unknown_trips: of each `while` loop; a `scan` has a known length.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    trips = {'scan': eqn.params.get('length'), 'while': unknown_trips}
    if eqn.primitive.name == 'dot_general':
      (axes, _), _ = eqn.params['dimension_numbers']
      depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in axes)
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth
    for inner in core.jaxprs_in_params(eqn.params):
      total += trips.get(eqn.primitive.name, 1) * flops(inner, unknown_trips)
  return total


def size(shape: str, main_memory: bool = False) -> float:
  """Bytes of a shape, tuples summed: `(f32[2,3]{1,0}, s32[])` is 28.

  Args:
    shape: as HLO writes it.
    main_memory: leave out arrays that lie in another memory.
  """
  total = 0.0
  for dtype, dims, layout in _ARRAY.findall(shape):
    bits = 8 if dtype == 'pred' else int((re.findall(r'\d+', dtype) or [0])[0])
    if not (main_memory and 'S(' in layout):
      count = math.prod(int(n.strip('<=')) for n in dims.split(',') if n)
      total += count * bits / 8
  return total


_stored = functools.partial(size, main_memory=True)


def read(text: str, unknown_trips: int = 1) -> Costs:
  """Adds up the instructions that a compiled program runs.

  Args:
    text: `compiled.as_text()`.
    unknown_trips: of each loop whose trip count depends on the data.

  Raises:
    ValueError: the text has no entry computation.
  """
  module, entry = _parse(text)
  costs = Costs()
  # An asynchronous collective stands in each fusion that runs beside it, always
  # with the same channel.
  by_channel: dict[str, Collective] = {}

  def add(name: str, times: float, in_fusion: bool) -> None:
    for one in module[name].values():
      if one.opcode.removesuffix('-start') in KINDS:
        channel = one.field(r'channel_id=(\d+)') or f'{name} {one.name}'
        new = _collective(one, module[name], name, times)
        old = by_channel.get(channel, new)
        by_channel[channel] = min(old, new, key=lambda c: c.times)
      if not in_fusion and one.opcode not in _FREE:
        costs.bytes += times * _traffic(module, module[name], one)
      if one.opcode == 'while':
        trips = _trips(module, one)
        costs.unknown_loops += trips is None
        trips = unknown_trips if trips is None else trips
        add(one.field(r'body=%?([\w.\-]+)'), times * trips, in_fusion)
      elif one.opcode in ('fusion', 'call', 'async-start', 'conditional'):
        for called in one.called:
          add(called, times, in_fusion or one.opcode == 'fusion')

  add(entry, 1.0, in_fusion=False)
  costs.collectives = list(by_channel.values())
  return costs


class _Instruction(NamedTuple):
  """One line of HLO: `name = shape opcode(operands), attributes`."""

  root: str | None  # set in the instruction that a computation returns
  name: str
  shape: str
  opcode: str
  operands: list[str]
  rest: str  # of the line, after the first parenthesis

  def field(self, pattern: str) -> str | None:
    """The first group of a pattern in the attributes."""
    match = re.search(pattern, self.rest)
    return match[1] if match else None

  @property
  def called(self) -> list[str]:
    """Computations that it runs, without the condition of a loop."""
    names = ' '.join(map(' '.join, _CALLED.findall(self.rest)))
    return re.findall(r'[\w.\-]+', names)

  @property
  def literal(self) -> int | None:
    """The value of an integer constant."""
    value = self.opcode == 'constant' and self.field(r'^(-?\d+)\)')
    return int(value) if value else None


_Computation = dict[str, _Instruction]
_Module = dict[str, _Computation]


def _parse(text: str) -> tuple[_Module, str]:
  """Splits HLO text into computations; the second is the entry's name."""
  module, entry, inside = {}, '', {}
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      inside = module[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif match := _INSTRUCTION.match(line):
      *parts, rest = match.groups()
      operands = re.findall(r'%([\w.\-]+)', rest.partition(')')[0])
      inside[match[2]] = _Instruction(*parts, operands, rest)
  if not entry:
    raise ValueError('no ENTRY computation: this is no HLO module')
  return module, entry


def _root(computation: _Computation) -> _Instruction:
  return next(one for one in computation.values() if one.root)


def _source(within: _Computation, name: str) -> _Instruction:
  """The instruction at the beginning of a chain of copies."""
  one = within[name]
  while one.opcode in ('copy', 'bitcast', 'convert'):
    one = within[one.operands[0]]
  return one


def _trips(module: _Module, loop: _Instruction) -> int | None:
  """Trips of `for (i = 0; i < n; i += step)`; None where n is not known."""
  if known := loop.field(r'known_trip_count"?:\{"?n"?:"?(\d+)'):
    return int(known)
  condition = module[loop.field(r'condition=%?([\w.\-]+)')]
  less = _root(condition)
  if less.opcode != 'compare' or 'direction=LT' not in less.rest:
    return None
  counter, end = (_source(condition, x) for x in less.operands)
  index = counter.field(r'index=(\d+)')
  if end.literal is None or index is None:
    return None
  body, steps = module[loop.field(r'body=%?([\w.\-]+)')], []
  if _root(body).opcode == 'tuple':
    after = _source(body, _root(body).operands[int(index)])
    if after.opcode == 'add':
      steps = [_source(body, x).literal for x in after.operands]
  return math.ceil(end.literal / next(filter(None, steps), 1))


def _traffic(module: _Module, within: _Computation, one: _Instruction) -> float:
  """Bytes of main memory that an instruction reads and writes."""
  if one.opcode.endswith(('-done', '-update')):
    return 0.0
  if one.opcode.endswith('-start'):  # Its tuple has operands and results.
    return _stored(one.shape)
  if one.opcode in _SLICES:
    return 2.0 * _stored(one.shape)
  if one.opcode == 'dynamic-update-slice':
    return 2.0 * _stored(within[one.operands[1]].shape)
  if one.opcode != 'fusion':
    operands = (within[x].shape for x in one.operands if x in within)
    return _stored(one.shape) + sum(map(_stored, operands))
  # A fusion may read, or replace, only a slice of an operand.
  fused = module[one.called[0]]
  read, written = 0.0, _stored(one.shape)
  for parameter in fused.values():
    if parameter.opcode != 'parameter' or not _stored(parameter.shape):
      continue
    users = [x for x in fused.values() if parameter.name in x.operands]
    opcodes = {
      x.opcode if x.operands.index(parameter.name) == 0 else '' for x in users
    }
    if opcodes and opcodes <= _SLICES:
      read += sum(size(x.shape) for x in users)
    elif opcodes == {'dynamic-update-slice'}:
      for x in users:
        written += size(fused[x.operands[1]].shape) - size(x.shape)
    else:
      read += _stored(parameter.shape)
  return read + max(written, 0.0)


def _collective(
  one: _Instruction, within: _Computation, computation: str, times: float
) -> Collective:
  kind = one.opcode.removesuffix('-start')
  if kind == 'all-reduce' and 'reduce-scatter' in computation:
    kind = 'reduce-scatter'  # A fusion takes its slice of the sum.
  operands = sum(size(within[x].shape) for x in one.operands if x in within)
  result = size(one.shape)
  if one.opcode.endswith('-start') and one.shape.startswith('('):
    result -= operands  # The tuple holds the operands, too.
  return Collective(kind, int(max(operands, result)), times)
