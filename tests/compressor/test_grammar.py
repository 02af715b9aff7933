"""Extraction: every constrained completion is a part of its prompt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.compressor import grammar as extraction_lib
from gr2_jax.models import transformer
from gr2_jax.ops import compression
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import sampling
from gr2_jax.train import learner, policy_gradient

from .. import tiny

V = tiny.MODEL.vocab_size
P, G, S, T, K = 4, 3, 60, 24, 4
PAD, BOS, EOS, HISTORY, CANDIDATES, CLOSING, SLOT = 0, 1, 2, 3, 4, 5, 10
WORDS = (20, 26)  # few, so that tokens repeat


def extraction(slack=1):
  return extraction_lib.Extraction(
    history=HISTORY,
    candidates=CANDIDATES,
    slot_base=SLOT,
    num_slots=6,
    num_candidates=K,
    eos=EOS,
    pad=PAD,
    slack=slack,
  )


def blocks(rng, least=0):
  """A history and lines, of any lengths."""
  count = int(rng.integers(1, K + 1))

  def some(low, high):
    return rng.integers(*WORDS, int(rng.integers(low, high))).tolist()

  return some(0, 13), [some(least, 10) for _ in range(count)]


def rendered(context):
  history, lines = context
  ids = [BOS, HISTORY, *history, CANDIDATES]
  for place, line in enumerate(lines):
    ids += [*line, SLOT + place]
  return [*ids, CLOSING]


def sources(rng, contexts, slack=1, budgets=None):
  """Sources of prompts with random ids as padding."""
  prompt = rng.integers(0, V, (len(contexts), S)).astype(np.int32)
  ids = [rendered(one) for one in contexts]
  for row, one in zip(prompt, ids, strict=True):
    row[: len(one)] = one
  length = np.array([len(one) for one in ids], np.int32)
  count = np.array([len(lines) for _, lines in contexts], np.int32)
  if budgets is None:
    budgets = count + 2 + rng.integers(0, 30, len(contexts))
  budgets = np.asarray(budgets, np.int32)
  source = extraction(slack).source(prompt, length, count, budgets)
  return prompt, length, source


def vocabulary_mask(grammar, source, progress, left):
  """The mask on the vocabulary: bool [P, ..., V].

  It is all False where a token could be chosen twice.
  """
  candidates = grammar.candidate_tokens(source)
  found = grammar.allowed(source, progress, left, candidates.shape[1])
  hits = jax.vmap(lambda ids, rows: rows.astype(int) @ jax.nn.one_hot(ids, V))(
    candidates, found
  )
  return jnp.where((hits > 1).any(), False, hits > 0)


@functools.partial(jax.jit, static_argnums=0)
def complete(slack, source, key, bias):
  """Samples with random logits: tokens, masks and progress of each step."""
  grammar = extraction(slack)

  def step(progress, at):
    t, key = at
    left = jnp.broadcast_to(T - t, (P, G))
    allowed = vocabulary_mask(grammar, source, progress, left)
    logits = 3 * jax.random.normal(key, (P, G, V)) + bias
    token = jnp.argmax(jnp.where(allowed, logits, -jnp.inf), -1)
    token = jnp.where(progress.done, PAD, token).astype(jnp.int32)
    return grammar.advance(source, progress, token), (token, allowed, progress)

  first = grammar.start(source, (P, G), False)
  _, found = jax.lax.scan(
    step, first, (jnp.arange(T), jax.random.split(key, T))
  )
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), found)


def drawn(seed, slack, taste, least=0):
  """Prompts and completions, with a bias for or against anchors."""
  rng = np.random.default_rng(seed)
  contexts = [blocks(rng, least) for _ in range(P)]
  _, _, source = sources(rng, contexts, slack)
  bias = np.zeros(V, np.float32)
  bias[[CANDIDATES, *range(SLOT, SLOT + K)]] = taste
  tokens, allowed, progress = complete(
    slack, source, jax.random.key(seed), bias
  )
  return contexts, source, np.asarray(tokens), np.asarray(allowed), progress


def oracle(context, written, budget, remaining, slack):
  """The allowed next tokens, computed on lists."""
  history, lines = context
  segments = [history, *lines]
  anchors = [CANDIDATES, *(SLOT + place for place in range(len(lines)))]
  kept, rest = [[]], list(history)
  for token in written:
    if token in rest:
      rest = rest[rest.index(token) + 1 :]
      kept[-1].append(token)
    else:
      assert token == anchors[len(kept) - 1]
      rest = list(segments[len(kept)]) if len(kept) < len(segments) else []
      kept.append([])
  anchors = anchors[len(kept) - 1 :]
  if not anchors:
    return {EOS}
  room = min(budget - len(written), remaining) - len(anchors) - 1
  if room <= 0:
    return {anchors[0]}
  if len(kept) == 1:
    return {*rest, anchors[0]}
  size = len(kept[-1])
  most = (room + size) // len(anchors)  # An equal share of what is left.
  needed = 0
  if len(kept) == 2:  # The others must be able to be as long.
    needed = min(most, min(map(len, lines))) - slack - size
    most = min(most, min(map(len, lines)) + slack)
  if len(kept) > 2:
    first = len(kept[1])
    most = min(most, first + slack)
    needed = min(first - size, len(rest))
  if size >= most:
    return {anchors[0]}
  if needed > 0:  # Enough tokens must be left unskipped.
    return set(rest[: len(rest) - needed + 1])
  return {*rest, anchors[0]}


CASES = dict(
  seed=st.integers(0, 2**31),
  slack=st.integers(0, 2),
  taste=st.sampled_from([-8.0, -2.0, 0.0, 3.0]),
)


@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_the_mask_equals_the_rules_on_lists(seed, slack, taste):
  contexts, source, tokens, allowed, _ = drawn(seed, slack, taste)
  assert allowed.any(-1).all()
  for p in range(P):
    for g in range(G):
      for t in range(T):
        written = tokens[p, g, :t].tolist()
        expected = oracle(
          contexts[p], written, int(source.budget[p]), T - t, slack
        )
        assert set(np.flatnonzero(allowed[p, g, t])) == expected
        if tokens[p, g, t] == EOS:
          break


def is_part(short, long):
  rest = iter(long)
  return all(token in rest for token in short)


def split(tokens, count):
  """The length, history and lines of a completion with anchors in order."""
  size = tokens.index(EOS)
  assert not any(tokens[size + 1 :])
  anchors = [CANDIDATES, *range(SLOT, SLOT + count)]
  at = [tokens.index(anchor) for anchor in anchors]
  assert at == sorted(at)
  assert at[-1] == size - 1
  parts = [tokens[a + 1 : b] for a, b in zip([-1, *at[:-1]], at, strict=True)]
  assert not set(sum(parts, [])) & {*anchors, EOS}
  return size + 1, parts


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_every_completion_is_an_extract_of_its_prompt(seed, slack, taste):
  contexts, source, tokens, _, _ = drawn(seed, slack, taste)
  for p, (history, lines) in enumerate(contexts):
    for row in tokens[p].tolist():
      size, (kept, *shown) = split(row, len(lines))
      assert size <= min(int(source.budget[p]), T)
      assert is_part(kept, history)
      for line, whole in zip(shown, lines, strict=True):
        assert is_part(line, whole)
        assert len(line) <= len(shown[0]) + slack
        assert len(line) >= min(len(shown[0]), len(whole))


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_every_completion_is_valid(seed, slack, taste):
  """By `ops.compression`, which shares no code with the mask."""
  rng = np.random.default_rng(seed)
  contexts = [blocks(rng) for _ in range(P)]
  prompt, length, source = sources(rng, contexts, slack)
  bias = np.zeros(V, np.float32)
  bias[[CANDIDATES, *range(SLOT, SLOT + K)]] = taste
  tokens, _, _ = complete(slack, source, jax.random.key(seed), bias)
  symbols = compression.Symbols(HISTORY, CANDIDATES, SLOT, K, EOS)
  size = 1 + jnp.argmax(tokens == EOS, -1)
  verdict = compression.verify(
    tokens,
    size,
    prompt,
    length,
    source.count,
    source.budget,
    symbols,
    2 * slack,
  )
  assert (np.asarray(verdict) == compression.VALID).all()


@pytest.mark.parametrize('spare', [0, 1, 5])
def test_a_small_budget_is_used_and_not_exceeded(spare):
  rng = np.random.default_rng(spare)
  contexts = [blocks(rng, least=5) for _ in range(P)]
  count = np.array([len(lines) for _, lines in contexts])
  least = extraction().min_tokens(count)
  _, _, source = sources(rng, contexts, budgets=least + spare)
  bias = np.zeros(V, np.float32)
  bias[[CANDIDATES, *range(SLOT, SLOT + K)]] = -20.0
  tokens, allowed, _ = complete(1, source, jax.random.key(0), bias)
  assert np.asarray(allowed).any(-1).all()
  for p, (history, lines) in enumerate(contexts):
    for row in np.asarray(tokens)[p].tolist():
      size, parts = split(row, len(lines))
      assert size == least[p] + sum(map(len, parts))
      if not spare:
        assert size == least[p]
      if len(history) >= spare:  # The history may use all of it.
        assert spare - len(lines) <= size - least[p] <= spare


def test_a_line_must_not_skip_tokens_that_it_needs():
  context = ([], [[20, 21, 22, 23], [20, 21, 22, 23]])
  rng = np.random.default_rng(0)
  _, _, source = sources(rng, [context], budgets=[30])
  grammar = extraction()
  progress = grammar.start(source, (1,), False)
  for token in (CANDIDATES, 20, 21, 22, SLOT):
    progress = grammar.advance(source, progress, jnp.int32([token]))
  allowed = vocabulary_mask(grammar, source, progress, jnp.int32([20]))
  assert np.flatnonzero(allowed[0]).tolist() == [20, 21]  # Three of four.
  progress = grammar.advance(source, progress, jnp.int32([21]))
  allowed = vocabulary_mask(grammar, source, progress, jnp.int32([19]))
  assert np.flatnonzero(allowed[0]).tolist() == [22]


def test_of_a_repeated_token_the_first_is_kept():
  context = ([20, 21, 20, 22], [[23]])
  _, _, source = sources(np.random.default_rng(0), [context], budgets=[9])
  grammar = extraction()
  progress = grammar.start(source, (1,), False)
  progress = grammar.advance(source, progress, jnp.int32([20]))
  allowed = vocabulary_mask(grammar, source, progress, jnp.int32([9]))
  assert np.flatnonzero(allowed[0]).tolist() == [CANDIDATES, 20, 21, 22]


def test_padding_behind_a_prompt_is_never_read():
  rng = np.random.default_rng(0)
  contexts = [blocks(rng) for _ in range(P)]
  budgets = [20] * P
  one, other = (
    sources(np.random.default_rng(seed), contexts, budgets=budgets)[2]
    for seed in range(2)
  )
  assert (one.tokens != other.tokens).any()
  found = [
    complete(1, source, jax.random.key(0), np.zeros(V, np.float32))[:2]
    for source in (one, other)
  ]
  tiny.assert_trees_equal(*found)


@pytest.mark.parametrize('slack', [0, 1])
def test_replay_equals_one_step_after_another(slack):
  _, source, tokens, _, progress = drawn(3, slack, 0.0)
  found = grammar_lib.replay(extraction(slack), source, tokens, False)
  # Nothing is read behind <eos>.
  real = np.cumsum(tokens == EOS, -1) - (tokens == EOS) == 0
  for name in ('place', 'used', 'line', 'first', 'done'):
    one, two = getattr(found, name), getattr(progress, name)
    assert one.shape == (P, G, T)
    np.testing.assert_array_equal(
      np.asarray(one)[real], np.asarray(two)[real], name
    )
  assert np.asarray(found.first).max() > 0


def test_sampler_and_learner_agree():
  temperature = 0.7
  rng = np.random.default_rng(1)
  contexts = [blocks(rng, least=2) for _ in range(P)]
  prompt, length, source = sources(rng, contexts)
  params, grammar = tiny.params(), extraction()
  config = sampling.SamplingOptions(
    group=G, max_tokens=T, temperature=temperature, constrained=True
  )
  found = tiny.sample(
    tiny.MODEL, params, prompt, length, source, jax.random.key(0), grammar,
    config,
  )  # fmt: skip
  for p, (_, lines) in enumerate(contexts):
    for g, row in enumerate(np.asarray(found.tokens)[p].tolist()):
      assert split(row, len(lines))[0] == found.length[p, g]

  @functools.partial(jax.jit, static_argnums=0)
  def score(chunk, constraint):
    hidden, prefix = transformer.encode_prompt(
      tiny.MODEL, params, prompt, length
    )
    hidden = transformer.completion_hidden(
      tiny.MODEL, params, hidden, prefix, found.tokens
    )
    return learner.score_tokens(
      params, hidden, found.tokens, grammar, temperature=temperature,
      chunk=chunk, constraint=constraint,
    )  # fmt: skip

  progress = grammar_lib.replay(grammar, source, found.tokens, False)
  real = np.arange(T) < np.asarray(found.length)[..., None]
  for chunk in (32, 7):
    scores = score(chunk, (progress, source))
    for ours, theirs in (
      (scores.logp, found.logp),
      (scores.entropy, found.entropy),
    ):
      difference = np.abs(np.asarray(ours) - np.asarray(theirs))[real]
      assert difference.max() < 1e-5
  # Without the mask they differ.
  free = score(32, None)
  difference = np.abs(np.asarray(free.logp) - np.asarray(found.logp))[real]
  assert difference.mean() > 0.5


def test_a_policy_batch_carries_its_sources():
  """They are arrays per prompt: they are scored and split with the batch."""
  rng = np.random.default_rng(2)
  contexts = [blocks(rng, least=2) for _ in range(P)]
  prompt, length, source = sources(rng, contexts)
  params, grammar = tiny.params(), extraction()
  config = sampling.SamplingOptions(group=G, max_tokens=T, constrained=True)
  found = tiny.sample(
    tiny.MODEL, params, prompt, length, source, jax.random.key(0), grammar,
    config,
  )  # fmt: skip
  batch = policy_gradient.PolicyBatch(
    prompt=prompt, prompt_length=length, constraint_inputs=source,
    tokens=found.tokens,
    length=found.length, logp=found.logp,
    advantage=np.ones((P, G), np.float32), use=np.ones(P, bool),
  )  # fmt: skip
  score = jax.jit(policy_gradient.score, static_argnums=(0, 3, 4))
  real = np.arange(T) < np.asarray(found.length)[..., None]
  for rows in (slice(None), slice(2, 4)):
    part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
    scores = score(tiny.MODEL, params, part, grammar, config)
    difference = np.abs(np.asarray(scores.logp) - np.asarray(part.logp))
    assert difference[real[rows]].max() < 1e-5
