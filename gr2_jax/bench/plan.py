"""The smallest TPU slice that each model trains on, by compiling for it.

python -m gr2_jax.bench.plan --out=plan.jsonl

For every model and family the step of stage `rl` is compiled for one slice
after another, from the first whose chips can hold parameters and optimizer, up
to the first that it fits on. Each answer is a line of `--out`; what is there
already is not compiled again. Needs the extra `tpu`; hours for the whole table,
minutes for a cell.
"""

import json
import pathlib
import sys

from absl import app, flags

from configs import common
from gr2_jax import planning, reporting, topologies

_MODELS = flags.DEFINE_list('models', list(common.QWEN3), 'Presets.')
_FAMILIES = flags.DEFINE_list('families', list(topologies.CHIPS), 'Of chips.')
_OUT = flags.DEFINE_string('out', 'plan.jsonl', 'Where answers are kept.')
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


def table(cells: dict[tuple[str, str], dict[str, object]]) -> str:
  """A row a model, a column a family: slice, share of its HBM, seconds."""
  rows = {}
  for (model, family), found in cells.items():
    shown = 'none'
    if found['topology']:
      shape = found['topology'].partition(':')[2]
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
