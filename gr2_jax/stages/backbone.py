"""Backbone: the vocabulary, the evidence's bins, and a pretrained model.

Without `model.source` the vocabulary is trained on the catalog's text, and
mid-training starts from random parameters. With it, the stage adds the symbols
to the model's tokenizer, and rows for them to its embedding.
"""

import logging
import pathlib
import re
from typing import Any

import jax
from ml_collections import ConfigDict

from gr2_jax.data import slates as slates_lib
from gr2_jax.data import splits
from gr2_jax.distributed import sharding
from gr2_jax.models import embedding_init
from gr2_jax.pipeline import checkpoint
from gr2_jax.policy import policy
from gr2_jax.prompts import documents, prompt, vocabulary
from gr2_jax.teachers import heuristic


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Creates the vocabulary and imports the parameters.

  Raises a ValueError, with the flags to set, if the config describes another
  model than `model.source`.
  """
  backbone = None
  if config.model.source:
    from gr2_jax import hf  # Needs the extra `hf`.

    backbone = hf.open_backbone(config.model.source)
    _check_shape(config.model, backbone)

  if not (workdir / policy.BINS).exists():
    policy.create_vocabulary(
      config,
      inputs['slates'],
      inputs['tokenizer'],
      workdir,
      (*heuristic.PHRASES, *documents.PHRASES),
      backbone,
    )
  spec = policy.load(config, inputs | {'backbone': workdir})
  words = spec.vocabulary
  results = {
    'vocabulary': len(words),
    'symbols': len(words.layout.symbols()),
    'prompt_tokens': spec.prompter.prompt_tokens,
    'source': config.model.source,
    'history_left_out': left_out(spec.prompter, inputs['slates']),
  }
  if not backbone:
    return results

  # Parameters, with a row for each added symbol.
  texts = symbol_texts(spec)[backbone.vocab_size - words.first_symbol :]
  rows = {
    name: embedding_init.new_rows(
      backbone.read(name), texts, config.model.new_rows
    )
    for name in ('embedding', 'unembedding')[: 2 - config.model.tie_embeddings]
  }
  abstract = spec.abstract_params(sharding.make_mesh(**config.mesh))
  params = hf.import_params(
    backbone,
    spec.model,
    jax.tree.map(lambda leaf: leaf.sharding, abstract),
    rows['embedding'],
    rows.get('unembedding'),
  )
  checkpoint.save_params(workdir / policy.PARAMS, params)
  return results | {
    'family': backbone.family,
    'added_rows': len(texts),
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(abstract)),
  }


def left_out(
  prompter: prompt.Prompter, slates: pathlib.Path
) -> dict[str, dict[str, int]]:
  """Split -> how many histories the prompt's budget cuts, and items lost."""
  omitted = {}
  for split in splits.SPLITS if prompter.budget else ():
    records = slates_lib.SlateSource(slates, split)
    missing = [
      min(int(slate['history_length']), prompter.history)
      - len(prompter.shown(slate))
      for slate in map(records.__getitem__, range(len(records)))
    ]
    omitted[split] = {
      'slates': len(missing),
      'cut': sum(n > 0 for n in missing),
      'items': sum(missing),
    }
    logging.info('backbone: prompt.budget in %s: %s', split, omitted[split])
  return omitted


def symbol_texts(spec: policy.PolicySpec) -> list[list[int]]:
  """Ids of the words that describe each added symbol.

  The titles of an item describe its codes, a number describes a slot, and the
  words in their names describe the others.
  """
  words, items = spec.vocabulary, spec.prompter.items
  texts: dict[int, list[int]] = {}
  for symbol in (vocabulary.PAD, *words.layout.symbols()):
    number = words.pieces.id(symbol)
    pattern = '[0-9]+' if words.is_slot(number) else '[a-z]+|[0-9]+'
    is_code = number >= words.sid_base
    named = '' if is_code else ' '.join(re.findall(pattern, symbol))
    texts[number] = words.encode(named) if named else []
  for codes, title in zip(items['sid'], items['title'], strict=True):
    for number in codes:
      texts[number].extend(title)
  return [texts[number] for number in range(words.first_symbol, len(words))]


def _check_shape(config: ConfigDict, backbone: Any) -> None:
  """Raises if config and checkpoint differ, but for RoPE scaling to add."""
  stretchable = not backbone.fields.get('rope_scaling')
  differ = {}
  for name, value in backbone.fields.items():
    is_stretch = name.startswith('rope_') and name != 'rope_base'
    if config[name] != value and not (stretchable and is_stretch):
      differ[name] = value
  if differ:
    name, value = next(iter(differ.items()))
    flags = ' '.join(f'--config.model.{k}={v}' for k, v in differ.items())
    raise ValueError(
      f'{backbone.source}: model.{name} is {value} there; describe the model '
      f'with {flags}'
    )
