"""Retrieval: which item comes next, by its semantic ID.

A beam search writes a tuple of codes behind a history and never leaves the
catalog's trie. An item's score is the log-probability of its tuple,

  score(i) = sum_l log p(code_l(i) | history, code_1(i) .. code_{l-1}(i)),

over the whole vocabulary: what the trie forbids is struck out, not shared out.

Axes: P histories, G beams, L levels, C codebook size, I items, H items of a
history, T tokens.
"""

import dataclasses
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import processes, sharding
from gr2_jax.models import transformer
from gr2_jax.policy import policy
from gr2_jax.semantic_ids import ids as ids_lib
from gr2_jax.semantic_ids import trie as trie_lib


@flax.struct.dataclass
class Found:
  """What a search found, best first; items that share a tuple are one."""

  items: jax.Array  # int32 [P, G]; -1 where there are fewer
  score: jax.Array  # float32 [P, G]; -inf there


def search(
  model: transformer.TransformerConfig,
  params: Any,
  trie: trie_lib.Trie,
  prompt_PxT: jax.Array,
  length_P: jax.Array,
  excluded_PxHxL: jax.Array,
  *,
  sid_base: int,
  beams: int,
) -> Found:
  """Beam search over a catalog. Exact where no level has more than G prefixes.

  The history is encoded once; the beams are its group, and read their own few
  codes anew at every level. Pure: jit with `model`, `sid_base` and `beams`
  static.

  Args:
    model: the decoder's shape.
    params: unboxed parameters.
    trie: of the catalog.
    prompt_PxT: int32 ids, right-padded, that a semantic ID follows.
    length_P: int32.
    excluded_PxHxL: int32, tuples that may not be found; -1 for none.
    sid_base: id of the first level's first code.
    beams: G.

  Returns:
    The best items found, at most G of each history.
  """
  L, C = excluded_PxHxL.shape[-1], trie.codebook_size
  P = len(prompt_PxT)
  hidden, prefix = transformer.encode_prompt(
    model, params, prompt_PxT, length_P
  )
  rows = transformer.output_embedding(params)
  codes = jnp.zeros((P, 1, 0), jnp.int32)
  node, score = jnp.zeros((P, 1), jnp.int32), jnp.zeros((P, 1), jnp.float32)
  for level in range(L):
    first = sid_base + level * C
    ids = codes + sid_base + C * jnp.arange(level)
    states = transformer.completion_hidden(
      model,
      params,
      hidden,
      prefix,
      jnp.pad(ids, [(0, 0), (0, 0), (0, 1)]),  # The last one is not read.
    )[:, :, level]
    logits = (states @ rows.T.astype(states.dtype)).astype(jnp.float32)
    logps = jax.nn.log_softmax(logits)[..., first : first + C]
    allowed = trie.allowed(node)
    if level == L - 1:
      allowed &= ~_completes(codes, excluded_PxHxL, C)
    total = jnp.where(allowed, score[..., None] + logps, -jnp.inf)
    G = total.shape[1]
    score, place = jax.lax.top_k(total.reshape(P, -1), min(beams, G * C))
    parent, code = place // C, place % C
    node = trie.advance(jnp.take_along_axis(node, parent, 1), code)
    node = jnp.where(score > -jnp.inf, node, -1)
    codes = jnp.take_along_axis(codes, parent[..., None], 1)
    codes = jnp.concatenate([codes, code[..., None]], -1)
  return Found(items=trie.item(node), score=score)


def _completes(
  codes_PxGxl: jax.Array, tuples_PxHxL: jax.Array, codebook_size: int
) -> jax.Array:
  """Which last codes would make a beam one of the tuples: bool [P, G, C]."""
  own, theirs = codes_PxGxl[:, :, None], tuples_PxHxL[:, None, :, :-1]
  same = (own == theirs).all(-1)
  last = jax.nn.one_hot(tuples_PxHxL[..., -1], codebook_size)
  return jnp.einsum('pgh,phc->pgc', same.astype(last.dtype), last) > 0


@dataclasses.dataclass(frozen=True)
class Questions:
  """Histories, and what came next.

  Attributes:
    prompt: int32 [n, T], right-padded.
    length: int32 [n].
    seen: int32 [n, H], items of the whole history; -1 for none.
    target: int32 [n].
  """

  prompt: np.ndarray
  length: np.ndarray
  seen: np.ndarray
  target: np.ndarray

  def __len__(self) -> int:
    return len(self.target)


