"""Retrieval: the next item of a history, by its semantic ID.

A beam search writes a tuple of codes after a history and never leaves the
catalog's trie. An item's score is the log-probability of its tuple,

  score(i) = sum_l log p(code_l(i) | history, code_1(i) .. code_{l-1}(i)),

over the whole vocabulary: probability outside the trie is not redistributed.

Axes: P histories, G beams, L levels, C codebook size, I items, H items of a
history, T tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gr2_jax.data import slates as slates_lib
from gr2_jax.distributed import processes, sharding
from gr2_jax.models import transformer
from gr2_jax.policy import policy
from gr2_jax.semantic_ids import ids as ids_lib
from gr2_jax.semantic_ids import trie as trie_lib


@struct.dataclass
class SearchResults:
  """Results of a search, best first; items that share a tuple are one."""

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
) -> SearchResults:
  """Beam search over a catalog. Exact where no level has more than G prefixes.

  The history is encoded once; the beams are its group, and their few codes are
  read again at every level. Pure: jit with `model`, `sid_base` and `beams`
  static.

  Args:
    model: the decoder's shape.
    params: unboxed parameters.
    trie: of the catalog.
    prompt_PxT: int32 ids, right-padded, to be followed by a semantic ID.
    length_P: int32.
    excluded_PxHxL: int32, tuples that must not be returned; -1 for none.
    sid_base: id of the first level's first code.
    beams: G, the most items returned for a history.
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
  return SearchResults(items=trie.item(node), score=score)


def _completes(
  codes_PxGxl: jax.Array, tuples_PxHxL: jax.Array, codebook_size: int
) -> jax.Array:
  """Last codes that would make a beam one of the tuples: bool [P, G, C]."""
  same = (codes_PxGxl[:, :, None] == tuples_PxHxL[:, None, :, :-1]).all(-1)
  last = jax.nn.one_hot(tuples_PxHxL[..., -1], codebook_size)
  return jnp.einsum('pgh,phc->pgc', same.astype(last.dtype), last) > 0


@dataclasses.dataclass(frozen=True)
class Questions:
  """Histories and the item that followed each."""

  prompt: np.ndarray  # int32 [n, T], right-padded
  length: np.ndarray  # int32 [n]
  seen: np.ndarray  # int32 [n, H], items of the whole history; -1 for none
  target: np.ndarray  # int32 [n]

  def __len__(self) -> int:
    return len(self.target)


def questions(
  slates: slates_lib.Slates,
  opening: list[int],
  sid_tokens: tuple[tuple[int, ...], ...],
  items: int,
  limit: int,
) -> Questions:
  """Held-out histories, each with its last item as the target.

  The last item of a slate's history precedes the slate, so it is no part of the
  slate's labels. A history whose last item repeats an earlier one is skipped,
  since seen items are not offered.

  Args:
    slates: of one split.
    opening: ids before the history.
    sid_tokens: ids of each item's semantic ID.
    items: the most recent items shown, at most.
    limit: questions at most, a fixed draw.
  """
  order = np.random.default_rng(0).permutation(len(slates))
  levels = len(sid_tokens[0])
  rows, lengths, seen, targets = [], [], [], []
  for index in order.tolist():
    history = slates.history[index, : slates.history_length[index]]
    before = history[:-1]
    if len(rows) == limit:
      break
    if not len(before) or history[-1] in before:
      continue
    ids = list(opening)
    for item in before[-items:]:
      ids.extend(sid_tokens[item])
    lengths.append(len(ids))
    size = len(opening) + items * levels
    rows.append(np.pad(np.array(ids, np.int32), (0, size - len(ids))))
    row = np.full(slates.history.shape[1], -1, np.int32)
    row[: len(before)] = before
    seen.append(row)
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


def popular(
  slates: slates_lib.Slates, seen_nxH: np.ndarray, limit: int
) -> np.ndarray:
  """The baseline: items by the number of users with them in a history.

  Args:
    slates: of training.
    seen_nxH: items not to offer, of `Questions`.
    limit: items offered.

  Returns:
    int32 [n, limit]; -1 where there are fewer.
  """
  real = np.arange(slates.history.shape[1]) < slates.history_length[:, None]
  user = np.broadcast_to(slates.user[:, None], real.shape)[real]
  pairs = np.unique(np.stack([user, slates.history[real]]), axis=1)
  items, users = np.unique(pairs[1], return_counts=True)
  order = items[np.argsort(-users, kind='stable')]
  out = np.full((len(seen_nxH), limit), -1, np.int32)
  for row, seen in zip(out, seen_nxH, strict=True):
    offered = order[: limit + len(seen)]
    offered = offered[~np.isin(offered, seen)][:limit]
    row[: len(offered)] = offered
  return out


def summary(items: np.ndarray, target: np.ndarray) -> dict[str, float]:
  """How high the next item ranks.

  Args:
    items: int32 [n, G], best first; -1 for none.
    target: int32 [n].

  Returns:
    `r@5` and `r@10`, the share of targets among the first 5 and 10; and `mrr`,
    the mean of 1 / rank, 0 where the target is missing.
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
    mesh: devices of the parameters.
    sids: the catalog's.
    held_out: the questions.
    batch_size: questions at a time.
    beams: G.
  """

  def __init__(
    self,
    spec: policy.PolicySpec,
    mesh: jax.sharding.Mesh,
    sids: ids_lib.SemanticIds,
    held_out: Questions,
    batch_size: int,
    beams: int,
  ):
    self._mesh, self._batch_size = mesh, batch_size
    self._trie = trie_lib.build_trie(sids)
    self._held_out = held_out
    codes = np.concatenate([sids.codes, np.full((1, sids.levels), -1)])
    self._excluded = codes[held_out.seen].astype(np.int32)
    self._target = sids.find(sids.codes[held_out.target])
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
      for begin in range(0, len(self._held_out), self._batch_size):
        index = np.arange(begin, begin + self._batch_size)
        index = np.minimum(index, len(self._held_out) - 1)
        arrays = self._held_out.prompt, self._held_out.length, self._excluded
        batch = sharding.shard_batch(
          tuple(x[index] for x in arrays), self._mesh
        )
        results = self._search(params, self._trie, *batch)
        parts.append(processes.gather_to_host(results.items))
    items = np.concatenate(parts)[: len(self._held_out)]
    return summary(items, self._target)
