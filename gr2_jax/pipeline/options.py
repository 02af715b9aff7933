"""Typed options of a config section."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

T = TypeVar('T')

# A config or a section of one, an `ml_collections.ConfigDict`. It is Any to a
# type checker, because a field may have any type.
Config = Any


def read(cls: type[T], section: Mapping[str, Any]) -> T:
  """Builds a dataclass from the fields of a config section that it has.

  Raises:
    TypeError: the section lacks a field that has no default.
  """
  names = (field.name for field in dataclasses.fields(cls))  # pyright: ignore
  return cls(**{name: section[name] for name in names if name in section})


def check_choices(
  options: Any, section: str, choices: Mapping[str, Collection[str]]
) -> None:
  """Checks fields that are one of a few names.

  Args:
    options: a dataclass.
    section: the name of its config section.
    choices: field -> the known names.

  Raises:
    ValueError: a field is none of them; the message names it.
  """
  for name, known in choices.items():
    value = getattr(options, name)
    if value not in known:
      raise ValueError(
        f'{section}.{name}={value!r}: must be one of {", ".join(known)}'
      )
