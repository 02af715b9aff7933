"""What a compiled program does, read from its optimised HLO text.

XLA's own `cost_analysis()` counts the body of a loop once, and a decoder's
layers are a loop. Here every instruction is weighed by how often it runs: trip
counts are read from the text, from `known_trip_count` or from a loop's
condition and step; the caller names the one of loops that end when the data
says so.

All counts are of one device.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)

# Opcodes that move nothing: names for what is there already.
_FREE = frozenset(
  (
    'parameter',
    'constant',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'after-all',
    'iota',
    'partition-id',
    'replica-id',
    'while',
    'conditional',
    'call',
    'opt-barrier',
  )
)
_SLICES = frozenset(('dynamic-slice', 'slice', 'gather'))
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


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction, and how often a device runs it."""

  kind: str  # of COLLECTIVES
  bytes: int  # its larger side: what goes in, or what comes out
  times: float
  shape: str


@dataclasses.dataclass
class Account:
  """What one device does in one call."""

  flops: float = 0.0  # of matrix products: two a multiply-add
  bytes: float = 0.0  # to and from memory
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  unknown_loops: int = 0  # loops whose trip count the text does not give

  def by_kind(self) -> dict[str, tuple[float, float]]:
    """Kind -> how many run, and their bytes."""
    found = {kind: [0.0, 0.0] for kind in COLLECTIVES}
    for one in self.collectives:
      found[one.kind][0] += one.times
      found[one.kind][1] += one.times * one.bytes
    return {kind: (n, size) for kind, (n, size) in found.items() if n}

  def largest(self) -> Collective | None:
    """The largest collective of any kind; None without any.

    Of any, since a compiler may write a gather as a sum of padded parts.
    """
    return max(self.collectives, key=lambda c: c.bytes, default=None)

  def sent(self) -> float:
    """Bytes that leave the device, at most: an all-reduce goes round twice."""
    return sum(
      c.times * c.bytes * (2 if c.kind == 'all-reduce' else 1)
      for c in self.collectives
    )


def arrays(shape: str) -> list[tuple[float, tuple[int, ...]]]:
  """Bytes of an element and dimensions of each array in a shape's text."""
  return [
    (_itemsize(dtype), tuple(int(d.strip('<=')) for d in dims.split(',') if d))
    for dtype, dims in _ARRAY.findall(shape)
  ]


def size(shape: str) -> int:
  """Bytes of a shape's text, tuples summed: `(f32[2,3]{1,0}, s32[])` is 28."""
  return int(sum(item * math.prod(dims) for item, dims in arrays(shape)))


def account(text: str, unknown_trips: int = 1) -> Account:
  """Adds up what a module's entry computation runs.

  Args:
    text: `compiled.as_text()`.
    unknown_trips: of loops whose count the text does not give.

  Returns:
    The account.

  Raises:
    ValueError: there is no entry computation in the text.
  """
  return _Module(text, unknown_trips).account()


def _once(found: list[tuple[str, Collective]]) -> list[Collective]:
  """An asynchronous collective stands in all fusions that it runs beside.

  They share its channel; some are in loops within the one that it is of.
  """
  kept: dict[str, Collective] = {}
  for channel, one in found:
    if channel not in kept or one.times < kept[channel].times:
      kept[channel] = one
  return list(kept.values())


