"""Paid answers on disk, and the tokens that they cost.

Each line is a JSON object: an answer, or the tokens that a failed request may
have cost. A line is flushed to the disk before its answer is used, so that a
killed run repeats no request. A torn last line is dropped.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from gr2_jax.pipeline import artifacts

ANSWERS = 'answers'  # folder beside the folders of the stages


class OverLimit(ValueError):
  """The next request might exceed the limit on tokens."""


@dataclasses.dataclass(frozen=True)
class Reply:
  """An answer of a model; token counts are the server's, 0 if it sends none."""

  text: str  # may be empty
  finish: str  # reason of its end: stop, length, refusal, content_filter, ...
  prompt_tokens: int
  completion_tokens: int


def key(*parts: object) -> str:
  """Hashes the parts of a request to 32 hex digits."""
  content = json.dumps(parts, sort_keys=True).encode()
  return hashlib.blake2b(content, digest_size=16).hexdigest()


def usage(replies: Iterable[Reply]) -> dict[str, int]:
  """Totals of replies: answers, prompt_tokens, completion_tokens."""
  replies = list(replies)
  return {
    'answers': len(replies),
    'prompt_tokens': sum(reply.prompt_tokens for reply in replies),
    'completion_tokens': sum(reply.completion_tokens for reply in replies),
  }


class Ledger(contextlib.AbstractContextManager):
  """Answers by key, and a limit on tokens that includes earlier runs.

  Threads may share it; processes may not.

  Args:
    path: the file; created if missing.
    limit: on prompt and answer tokens together; None: no limit.
    section: config section of the limit, for errors.

  Raises:
    ValueError: a line before the last one is damaged.
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
    self.charged = 0  # tokens spent in this run and in earlier ones
    self._reserved = 0
    self._changed = threading.Condition()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = self.path.open('a+b')
    self._load()

  def __len__(self) -> int:
    return len(self._replies)

  def usage(self) -> dict[str, int]:
    """The totals of all answers."""
    with self._changed:
      return usage(self._replies.values())

  def get(self, name: str) -> Reply | None:
    """The answer with that key, if any."""
    return self._replies.get(name)

  def reserve(self, tokens: int) -> None:
    """Reserves tokens for a request; waits while other reservations block it.

    Raises:
      OverLimit: the tokens do not fit into the limit.
    """
    with self._changed:
      while self._limit is not None and (
        self.charged + self._reserved + tokens > self._limit
      ):
        if not self._reserved:
          raise OverLimit(
            f'{self.path}: {self._section}.token_limit={self._limit}, '
            f'{self.charged} tokens are spent and the next request may cost '
            f'{tokens}. The {len(self)} answers are stored: repeat the command '
            'with a higher limit to continue'
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
    """Ends a reservation; stores the cost, and the reply if there is one."""
    with self._changed:
      self._reserved -= reserved
      self.charged += charged
      try:
        if reply is not None or charged:
          line: dict[str, Any] = {'charged': charged}
          if name is not None and reply is not None:
            line |= {'key': name} | dataclasses.asdict(reply)
            self._replies[name] = reply
          self._file.write(json.dumps(line).encode() + b'\n')
          self._file.flush()
          os.fsync(self._file.fileno())
      finally:
        self._changed.notify_all()

  def __exit__(self, *unused_exception) -> None:
    self._file.close()

  def _load(self) -> None:
    """Reads all complete lines and removes a torn one."""
    self._file.seek(0)
    content = self._file.read()
    size = content.rfind(b'\n') + 1
    self._file.truncate(size)
    for number, line in enumerate(content[:size].splitlines(), 1):
      try:
        row = json.loads(line)
        self.charged += int(row.pop('charged'))
        if row:
          name = row.pop('key')
          self._replies[name] = Reply(**row)
      except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(
          f'{self.path}:{number}: not an answer '
          f'({type(e).__name__}: {line[:60]!r}); delete the line to repeat its '
          'request'
        ) from e


def from_config(
  section: str, stage: Any, workdir: pathlib.Path, identity: Sequence[object]
) -> Ledger:
  """Opens a ledger in the folder that all stages share.

  Args:
    section: name of `stage`, for errors.
    stage: section with `token_limit`.
    workdir: folder of the stage.
    identity: JSON values that name the ledger, such as its models.
  """
  name = key(artifacts.dumps(identity))[:8]
  path = workdir.parent / ANSWERS / f'{name}.jsonl'
  return Ledger(path, stage.token_limit or None, section)


def with_cost(stage: Any, usage: dict[str, Any]) -> dict[str, Any]:
  """Adds model and cost to a usage report; the cost is None without prices."""
  cost = None
  if stage.prompt_price or stage.answer_price:
    cost = (
      usage['prompt_tokens'] * stage.prompt_price
      + usage['completion_tokens'] * stage.answer_price
    ) / 1e6
  return {'model': stage.model, **usage, 'cost': cost}
