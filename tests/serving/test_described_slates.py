"""Descriptions beside a slate: accepted, or refused with a reason."""

import dataclasses
import json
import re

import numpy as np
import pytest

from gr2_jax.data import log as log_lib
from gr2_jax.serving import request

INDEX = {'a': 0, 'b': 1}
SLATE = {'history': ['a', 'h9', 'gone'], 'candidates': ['x9', 'b', 'y9', 7]}


def parse(*items, unreadable=''):
  row = SLATE | ({'items': list(items)} if items else {})
  fields = request.slate(4).check(row, 'slates[0]')
  return request.resolve(fields, 1, INDEX, unreadable)


def described(name='x9', **fields):
  return {'item_id': name, 'title': 'Solaris'} | fields


def test_described_items_are_numbered_behind_the_catalogs():
  found = parse(described('h9'), described(7), described('x9'))
  assert found.described.item_ids == ('h9', '7', 'x9')
  assert found.candidates == (4, 1, -1, 3)
  assert found.history == (0, 2)
  assert found.unknown == 1
  assert found.described_candidates == ['x9', 7]


def test_only_needed_and_unknown_items_are_described():
  found = parse(described('b', title='Other'), described('far'))
  assert not len(found.described)
  assert found.candidates == (-1, 1, -1, -1)
  assert dataclasses.replace(found, described=request.NO_ITEMS) == parse()


def test_fields_and_their_defaults():
  found = parse(
    described(brand='Mosfilm', categories=['Film', 'Drama'], year=1972),
    described('y9', brand=None, categories=None, year=None),
    described('h9', brand='solaris'),
    described(7, title='\ud800 half'),
  ).described
  assert found.titles == ('Mosfilm Solaris', 'Solaris', 'Solaris', '? half')
  assert found.categories == (('Film', 'Drama'), (), (), ())
  assert found.years.tolist() == [1972, 0, 0, 0]


def test_descriptions_that_cannot_be_read_are_checked_all_the_same():
  found = parse(described(), unreadable='no tokenizer')
  assert found == parse()
  with pytest.raises(log_lib.DataError, match='title'):
    parse({'item_id': 'x9'}, unreadable='no tokenizer')


def test_a_file_of_slates_takes_descriptions_and_names_what_is_missing(
  tmp_path,
):
  catalog = log_lib.Catalog(('a', 'b'), ('', ''), ((), ()), np.zeros(2, int))
  path = tmp_path / 'slates.jsonl'
  row = {'history': [], 'candidates': ['x9'], 'items': [described()]}
  path.write_text(json.dumps(row))
  (found,) = request.read(path, catalog, 4)
  assert found.candidates == (2,)
  cure = r'items \(not here: it is old\), or train'
  with pytest.raises(log_lib.DataError, match=f"'x9' is not in.*{cure}"):
    list(request.read(path, catalog, 4, 'it is old'))


def test_slates_of_a_batch_share_no_description():
  first = parse(described('x9', title='One'))
  second = parse(described('h9', title='Two'), described('x9', title='Three'))
  both = request.described([first, parse(), second])
  assert both.titles == ('One', 'Two', 'Three')
  assert request.described([]).titles == ()


@pytest.mark.parametrize(
  ('items', 'place', 'message'),
  [
    ('x9', '', "field 'items': 'x9': it must be a list"),
    (
      {'x9': 'Solaris'},
      '',
      "field 'items': {'x9': 'Solaris'}: it must be a list",
    ),
    ([7], '[0]', ': not a JSON object: write {"item_id"'),
    (
      [described()] * 35,
      '',
      "field 'items': a list of 35, room for 34: desc",
    ),
    ([{'title': 'Solaris'}], '[0]', "field 'item_id': missing: every"),
    ([described(1.5)], '[0]', "field 'item_id': 1.5: it must be text or"),
    ([described(True)], '[0]', "field 'item_id': True: it must be text or"),
    ([described(7), described('7')], '', "field 'items': '7' again: each once"),
    ([{'item_id': 'x9'}], '[0]', "field 'title': missing: every"),
    ([described(title=None)], '[0]', "field 'title': missing: every"),
    ([described(title=7)], '[0]', "field 'title': 7: it must be text"),
    (
      [described(title=' \n')],
      '[0]',
      r"field 'title': ' \n': it must be text that is not blank",
    ),
    (
      [described(title='x' * 1001)],
      '[0]',
      f"field 'title': '{'x' * 56}...: it must be text that",
    ),
    ([described(brand=['x'])], '[0]', "field 'brand': ['x']: it must be text"),
    (
      [described(brand='x' * 201)],
      '[0]',
      f"field 'brand': '{'x' * 56}...: it must be text of at most 200",
    ),
    ([described(categories='x')], '[0]', "field 'categories': 'x': it must"),
    (
      [described(categories=[1])],
      '[0]',
      "field 'categories': 1: each must be text",
    ),
    (
      [described(), described('y9', categories=['x'] * 33)],
      '[1]',
      "field 'categories': a list of 33, room for 32: shorten",
    ),
    (
      [described(categories=['x' * 201])],
      '[0]',
      f"field 'categories': '{'x' * 56}...: each must be text of at most 200",
    ),
    ([described(year='1972')], '[0]', "field 'year': '1972': it must be a who"),
    ([described(year=1972.5)], '[0]', "field 'year': 1972.5: it must be a"),
    ([described(year=True)], '[0]', "field 'year': True: it must be a whole"),
    ([described(year=-1)], '[0]', "field 'year': -1: it must be a whole"),
    ([described(year=10_000)], '[0]', "field 'year': 10000: it must be a who"),
    ([described(titel='x')], '[0]', "field 'titel': unknown: known are item_"),
  ],
)
def test_a_bad_description_names_place_field_and_cure(items, place, message):
  where = 'slates[0], ' + (place and f'items{place}, ')
  message = re.escape(f'{where}{message}'.replace(', : ', ': '))
  with pytest.raises(log_lib.DataError, match=message):
    request.slate(4).check(SLATE | {'items': items}, 'slates[0]')
