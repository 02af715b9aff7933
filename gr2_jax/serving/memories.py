"""What is kept of histories, so that a known one is not read again.

Behind memory tokens a policy reads these alone (`models/memory.py`), and their
keys and values depend on the history and the parameters: a cache belongs to one
loaded policy, and its key is all that stands before the rest of a prompt, token
for token. Who shows another history, or the same one otherwise, has another
key.

Memories are kept on the host. Which ones a batch needs, and in which order, is
new each time: on devices they would have to be gathered from all that split
batches, and would take room from them; the copy of a batch's is small.
"""

import collections
import threading
from collections.abc import Callable, Sequence

import numpy as np


class Memories:
  """Bounded by bytes; what was not asked for the longest goes first.

  Threads may share one.

  Args:
    limit: bytes of keys and memories, at most; 0 keeps none.
  """

  def __init__(self, limit: int):
    self.limit = limit
    self._kept: collections.OrderedDict[bytes, np.ndarray]
    self._kept = collections.OrderedDict()
    self._bytes = 0
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._kept)

  @property
  def bytes(self) -> int:
    """Of keys and memories that are kept."""
    return self._bytes

  def recall(
    self,
    keys: Sequence[bytes],
    encode: Callable[[list[int]], Sequence[np.ndarray]],
  ) -> tuple[list[np.ndarray], int]:
    """Memories of histories, known or new.

    Args:
      keys: one for each; equal ones are encoded once.
      encode: places among the keys to their memories, of at least one.

    Returns:
      A memory for each key, and how many were encoded.
    """
    found, new = {}, {}
    with self._lock:
      for place, key in enumerate(keys):
        if key in self._kept:
          self._kept.move_to_end(key)
          found[key] = self._kept[key]
        else:
          new.setdefault(key, place)
    if new:
      made = encode(list(new.values()))
      for key, memory in zip(new, made, strict=True):
        found[key] = memory
        self._keep(key, memory)
    return [found[key] for key in keys], len(new)

  def _keep(self, key: bytes, memory: np.ndarray) -> None:
    size = len(key) + memory.nbytes
    with self._lock:
      # Another thread may have made it meanwhile.
      if size > self.limit or key in self._kept:
        return
      self._kept[key] = memory.copy()  # A view would hold its whole batch.
      self._bytes += size
      while self._bytes > self.limit:
        old, dropped = self._kept.popitem(last=False)
        self._bytes -= len(old) + dropped.nbytes
