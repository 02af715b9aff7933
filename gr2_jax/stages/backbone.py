"""Backbone: the vocabulary, the evidence's bins, and a pretrained model.

Without `model.source` the vocabulary is trained on the catalog's text, and
mid-training starts from random parameters. With it, the symbols are added to
the model's own tokenizer and rows for them to its embedding.
"""

import logging
import pathlib
import re
from typing import Any

import jax

from gr2_jax.data import slates as slates_lib
from gr2_jax.data import splits
from gr2_jax.models import embedding_init
from gr2_jax.pipeline import checkpoint
from gr2_jax.policy import policy
from gr2_jax.prompts import documents, prompt, vocabulary
from gr2_jax.teachers import heuristic


def run(
  config, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Founds the vocabulary and imports the parameters.

  Args:
    config: sections prompt, model, mesh.
    inputs: slates, tokenizer.
    workdir: of this stage.

  Returns:
    Sizes of vocabulary and prompts, where the model came from, and how many
    rows its embedding was given.

  Raises:
    ValueError: the model there is another than the config says; tells how to
      name it.
  """
  backbone = None
  if config.model.source:
    from gr2_jax import hf  # Needs the extra `hf`.

    backbone = hf.open_backbone(config.model.source)
    _check_shape(config.model, backbone)

  # Vocabulary and evidence bins.
  if not (workdir / policy.BINS).exists():
    policy.found_vocabulary(
      config,
      inputs['slates'],
      inputs['tokenizer'],
      workdir,
      (*heuristic.PHRASES, *documents.PHRASES),
      backbone,
    )
  setup = policy.load(config, inputs | {'backbone': workdir})
  words = setup.vocabulary
  found = {
    'vocabulary': len(words),
    'symbols': len(words.layout.symbols()),
    'prompt_tokens': setup.prompter.prompt_tokens,
    'source': config.model.source,
    'history_left_out': left_out(setup.prompter, inputs['slates']),
  }
  if not backbone:
    return found

  # Parameters.
  texts = symbol_texts(setup)[backbone.vocab_size - words.first_symbol :]
  rows = {
    name: embedding_init.new_rows(
      backbone.read(name),
      texts,
      config.model.new_rows,
    )
    for name in ('embedding', 'unembedding')[: 2 - config.model.tie_embeddings]
  }
  abstract = setup.abstract_params()
  params = hf.import_params(
    backbone,
    setup.model,
    jax.tree.map(lambda leaf: leaf.sharding, abstract),
    rows['embedding'],
    rows.get('unembedding'),
  )
  checkpoint.save_params(workdir / policy.PARAMS, params)
  return found | {
    'family': backbone.family,
    'added_rows': len(texts),
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(abstract)),
  }


def left_out(
  prompter: prompt.Prompter, slates: pathlib.Path
) -> dict[str, dict[str, int]]:
  """What the budget of a prompt costs: split -> slates cut, items left out."""
  found = {}
  for split in splits.SPLITS if prompter.budget else ():
    records = slates_lib.source(slates, split)
    missing = [
      min(int(slate['history_length']), prompter.history)
      - len(prompter.shown(slate))
      for slate in map(records.__getitem__, range(len(records)))
    ]
    found[split] = {
      'slates': len(missing),
      'cut': sum(n > 0 for n in missing),
      'items': sum(missing),
    }
    logging.info('backbone: prompt.budget in %s: %s', split, found[split])
  return found


def symbol_texts(setup: policy.Setup) -> list[list[int]]:
  """Ids of the words that tell what each symbol of ours stands for.

  A semantic-ID code stands for the titles of the items that carry it, a slot
  for its number, the others for the words in their names.
  """
  words, items = setup.vocabulary, setup.prompter.items
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


def _check_shape(config, backbone) -> None:
  """Compares a config's fields with a checkpoint's, stretching included."""
  differ = {
    name: value
    for name, value in backbone.fields.items()
    if config[name] != value
  }
  if not backbone.fields.get('rope_scaling'):  # The user may stretch it.
    differ = {
      name: value
      for name, value in differ.items()
      if name == 'rope_base' or not name.startswith('rope_')
    }
  if differ:
    raise ValueError(
      f'{backbone.source}: model.{next(iter(differ))} is '
      f'{next(iter(differ.values()))} there; describe the model it holds with '
      + ' '.join(f'--config.model.{k}={v}' for k, v in differ.items())
    )
