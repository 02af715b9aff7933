"""A cache of encoded histories, so that a known history is not encoded again.

Behind memory tokens a policy attends to these alone, and their keys and values
depend only on the history and the parameters. So a cache belongs to one loaded
policy, and its key is the history's part of the prompt, token for token: a
history that is shown differently has another key.

Memories lie on the host. Each batch needs other ones in another order: on
devices they would have to be gathered across the batch's shards, and would take
room. Copying those of one batch is cheap.
"""

import collections
import threading
from collections.abc import Callable, Sequence

import numpy as np


class Memories:
  """Bounded by bytes; drops the least recently used; safe for threads.

  Args:
    limit: bytes of keys and memories; 0 keeps none.
  """

  def __init__(self, limit: int):
    self.limit = limit
    self.bytes = 0  # of the keys and memories that are kept
    self._kept: collections.OrderedDict[bytes, np.ndarray]
    self._kept = collections.OrderedDict()
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._kept)

  def recall(
    self,
    keys: Sequence[bytes],
    encode: Callable[[list[int]], Sequence[np.ndarray]],
  ) -> tuple[list[np.ndarray], int]:
    """Looks up memories by key, and encodes the missing ones.

    `encode` returns the memories of the keys at given places. Equal keys are
    encoded once.

    Returns:
      A memory for each key, and the number of histories encoded.
    """
    memories, new = {}, {}
    with self._lock:
      for place, key in enumerate(keys):
        if key in self._kept:
          self._kept.move_to_end(key)
          memories[key] = self._kept[key]
        else:
          new.setdefault(key, place)
    if new:
      encoded = encode(list(new.values()))
      for key, memory in zip(new, encoded, strict=True):
        memories[key] = memory
        self._keep(key, memory)
    return [memories[key] for key in keys], len(new)

  def _keep(self, key: bytes, memory: np.ndarray) -> None:
    size = len(key) + memory.nbytes
    with self._lock:
      # Another thread may have encoded the same history in the meantime.
      if size > self.limit or key in self._kept:
        return
      self._kept[key] = memory.copy()  # A view would hold its whole batch.
      self.bytes += size
      while self.bytes > self.limit:
        old, dropped = self._kept.popitem(last=False)
        self.bytes -= len(old) + dropped.nbytes