def questions(
  slates: slates_lib.Slates,
  opening: list[int],
  sid_tokens: tuple[tuple[int, ...], ...],
  items: int,
  most: int,
) -> Questions:
  """Asks for the last item of held-out histories, from those before it.

  The last item of a slate's history precedes the slate: whatever the slate's
  labels are, it is no part of them. Where it repeats an item before it there
  is no question, since items seen are not offered.

  Args:
    slates: of one split.
    opening: ids before the history.
    sid_tokens: ids of each item's semantic ID.
    items: most recent ones that are shown, at most.
    most: questions, a fixed draw.

  Returns:
    At most so many.
  """
  order = np.random.default_rng(0).permutation(len(slates))
  levels = len(sid_tokens[0])
  rows, lengths, seen, targets = [], [], [], []
  for index in order.tolist():
    history = slates.history[index, : slates.history_length[index]]
    before = history[:-1]
    if len(rows) == most:
      break
    if not len(before) or history[-1] in before:
      continue
    ids = list(opening)
    for item in before[-items:]:
      ids.extend(sid_tokens[item])
    lengths.append(len(ids))
    size = len(opening) + items * levels
    rows.append(np.pad(np.array(ids, np.int32), (0, size - len(ids))))
    own = np.full(slates.history.shape[1], -1, np.int32)
    own[: len(before)] = before
    seen.append(own)
    targets.append(history[-1])
  width = slates.history.shape[1]
  return Questions(
    prompt=np.array(rows, np.int32).reshape(
      len(rows), len(opening) + items * levels
    ),
    length=np.array(lengths, np.int32),
    seen=np.array(seen, np.int32).reshape(len(rows), width),
    target=np.array(targets, np.int32),
  )


def popular(slates: slates_lib.Slates, seen: np.ndarray, most: int):
  """The baseline: items by how many users have them in a history.

  Args:
    slates: of training.
    seen: int32 [n, H] of `Questions`, items that are not offered.
    most: items offered.

  Returns:
    int32 [n, most].
  """
  real = np.arange(slates.history.shape[1]) < slates.history_length[:, None]
  user = np.broadcast_to(slates.user[:, None], real.shape)[real]
  pairs = np.unique(np.stack([user, slates.history[real]]), axis=1)
  items, users = np.unique(pairs[1], return_counts=True)
  order = items[np.argsort(-users, kind='stable')]
  out = np.full((len(seen), most), -1, np.int32)
  for row, own in zip(out, seen, strict=True):
    offered = order[: most + len(own)]
    offered = offered[~np.isin(offered, own)][:most]
    row[: len(offered)] = offered
  return out


def summary(items: np.ndarray, target: np.ndarray) -> dict[str, float]:
  """How high the next item stands.

  Args:
    items: int32 [n, G], best first; -1 for none.
    target: int32 [n].

  Returns:
    `r@5` and `r@10`, the share of targets among the first so many, and `mrr`,
    the mean of 1 / place, 0 where the target was not found.
  """
  hit = items == target[:, None]
  place = 1 + np.arange(items.shape[1])
  return {
    'r@5': float(hit[:, :5].any(1).mean()),
    'r@10': float(hit[:, :10].any(1).mean()),
    'mrr': float((hit / place).sum(1).mean()),
  }


class Retriever:
  """A search for held-out questions, compiled once.

  Args:
    spec: tokens and shapes.
    mesh: where the parameters lie.
    sids: the catalog's.
    asked: the questions.
    batch_size: of them at a time.
    beams: G.
  """

  def __init__(
    self,
    spec: policy.PolicySpec,
    mesh: jax.sharding.Mesh,
    sids: ids_lib.SemanticIds,
    asked: Questions,
    batch_size: int,
    beams: int,
  ):
    self._mesh, self._batch_size = mesh, batch_size
    self._trie = trie_lib.build_trie(sids)
    self._asked = asked
    codes = np.concatenate([sids.codes, np.full((1, sids.levels), -1)])
    self._excluded = codes[asked.seen].astype(np.int32)
    self._target = sids.find(sids.codes[asked.target])
    self._search = jax.jit(
      functools.partial(
        search,
        spec.model,
        sid_base=spec.vocabulary.sid_base,
        beams=beams,
      )
    )

  def __call__(self, params: Any) -> dict[str, float]:
    """See `summary`."""
    parts = []
    with sharding.activate(self._mesh):
      for begin in range(0, len(self._asked), self._batch_size):
        index = np.arange(begin, begin + self._batch_size)
        index = np.minimum(index, len(self._asked) - 1)
        batch = sharding.shard_batch(
          (
            self._asked.prompt[index],
            self._asked.length[index],
            self._excluded[index],
          ),
          self._mesh,
        )
        found = self._search(params, self._trie, *batch)
        parts.append(processes.gather_to_host(found.items))
    items = np.concatenate(parts)[: len(self._asked)]
    return summary(items, self._target)
