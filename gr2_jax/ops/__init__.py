"""Pure functions on arrays: no model, no config, nothing of the project.

Axis letters: G group (rollouts of one slate), T time, K candidates,
V vocabulary, S seeds, U users. A leading `...` is any number of batch axes.

Arguments of these names have these shapes in every module:

* `ranking [..., K]` int32: `ranking[..., i]` is the candidate at rank `i`, by
  its index in the order in which the prompt presents the candidates.
* `count [...]` int32: the number of real candidates; indices `>= count` are
  padding. A ranking lists the real ones first, then the padding in ascending
  order.
* `grades [..., K]` 0, 1 or 2 (positive where > 0), and `incoming [..., K]` the
  incoming rank (0 = first) of each candidate, both in presented order. Entries
  at padding are not read.
* A loss is a `Total(sum, count)`: add totals over micro-batches and devices,
  then divide once.
"""

import jax
import numpy as np

Array = jax.Array | np.ndarray
