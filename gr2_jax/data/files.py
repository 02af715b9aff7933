"""Files that appear whole or not at all."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def atomic_path(
  path: os.PathLike[str] | str, shared: bool = False
) -> Iterator[pathlib.Path]:
  """Yields a temporary sibling, which replaces `path` when the block succeeds.

  Args:
    path: the file that is to appear.
    shared: whether several runs may write it at the same time; the sibling
      then has a random name. Otherwise the next try overwrites what a killed
      process has left.
  """
  path = pathlib.Path(path)
  infix = f'.{uuid.uuid4().hex[:8]}' if shared else ''
  temporary = path.with_name(f'{path.name}{infix}.tmp')
  try:
    yield temporary
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def atomic_write(
  path: os.PathLike[str] | str, mode: str = 'w', shared: bool = False
) -> Iterator[IO[Any]]:
  """Opens a file that replaces `path` when the block succeeds.

  Args:
    path: the file that is to appear.
    mode: `w` for UTF-8 text, `wb` for bytes.
    shared: as for `atomic_path`.
  """
  encoding = None if 'b' in mode else 'utf-8'
  with (
    atomic_path(path, shared) as temporary,
    temporary.open(mode, encoding=encoding) as file,
  ):
    yield file
    file.flush()
    os.fsync(file.fileno())
