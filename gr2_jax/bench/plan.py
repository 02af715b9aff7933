"""The smallest TPU slice that each model trains on, by compiling for it.

python -m gr2_jax.bench.plan --out=plan.jsonl

For every model and family the step of stage `rl` is compiled for larger and
larger slices, from the first that `min_update_bytes` does not rule out to the
first that it fits on. Each result is a line of `--out` and is not computed
again. Needs the extra `tpu`; a cell takes minutes, the whole table hours.

`--nocompile` takes a minute: a cell without a result shows the first slice that
is not ruled out, as `>= 4x4, 60%`: at least that slice, and at least that
share of its HBM.
"""

import json
import pathlib
import sys

from absl import app, flags

from configs import common
from gr2_jax.aot import abstract, planning, topologies
from gr2_jax.pipeline import reporting

_MODELS = flags.DEFINE_list('models', list(common.QWEN3), 'Presets.')
_FAMILIES = flags.DEFINE_list('families', list(topologies.CHIPS), 'Of chips.')
_OUT = flags.DEFINE_string('out', 'plan.jsonl', 'File of results.')
_COMPILE = flags.DEFINE_bool('compile', True, 'Compute missing results.')
planning.define_flags()


def cell(model: str, family: str, load: abstract.Load) -> dict[str, object]:
  """Searches the smallest slice of a family that a preset fits on.

  Returns:
    `topology`, and what the step takes there; `topology` None if it fits none.
  """
  report = planning.suggest(
    common.compose('rl', f'model={model}'),
    family,
    load,
    log=lambda line: print(model, line, file=sys.stderr),
  )
  if report is None:
    return {'topology': None}
  return {
    'topology': report.topology,
    'mesh': dict(report.step.mesh.shape),
    'memory': report.memory / report.chip.hbm,
    'seconds': report.seconds,
    'programs': {
      p.lowered.name: p.seconds(report.chip) for p in report.programs
    },
  }


def bound(model: str, family: str, load: abstract.Load) -> dict[str, object]:
  """The smallest slice that is not ruled out without compiling.

  Returns:
    `topology`, None if all are ruled out, and `least`, a lower bound of the
    share of its HBM that the step needs.
  """
  config = common.compose('rl', f'model={model}')
  for topology, size in planning.candidates(config, family, load):
    return {'topology': topology, 'least': size / topologies.chip(topology).hbm}
  return {'topology': None}


def table(cells: dict[tuple[str, str], dict[str, object]]) -> str:
  """A row for each model, a column for each family: slice, HBM, seconds."""
  rows = {}
  for (model, family), entry in cells.items():
    shown, shape = 'none', (entry['topology'] or '').partition(':')[2]
    if 'least' in entry:
      shown = f'>= {shape}, {entry["least"]:.0%}'
    elif shape:
      shown = f'{shape}, {entry["memory"]:.0%}, {entry["seconds"]:.1f} s'
    rows.setdefault(model, {'model': model})[family] = shown
  families = dict.fromkeys(family for _, family in cells)
  return reporting.table(rows.values(), ('model', *families))


def main(argv: list[str]) -> None:
  """Prints the table; appends the new results to the file."""
  del argv
  load = planning.load_from_flags(flags.FLAGS)
  out = pathlib.Path(_OUT.value)
  cells = {}
  for line in out.read_text().splitlines() if out.exists() else ():
    entry = json.loads(line)
    if entry['load'] == repr(load):
      cells[entry['model'], entry['family']] = entry
  try:
    for model in _MODELS.value:
      for family in _FAMILIES.value:
        if (model, family) in cells:
          continue
        if not _COMPILE.value:
          cells[model, family] = bound(model, family, load)
          continue
        entry = {'model': model, 'family': family, 'load': repr(load)}
        entry |= cell(model, family, load)
        cells[model, family] = entry
        with out.open('a') as file:
          file.write(json.dumps(entry) + '\n')
  except (topologies.TopologyError, common.ConfigError) as e:
    sys.exit(f'error: {e}')
  models, families = list(common.MODELS), list(topologies.CHIPS)
  keys = sorted(cells, key=lambda k: (models.index(k[0]), families.index(k[1])))
  print(table({key: cells[key] for key in keys}))


if __name__ == '__main__':
  app.run(main)
