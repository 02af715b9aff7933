"""Answers that were paid for, on disk, and the tokens that they took.

One JSON object a line, appended and flushed to the disk before the answer is
used, so that a killed run asks for no answer twice. A last line that a kill
has torn is dropped. A line is an answer, or tokens that a request may have
taken that was never answered.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import threading


class OverLimit(ValueError):
  """The next request might exceed the limit on tokens."""


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a model said.

  Attributes:
    text: of the answer; empty where there is none.
    finish: why it ends: stop, length, refusal, content_filter, ...
    prompt_tokens: read by the model, as the server counts them.
    completion_tokens: written by it; 0, both, where the server does not say.
  """

  text: str
  finish: str
  prompt_tokens: int
  completion_tokens: int


def key(*parts: object) -> str:
  """A name for the answer to a request: 32 hex digits."""
  content = json.dumps(parts, sort_keys=True).encode()
  return hashlib.blake2b(content, digest_size=16).hexdigest()


class Ledger:
  """Answers by key, and a limit on tokens that holds over resumed runs.

  Safe to use from many threads; one process at a time.

  Args:
    path: the file; made where it does not exist.
    limit: tokens in all, prompts and answers; None: no limit.
    section: of the config, whose `token_limit` that is.

  Raises:
    ValueError: a line before the last one is damaged; names it.
  """

  def __init__(
    self,
    path: os.PathLike[str] | str,
    limit: int | None,
    section: str = 'traces',
  ):
    self.path = pathlib.Path(path)
    self._limit, self._section = limit, section
    self._replies: dict[str, Reply] = {}
    self._charged = self._reserved = 0
    self._changed = threading.Condition()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = self.path.open('a+b')
    self._load()

  @property
  def charged(self) -> int:
    """Tokens taken so far, in this run and in those before it."""
    return self._charged

  def __len__(self) -> int:
    return len(self._replies)

  def usage(self) -> dict[str, int]:
    """What its answers took: answers, prompt_tokens, completion_tokens."""
    with self._changed:
      replies = [*self._replies.values()]
    return {
      'answers': len(replies),
      'prompt_tokens': sum(reply.prompt_tokens for reply in replies),
      'completion_tokens': sum(reply.completion_tokens for reply in replies),
    }

  def get(self, name: str) -> Reply | None:
    """The answer of that key, if there is one."""
    return self._replies.get(name)

  def reserve(self, tokens: int) -> None:
    """Sets tokens aside, before asking; waits for others' if need be.

    Args:
      tokens: the most that the request may take.

    Raises:
      OverLimit: it does not fit.
    """
    with self._changed:
      while self._limit is not None and (
        self._charged + self._reserved + tokens > self._limit
      ):
        if not self._reserved:
          raise OverLimit(
            f'{self.path}: {self._section}.token_limit={self._limit}, '
            f'{self._charged} tokens are spent and the next request may take '
            f'{tokens}; the {len(self)} answers are kept: give the same '
            'command with a higher limit, and it goes on from here'
          )
        self._changed.wait()
      self._reserved += tokens

  def settle(
    self,
    reserved: int,
    charged: int,
    name: str | None = None,
    reply: Reply | None = None,
  ) -> None:
    """Gives back what was set aside and writes down what came of it.

    Args:
      reserved: as for `reserve`.
      charged: tokens that the request took.
      name: key of the answer.
      reply: the answer; None where none came.
    """
    with self._changed:
      self._reserved -= reserved
      self._charged += charged
      try:
        if reply is not None or charged:
          line = {'charged': charged}
          if reply is not None:
            line |= {'key': name} | dataclasses.asdict(reply)
            self._replies[name] = reply
          self._file.write(json.dumps(line).encode() + b'\n')
          self._file.flush()
          os.fsync(self._file.fileno())
      finally:
        self._changed.notify_all()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def __enter__(self) -> 'Ledger':
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()

  def _load(self) -> None:
    """Reads the whole lines and cuts off a torn one."""
    self._file.seek(0)
    content = self._file.read()
    whole = content.rfind(b'\n') + 1
    self._file.truncate(whole)
    for number, line in enumerate(content[:whole].splitlines(), 1):
      try:
        row = json.loads(line)
        self._charged += int(row.pop('charged'))
        if row:
          name = row.pop('key')
          self._replies[name] = Reply(**row)
      except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(
          f'{self.path}:{number}: not an answer '
          f'({type(e).__name__}: {line[:60]!r}); delete the line, and what it '
          'held is asked for again'
        ) from e
