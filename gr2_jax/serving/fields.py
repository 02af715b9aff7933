"""Fields of JSON objects, declared once: to be checked and to be documented.

`Object.check` returns the values of an object's fields, or raises DataError
with place, field, finding and cure. `Object.schema` is the same declaration as
JSON Schema, for the OpenAPI document.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from gr2_jax.data import descriptions
from gr2_jax.data import log as log_lib

_TYPES = {
  'string': str,
  'integer': int,
  'number': int | float,
  'null': type(None),
}
_UNKNOWN_SHOWN = 5  # unknown fields that one error names


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of text, number or null.

  Attributes:
    noun: words that complete "it must be".
    schema: the same as JSON Schema: enum, or type with minimum, maximum,
      exclusiveMinimum, maxLength, pattern.
  """

  noun: str
  schema: Mapping[str, Any]

  def holds(self, value: Any) -> bool:
    """Whether a value is of this kind."""
    limit = self.schema.get
    if isinstance(value, bool):
      return False
    if 'enum' in self.schema:
      return value in self.schema['enum']
    if not isinstance(
      value, tuple(_TYPES[name] for name in _types(self.schema))
    ):
      return False
    if isinstance(value, str):
      short_enough = len(value) <= limit('maxLength', math.inf)
      return short_enough and bool(re.search(limit('pattern', ''), value))
    return value is None or (
      limit('minimum', -math.inf) <= value <= limit('maximum', math.inf)
      and value > limit('exclusiveMinimum', -math.inf)
    )

  def check(self, value: Any, where: str, field: str, verb: str = 'it') -> Any:
    """Returns the value, or raises DataError."""
    if not self.holds(value):
      cure = f'{verb} must be {self.noun}'
      fail(where, field, descriptions.short(value), cure)
    return value


TEXT = Kind('text', {'type': 'string'})
ID = Kind('text or a whole number', {'type': ['string', 'integer']})


@dataclasses.dataclass(frozen=True)
class List:
  """A list of values or objects."""

  of: 'Kind | Object'
  least: int = 0
  most: int | None = None
  cure: str = 'shorten the list'
  unique: Callable[[Any], str] | None = None  # element -> its key

  def check(self, value: Any, where: str, field: str) -> list[Any]:
    """Returns the elements, or raises DataError."""
    if not isinstance(value, list):
      fail(where, field, descriptions.short(value), 'it must be a list')
    if len(value) < self.least:
      fail(where, field, 'an empty list', 'give one or more')
    if self.most is not None and len(value) > self.most:
      finding = f'a list of {len(value)}, room for {self.most}'
      fail(where, field, finding, self.cure)
    if isinstance(self.of, Object):
      value = [
        self.of.check(element, _inside(where, f'{field}[{place}]'))
        for place, element in enumerate(value)
      ]
    else:
      for element in value:
        self.of.check(element, where, field, verb='each')
    keys = set()
    for key in map(self.unique, value) if self.unique else ():
      if key in keys:
        fail(where, field, f'{descriptions.short(key)} again', 'each once')
      keys.add(key)
    return value

  @property
  def schema(self) -> dict[str, Any]:
    """JSON Schema."""
    schema = {'type': 'array', 'items': self.of.schema}
    if self.least:
      schema['minItems'] = self.least
    if self.most is not None:
      schema['maxItems'] = self.most
    if self.unique and isinstance(self.of, Kind):
      schema['uniqueItems'] = True
    return schema


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of an object.

  Attributes:
    default: value of a missing field. A field that is neither required nor has
      a default may be null, which means the same as missing.
    like: an earlier list field; this list must be as long.
  """

  name: str
  kind: Kind | List
  meaning: str = ''
  required: bool = False
  default: Any = None
  like: str = ''

  @property
  def schema(self) -> dict[str, Any]:
    """JSON Schema."""
    schema = dict(self.kind.schema)
    if self.nullable:
      schema['type'] = [*_types(schema), 'null']
    if self.meaning:
      schema['description'] = self.meaning
    if self.default is not None:
      schema['default'] = self.default
    return schema

  @property
  def nullable(self) -> bool:
    """Whether null means the same as missing."""
    return not self.required and self.default is None


class Object:
  """A JSON object that has these fields and no others."""

  def __init__(self, noun: str, example: str, *fields: Field):
    self.noun, self.example, self.fields = noun, example, fields

  def check(self, value: Any, where: str = '') -> dict[str, Any]:
    """Checks an object.

    Args:
      value: parsed JSON.
      where: place of the object, for errors; empty for a whole body.

    Returns:
      The value of every declared field.

    Raises:
      DataError: with place, field, finding and cure.
    """
    if not isinstance(value, dict):
      raise log_lib.DataError(
        f'{where or f"the {self.noun}"}: not a JSON object: write '
        f'{self.example}'
      )
    known = [field.name for field in self.fields]
    if unknown := [name for name in value if name not in known]:
      shown = [descriptions.short(name) for name in unknown[:_UNKNOWN_SHOWN]]
      shown += ['...'] * (len(unknown) > _UNKNOWN_SHOWN)
      word = 'fields' if len(unknown) > 1 else 'field'
      place = _inside(where, f'{word} {", ".join(shown)}')
      cure = f'known are {", ".join(known)}'
      raise log_lib.DataError(f'{place}: unknown: {cure}')
    values = {}
    for field in self.fields:
      given = value.get(field.name, field.default)
      if given is None and field.required:
        fail(where, field.name, 'missing', f'every {self.noun} needs it')
      if given is not None or not field.nullable:
        given = field.kind.check(given, where, field.name)
        if field.like and len(given) != len(values[field.like]):
          fail(
            where,
            field.name,
            f'{len(given)} values, but {field.like} has '
            f'{len(values[field.like])}',
            'give one for each, or none at all',
          )
      values[field.name] = given
    return values

  @property
  def schema(self) -> dict[str, Any]:
    """JSON Schema."""
    return {
      'type': 'object',
      'required': [field.name for field in self.fields if field.required],
      'additionalProperties': False,
      'properties': {field.name: field.schema for field in self.fields},
    }


def fail(where: str, field: str, finding: str, cure: str) -> NoReturn:
  """Raises DataError."""
  place = _inside(where, f'field {field!r}')
  raise log_lib.DataError(f'{place}: {finding}: {cure}')


def _inside(where: str, part: str) -> str:
  return f'{where}, {part}' if where else part


def _types(schema: Mapping[str, Any]) -> list[str]:
  types = schema['type']
  return types if isinstance(types, list) else [types]
