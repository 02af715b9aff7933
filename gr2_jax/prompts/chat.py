"""A chat model's turns around a prompt, from the template in its file.

The template is rendered with a mark as the user's text. The text before the
mark opens every prompt; the text behind it closes the user's turn and opens the
model's. A template with `enable_thinking` is rendered both ways: where it puts
an empty reasoning span into an answer without reasoning, as Qwen3's does, that
span comes before <answer>.
"""

import dataclasses
import os
import re
from typing import NoReturn

from gr2_jax.prompts import vocabulary as vocabulary_lib

_MARK = 'THE-PROMPT-STANDS-HERE'

# Knowledge priming: what tends to hold in any catalog.
KNOWLEDGE = """\
What tends to hold: the last few items say more than older ones. People go on \
within a series or with the same maker, and from an item to what completes it, \
not to a second copy of it. A narrow category that recurs says more than a \
wide one. Where nothing else tells candidates apart, the better known is the \
safer choice."""

# Control token -> `enable_thinking`.
_ASKS = {'<think>': True, '<answer>': False, '<compress>': False}


@dataclasses.dataclass(frozen=True)
class Turns:
  """Token ids around the blocks of a prompt."""

  opening: tuple[int, ...]  # at least one
  closing: tuple[int, ...]
  asks: dict[str, tuple[int, ...]]  # control token -> ids that end in it


def turns(vocabulary: vocabulary_lib.Vocabulary, system: str) -> Turns:
  """Opening and closing of a model's prompts.

  Without a chat template they are <bos> and the bare control tokens, and the
  `system` text is unused.

  Raises:
    ValueError: the template fails, or alters the user's text.
  """
  control = vocabulary.control
  pieces = vocabulary.pieces
  if not pieces.chat_template:
    asks = {name: (control[name],) for name in _ASKS}
    return Turns((vocabulary.bos,), (), asks)
  opening: list[int] = []
  closings = {}
  for name, thinking in _ASKS.items():
    text = render(pieces.chat_template, pieces.names, system, _MARK, thinking)
    before, mark, after = text.partition(_MARK)
    if not mark:
      raise ValueError(
        'the chat template alters or omits the text of the user; use another '
        f'model, or correct the template: {pieces.chat_template[:200]!r}'
      )
    # A template may open the reasoning, which our control token does.
    after = re.sub(r'<think>\s*$', '', after)
    opening = pieces.markup(before)
    closings[name] = pieces.markup(after)
  shared = os.path.commonprefix(list(closings.values()))
  return Turns(
    opening=tuple(opening),
    closing=tuple(shared),
    asks={
      name: (*ids[len(shared) :], control[name])
      for name, ids in closings.items()
    },
  )


def render(
  template: str,
  names: dict[str, str | None],
  system: str,
  user: str,
  thinking: bool,
) -> str:
  """Text of a system and a user turn, and the opening of the model's turn.

  Args:
    template: Jinja. It comes from a file, so it runs in a sandbox.
    names: `bos_token` and the like; None becomes empty.
    system: content of the first turn, which is left out where it is empty.
    user: content of the second turn.
    thinking: `enable_thinking`.

  Raises:
    ValueError: the template fails.
  """
  import jinja2.sandbox  # Of the extra `hf`.

  def refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  environment.globals['raise_exception'] = refuse
  messages = [{'role': 'system', 'content': system}] if system else []
  messages.append({'role': 'user', 'content': user})
  try:
    return environment.from_string(template).render(
      messages=messages,
      add_generation_prompt=True,
      enable_thinking=thinking,
      tools=None,
      **{name: token or '' for name, token in names.items()},
    )
  except jinja2.TemplateError as e:
    raise ValueError(
      f'the chat template fails: {e}; if it rejects the system turn, an empty '
      'prompt.system leaves that out'
    ) from e
