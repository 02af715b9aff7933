import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2_jax.semantic_ids import assignment, ids

OWN_TUPLE = ('unused', 'digit')


def nobody(items):
  raise AssertionError(f'nothing moves, but {items} were asked for')


def distances(residual, vectors):
  return ((residual - vectors) ** 2).sum(-1)


def quantise(latent, vectors):
  codes = []
  for level in vectors:
    codes.append(int(distances(latent, level).argmin()))
    latent = latent - level[codes[-1]]
  return codes


def complete(latents, vectors, **options):
  codes = np.array([quantise(x, vectors) for x in latents], np.int32)
  codes = codes.reshape(len(latents), len(vectors))
  return assignment.complete(codes, vectors, lambda i: latents[i], **options)


@st.composite
def catalogs(draw, least=0):
  """Latents, codebooks and options, with up to a full code space of items."""
  kind = draw(st.sampled_from(OWN_TUPLE))
  size, levels = draw(st.sampled_from([(1, 2), (2, 2), (2, 4), (3, 3), (5, 2)]))
  drawn = 1 if kind == 'digit' else draw(st.integers(1, levels - 1))
  items = max(1, size**levels * draw(st.integers(least, 100)) // 100)
  rng = np.random.default_rng(draw(st.integers(0, 1000)))
  # On a grid, so that many are equal, and sums are exact.
  latents = rng.integers(0, draw(st.integers(1, 9)), size=(items, 2))
  vectors = rng.integers(-4, 9, size=(levels - drawn, size, 2))
  options = {
    'levels': levels,
    'kind': kind,
    'seed': draw(st.integers(0, 2**40)),
  }
  return latents.astype(np.float32), vectors.astype(np.float32), options


def seated_one_by_one(latents, vectors, levels, taken):
  """Fitted codes by brute force: each item in turn, level by level."""
  size, named, moved = vectors.shape[1], [tuple(x) for x in taken], 0
  for latent in latents:
    codes, asked = [], quantise(latent, vectors)
    for level in range(len(vectors)):
      held = [
        sum(x[: level + 1] == (*codes, code) for x in named)
        for code in range(size)
      ]
      free = np.array(held) < size ** (levels - level - 1)
      residual = latent - vectors[np.arange(level), codes].sum(0)
      wish = asked[level] if asked[:level] == codes else -1
      if wish < 0 or not free[wish]:
        cost = np.where(free, distances(residual, vectors[level]), np.inf)
        wish = int(cost.argmin())
      codes.append(wish)
    moved += codes != asked
    named.append(tuple(codes))
  return np.array(named[len(taken) :]), moved


@settings(max_examples=100, deadline=None)
@given(catalogs(), st.integers(0, 100), st.randoms(use_true_random=False))
def test_items_are_seated_in_turn_and_taken_tuples_are_never_given(
  catalog, share, random
):
  latents, vectors, options = catalog
  size, levels = vectors.shape[1], options['levels']
  room = size**levels - len(latents)
  space = list(np.ndindex(*(size,) * levels))
  taken = np.array(random.sample(space, room * share // 100), np.int32)
  taken = taken.reshape(-1, levels)
  got, moved = complete(latents, vectors, taken=taken, **options)
  want, want_moved = seated_one_by_one(latents, vectors, levels, taken)
  np.testing.assert_array_equal(got[:, : len(vectors)], want)
  assert moved == want_moved
  named = [tuple(x) for x in got.tolist()]
  assert len(set(named)) == len(named)
  assert not set(named) & {tuple(x) for x in taken.tolist()}


@settings(max_examples=60, deadline=None)
@given(catalogs(), st.data())
def test_a_catalog_named_in_two_parts_is_named_as_in_one(catalog, data):
  latents, vectors, options = catalog
  whole, moved = complete(latents, vectors, **options)
  cut = data.draw(st.integers(0, len(latents)))
  first, few = complete(latents[:cut], vectors, **options)
  np.testing.assert_array_equal(first, whole[:cut])
  order = data.draw(st.permutations(range(cut)))
  taken = first[np.array(order, int)]
  second, more = complete(latents[cut:], vectors, taken=taken, **options)
  np.testing.assert_array_equal(second, whole[cut:])
  assert few + more == moved


@settings(max_examples=20, deadline=None)
@given(catalogs(least=100))
def test_every_tuple_of_the_code_space_can_be_given(catalog):
  latents, vectors, options = catalog
  codes, _ = complete(latents, vectors, **options)
  assert len(np.unique(codes, axis=0)) == len(codes)
  np.testing.assert_array_equal(codes.min(0), 0)
  np.testing.assert_array_equal(codes.max(0), vectors.shape[1] - 1)


@pytest.mark.parametrize('kind', OWN_TUPLE)
def test_equal_items_share_the_longest_prefix_there_is_room_for(kind):
  latents = np.ones((150, 3), np.float32)
  vectors = np.random.default_rng(0).normal(size=(3, 4, 3)).astype(np.float32)
  codes, moved = complete(latents, vectors, levels=4, kind=kind, seed=0)
  assert moved == 150 - 4
  for depth, room in ((1, 64), (2, 16), (3, 4), (4, 1)):
    prefixes = np.unique(codes[:, :depth], axis=0)
    assert len(prefixes) == -(-150 // room)


def test_overflow_goes_to_the_nearest_sibling_with_room():
  vectors = np.array(
    [[[0.0], [100.0], [200.0]], [[0.0], [10.0], [4.0]]], np.float32
  )
  latents = np.array([[1.0], [1.0], [1.0], [1.0], [9.0], [1.0]], np.float32)
  got, moved = complete(latents, vectors, levels=3, kind='digit', seed=0)
  # Three fit under (0, 0); the fourth and the sixth go to 4.0, not to 10.0.
  np.testing.assert_array_equal(got[:, 1], [0, 0, 0, 2, 1, 2])
  np.testing.assert_array_equal(got[:, 0], 0)
  np.testing.assert_array_equal(got[:, 2], [0, 1, 2, 0, 0, 1])
  assert moved == 2


def test_latents_are_asked_for_block_by_block_where_items_may_move(monkeypatch):
  monkeypatch.setattr(assignment, '_BLOCK', 4)
  latents = np.repeat(np.array([[0.0], [50.0]], np.float32), [9, 3], axis=0)
  vectors = np.array([[[0.0], [50.0], [1.0], [2.0]]], np.float32)
  codes = np.array([quantise(x, vectors) for x in latents])
  asked = []

  def latents_of(items):
    asked.append(items.tolist())
    return latents[items]

  got, moved = assignment.complete(
    codes, vectors, latents_of, levels=2, kind='unused', seed=0,
    taken=np.array([[0, 0]]),
  )  # fmt: skip
  # One place of four is taken; of the nine, four go to 1.0 and two to 2.0.
  assert got[:, 0].tolist() == [0] * 3 + [2] * 4 + [3] * 2 + [1] * 3
  assert moved == 6
  # The last three might have had to make way.
  assert asked == [[3, 4, 5, 6], [7, 8, 9, 10], [11]]


def test_no_item_moves_while_there_is_room():
  vectors = np.zeros((2, 8, 3), np.float32)
  fitted = np.repeat(np.stack(np.indices((8, 8)), -1).reshape(-1, 2), 8, axis=0)
  codes, moved = assignment.complete(
    fitted, vectors, nobody, levels=3, kind='unused', seed=0
  )
  np.testing.assert_array_equal(codes[:, :2], fitted)
  assert moved == 0


def drawn(prefixes, size, **options):
  vectors = np.zeros((prefixes.shape[1], size, 1), np.float32)
  options = {'kind': 'unused', 'seed': 0} | options
  return assignment.complete(prefixes, vectors, nobody, **options)[0]


def chi_square(numbers, size):
  """Chi-squared statistic in standard deviations from its mean."""
  counts = np.bincount(numbers, minlength=size)
  expected = len(numbers) / size
  statistic = ((counts - expected) ** 2 / expected).sum()
  return abs(statistic - (size - 1)) / np.sqrt(2 * (size - 1))


@pytest.mark.parametrize(('size', 'levels'), [(29, 3), (32, 3), (6, 4)])
def test_drawn_numbers_are_uniform_among_the_unused_and_seeded(size, levels):
  prefixes = np.stack(np.indices((size, size)), -1).reshape(-1, 2)
  prefixes = np.tile(prefixes, (2, 1))  # two items a prefix
  codes = drawn(prefixes, size, levels=levels)
  numbers = ids.prefix_keys(codes[:, 2:], size)
  room = size ** (levels - 2)
  first, second = np.split(numbers, 2)
  assert chi_square(first, room) < 5
  assert chi_square((second - first) % room - 1, room - 1) < 5
  other = drawn(prefixes, size, levels=levels, seed=1)
  np.testing.assert_array_equal(codes, drawn(prefixes, size, levels=levels))
  assert (codes[:, 2:] != other[:, 2:]).any(1).mean() > 0.8


def test_digits_count_in_catalog_order_and_fill_gaps():
  prefixes = np.array([[1, 0], [0, 2], [1, 0], [1, 0]])
  options = {'kind': 'digit', 'levels': 3}
  assert drawn(prefixes, 5, **options)[:, 2].tolist() == [0, 0, 1, 2]
  taken = np.array([[1, 0, 3], [1, 0, 0], [4, 4, 0]])
  got = drawn(prefixes, 5, taken=taken, **options)
  assert got[:, 2].tolist() == [1, 0, 2, 4]


def test_uniform_draws_may_collide_and_go_on_where_they_ended():
  prefixes = np.zeros((50, 2), int)
  options = {'kind': 'uniform', 'levels': 4}
  codes = drawn(prefixes, 8, **options)
  tuples = np.unique(codes, axis=0)
  assert 8 < len(tuples) < 50
  more = drawn(prefixes[:20], 8, taken=codes[:30], **options)
  np.testing.assert_array_equal(more, codes[30:])


def test_fitted_codes_stay_as_they_are():
  fitted = np.array([[1, 2], [0, 0], [1, 2]])
  got = drawn(fitted, 3, kind='fitted', levels=2)
  np.testing.assert_array_equal(got, fitted)
  assert got.dtype == np.int32


def test_sinkhorn_parts_what_collides():
  vectors = np.array([[[0.0], [9.0]], [[0.0], [1.0]]], np.float32)
  latents = np.array([[0.1], [0.3], [9.0]], np.float32)
  codes, moved = complete(latents, vectors, levels=2, kind='sinkhorn', seed=0)
  assert codes.tolist() == [[0, 0], [0, 1], [1, 0]]
  assert moved == 1


@pytest.mark.parametrize('kind', assignment.LAST_LEVELS)
def test_a_catalog_beyond_the_code_space_says_what_to_raise(kind):
  depth = {'fitted': 3, 'sinkhorn': 3}.get(kind, 2)
  fitted = np.zeros((27, depth), int)
  taken = np.array([[0, 0, 0], [0, 0, 0], [2, 1, 0]])  # two tuples
  message = r'27 items beside 2 taken tuples.*3\^3 = 27.*codebook_size'
  with pytest.raises(ValueError, match=message):
    drawn(fitted, 3, kind=kind, levels=3, taken=taken)
  assignment.check_capacity(27, 3, 3)
  with pytest.raises(ValueError, match=r'^28 items do not fit in 3\^3 = 27'):
    assignment.check_capacity(28, 3, 3)


def test_an_unknown_kind_and_unsuitable_levels_are_named():
  fitted = np.zeros((1, 2), int)
  with pytest.raises(ValueError, match=r"'random'.*\('unused', 'uniform'"):
    drawn(fitted, 5, kind='random', levels=3)
  for kind, levels in (
    ('unused', 2), ('uniform', 1), ('digit', 4), ('sinkhorn', 3), ('fitted', 3),
  ):  # fmt: skip
    with pytest.raises(
      ValueError, match=f'2 fitted levels of {levels}.*{kind}'
    ):
      drawn(fitted, 5, kind=kind, levels=levels)
