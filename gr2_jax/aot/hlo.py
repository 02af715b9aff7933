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
import itertools
import math
import re

from gr2_jax.aot import gathers, hlo_text

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


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction, and how often a device runs it."""

  kind: str  # of COLLECTIVES
  bytes: int  # its larger side: what goes in, or what comes out
  times: float
  shape: str
  gathered: float = 0.0  # bytes that it puts together of several devices' parts


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

  def largest_gather(self) -> Collective | None:
    """What puts most together at once, in any form that `gathers` knows."""
    found = max(self.collectives, key=lambda c: c.gathered, default=None)
    return found if found and found.gathered else None

  def largest_other(self) -> Collective | None:
    """The largest collective that gathers nothing, as far as can be seen."""
    others = (c for c in self.collectives if not c.gathered)
    return max(others, key=lambda c: c.bytes, default=None)

  def sent(self) -> float:
    """Bytes that leave the device, at most: an all-reduce goes round twice."""
    return sum(
      c.times * c.bytes * (2 if c.kind == 'all-reduce' else 1)
      for c in self.collectives
    )


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


def _collective(kind, one, scope, times) -> Collective:
  within = scope.within
  goes_in = sum(
    hlo_text.size(within[x].shape) for x in one.operands if x in within
  )
  comes_out = hlo_text.size(one.shape)
  if one.opcode.endswith('-start') and one.shape.startswith('('):
    comes_out -= goes_in  # The tuple holds the operands too.
  gathered = comes_out if kind == 'all-gather' else 0
  if kind == 'all-reduce' and 'reduce-scatter' in scope.name:
    kind = 'reduce-scatter'  # Its slice stands beside it in the fusion.
  if kind == 'all-reduce':
    gathered = sum(
      hlo_text.size(within[x].shape)
      for x in one.operands
      if gathers.padded(scope, x)
    )
  return Collective(kind, max(goes_in, comes_out), times, one.shape, gathered)


class _Module:
  """Computations by name, and the walk over those that run."""

  def __init__(self, text: str, unknown_trips: int):
    self._computations, self._entry = hlo_text.parse(text)
    self._unknown_trips = unknown_trips

  def account(self) -> Account:
    total, found = Account(), []
    entry = gathers.Scope(self._computations, self._entry)
    self._walk(entry, 1.0, 1.0, True, total, found)
    total.collectives = _once(found)
    return total

  def _walk(self, scope, times, trips, scheduled, total, found) -> None:
    """Adds a computation.

    Args:
      scope: the computation.
      times: it runs.
      trips: of the loop whose body it is.
      scheduled: False within a fusion.
      total: what is added to.
      found: its collectives, with what tells one from another.
    """
    within = scope.within
    handed = gathers.handed_round(scope) if trips > 1 else {}
    for one in within.values():
      if one.opcode in ('dot', 'convolution'):
        total.flops += times * self._flops(one, within)
      elif kind := _kind(one.opcode):
        channel = one.attribute(r'channel_id=(\d+)')
        channel = channel or f'{scope.name} {one.name}'
        added = _collective(kind, one, scope, times)
        if one.name in handed:
          added = dataclasses.replace(
            added, gathered=trips * sum(handed.values())
          )
        found.append((channel, added))
      if scheduled and one.opcode not in _FREE:
        total.bytes += times * self._traffic(one, within)
      if one.opcode == 'while':
        n = self._trips(one, within)
        total.unknown_loops += n is None
        n = self._unknown_trips if n is None else n
        body = scope.inner(one, one.attribute(r'body=%?([\w.\-]+)'))
        self._walk(body, times * n, n, True, total, found)
      elif one.opcode in ('fusion', 'call', 'async-start', 'conditional'):
        # Every branch of a conditional is counted: an upper bound.
        for called in one.called:
          inner = scope.inner(one, called)
          seen = scheduled and one.opcode != 'fusion'
          self._walk(inner, times, 1.0, seen, total, found)

  def _flops(self, one: hlo_text.Instruction, within) -> float:
    """Two a multiply-add, padding and dilation left out."""
    (_, out), *_ = hlo_text.arrays(one.shape)
    left, right = (
      hlo_text.arrays(within[x].shape)[0][1] for x in one.operands[:2]
    )
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

  def _traffic(self, one: hlo_text.Instruction, within) -> float:
    """Bytes of main memory that a scheduled instruction reads and writes."""
    operands = [within[x].shape for x in one.operands if x in within]
    if one.opcode.endswith(('-done', '-update')):
      return 0.0
    if one.opcode.endswith('-start'):  # The tuple holds both its sides.
      return hlo_text.stored(one.shape)
    if one.opcode == 'fusion':
      return self._fusion_traffic(one)
    if one.opcode in _SLICES:
      return 2.0 * hlo_text.stored(one.shape)
    if one.opcode == 'dynamic-update-slice':
      return 2.0 * hlo_text.stored(operands[1])
    return hlo_text.stored(one.shape) + sum(map(hlo_text.stored, operands))

  def _fusion_traffic(self, one: hlo_text.Instruction) -> float:
    """A fusion reads of a sliced operand the slice, and updates in place."""
    inner = self._computations[one.called[0]]
    readers = collections.defaultdict(list)
    for reader in inner.values():
      for place, operand in enumerate(reader.operands):
        readers[operand].append((reader, place))
    read, written = 0.0, hlo_text.stored(one.shape)
    for parameter in inner.values():
      if parameter.opcode != 'parameter' or not hlo_text.stored(
        parameter.shape
      ):
        continue
      uses = _through_bitcasts(parameter.name, readers)
      first = all(place == 0 for _, place in uses)
      opcodes = {reader.opcode for reader, _ in uses}
      if first and opcodes and opcodes <= _SLICES:
        read += sum(hlo_text.size(reader.shape) for reader, _ in uses)
      elif first and opcodes == {'dynamic-update-slice'}:
        for reader, _ in uses:
          written -= hlo_text.size(reader.shape)
          written += hlo_text.size(inner[reader.operands[1]].shape)
      else:
        read += hlo_text.stored(parameter.shape)
    return read + max(written, 0.0)

  def _trips(self, one: hlo_text.Instruction, within) -> float | None:
    """How often a loop runs: known, or `i < n` with i from a by a step."""
    known = one.attribute(r'known_trip_count"?:\{"?n"?:"?(\d+)')
    if known:
      return float(known)
    condition = self._computations[one.attribute(r'condition=%?([\w.\-]+)')]
    body = self._computations[one.attribute(r'body=%?([\w.\-]+)')]
    less = hlo_text.root(condition)
    if less.opcode == 'fusion':
      condition = self._computations[less.called[0]]
      less = hlo_text.root(condition)
    if less.opcode != 'compare' or 'direction=LT' not in less.attributes:
      return None
    counter, bound = (hlo_text.behind(condition, x) for x in less.operands)
    index = counter.attribute(r'index=(\d+)')
    end = bound.literal
    if counter.opcode != 'get-tuple-element' or end is None:
      return None
    result = hlo_text.root(body)
    begin = None
    carried = hlo_text.behind(within, one.operands[0])
    if carried.opcode == 'tuple':
      begin = hlo_text.behind(within, carried.operands[int(index)]).literal
    step = None
    if result.opcode == 'tuple':
      after = hlo_text.behind(body, result.operands[int(index)])
      if after.opcode == 'add':
        steps = (hlo_text.behind(body, x).literal for x in after.operands)
        step = next((x for x in steps if x is not None), None)
    # Counters that hide in a fusion are of XLA's making: from 0, by 1.
    return float(math.ceil((end - (begin or 0)) / (step or 1)))


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


def _through_bitcasts(name, readers) -> list[tuple[hlo_text.Instruction, int]]:
  """Who reads a value, names for the same bytes looked through."""
  found: list[tuple[hlo_text.Instruction, int]] = []
  for reader, place in readers[name]:
    if reader.opcode == 'bitcast':
      found += _through_bitcasts(reader.name, readers)
    else:
      found.append((reader, place))
  return found
