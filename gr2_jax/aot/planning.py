"""Whether a training step fits a TPU slice, and how fast it could be there.

Each program of the step is compiled for the slice, and its memory, its work and
its collectives are read off: `hlo` counts what runs in loops as often as it
runs. The seconds are a roofline: as if every program were as fast as the
scarcest of its resources (matrix units, memory, network), all else for free.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from absl import flags

from gr2_jax.aot import abstract, hlo, topologies
from gr2_jax.pipeline import reporting

LEVELS = ('O0', 'O1', 'O2', 'O3')  # How hard XLA tries.
COLUMNS = (
  'program',
  'GB a chip',
  '% of HBM',
  'TFLOP',
  'GB moved',
  'GB sent',
  'seconds',
  'bound by',
  'compiled in',
)


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function, as one chip sees it."""

  name: str
  memory: float  # bytes at its peak, with what stays beside it
  compile_seconds: float
  runs: int = 1  # in a step
  account: hlo.Account | None = None  # None: it did not fit

  def seconds(self, chip: topologies.Chip) -> dict[str, float]:
    """Of each resource, if it alone were the limit."""
    found = self.account
    return {
      'compute': found.flops / chip.flops,
      'memory': found.bytes / chip.hbm_bandwidth,
      'network': found.sent() / chip.ici_bandwidth,
    }


@dataclasses.dataclass(frozen=True)
class Report:
  """A step on a slice."""

  topology: str
  mesh: dict[str, int]
  parameters: int
  parameter_bytes: int  # of the whole tree, in the dtype of activations
  layer_bytes: int  # of one layer, likewise
  state_bytes: int  # of parameters and optimizer, on one chip
  load: abstract.Load
  group: int
  completion: int
  programs: tuple[Program, ...]

  @property
  def chip(self) -> topologies.Chip:
    """What it runs on."""
    return topologies.chip(self.topology)

  @property
  def fits(self) -> bool:
    """Whether every program fits into a chip's memory."""
    return all(
      p.account is not None and p.memory <= self.chip.hbm for p in self.programs
    )

  @property
  def seconds(self) -> float:
    """A step, if each program were as fast as its scarcest resource."""
    return sum(
      p.runs * max(p.seconds(self.chip).values()) for p in self.programs
    )


