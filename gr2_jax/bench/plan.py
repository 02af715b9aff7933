"""The smallest TPU slice that each model trains on, by compiling for it.

python -m gr2_jax.bench.plan --out=plan.jsonl

For every model and family the step of stage `rl` is compiled for one slice
after another, from the first that `abstract.least_bytes` does not rule out, up
to the first that it fits on. Each answer is a line of `--out`; what is there
already is not compiled again. Needs the extra `tpu`; hours for the whole table,
minutes for a cell.

`--nocompile` takes a minute: cells without an answer show the first slice that
is not ruled out, as `>= 4x4, 60%`: at least that slice, and at least that
share of its HBM.
"""

import json
import pathlib
import sys

from absl import app, flags

from configs import common
from gr2_jax.aot import planning, topologies
from gr2_jax.pipeline import reporting

_MODELS = flags.DEFINE_list('models', list(common.QWEN3), 'Presets.')
_FAMILIES = flags.DEFINE_list('families', list(topologies.CHIPS), 'Of chips.')
_OUT = flags.DEFINE_string('out', 'plan.jsonl', 'Where answers are kept.')
_COMPILE = flags.DEFINE_bool('compile', True, 'Look for the answers.')
planning.define_flags()


def cell(model: str, family: str, load) -> dict[str, object]:
  """Looks for the slice of one cell of the table.

  Args:
    model: preset.
    family: of chips.
    load: a step.

  Returns:
    `topology` and what the step is there; `topology` None where none will do.
  """
  config = common.compose('rl', f'model={model}')
  found = planning.suggest(
    config, family, load, say=lambda line: print(model, line, file=sys.stderr)
  )
  if found is None:
    return {'topology': None}
  return {
    'topology': found.topology,
    'mesh': found.mesh,
    'memory': max(p.memory for p in found.programs) / found.chip.hbm,
    'seconds': found.seconds,
    'programs': {p.name: p.seconds(found.chip) for p in found.programs},
  }


def bound(model: str, family: str, load) -> dict[str, object]:
  """What can be said of a cell without compiling.

  Args:
    model: preset.
    family: of chips.
    load: a step.

  Returns:
    `topology`, the smallest that is not ruled out, and `least`, the share of
    its HBM that is needed whatever the compiler does.
  """
  config = common.compose('rl', f'model={model}')
  for topology, size in planning.roomy(config, family, load):
    least = size / topologies.chip(topology).hbm
    return {'topology': topology, 'least': least}
  return {'topology': None}


def table(cells: dict[tuple[str, str], dict[str, object]]) -> str:
  """A row a model, a column a family: slice, share of its HBM, seconds."""
  rows = {}
  for (model, family), found in cells.items():
    shown, shape = 'none', (found['topology'] or '').partition(':')[2]
    if 'least' in found:
      shown = f'>= {shape}, {found["least"]:.0%}'
    elif shape:
      shown = f'{shape}, {found["memory"]:.0%}, {found["seconds"]:.1f} s'
    rows.setdefault(model, {'model': model})[family] = shown
  families = dict.fromkeys(family for _, family in cells)
  return reporting.table(rows.values(), ('model', *families))


def main(argv: list[str]) -> None:
  """Entry point of `app.run`."""
  del argv
  load = planning.load_of(flags.FLAGS)
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
        found = cell(model, family, load)
        entry = {'model': model, 'family': family, 'load': repr(load)} | found
        cells[model, family] = entry
        with out.open('a') as file:
          file.write(json.dumps(entry) + '\n')
  except (topologies.TopologyError, common.ConfigError) as e:
    sys.exit(f'error: {e}')
  print(table(dict(sorted(cells.items(), key=lambda x: _place(x[0])))))


def _place(key: tuple[str, str]) -> tuple[int, int]:
  """Where a cell stands: presets and families in their own order."""
  model, family = key
  return list(common.MODELS).index(model), list(topologies.CHIPS).index(family)


if __name__ == '__main__':
  app.run(main)
