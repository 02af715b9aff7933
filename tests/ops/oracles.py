"""Slow, obvious definitions in plain Python and numpy."""

import itertools
import math

import numpy as np


def ranked_grades(ranking, grades, count):
  return [int(grades[j]) for j in ranking[:count]]


def auc(ranking, grades, count):
  ranked = ranked_grades(ranking, grades, count)
  right = pairs = 0
  for i, j in itertools.permutations(range(count), 2):
    if ranked[i] > 0 and ranked[j] == 0:
      pairs += 1
      right += i < j
  return right / pairs if pairs else 0.5


def misordered(ranking, grades, count):
  """Whether some negative stands above a positive."""
  ranked = ranked_grades(ranking, grades, count)
  return any(a <= 0 < b for a, b in itertools.combinations(ranked, 2))


def ndcg(ranking, grades, count, k):
  def dcg(values):
    return sum((2**g - 1) / math.log2(i + 2) for i, g in enumerate(values[:k]))

  ranked = ranked_grades(ranking, grades, count)
  best = dcg(sorted(ranked, reverse=True))
  return dcg(ranked) / best if best else 0.0


def recall(ranking, grades, count, k):
  ranked = ranked_grades(ranking, grades, count)
  positives = sum(g > 0 for g in ranked)
  found = sum(g > 0 for g in ranked[:k])
  return found / min(k, positives) if positives else 0.0


def reciprocal_rank(ranking, grades, count):
  for i, grade in enumerate(ranked_grades(ranking, grades, count)):
    if grade > 0:
      return 1 / (i + 1)
  return 0.0


def target(grades, count, incoming):
  return min(range(count), key=lambda j: (-grades[j], incoming[j]))


def promotion(ranking, grades, count, incoming):
  if not any(grades[j] > 0 for j in range(count)):
    return 0.0
  j = target(grades, count, incoming)
  return (int(incoming[j]) - list(ranking).index(j)) / count


def incoming_order(incoming, count):
  size = len(incoming)
  real = sorted(range(count), key=lambda j: incoming[j])
  return real + list(range(count, size))


def parse(
  ids, length, count, incoming, slot_base, num_slots, eos, think_end, thinking
):
  """(ranking, verdict name), by reading the tokens one after another."""
  tokens = [int(t) for t in ids[:length]]
  fallback = incoming_order(incoming, count)
  if eos not in tokens or tokens.index(eos) != length - 1:
    return fallback, 'wrong_format'
  answer = tokens[:-1]
  if thinking:
    if think_end not in answer:
      return fallback, 'wrong_format'
    answer = answer[answer.index(think_end) + 1 :]
  slots = [t - slot_base for t in answer]
  if any(not 0 <= s < num_slots for s in slots):
    return fallback, 'wrong_format'
  if any(s >= count for s in slots):
    return fallback, 'out_of_set'
  if len(set(slots)) < len(slots):
    return fallback, 'repetition'
  if len(slots) < count:
    return fallback, 'missing'
  return slots + list(range(count, len(incoming))), 'valid'


def discordant_share(first, second, count):
  pairs = list(itertools.combinations(range(count), 2))
  first, second = list(first[:count]), list(second[:count])
  wrong = sum(
    (first.index(a) < first.index(b)) != (second.index(a) < second.index(b))
    for a, b in pairs
  )
  return wrong / len(pairs) if pairs else 0.0


def random_slates(seed, batch, size, min_count=1):
  """Rankings, grades, counts and incoming ranks, garbage at padding."""
  rng = np.random.default_rng(seed)
  count = rng.integers(min_count, size + 1, batch).astype(np.int32)
  ranking = np.empty((batch, size), np.int32)
  incoming = rng.integers(-9, 9, (batch, size)).astype(np.int32)
  grades = rng.choice([0, 0, 1, 2], (batch, size)).astype(np.int8)
  for b, n in enumerate(count):
    ranking[b] = np.r_[rng.permutation(n), np.arange(n, size)]
    incoming[b, :n] = rng.permutation(n)
  return ranking, grades, count, incoming


def order_disagreement(answer, others, count):
  """Mean distance to the other answers; 0 where there is none."""
  shares = [discordant_share(answer, other, count) for other in others]
  return sum(shares) / len(shares) if shares else 0.0


def chains(ids, symbols):
  """Runs of codes of rising level, each a list of (level, code)."""
  found, last = [], None
  for token in ids:
    code = token - symbols.sid_base
    if not 0 <= code < symbols.levels * symbols.codebook_size:
      last = None
      continue
    level, code = divmod(code, symbols.codebook_size)
    if last is not None and level == last + 1:
      found[-1].append((level, code))
    else:
      found.append([(level, code)])
    last = level
  return found


def complete(chain, symbols):
  return [level for level, _ in chain] == list(range(symbols.levels))


def block(prompt, start, other):
  """Tokens after `start` up to `other` or the end."""
  if start not in prompt:
    return []
  rest = prompt[prompt.index(start) + 1 :]
  if other in rest:
    rest = rest[: rest.index(other)]
  return rest


def judge(
  tokens, length, prompt, prompt_length, count, ranking, valid, symbols
):
  """The four axes of one completion, by reading it as a person would."""
  tokens = [int(t) for t in tokens[:length]]
  prompt = [int(t) for t in prompt[:prompt_length]]
  if symbols.think_end not in tokens:
    return 0.0, 0.0, 0.0, 0.0
  span = tokens[: tokens.index(symbols.think_end)]
  if symbols.eos in span:
    return 0.0, 0.0, 0.0, 0.0
  history, candidates = (
    [c for c in chains(block(prompt, *names), symbols) if complete(c, symbols)]
    for names in (
      (symbols.history, symbols.candidates),
      (symbols.candidates, symbols.history),
    )
  )
  attempts = chains(span, symbols)
  cited = [c for c in attempts if complete(c, symbols)]
  slots = [
    t - symbols.slot_base
    if 0 <= t - symbols.slot_base < symbols.num_slots
    else None
    for t in span
  ]
  named = [s for s in slots if s is not None]

  grounding = sum(c in history for c in cited) / max(1, len(cited))

  consistency = 0.0
  if valid and named:
    while slots[-1] is None:
      slots.pop()
    last = list(itertools.takewhile(lambda s: s is not None, reversed(slots)))[
      ::-1
    ]
    top = {int(j) for j in ranking[: min(len(set(last)), count)]}
    overlap = len(set(last) & top) / len(set(last))
    consistency = ((last[0] == ranking[0]) + overlap) / 2

  flow = 0.0
  if cited and named:
    code = [
      symbols.sid_base + level * symbols.codebook_size + code
      for level, code in cited[0]
    ]
    first = next(t for t in range(len(span)) if span[t : t + len(code)] == code)
    after = sum(s is not None for s in slots[first:])
    bigrams = list(itertools.pairwise(span))
    flow = after / len(named) * len(set(bigrams)) / len(bigrams)

  right = sum(c in history + candidates for c in cited)
  right += sum(s < count for s in named)
  identifiers = right / max(1, len(attempts) + len(named))
  return grounding, consistency, flow, identifiers
