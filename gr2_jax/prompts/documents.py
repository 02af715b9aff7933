"""Documents of mid-training: users and items, in semantic IDs and in words.

  sequence  <next> sid sid ..                 a history, in its order
  persona   <persona> sid sid .. words <eos>  a user; or words, then history
  caption   <caption> sid title path <eos>    an item; or text, then SID
  text      <text> words <eos>                of a file; long ones in pieces

A document is a function of its record and, where there are two directions, of a
random number.
"""

import collections
import os
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from numpy.random import Generator

from gr2_jax.data import slates as slates_lib
from gr2_jax.data.log import Catalog, DataError, parse_json
from gr2_jax.prompts import packing, prompt

# Words of personas that the catalog lacks, each of which the vocabulary learns.
PHRASES = (
  'mostly and lately from decades',
  ' '.join(str(decade) for decade in range(1920, 2030, 10)),
)

Slate = dict[str, np.ndarray]
Documents = list[list[int]]

_HELD_OUT = 20  # one text in so many is held out


def renderers(
  prompter: prompt.Prompter,
  catalog: Catalog,
  items: int,
  title_tokens: int,
  tokens: int,
) -> dict[str, packing.Render]:
  """Makes the functions that render records as documents.

  Args:
    prompter: token ids.
    catalog: texts of the items.
    items: most items of a history, the most recent ones.
    title_tokens: most tokens of a category's name in a persona.
    tokens: most tokens of a document. A persona with many words has fewer
      items, a caption is cut, a text continues in further documents.

  Returns:
    Task -> render; its records are slates, items (`caption`), strings (`text`).

  Raises:
    ValueError: `tokens` are too few for a history.
  """
  words, sids = prompter.vocabulary, prompter.items['sid']
  control, levels = words.control, words.layout.levels
  if tokens < (needed := 2 + (items + 1) * levels):
    raise ValueError(
      f'midtrain.row_tokens={tokens}: midtrain.sequence_items={items} of '
      f'{levels} tokens each need {needed} at least'
    )
  most_words = tokens - 2 - levels

  def recent(slate: Slate) -> np.ndarray:
    return slate['history'][: int(slate['history_length'])][-items:]

  def spell(history: np.ndarray) -> list[int]:
    return [code for item in history for code in sids[item]]

  def both_ways(
    task: str, sid_ids: list[int], text_ids: list[int], rng: Generator
  ) -> Documents:
    parts = [*sid_ids, *text_ids]
    if rng.random() < 0.5:
      parts = [*text_ids, *sid_ids]
    return [[control[f'<{task}>'], *parts, words.eos]]

  def sequence(slate: Slate, rng: Generator) -> Documents:
    del rng
    ids = spell(recent(slate))
    return [[control['<next>'], *ids]] if ids else []

  def persona(slate: Slate, rng: Generator) -> Documents:
    history = recent(slate)
    text: list[int] = []
    for word in describe(history, catalog):
      text += words.encode(word)[:title_tokens]
    text = text[:most_words]
    room = (tokens - 2 - len(text)) // levels
    rendered = both_ways('persona', spell(history[-room:]), text, rng)
    return rendered if len(history) else []

  def caption(item: int, rng: Generator) -> Documents:
    text = words.encode(catalog.titles[item])
    text += words.encode(' > '.join(catalog.categories[item]))
    return both_ways('caption', list(sids[item]), text[:most_words], rng)

  def text(string: str, rng: Generator) -> Documents:
    del rng
    ids = [*words.encode(string), words.eos]
    most = tokens - 1
    return [
      [control['<text>'], *ids[begin : begin + most]]
      for begin in range(0, len(ids), most)
    ]

  return dict(sequence=sequence, persona=persona, caption=caption, text=text)


def describe(history: np.ndarray, catalog: Catalog) -> list[str]:
  """Describes a user in words: categories, recent categories, decades.

  `mostly A and B and C lately D and E from decades 1990 and 1980`: the most
  frequent categories of the history (oldest item first), those of its last
  items (the last item's first), and the most frequent decades. Of equally
  frequent ones, the first counts.
  """
  frequent = collections.Counter(
    name for item in history for name in catalog.categories[item]
  )
  latest = dict.fromkeys(
    name for item in history[:-4:-1] for name in catalog.categories[item]
  )
  years = (int(catalog.years[item]) for item in history)
  decades = collections.Counter(str(y // 10 * 10) for y in years if y)
  text: list[str] = []
  for opening, names in (
    (['mostly'], [name for name, _ in frequent.most_common(3)]),
    (['lately'], list(latest)[:2]),
    (['from', 'decades'], [name for name, _ in decades.most_common(2)]),
  ):
    if names:
      text += [*opening, names[0]]
      for name in names[1:]:
        text += ['and', name]
  return text


def read_texts(path: os.PathLike[str] | str) -> tuple[list[str], list[str]]:
  """Reads general text, one document a line.

  Args:
    path: a UTF-8 file. The lines of a .jsonl file are objects with a field
      `text`; those of another file are the text. Empty lines are skipped.

  Returns:
    Documents to train on, and one in twenty (at least one) held out.

  Raises:
    DataError: the file is missing or malformed, or has fewer than two
      documents.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise DataError(f'{path}: midtrain.text_file is no file')
  texts = []
  with path.open('rb') as file:
    for number, line in enumerate(file, 1):
      try:
        string = line.decode().strip()
      except UnicodeDecodeError as e:
        raise DataError(f'{path}:{number}: not UTF-8 ({e}); convert it') from e
      if string and path.suffix == '.jsonl':
        string = _text_field(string, f'{path}:{number}')
      if string:
        texts.append(string)
  if len(texts) < 2:
    raise DataError(
      f'{path}: {len(texts)} documents; at least two are needed, one of them '
      'held out'
    )
  held_out = texts[1::_HELD_OUT]
  return [t for i, t in enumerate(texts) if i % _HELD_OUT != 1], held_out


def _text_field(line: str, place: str) -> str:
  value = parse_json(line, place)
  text = value.get('text') if isinstance(value, dict) else None
  if not isinstance(text, str):
    raise DataError(
      f'{place}: field text is {text!r}, no string; a line is an object like '
      '{"text": "..."}'
    )
  return text.strip()


def sources(
  slates: pathlib.Path, stage: ConfigDict, items: int
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Task -> random access to records, to train on and held out.

  Held-out slates belong to the validation split, held-out texts to the same
  file. Captions of all `items` are in both, since the semantic ID of every item
  must be learned.
  """
  texts = ([], [])
  if stage.text_file and stage.mixture.text:
    texts = read_texts(stage.text_file)
  train, held_out = (
    dict.fromkeys(
      ('sequence', 'persona', 'pointing'),
      slates_lib.SlateSource(slates, split),
    )
    | {'caption': range(items), 'text': text}
    for split, text in zip(('train', 'validation'), texts, strict=True)
  )
  return train, held_out
