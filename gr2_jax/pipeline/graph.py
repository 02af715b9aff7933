"""The stage graph: what each stage needs, reads, and how it runs.

A stage is the module `gr2_jax.stages.<name>` (a study `study_<name>` is
`gr2_jax.studies.<name>`) with a function `run(config, inputs, workdir)`. It
resumes from whatever it finds in `workdir`; the dict that it returns becomes
`results.json`. An optional `summary(results)` returns the table that the
command prints.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stage:
  """One node of the graph.

  Attributes:
    needs: stages that must finish before. `name` is the run with this stage's
      own seed; `name@*` is one run for each of `config.seeds`, passed to `run`
      as inputs `name@0`, `name@1`, ... `{section.field}` is the stage that the
      config field names (one of STARTS). `{x.context}` needs `compress` only
      where its value is a form that `compress` writes.
    sections: the config sections that the stage reads. It receives no others,
      so a change of any section that it reads changes its fingerprint.
    seeded: whether the stage runs once per seed and reads `config.seed`.
    files: config fields (`section.field`) that may hold the path of a file or
      folder. The content enters the fingerprint.
    together: whether all processes of a cluster run the stage. Otherwise
      process 0 runs it on its own devices while the others wait.
  """

  needs: tuple[str, ...]
  sections: tuple[str, ...]
  seeded: bool = False
  files: tuple[str, ...] = ()
  together: bool = False


def module(name: str) -> str:
  """The module that implements a stage or study."""
  if name.startswith('study_'):
    return f'gr2_jax.studies.{name.removeprefix("study_")}'
  return f'gr2_jax.stages.{name}'


# Stages that a config field may name as the one to start from.
STARTS = {
  'export.start': ('rl', 'internalize', 'prune', 'opd', 'sft'),
  'rerank.start': ('rl', 'internalize', 'prune', 'opd', 'sft'),
  'prune.start': ('internalize', 'rl', 'opd', 'sft'),
  'internalize.start': ('rl', 'opd', 'sft'),
  'compress.start': ('sft', 'opd', 'rl'),
  'opd.start': ('sft', 'midtrain'),
  'rl.start': ('sft', 'opd', 'midtrain'),
}

_BACKBONE = ('slates', 'tokenizer', 'backbone')
_POLICY = ('data', 'prompt', 'model', 'mesh')


def _training(name: str, *needs: str, files: tuple[str, ...] = ()) -> Stage:
  """A stage that trains the language model."""
  return Stage(
    (*_BACKBONE, *needs),
    (*_POLICY, name),
    seeded=True,
    files=files,
    together=True,
  )


def _study(*sections: str) -> Stage:
  """A study makes its own runs, so it reads all that these depend on."""
  return Stage(
    (),
    (*_POLICY, 'tokenizer', 'midtrain', 'traces', 'sft', *sections, 'seeds'),
    files=(
      'data.path',
      'model.source',
      'tokenizer.text_source',
      'midtrain.text_file',
    ),
  )


STAGES: dict[str, Stage] = {
  'slates': Stage((), ('data',), files=('data.path',)),
  'tokenizer': Stage(
    ('slates',),
    ('tokenizer', 'mesh'),
    files=('tokenizer.extends', 'tokenizer.text_source'),
  ),
  'backbone': Stage(
    ('slates', 'tokenizer'),
    ('prompt', 'model', 'mesh'),
    files=('model.source',),
  ),
  'midtrain': _training('midtrain', files=('midtrain.text_file',)),
  'traces': Stage(
    _BACKBONE, (*_POLICY, 'traces'), seeded=True, files=('traces.policy',)
  ),
  'sft': _training('sft', 'midtrain', 'traces'),
  'opd': _training(
    'opd', '{opd.start}', '{opd.context}', files=('opd.policy',)
  ),
  'rl': _training('rl', '{rl.start}', '{rl.context}'),
  'internalize': _training(
    'internalize', '{internalize.start}', '{internalize.context}'
  ),
  'prune': _training('prune', '{prune.start}', '{prune.context}'),
  'compress': _training('compress', '{compress.start}'),
  'baselines': Stage(('slates',), ('data', 'baselines')),
  'evaluate': Stage(
    (*_BACKBONE, 'baselines', '{rl.start}@*', 'rl@*', '{rl.context}@*'),
    (*_POLICY, 'rl', 'evaluate', 'seeds'),
  ),
  'rerank': Stage(
    (*_BACKBONE, '{rerank.start}'),
    (*_POLICY, 'rerank'),
    seeded=True,
    files=('rerank.input',),
  ),
  'export': Stage(
    (*_BACKBONE, '{export.start}'),
    ('prompt', 'model', 'mesh', 'export'),
    seeded=True,
  ),
  'study_hacking': _study('opd', 'rl', 'study_hacking'),
  'study_distill': _study('opd', 'rl', 'study_distill'),
  'study_compress': _study('opd', 'rl', 'compress', 'study_compress'),
  'study_internalize': _study('opd', 'rl', 'internalize', 'study_internalize'),
  'study_prune': _study('opd', 'rl', 'internalize', 'prune', 'study_prune'),
  'study_tokenizer': _study('study_tokenizer'),
}

# Config fields that were renamed: new dotted name -> former last part. `*`
# stands for any sections. Fingerprints are hashes of the former names, so that
# artifacts from before a renaming are still found.
RENAMED = {
  '*.reward_divergence_patience': 'divergence',
  '*.selection_metric': 'choose',
  'compress.ratio': 'keep',
  'compress.ratios': 'keeps',
  'study_compress.ratios': 'keeps',
  'traces.evidence_columns': 'believes',
}


def with_former_names(sections: Mapping[str, Any]) -> dict[str, Any]:
  """Copies nested config sections, with the former names of RENAMED fields."""
  return _rename(sections, RENAMED)


def with_current_names(sections: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `with_former_names`; current names stay as they are."""
  former = {}
  for path, name in RENAMED.items():
    parent, _, current = path.rpartition('.')
    former[f'{parent}.{name}'] = current
  return _rename(sections, former)


def _rename(
  values: Mapping[str, Any], names: Mapping[str, str], prefix: str = ''
) -> dict[str, Any]:
  """Replaces the last part of each dotted name that matches a pattern."""
  result = {}
  for name, value in values.items():
    path = prefix + name
    if isinstance(value, Mapping):
      value = _rename(value, names, f'{path}.')
    matches = (new for p, new in names.items() if fnmatch.fnmatchcase(path, p))
    result[next(matches, name)] = value
  return result
