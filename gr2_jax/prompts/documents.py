"""Documents of mid-training: users and items, in semantic IDs and in words.

  sequence  <next> sid sid ..                 a history, in its order
  persona   <persona> sid sid .. words <eos>  a user; or words, then history
  caption   <caption> sid title path <eos>    an item; or text, then SID
  text      <text> words <eos>                of a file; long ones in pieces

What they are is a function of the record and, where there are two directions,
of a coin.
"""

import collections
import json
import os
import pathlib
from typing import Any

import numpy as np

from gr2_jax.data import slates as slates_lib
from gr2_jax.data.log import Catalog, DataError
from gr2_jax.prompts import packing, prompt

# What a persona is made of beside the catalog's words, for the vocabulary to
# learn whole.
PHRASES = (
  'mostly and lately from decades',
  ' '.join(str(decade) for decade in range(1920, 2030, 10)),
)

_HELD_OUT = 20  # one text in so many is not trained on


def renderers(
  prompter: prompt.Prompter,
  catalog: Catalog,
  items: int,
  title_tokens: int,
  tokens: int,
) -> dict[str, packing.Render]:
  """How records become documents.

  Args:
    prompter: token ids.
    catalog: what is told of the items.
    items: most recent ones of a history that a document has, at most.
    title_tokens: of a category's name in a persona, at most.
    tokens: of a row, which no document is longer than: a persona whose words
      are many has fewer items, a caption is cut, a text goes on in further
      documents.

  Returns:
    Task -> render. Records are slates, items' numbers (`caption`), strings
    (`text`).

  Raises:
    ValueError: a row has no room for a history.
  """
  words, sids = prompter.vocabulary, prompter.items['sid']
  control, levels = words.control, words.layout.levels
  if tokens < (needed := 2 + (items + 1) * levels):
    raise ValueError(
      f'midtrain.row_tokens={tokens}: midtrain.sequence_items={items} of '
      f'{levels} tokens each need {needed} at least'
    )
  told_at_most = tokens - 2 - levels

  def shown(slate):
    history = slate['history'][: int(slate['history_length'])]
    return history[-items:]

  def spell(history):
    return [code for item in history for code in sids[item]]

  def sequence(slate, rng):
    del rng
    ids = spell(shown(slate))
    return [[control['<next>'], *ids]] if ids else []

  def persona(slate, rng):
    history = shown(slate)
    told: list[int] = []
    for word in describe(history, catalog):
      told += words.encode(word)[:title_tokens]
    told = told[:told_at_most]
    room = (tokens - 2 - len(told)) // levels
    both = [spell(history[-room:]), told]
    if rng.random() < 0.5:
      both.reverse()
    ids = [control['<persona>'], *both[0], *both[1], words.eos]
    return [ids] if len(history) else []

  def caption(item, rng):
    told = words.encode(catalog.titles[item])
    told += words.encode(' > '.join(catalog.categories[item]))
    both = [sids[item], told[:told_at_most]]
    if rng.random() < 0.5:
      both.reverse()
    return [[control['<caption>'], *both[0], *both[1], words.eos]]

  def text(string, rng):
    del rng
    ids = [*words.encode(string), words.eos]
    most = tokens - 1
    return [
      [control['<text>'], *ids[begin : begin + most]]
      for begin in range(0, len(ids), most)
    ]

  return dict(sequence=sequence, persona=persona, caption=caption, text=text)


def describe(history: np.ndarray, catalog: Catalog) -> list[str]:
  """A user in words: what of, what last, and of which years.

  `mostly A and B and C lately D and E from decades 1990 and 1980`: the most
  frequent categories of the history, those of its last items (the last item's
  first), the decades of most of its items. Ties go to what came first.

  Args:
    history: int [n] items, oldest first.
    catalog: categories and years.

  Returns:
    Words and names, in order.
  """
  often = collections.Counter(
    name for item in history for name in catalog.categories[item]
  )
  last = dict.fromkeys(
    name for item in history[:-4:-1] for name in catalog.categories[item]
  )
  years = (int(catalog.years[item]) for item in history)
  decades = collections.Counter(str(y // 10 * 10) for y in years if y)
  parts = (
    (['mostly'], [name for name, _ in often.most_common(3)]),
    (['lately'], list(last)[:2]),
    (['from', 'decades'], [name for name, _ in decades.most_common(2)]),
  )
  found: list[str] = []
  for opening, names in parts:
    if names:
      found += [*opening, names[0]]
      for name in names[1:]:
        found += ['and', name]
  return found


def read_texts(path: os.PathLike[str] | str) -> tuple[list[str], list[str]]:
  """Reads general text: a document a line.

  Args:
    path: a UTF-8 file; of suffix .jsonl, lines are objects with a field
      `text`, in any other they are the text. Empty lines are skipped.

  Returns:
    Documents to train on, and one in twenty (at least one) to measure on.

  Raises:
    DataError: the file is missing or is not that, or has fewer than two
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
      f'{path}: {len(texts)} documents; one is trained on and one held out at '
      'least'
    )
  held = texts[1::_HELD_OUT]
  return [t for i, t in enumerate(texts) if i % _HELD_OUT != 1], held


def _text_field(line: str, place: str) -> str:
  cure = 'a line is an object like {"text": "..."}'
  try:
    found = json.loads(line)
  except json.JSONDecodeError as e:
    raise DataError(f'{place}: not JSON ({e}); {cure}') from e
  text = found.get('text') if isinstance(found, dict) else None
  if not isinstance(text, str):
    raise DataError(f'{place}: field text is {text!r}, no string; {cure}')
  return text.strip()


def sources(
  slates: pathlib.Path, stage, items: int
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Task -> random access to records: to train on, and held out.

  Held-out slates are of the validation split, held-out texts a part of the
  file. Captions are of the whole catalog in both: which item has which
  semantic ID must be learned of every one.

  Args:
    slates: artifact of that stage.
    stage: section `midtrain`.
    items: number of items.
  """
  texts = ([], [])
  if stage.text_file and stage.mixture.text:
    texts = read_texts(stage.text_file)
  found = []
  for split, text in zip(('train', 'validation'), texts, strict=True):
    of_slates = slates_lib.SlateSource(slates, split)
    found.append(
      dict.fromkeys(('sequence', 'persona', 'pointing'), of_slates)
      | {'caption': range(items), 'text': text}
    )
  return found[0], found[1]
