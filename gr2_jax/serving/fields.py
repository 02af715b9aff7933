"""Fields of JSON objects, declared once: a check and a schema of each.

`Object.check` returns the values of an object's fields, or raises DataError
with the place, the field, the finding and the cure. `Object.schema` returns the
same rules as JSON Schema, for the OpenAPI document.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NoReturn

from gr2_jax.data import descriptions
from gr2_jax.data import log as log_lib

UNKNOWN_SHOWN = 5  # Unknown fields that one error names.


@dataclasses.dataclass(frozen=True)
class Kind:
  """A single value, such as a text or a number."""

  noun: str  # completes "it must be"
  plural: str  # completes "a list of"
  holds: Callable[[Any], bool]
  schema: dict[str, Any]

  def check(self, value: Any, where: str, field: str) -> Any:
    """Returns the value, or raises DataError."""
    if not self.holds(value):
      fail(where, field, descriptions.short(value), f'it must be {self.noun}')
    return value

  def or_null(self) -> 'Kind':
    """The same kind, or null."""
    return Kind(
      f'{self.noun}, or null',
      self.plural,
      lambda value: value is None or self.holds(value),
      _or_null(self.schema),
    )


def text(longest: int | None = None, *, pattern: str = '', noun: str = 'text'):
  """Text of at most `longest` characters in which the pattern is found."""
  schema = {'type': 'string'}
  if longest is not None:
    noun += f' of at most {longest} characters'
    schema |= {'maxLength': longest}
  if pattern:
    schema |= {'pattern': pattern}

  def holds(value: Any) -> bool:
    return (
      isinstance(value, str)
      and (longest is None or len(value) <= longest)
      and re.search(pattern, value) is not None
    )

  return Kind(noun, 'texts', holds, schema)


def number(low: float, high: float, *, above: bool = False) -> Kind:
  """A number between two limits; `above` excludes the lower one."""

  def holds(value: Any) -> bool:
    return (
      isinstance(value, int | float)
      and not isinstance(value, bool)
      and low <= value <= high
      and not (above and value == low)
    )

  noun = f'above {low:g}, at most {high:g}' if above else f'{low:g} to {high:g}'
  return Kind(
    f'a number {noun}' if above else f'a number from {noun}',
    'numbers',
    holds,
    {
      'type': 'number',
      'exclusiveMinimum' if above else 'minimum': low,
      'maximum': high,
    },
  )


def whole(low: int, high: int) -> Kind:
  """A whole number between two limits."""
  return Kind(
    f'a whole number from {low} to {high}',
    'whole numbers',
    lambda value: type(value) is int and low <= value <= high,
    {'type': 'integer', 'minimum': low, 'maximum': high},
  )


def one_of(*values: str | int | None) -> Kind:
  """One of a few values."""
  return Kind(
    f'one of {", ".join(map(str, values))}',
    'values',
    lambda value: not isinstance(value, bool) and value in values,
    {'enum': list(values)},
  )


ID = Kind(
  'text or a whole number',
  'item ids',
  lambda value: isinstance(value, str | int) and not isinstance(value, bool),
  {'type': ['string', 'integer']},
)


@dataclasses.dataclass(frozen=True)
class List:
  """A list of values or objects."""

  of: 'Kind | Object'
  least: int = 0
  most: int | None = None
  cure: str = ''  # of a list that is longer
  unique: Callable[[Any], str] | None = None  # element -> its key

  def check(self, value: Any, where: str, field: str) -> list[Any]:
    """Returns the elements, or raises DataError."""
    if not isinstance(value, list):
      cure = f'it must be a list of {self.of.plural}'
      fail(where, field, descriptions.short(value), cure)
    if len(value) < self.least:
      fail(where, field, 'an empty list', 'give one or more')
    if self.most is not None and len(value) > self.most:
      finding = f'{len(value)} {self.of.plural}, room for {self.most}'
      fail(where, field, finding, self.cure)
    if isinstance(self.of, Object):
      value = [
        self.of.check(element, _inside(where, f'{field}[{place}]'))
        for place, element in enumerate(value)
      ]
    else:
      for element in value:
        if not self.of.holds(element):
          finding = descriptions.short(element)
          fail(where, field, finding, f'each must be {self.of.noun}')
    if self.unique:
      seen = set()
      for key in map(self.unique, value):
        if key in seen:
          fail(where, field, f'{descriptions.short(key)} again', 'each once')
        seen.add(key)
    return value

  @property
  def schema(self) -> dict[str, Any]:
    """JSON Schema."""
    schema = {'type': 'array', 'items': self.of.schema}
    if self.least:
      schema |= {'minItems': self.least}
    if self.most is not None:
      schema |= {'maxItems': self.most}
    if self.unique and isinstance(self.of, Kind):
      schema |= {'uniqueItems': True}
    return schema


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of an object.

  Attributes:
    default: value of a field that is missing. A field that is neither required
      nor has a default may be null, which is the same as missing.
    like: name of an earlier list field that this list must be as long as.
  """

  name: str
  kind: Kind | List
  meaning: str = ''
  required: bool = False
  default: Any = None
  like: str = ''

  @property
  def nullable(self) -> bool:
    """Whether null is the same as missing."""
    return not self.required and self.default is None

  @property
  def schema(self) -> dict[str, Any]:
    """JSON Schema."""
    schema = self.kind.schema
    if self.nullable:
      schema = _or_null(schema)
    if self.meaning:
      schema = schema | {'description': self.meaning}
    if self.default is not None:
      schema = schema | {'default': self.default}
    return schema


@dataclasses.dataclass(frozen=True)
class Object:
  """A JSON object that has these fields and no others."""

  noun: str
  plural: str
  example: str
  fields: tuple[Field, ...]

  def check(self, value: Any, where: str = '') -> dict[str, Any]:
    """Checks an object.

    Args:
      value: parsed JSON.
      where: place of the object, for errors; empty for a whole body.

    Returns:
      Every declared field and its value; the default where it is missing.

    Raises:
      DataError: with place, field, finding and cure.
    """
    if not isinstance(value, dict):
      raise log_lib.DataError(
        f'{where or f"the {self.noun}"}: not a JSON object: write '
        f'{self.example}'
      )
    names = [field.name for field in self.fields]
    if unknown := [name for name in value if name not in names]:
      shown = ', '.join(map(descriptions.short, unknown[:UNKNOWN_SHOWN]))
      more = ', ...' if len(unknown) > UNKNOWN_SHOWN else ''
      raise log_lib.DataError(
        f'{_inside(where, f"field {shown}{more}")}: unknown: known are '
        f'{", ".join(names)}'
      )
    values = {}
    for field in self.fields:
      given = value.get(field.name, field.default)
      if given is None and field.required:
        fail(where, field.name, 'missing', f'every {self.noun} needs it')
      if given is not None or not field.nullable:
        given = field.kind.check(given, where, field.name)
      if given is not None and field.like:
        count = len(values[field.like])
        if len(given) != count:
          finding = f'{len(given)} values, but {field.like} has {count}'
          fail(where, field.name, finding, 'give one for each, or none at all')
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


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
  if 'enum' in schema:
    return schema | {'enum': [*schema['enum'], None]}
  types = schema['type']
  types = types if isinstance(types, list) else [types]
  return schema | {'type': [*types, 'null']}
