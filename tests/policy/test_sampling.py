import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.ops import parsing
from gr2_jax.policy import grammar, sampling

from .. import tiny

K = tiny.GRAMMAR.num_candidates
V = tiny.MODEL.vocab_size


def config(thinking, tokens=None, **kwargs):
  fields = dict(group=4, max_tokens=tokens or (11 if thinking else K + 1))
  return sampling.SamplingOptions(**(fields | kwargs), thinking=thinking)


def verdicts(found, count, thinking):
  shape = found.length.shape
  return parsing.parse_answer(
    found.tokens,
    found.length,
    np.broadcast_to(count[:, None], shape),
    np.broadcast_to(np.arange(K), (*shape, K)),
    num_candidates=K,
    slot_base=tiny.GRAMMAR.slot_base,
    num_slots=tiny.GRAMMAR.num_slots,
    eos=tiny.GRAMMAR.eos,
    think_end=tiny.GRAMMAR.think_end,
    thinking=thinking,
  ).verdict


@pytest.mark.parametrize(
  ('thinking', 'tokens', 'temperature'),
  [(False, K + 1, 1.0), (True, K + 2, 1.0), (True, 11, 0.7), (True, 11, 0.0)],
)
def test_every_constrained_completion_is_valid(thinking, tokens, temperature):
  """Any parameters, prompts and counts; the smallest budget too."""
  settings_ = config(
    thinking, tokens, temperature=temperature, constrained=True
  )
  count, spans = tiny.counts(6), set()
  for seed in range(8):
    params = tiny.params(seed=seed)
    params['embedding'] *= 1 + seed
    prompt, length = tiny.prompts(6, seed=seed)
    found = tiny.sample(
      tiny.MODEL, params, prompt, length, count, jax.random.key(seed),
      tiny.GRAMMAR, settings_,
    )  # fmt: skip
    assert (verdicts(found, count, thinking) == parsing.VALID).all()
    spans |= set((np.asarray(found.length) - count[:, None]).ravel().tolist())
  assert max(spans) <= tokens - 1
  if thinking and tokens == 11:
    assert len(spans) > 1  # Reasoning of several lengths.


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_some_token_is_always_allowed(data):
  T = 8
  tokens = np.array(
    data.draw(st.lists(st.integers(0, V - 1), min_size=T, max_size=T))
  )
  count = np.int32(data.draw(st.integers(0, K)))
  thinking = data.draw(st.booleans())
  left = T - np.arange(T)
  found = allowed(replay(tokens, thinking), np.full(T, count), left)
  assert found.any(-1).all()
  opened = thinking & ~np.cumsum(np.r_[False, tokens == 4])[:-1].astype(bool)
  for t in range(T):
    may = set(np.flatnonzero(found[t]).tolist())
    if opened[t]:
      want = {4} if left[t] <= count + 2 else set(range(V)) - {0, 2}
    else:
      begun = 0 if not thinking else list(tokens).index(4)
      named = set(tokens[begun:t].tolist())
      want = set(range(10, 10 + count)) - named or {2}
    assert may == want


allowed = jax.jit(
  lambda progress, count, left: tiny.GRAMMAR.allowed(count, progress, left, V)
)
replay = jax.jit(
  functools.partial(grammar.replay, tiny.GRAMMAR, None), static_argnums=1
)


@pytest.mark.parametrize('thinking', [True, False])
def test_replay_equals_one_step_after_another(thinking):
  tokens = np.random.default_rng(0).integers(0, 17, (2, 3, 9)).astype(np.int32)
  tokens[0, 0, 2], tokens[1, 1, 4] = tiny.GRAMMAR.think_end, tiny.GRAMMAR.eos
  found = replay(tokens, thinking)
  progress = tiny.GRAMMAR.start(None, (2, 3), thinking)
  for t in range(9):
    for name in ('answering', 'emitted', 'done'):
      np.testing.assert_array_equal(
        getattr(found, name)[:, :, t], getattr(progress, name), name
      )
    progress = tiny.GRAMMAR.advance(None, progress, tokens[:, :, t])
  assert np.asarray(progress.emitted).any()


