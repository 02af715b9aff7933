"""Whether a training step fits a TPU slice, and how fast it could be there.

Each program of the step is compiled for the slice. The seconds are a roofline:
each program runs as fast as the scarcest of its resources (matrix units,
memory, network) allows, as if the others cost nothing.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator

import jax
import ml_collections
from absl import flags

from gr2_jax.aot import abstract, costs, topologies
from gr2_jax.pipeline import reporting

LEVELS = ('O0', 'O1', 'O2', 'O3')  # XLA's effort.
COLUMNS = (
  'program', 'GB a chip', '% of HBM', 'TFLOP', 'GB moved', 'GB sent', 'seconds',
  'bound by', 'compiled in',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program; counts are of one chip."""

  lowered: abstract.Lowered
  memory: float  # bytes at the peak, resident ones included
  compile_seconds: float
  counts: costs.Costs | None = None  # None: the compiler ran out of memory

  def seconds(self, chip: topologies.Chip) -> dict[str, float]:
    """Seconds of each resource, if it alone were the limit."""
    return {
      'compute': self.lowered.flops / chip.flops,
      'memory': self.counts.bytes / chip.hbm_bandwidth,
      'network': self.counts.sent / chip.ici_bandwidth,
    }


@dataclasses.dataclass(frozen=True)
class Report:
  """A step compiled for a slice."""

  topology: str
  step: abstract.Step
  programs: tuple[Program, ...]

  @property
  def chip(self) -> topologies.Chip:
    """The chip of the slice."""
    return topologies.chip(self.topology)

  @property
  def memory(self) -> float:
    """Bytes of a chip at the peak of the step."""
    return max(p.memory for p in self.programs)

  @property
  def fits(self) -> bool:
    """Whether every program fits into a chip's memory."""
    return self.memory <= self.chip.hbm and all(p.counts for p in self.programs)

  @property
  def seconds(self) -> float:
    """Lower bound of the seconds of a step."""
    return sum(
      p.lowered.runs * max(p.seconds(self.chip).values()) for p in self.programs
    )


def compile_program(lowered: abstract.Lowered) -> Program:
  """Compiles a program and adds up its costs.

  Raises:
    TopologyError: jaxlib cannot read the programs of the installed libtpu.
  """
  begin = time.monotonic()
  try:
    compiled = lowered.program.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    size = exhausted_bytes(str(e)) + lowered.resident
    return Program(lowered, size, time.monotonic() - begin)
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
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as e:
    raise topologies.TopologyError(
      f'{lowered.name}: jaxlib {jax.lib.__version__} cannot read the programs '
      'of this libtpu; install the version that jax[tpu] requires'
    ) from e
  counts = costs.read(text, lowered.unknown_trips)
  return Program(lowered, peak + lowered.resident, seconds, counts)


def exhausted_bytes(message: str) -> float:
  """Bytes in the compiler's out-of-memory message; inf if it has none.

  It is a lower bound: the message may count temporaries only.
  """
  match = re.search(
    r'(?:Used |temporaries \()([\d.]+)([KMGT])\)? (?:of|exceeds)', message
  )
  if not match:
    return math.inf
  return float(match[1]) * 1024 ** ('KMGT'.index(match[2]) + 1)


def plan(
  config: ml_collections.ConfigDict,
  topology: str,
  load: abstract.Load,
  stop_early: bool = False,
) -> Report:
  """Compiles a step for a slice.

  Args:
    config: of `configs/rl.py`.
    topology: of `topologies.slices`.
    load: sizes of the step.
    stop_early: compile the update first, and the rollouts only if it fits.
  """
  mesh = abstract.open_mesh(config, topology, load.slates)
  step = abstract.make_step(config, mesh, load)
  programs = abstract.lower(step)
  report = Report(topology, step, ())
  for lowered in reversed(programs) if stop_early else programs:
    compiled = (*report.programs, compile_program(lowered))
    report = dataclasses.replace(report, programs=compiled)
    if stop_early and not report.fits:
      break
  return report


def candidates(
  config: ml_collections.ConfigDict, family: str, load: abstract.Load
) -> Iterator[tuple[str, int]]:
  """Slices that may fit, small to large, with `min_update_bytes` there.

  Args:
    config: of `configs/rl.py`; its mesh is ignored.
    family: of `topologies.CHIPS`.
    load: sizes of the step.

  Raises:
    TopologyError: an unknown family, or `libtpu` is not installed.
  """
  config = _any_mesh(config)
  for topology in topologies.slices(family):
    try:
      mesh = abstract.open_mesh(config, topology, load.slates)
      size = abstract.make_step(config, mesh, load).min_update_bytes()
    except topologies.TopologyError:
      raise
    except ValueError:  # So many chips do not split the heads or the width.
      continue
    if size <= topologies.chip(topology).hbm:
      yield topology, size