class _Module:
  """Computations by name, and the walk over those that run."""

  def __init__(self, text: str, unknown_trips: int):
    self._computations: dict[str, dict[str, Instruction]] = {}
    self._unknown_trips = unknown_trips
    self._entry = None
    inside = None
    for line in text.splitlines():
      if header := _COMPUTATION.match(line):
        inside = self._computations[header.group(2)] = {}
        self._entry = header.group(2) if header.group(1) else self._entry
      elif inside is not None and (found := _INSTRUCTION.match(line)):
        one = _parse(*found.groups())
        inside[one.name] = one
    if self._entry is None:
      raise ValueError('no ENTRY computation: this is no HLO module')

  def account(self) -> Account:
    total, found = Account(), []
    self._walk(self._entry, 1.0, True, total, found)
    total.collectives = _once(found)
    return total

  def _walk(self, name, times, scheduled, total, found) -> None:
    """Adds a computation; `scheduled` is False within a fusion."""
    within = self._computations[name]
    for one in within.values():
      if one.opcode in ('dot', 'convolution'):
        total.flops += times * self._flops(one, within)
      elif kind := _kind(one.opcode):
        channel = one.attribute(r'channel_id=(\d+)') or f'{name} {one.name}'
        found.append((channel, self._collective(kind, one, name, times)))
      if scheduled and one.opcode not in _FREE:
        total.bytes += times * self._traffic(one, within)
      if one.opcode == 'while':
        trips = self._trips(one, within)
        total.unknown_loops += trips is None
        trips = self._unknown_trips if trips is None else trips
        body = one.attribute(r'body=%?([\w.\-]+)')
        self._walk(body, times * trips, True, total, found)
      elif one.opcode in ('fusion', 'call', 'async-start', 'conditional'):
        # Every branch of a conditional is counted: an upper bound.
        for called in one.called:
          inside = scheduled and one.opcode != 'fusion'
          self._walk(called, times, inside, total, found)

  def _collective(self, kind, one, name, times) -> Collective:
    within = self._computations[name]
    goes_in = sum(size(within[x].shape) for x in one.operands if x in within)
    comes_out = size(one.shape)
    if one.opcode.endswith('-start') and one.shape.startswith('('):
      comes_out -= goes_in  # The tuple holds the operands too.
    if kind == 'all-reduce' and 'reduce-scatter' in name:
      kind = 'reduce-scatter'  # Its slice stands beside it in the fusion.
    return Collective(kind, max(goes_in, comes_out), times, one.shape)

  def _flops(self, one: Instruction, within) -> float:
    """Two a multiply-add, padding and dilation left out."""
    (_, out), *_ = arrays(one.shape)
    left, right = (arrays(within[x].shape)[0][1] for x in one.operands[:2])
    if one.opcode == 'dot':
      axes = one.attribute(r'lhs_contracting_dims=\{([\d,]*)\}') or ''
      depth = math.prod(left[int(a)] for a in axes.split(',') if a)
      return 2.0 * math.prod(out) * depth
    labels = one.attribute(r'dim_labels=([\w]+_[\w]+->[\w]+)')
    of_left, of_right, of_out = re.split('_|->', labels)
    window = one.attribute(r'window=\{([^}]*)\}') or ''
    taps = 1.0
    for number, kernel in enumerate(_window(window, 'size', 'x')):
      axis = str(number)
      taps *= _taps(
        left[of_left.index(axis)],
        out[of_out.index(axis)],
        int(kernel),
        stride=int(_window(window, 'stride', 'x', number, '1')),
        pad=int(_window(window, 'pad', 'x', number, '0_0').split('_')[0]),
        lhs_dilate=int(_window(window, 'lhs_dilate', 'x', number, '1')),
        rhs_dilate=int(_window(window, 'rhs_dilate', 'x', number, '1')),
      )
    batch, features = out[of_out.index('b')], out[of_out.index('f')]
    depth = right[of_right.index('i')]
    groups = int(one.attribute(r'batch_group_count=(\d+)') or 1)
    return 2.0 * batch * features * depth * taps / groups

  def _traffic(self, one: Instruction, within) -> float:
    """Bytes of main memory that a scheduled instruction reads and writes."""
    operands = [within[x].shape for x in one.operands if x in within]
    if one.opcode.endswith(('-done', '-update')):
      return 0.0
    if one.opcode.endswith('-start'):  # The tuple holds both its sides.
      return _stored(one.shape)
    if one.opcode == 'fusion':
      return self._fusion_traffic(one)
    if one.opcode in _SLICES:
      return 2.0 * _stored(one.shape)
    if one.opcode == 'dynamic-update-slice':
      return 2.0 * _stored(operands[1])
    return _stored(one.shape) + sum(map(_stored, operands))

  def _fusion_traffic(self, one: Instruction) -> float:
    """A fusion reads of a sliced operand the slice, and updates in place."""
    inner = self._computations[one.called[0]]
    readers = collections.defaultdict(list)
    for reader in inner.values():
      for place, operand in enumerate(reader.operands):
        readers[operand].append((reader, place))
    read, written = 0.0, _stored(one.shape)
    for parameter in inner.values():
      if parameter.opcode != 'parameter' or not _stored(parameter.shape):
        continue
      uses = _through_bitcasts(parameter.name, readers)
      first = all(place == 0 for _, place in uses)
      opcodes = {reader.opcode for reader, _ in uses}
      if first and opcodes and opcodes <= _SLICES:
        read += sum(size(reader.shape) for reader, _ in uses)
      elif first and opcodes == {'dynamic-update-slice'}:
        for reader, _ in uses:
          written -= size(reader.shape)
          written += size(inner[reader.operands[1]].shape)
      else:
        read += _stored(parameter.shape)
    return read + max(written, 0.0)

  def _trips(self, one: Instruction, within) -> float | None:
    """How often a loop runs: known, or `i < n` with i from a by a step."""
    known = one.attribute(r'known_trip_count"?:\{"?n"?:"?(\d+)')
    if known:
      return float(known)
    condition = self._computations[one.attribute(r'condition=%?([\w.\-]+)')]
    body = self._computations[one.attribute(r'body=%?([\w.\-]+)')]
    less = next(x for x in condition.values() if x.is_root)
    if less.opcode == 'fusion':
      condition = self._computations[less.called[0]]
      less = next(x for x in condition.values() if x.is_root)
    if less.opcode != 'compare' or 'direction=LT' not in less.attributes:
      return None
    counter, bound = (_behind(condition, x) for x in less.operands)
    index = counter.attribute(r'index=(\d+)')
    end = _literal(bound)
    if counter.opcode != 'get-tuple-element' or end is None:
      return None
    result = next(x for x in body.values() if x.is_root)
    begin = None
    carried = _behind(within, one.operands[0])
    if carried.opcode == 'tuple':
      begin = _literal(_behind(within, carried.operands[int(index)]))
    step = None
    if result.opcode == 'tuple':
      after = _behind(body, result.operands[int(index)])
      if after.opcode == 'add':
        steps = (_literal(_behind(body, x)) for x in after.operands)
        step = next((x for x in steps if x is not None), None)
    # Counters that hide in a fusion are of XLA's making: from 0, by 1.
    return float(math.ceil((end - (begin or 0)) / (step or 1)))