def read(lowered: abstract.Lowered) -> Program:
  """Compiles a program and adds up what it does.

  Returns:
    The program; without an account where the compiler ran out of memory.

  Raises:
    TopologyError: jaxlib and libtpu are no pair.
  """
  name, beside, runs = lowered.name, lowered.beside, lowered.runs
  begin = time.monotonic()
  try:
    compiled = lowered.program.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    size = wanted(str(e)) + beside
    return Program(name, size, time.monotonic() - begin, runs)
  seconds = time.monotonic() - begin
  memory = compiled.memory_analysis()
  peak = (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  try:
    written = compiled.as_text()
  except jax.errors.JaxRuntimeError as e:
    raise topologies.TopologyError(
      f'{name}: this libtpu writes programs that jaxlib {jax.lib.__version__} '
      'cannot read; take the version that jax[tpu] asks for'
    ) from e
  account = hlo.account(written, lowered.unknown_trips)
  return Program(name, peak + beside, seconds, runs, account)


def wanted(message: str) -> float:
  """Bytes that the compiler asked for in vain, as far as it says so; else inf.

  It stops at what it sees first: all memory, or temporaries alone.
  """
  found = re.search(
    r'(?:Used |temporaries \()([\d.]+)([KMGT])\)? (?:of|exceeds)', message
  )
  if not found:
    return math.inf
  return float(found.group(1)) * 1024 ** ('KMGT'.index(found.group(2)) + 1)


def plan(
  config, topology: str, load: abstract.Load, stop_early: bool = False
) -> Report:
  """Compiles a step for a slice.

  Args:
    config: of `configs/rl.py`.
    topology: of `topologies.slices`.
    load: what the data would say.
    stop_early: begin with the update, and leave the rollouts out where it
      does not fit.
  """
  mesh = abstract.open_mesh(config, topology, load.slates)
  setup = abstract.make_setup(config, mesh, load.text_rows)
  stage = config.rl
  found = []
  chip = topologies.chip(topology)
  waiting = abstract.lower(stage, setup, load)
  for lowered in reversed(waiting) if stop_early else waiting:
    found.append(read(lowered))
    if stop_early and not (found[-1].account and found[-1].memory <= chip.hbm):
      break
  params = setup.abstract_params()
  number, layers = (
    sum(x.size for x in jax.tree.leaves(tree))
    for tree in (params, params['layers'])
  )
  item = jnp.dtype(setup.model.dtype).itemsize
  return Report(
    topology=topology,
    mesh=dict(mesh.shape),
    parameters=number,
    parameter_bytes=number * item,
    layer_bytes=layers * item // setup.model.num_layers,
    state_bytes=abstract.state_bytes(config.rl, setup),
    load=load,
    group=stage.group_size,
    completion=setup.sampling(1, stage.thinking, 1.0, True).max_tokens,
    programs=tuple(found),
  )


def roomy(
  config, family: str, load: abstract.Load
) -> Iterator[tuple[str, int]]:
  """Slices of a family that are not ruled out before anything is compiled.

  Args:
    config: of `configs/rl.py`; its mesh is left open.
    family: of `topologies.CHIPS`.
    load: what the data would say.

  Yields:
    Topologies, small to large, and `abstract.least_bytes` there.

  Raises:
    TopologyError: no such family, or `libtpu` is not installed.
  """
  config = config.copy_and_resolve_references()
  config.mesh.update(data=-1, fsdp=1, tensor=1)
  for topology in topologies.slices(family):
    try:
      mesh = abstract.open_mesh(config, topology, load.slates)
      setup = abstract.make_setup(config, mesh, load.text_rows)
      size = abstract.least_bytes(config.rl, setup, load)
    except topologies.TopologyError:
      raise
    except ValueError:  # Heads or width that so many chips do not split.
      continue
    if size <= topologies.chip(topology).hbm:
      yield topology, size


def suggest(
  config,
  family: str,
  load: abstract.Load,
  known: Report | None = None,
  say: Callable[[str], None] = print,
) -> Report | None:
  """The smallest slice of a family that a step fits on, by compiling.

  Args:
    config: of `configs/rl.py`; its mesh is left open.
    family: of `topologies.CHIPS`.
    load: what the data would say.
    known: of a slice of that family, not compiled for again.
    say: is told of every slice that was compiled for.

  Returns:
    The report of that slice, or None where not even the largest will do.

  Raises:
    TopologyError: no such family, or `libtpu` is not installed.
  """
  config = config.copy_and_resolve_references()
  config.mesh.update(data=-1, fsdp=1, tensor=1)
  for topology, _ in roomy(config, family, load):
    if known and known.topology == topology and known.fits:
      return known
    report = plan(config, topology, load, stop_early=True)
    say(summary(report))
    if report.fits:
      return report
  return None


def summary(report: Report) -> str:
  """One line: the slice, whether the step fits, and how long it takes."""
  most = max(p.memory for p in report.programs)
  share = most / report.chip.hbm
  mesh = ' '.join(f'{name}={n}' for name, n in report.mesh.items())
  took = sum(p.compile_seconds for p in report.programs)
  verdict = (
    f'fits, at best {report.seconds:.2f} s a step'
    if report.fits
    else 'does not fit'
  )
  stopped = any(p.account is None for p in report.programs)
  return (
    f'{report.topology} ({mesh}): {"at least " * stopped}'
    f'{most / 1e9:.1f} GB a chip, {share:.0%} of '
    f'its HBM: {verdict} (compiled in {took:.0f} s)'
  )


def text(report: Report) -> str:
  """The whole report: memory, work, collectives, seconds."""
  load, chip = report.load, report.chip
  rows = []
  for program in report.programs:
    row = {
      'program': program.name,
      'GB a chip': program.memory / 1e9,
      '% of HBM': f'{program.memory / chip.hbm:.1%}',
      'compiled in': f'{program.compile_seconds:.0f} s',
    }
    if found := program.account:
      seconds = program.seconds(chip)
      row |= {
        'TFLOP': found.flops / 1e12,
        'GB moved': found.bytes / 1e9,
        'GB sent': found.sent() / 1e9,
        'seconds': max(seconds.values()),
        'bound by': max(seconds, key=seconds.get),
      }
    rows.append(row)
  lines = [
    f'{report.parameters / 1e9:.2f} B parameters; with optimizer '
    f'{report.state_bytes / 1e9:.2f} GB a chip',
    f'a step: {load.slates} slates x {report.group} rollouts, prompts of '
    f'{load.prompt_tokens} tokens, completions of {report.completion}',
    '',
    reporting.table(rows, COLUMNS),
    '',
  ]
  for program in report.programs:
    if program.account is None:
      lines.append(f'{program.name}: does not fit; the compiler gave up')
      continue
    for kind, (times, size) in program.account.by_kind().items():
      lines.append(f'{program.name}: {times:,.0f} {kind}, {size / 1e9:.2f} GB')
    if loops := program.account.unknown_loops:
      lines.append(
        f'{program.name}: {loops} loop ends when the data says so, and is '
        'counted in full'
      )
    lines += gathered(program, report)
  return '\n'.join([*lines, '', summary(report)])


def gathered(program: Program, report: Report) -> list[str]:
  """Lines that say how much of the parameters a device holds together at once.

  Args:
    program: compiled.
    report: it is of.
  """
  tree = report.parameter_bytes
  lines = []
  if most := program.account.largest_gather():
    lines.append(
      f'{program.name}: gathers at most {most.gathered / 1e9:.3f} GB at once '
      f'({most.kind}), {most.gathered / tree:.1%} of all parameters, '
      f'{most.gathered / report.layer_bytes:.2f} layers'
    )
  if other := program.account.largest_other():
    lines.append(
      f'{program.name}: its largest other collective is {other.kind}, '
      f'{other.bytes / 1e9:.3f} GB, {other.bytes / tree:.1%}'
    )
  lines.append(
    f'{program.name}: its peak is {program.memory / tree:.1%} of the bytes of '
    'all parameters'
  )
  return lines


def define_flags() -> None:
  """The flags of a load, for this module and for the planner."""
  flags.DEFINE_integer('slates', abstract.Load.slates, 'Slates of a step.', 1)
  flags.DEFINE_integer(
    'prompt_tokens', abstract.Load.prompt_tokens, 'Of a prompt.', 2
  )
  flags.DEFINE_integer(
    'text_rows',
    abstract.Load.text_rows,
    'Rows of the embedding before our symbols.',
    1,
  )
  flags.DEFINE_enum(
    'level', 'O1', LEVELS, 'How hard XLA tries; O2 is what a run compiles with.'
  )


def load_of(values: flags.FlagValues) -> abstract.Load:
  """What `define_flags` was given; the compiler is set, too."""
  jax.config.update('jax_optimization_level', values.level)
  return abstract.Load(values.slates, values.prompt_tokens, values.text_rows)