def test_slots_named_while_reasoning_stay_free():
  tokens = np.int32([11, 12, 4, 11])
  progress = replay(tokens, True)
  assert not progress.emitted[3].any()
  after = tiny.GRAMMAR.advance(
    None, jax.tree.map(lambda x: x[3], progress), tokens[3]
  )
  assert after.emitted.tolist() == [False, True, False, False, False]


@pytest.mark.parametrize('constrained', [True, False])
def test_nothing_is_written_after_the_end(constrained):
  _, _, found = tiny.rollouts(
    config(False, 9, constrained=constrained, group=64), size=5
  )
  tokens, length = np.asarray(found.tokens), np.asarray(found.length)
  time = np.arange(9)
  after = time >= length[..., None]
  assert after.any()
  assert (tokens[after] == tiny.GRAMMAR.pad).all()
  assert (np.asarray(found.logp)[after] == 0).all()
  assert (np.asarray(found.entropy)[after] == 0).all()
  ends = tokens == tiny.GRAMMAR.eos
  last = time == length[..., None] - 1
  assert (ends <= last).all()
  assert (ends[last] | (length.ravel() == 9)).all()
  assert (np.asarray(found.logp)[~after] <= 0).all()


def test_greedy_answers_are_the_most_likely_allowed_tokens():
  """Against whole sequences: no cache, no shared prefix."""
  settings_ = config(False, temperature=0.0, constrained=True, group=1)
  prompt, length, found = tiny.rollouts(settings_, size=5)
  params, count = tiny.params(), tiny.counts(5)
  tokens = np.asarray(found.tokens)
  ids, first = tiny.whole_sequences(prompt, length, tokens)
  logits = tiny.plain_hidden(tiny.MODEL, params, ids) @ params['embedding'].T
  for row in range(5):
    left = list(range(10, 10 + count[row]))
    for t in range(count[row]):
      best = max(left, key=lambda i: logits[row, first[row] + t - 1, i])
      assert tokens[row, 0, t] == best
      left.remove(best)


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_draws_follow_the_distribution(temperature):
  settings_ = config(False, 1, temperature=temperature, group=4096)
  prompt, length, found = tiny.rollouts(settings_, size=1)
  params = tiny.params()
  hidden = tiny.plain_hidden(tiny.MODEL, params, prompt)[0, length[0] - 1]
  logits = np.asarray(params['embedding'] @ hidden, np.float64) / temperature
  p = np.exp(logits - logits.max())
  p /= p.sum()
  drawn = np.asarray(found.tokens).ravel()
  share = np.bincount(drawn, minlength=V) / drawn.size
  assert np.abs(share - p).max() < 4 * np.sqrt(0.25 / drawn.size)
  np.testing.assert_allclose(found.logp[0, :, 0], np.log(p)[drawn], atol=1e-4)
  np.testing.assert_allclose(
    found.entropy[0, 0, 0], -(p * np.log(p)).sum(), atol=1e-4
  )


def test_a_key_decides_the_draws():
  settings_ = config(False, group=8)
  _, _, one = tiny.rollouts(settings_, seed=0)
  _, _, same = tiny.rollouts(settings_, seed=0)
  tiny.assert_trees_equal(one, same)
  prompt, length = tiny.prompts()
  other = tiny.sample(
    tiny.MODEL, tiny.params(), prompt, length, tiny.counts(5),
    jax.random.key(9), tiny.GRAMMAR, settings_,
  )  # fmt: skip
  assert (one.tokens != other.tokens).any()
  assert (one.tokens[:, 0] != one.tokens[:, 1]).any()


def test_entropy_of_forbidden_tokens_is_nothing():
  logits = jnp.zeros((1, 6))
  mask = jnp.arange(6)[None] < 4
  found = sampling.entropy(sampling.distribution(logits, 1.0, mask))
  np.testing.assert_allclose(found, [np.log(4)], rtol=1e-6)


def test_one_trace_serves_every_batch_of_a_shape():
  settings_ = config(True, 12)
  for seed in range(3):
    tiny.rollouts(settings_, seed=seed)
    if not seed:
      traces = tiny.sample._cache_size()
  assert tiny.sample._cache_size() == traces