def _parse(root: str | None, name: str, rest: str) -> Instruction:
  """Splits `shape opcode(operands), attributes`."""
  cut = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:cut], rest[cut:].lstrip()
  begin = rest.index('(')
  end = _closing(rest, begin)
  inside = rest[begin + 1 : end]
  opcode = rest[:begin]
  operands = tuple(re.findall(r'%([\w.\-]+)', inside))
  attributes = rest[end + 1 :]
  if opcode == 'constant':
    attributes = f'value={inside}{attributes}'
  return Instruction(name, shape, opcode, operands, attributes, bool(root))


def _stored(shape: str) -> float:
  """Bytes of a shape's arrays that lie in main memory: no space S(n)."""
  found = _PLACED.findall(shape)
  return float(sum(size(array) for array in found if 'S(' not in array))


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


def _kind(opcode: str) -> str | None:
  base = opcode.removesuffix('-start')
  return base if base in COLLECTIVES else None


def _window(text, key, separator, number=None, default=''):
  """A field of a convolution's window: all its parts, or one."""
  found = re.search(rf'\b{key}=(\S+)', text)
  parts = found.group(1).split(separator) if found else []
  if number is None:
    return parts
  return parts[number] if parts else default


def _taps(size_in, size_out, kernel, *, stride, pad, lhs_dilate, rhs_dilate):
  """Pairs of an output place and a kernel place that meet an input."""
  reach = (size_in - 1) * lhs_dilate
  return sum(
    0 <= at <= reach and at % lhs_dilate == 0
    for at in (
      out * stride + place * rhs_dilate - pad
      for out, place in itertools.product(range(size_out), range(kernel))
    )
  )


def _through_bitcasts(name, readers) -> list[tuple[Instruction, int]]:
  """Who reads a value, names for the same bytes looked through."""
  found: list[tuple[Instruction, int]] = []
  for reader, place in readers[name]:
    if reader.opcode == 'bitcast':
      found += _through_bitcasts(reader.name, readers)
    else:
      found.append((reader, place))
  return found


def _behind(within: dict[str, Instruction], name: str) -> Instruction:
  """The instruction that a chain of copies begins with."""
  one = within[name]
  while one.opcode in ('copy', 'bitcast', 'convert') and one.operands:
    one = within[one.operands[0]]
  return one


def _literal(one: Instruction) -> int | None:
  """The value of an integer constant, or None."""
  found = one.attribute(r'^value=(-?\d+)') if one.opcode == 'constant' else None
  return int(found) if found else None
