"""Memory tokens: what of a prompt stays readable behind them.

A prompt may hold learned tokens behind a user's history. They read it, and
what stands behind them reads only them and itself, as in gist tokens (Mu et
al., arXiv 2304.08467): so their keys and values are all that is kept of the
history, they depend on the user alone, and they may be cached.

With seen[t] = a memory token stands at t or before, and
behind[t] = seen[t] and t is none itself:

| query | reads, of what does not stand after it |
|---|---|
| before the first memory token | everything |
| a memory token | everything |
| behind | the keys with seen: memory tokens and what is behind, too |

Axes: P prompts, T time.
"""

import jax
import jax.numpy as jnp

from gr2_jax.ops import masking


def find(
  prompt_PxT: jax.Array, length_P: jax.Array, base: int, size: int
) -> jax.Array:
  """Where the memory tokens stand.

  Args:
    prompt_PxT: int32 ids, right-padded.
    length_P: int32.
    base: id of the family's first token; the others follow.
    size: tokens of the family.

  Returns:
    bool [P, T], False in the padding.
  """
  ours = (prompt_PxT >= base) & (prompt_PxT < base + size)
  return ours & masking.length_mask(length_P, prompt_PxT.shape[-1])


def readable(memory_PxT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The causal mask without what memory tokens stand for.

  A query t reads a key s where s <= t and (seen[s] or not behind[t]). What
  follows the prompt stands behind all of it: it reads s where seen[s], or
  anywhere in a prompt without memory tokens.

  Args:
    memory_PxT: bool, of `find`.

  Returns:
    Which keys each query of the prompt reads, bool [P, T, T], and which keys
    are read by what follows the prompt, bool [P, T].
  """
  seen = jnp.cumsum(memory_PxT, axis=-1) > 0
  behind = seen & ~memory_PxT
  time = jnp.arange(memory_PxT.shape[-1])
  within = seen[:, None, :] | ~behind[:, :, None]
  return within & (time[:, None] >= time), seen | ~seen[:, -1:]