def suggest(
  config: ml_collections.ConfigDict,
  family: str,
  load: abstract.Load,
  known: Report | None = None,
  log: Callable[[str], None] = print,
) -> Report | None:
  """Compiles for larger and larger slices until the step fits.

  Args:
    config: of `configs/rl.py`; its mesh is ignored.
    family: of `topologies.CHIPS`.
    load: sizes of the step.
    known: the report of a slice, which is not compiled for again if it fits.
    log: receives the summary of each slice that was compiled for.

  Returns:
    The report of the smallest slice, or None if the step fits none.

  Raises:
    TopologyError: an unknown family, or `libtpu` is not installed.
  """
  for topology, _ in candidates(config, family, load):
    if known and known.topology == topology and known.fits:
      return known
    report = plan(_any_mesh(config), topology, load, stop_early=True)
    log(summary(report))
    if report.fits:
      return report
  return None


def _any_mesh(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  config = config.copy_and_resolve_references()
  config.mesh.update(data=-1, fsdp=1, tensor=1)
  return config


def summary(report: Report) -> str:
  """One line: the slice, whether the step fits, and how long it takes."""
  mesh = ' '.join(f'{name}={n}' for name, n in report.step.mesh.shape.items())
  seconds = sum(p.compile_seconds for p in report.programs)
  bound = 'at least ' if any(p.counts is None for p in report.programs) else ''
  verdict = (
    f'fits, at best {report.seconds:.2f} s a step'
    if report.fits
    else 'does not fit'
  )
  return (
    f'{report.topology} ({mesh}): {bound}{report.memory / 1e9:.1f} GB a chip, '
    f'{report.memory / report.chip.hbm:.0%} of its HBM: {verdict} (compiled in '
    f'{seconds:.0f} s)'
  )


def text(report: Report) -> str:
  """The whole report: memory, work, collectives, seconds."""
  step, chip = report.step, report.chip
  params = jax.tree.leaves(step.spec.abstract_params(step.mesh))
  count = sum(x.size for x in params)
  all_bytes = count * jax.numpy.dtype(step.spec.model.dtype).itemsize
  rows, lines = [], []
  for program in report.programs:
    name, counts = program.lowered.name, program.counts
    row = {
      'program': name,
      'GB a chip': program.memory / 1e9,
      '% of HBM': f'{program.memory / chip.hbm:.1%}',
      'compiled in': f'{program.compile_seconds:.0f} s',
    }
    rows.append(row)
    if counts is None:
      lines.append(f'{name}: does not fit; the compiler ran out of memory')
      continue
    seconds = program.seconds(chip)
    row |= {
      'TFLOP': program.lowered.flops / 1e12,
      'GB moved': counts.bytes / 1e9,
      'GB sent': counts.sent / 1e9,
      'seconds': max(seconds.values()),
      'bound by': max(seconds, key=seconds.get),
    }
    for kind, (times, size) in counts.by_kind().items():
      lines.append(f'{name}: {times:,.0f} {kind}, {size / 1e9:.2f} GB')
    if counts.unknown_loops:
      lines.append(
        f'{name}: {counts.unknown_loops} loop ends when the data allows, and '
        f'counts as {program.lowered.unknown_trips} rounds, the most possible'
      )
    if largest := counts.largest:
      lines.append(
        f'{name}: the largest collective is {largest.kind}, '
        f'{largest.bytes / 1e9:.3f} GB, {largest.bytes / all_bytes:.1%} of all '
        'parameters'
      )
  state = abstract.bytes_per_chip(step.state()) / 1e9
  return '\n'.join(
    [
      f'{count / 1e9:.2f} B parameters; with optimizer {state:.2f} GB a chip',
      f'a step: {step.load.slates} slates x {step.stage.group_size} rollouts, '
      f'prompts of {step.load.prompt_tokens} tokens, completions of '
      f'{step.sampling.max_tokens}',
      '',
      reporting.table(rows, COLUMNS),
      '',
      *lines,
      '',
      summary(report),
    ]
  )


def define_flags() -> None:
  """Defines the flags that `load_from_flags` reads."""
  load = abstract.Load
  flags.DEFINE_integer('slates', load.slates, 'Of a step.', 1)
  flags.DEFINE_integer('prompt_tokens', load.prompt_tokens, 'Of a prompt.', 2)
  flags.DEFINE_integer(
    'text_rows', load.text_rows, 'Of the embedding, before our symbols.', 1
  )
  flags.DEFINE_enum(
    'level', 'O1', LEVELS, "XLA's effort; a training run compiles with O2."
  )


def load_from_flags(values: flags.FlagValues) -> abstract.Load:
  """Reads the load, and sets the effort of the compiler."""
  jax.config.update('jax_optimization_level', values.level)
  return abstract.Load(values.slates, values.prompt_tokens, values.text_rows)
