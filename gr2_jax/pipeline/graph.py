"""The stage graph, and nothing else.

A stage is the module `gr2_jax.stages.<name>` with one function,
`run(config, inputs, workdir) -> dict`, which is resumable from whatever it
left in `workdir`, and whose result becomes `results.json`.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stage:
  """One node of the graph.

  Attributes:
    needs: stages that must be finished before. `name` is, where that stage is
      seeded, its run with this stage's own seed; `name@*` is one run for every
      seed of `config.seeds`, given to `run` as inputs `name@0`, `name@1`, ...
      `{section.field}` is the stage that the config field names, of STARTS;
      or, of a field `context`, the one that writes such contexts, if any.
    sections: the top-level entries of the config that the stage reads. It is
      given these and no others, so none can change without a new fingerprint.
    seeded: whether the stage is run once per seed; it then reads
      `config.seed`.
    files: config fields (`section.field`) that may hold the path of a file or
      folder; its content counts like the config.
    together: whether all processes of a cluster run it. Process 0 runs any
      other stage on its own devices, and the others wait.
  """

  needs: tuple[str, ...]
  sections: tuple[str, ...]
  seeded: bool = False
  files: tuple[str, ...] = ()
  together: bool = False


def module(name: str) -> str:
  """The module of a stage: `study_<name>` is the study `<name>`."""
  room, name = (
    ('studies', name[6:]) if name[:6] == 'study_' else ('stages', name)
  )
  return f'gr2_jax.{room}.{name}'


# What an SFT policy depends on, all the way from the data.
_TRAINED = (
  'data',
  'tokenizer',
  'prompt',
  'model',
  'mesh',
  'midtrain',
  'traces',
  'sft',
)

_FILES = (
  'data.path',
  'model.source',
  'tokenizer.text_source',
  'midtrain.text_file',
)

# Which stages a config field may name as the one to start from.
STARTS = {
  'export.start': ('rl', 'internalize', 'prune', 'opd', 'sft'),
  'rerank.start': ('rl', 'internalize', 'prune', 'opd', 'sft'),
  'prune.start': ('internalize', 'rl', 'opd', 'sft'),
  'internalize.start': ('rl', 'opd', 'sft'),
  'compress.start': ('sft', 'opd', 'rl'),
  'opd.start': ('sft', 'midtrain'),
  'rl.start': ('sft', 'opd', 'midtrain'),
}

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
  'midtrain': Stage(
    ('slates', 'tokenizer', 'backbone'),
    ('data', 'prompt', 'model', 'mesh', 'midtrain'),
    seeded=True,
    together=True,
    files=('midtrain.text_file',),
  ),
  'traces': Stage(
    ('slates', 'tokenizer', 'backbone'),
    ('data', 'prompt', 'model', 'mesh', 'traces'),
    seeded=True,
    files=('traces.policy',),
  ),
  'sft': Stage(
    ('slates', 'tokenizer', 'backbone', 'midtrain', 'traces'),
    ('data', 'prompt', 'model', 'mesh', 'sft'),
    seeded=True,
    together=True,
  ),
  'opd': Stage(
    ('slates', 'tokenizer', 'backbone', '{opd.start}', '{opd.context}'),
    ('data', 'prompt', 'model', 'mesh', 'opd'),
    seeded=True,
    together=True,
    files=('opd.policy',),
  ),
  'rl': Stage(
    ('slates', 'tokenizer', 'backbone', '{rl.start}', '{rl.context}'),
    ('data', 'prompt', 'model', 'mesh', 'rl'),
    seeded=True,
    together=True,
  ),
  'internalize': Stage(
    (
      'slates',
      'tokenizer',
      'backbone',
      '{internalize.start}',
      '{internalize.context}',
    ),
    ('data', 'prompt', 'model', 'mesh', 'internalize'),
    seeded=True,
    together=True,
  ),
  'prune': Stage(
    ('slates', 'tokenizer', 'backbone', '{prune.start}', '{prune.context}'),
    ('data', 'prompt', 'model', 'mesh', 'prune'),
    seeded=True,
    together=True,
  ),
  'compress': Stage(
    ('slates', 'tokenizer', 'backbone', '{compress.start}'),
    ('data', 'prompt', 'model', 'mesh', 'compress'),
    seeded=True,
    together=True,
  ),
  'baselines': Stage(('slates',), ('data', 'baselines')),
  'evaluate': Stage(
    (
      'slates',
      'tokenizer',
      'backbone',
      'baselines',
      '{rl.start}@*',
      'rl@*',
      '{rl.context}@*',
    ),
    ('data', 'prompt', 'model', 'mesh', 'rl', 'evaluate', 'seeds'),
  ),
  'rerank': Stage(
    ('slates', 'tokenizer', 'backbone', '{rerank.start}'),
    ('data', 'prompt', 'model', 'mesh', 'rerank'),
    seeded=True,
    files=('rerank.input',),
  ),
  'export': Stage(
    ('slates', 'tokenizer', 'backbone', '{export.start}'),
    ('prompt', 'model', 'mesh', 'export'),
    seeded=True,
  ),
  # The studies make their own runs.
  'study_hacking': Stage(
    (),
    (*_TRAINED, 'opd', 'rl', 'study_hacking', 'seeds'),
    files=_FILES,
  ),
  'study_distill': Stage(
    (),
    (*_TRAINED, 'opd', 'rl', 'study_distill', 'seeds'),
    files=_FILES,
  ),
  'study_compress': Stage(
    (),
    (*_TRAINED, 'opd', 'rl', 'compress', 'study_compress', 'seeds'),
    files=_FILES,
  ),
  'study_internalize': Stage(
    (),
    (
      *_TRAINED,
      'opd',
      'rl',
      'internalize',
      'study_internalize',
      'seeds',
    ),
    files=_FILES,
  ),
  'study_prune': Stage(
    (),
    (
      *_TRAINED,
      'opd',
      'rl',
      'internalize',
      'prune',
      'study_prune',
      'seeds',
    ),
    files=_FILES,
  ),
  'study_tokenizer': Stage(
    (),
    (*_TRAINED, 'study_tokenizer', 'seeds'),
    files=_FILES,
  ),
}

# Config fields that were renamed: new dotted name -> former last part. `*`
# stands for any sections. Fingerprints are hashes of the former names, so that
# artifacts from before a renaming are still found.
RENAMED = {
  '*.reward_divergence_patience': 'divergence',
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
