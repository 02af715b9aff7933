"""A catalog of 42 texts, tokenizers that train in seconds, and artifacts."""

import json

from ml_collections import ConfigDict

from configs import common
from configs import tokenizer as config_file
from gr2_jax.pipeline import artifacts
from gr2_jax.stages import tokenizer

COLOURS = ('red', 'blue', 'green', 'pink', 'black', 'white')
THINGS = ('shampoo', 'lipstick', 'brush', 'soap', 'perfume', 'mirror', 'cream')
ITEMS = [
  (f'{colour} {thing} for you', ['beauty', thing], 1990 + 5 * number)
  for number, colour in enumerate(COLOURS)
  for thing in THINGS
]


def settings(**kwargs) -> ConfigDict:
  config = ConfigDict({'tokenizer': config_file.section(test=True)})
  config.mesh = common.mesh()
  config.tokenizer.update(
    dict(
      codebook_size=8, text_dim=16, hidden=(16,), latent=8, batch_size=32,
      pretrain_steps=20, steps=30, checkpoint_every=10, log_every=5,
      learning_rate=1e-2, warmup_steps=3,
    )
    | kwargs
  )  # fmt: skip
  return config


def short(**kwargs) -> ConfigDict:
  return settings(**dict(steps=4, checkpoint_every=2) | kwargs)


def write_catalog(directory, items, item_ids=None):
  directory.mkdir(exist_ok=True)
  with (directory / 'catalog.jsonl').open('w') as file:
    for row, (title, categories, year) in enumerate(items):
      line = {
        'item_id': item_ids[row] if item_ids else f'x{row}',
        'title': title,
        'categories': categories,
        'year': year,
      }
      file.write(json.dumps(line) + '\n')
  return {'slates': directory}


def finish(config, inputs, directory):
  """Makes a finished artifact like that of the runner."""
  results = tokenizer.run(config, inputs, directory)
  facts = {'config': config.to_dict()}
  (directory / 'config.json').write_text(artifacts.dumps(facts))
  (directory / 'results.json').write_text(artifacts.dumps(results))
  return results


def die(*_, **__):
  """Replaces a function by the interrupt of a kill."""
  raise KeyboardInterrupt
