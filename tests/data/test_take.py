import numpy as np

from gr2_jax.data import log, slates

from .. import tiny_data


def test_a_catalog_of_some_items_keeps_each_whole_in_the_order_asked():
  whole = tiny_data.catalog()
  whole = log.Catalog(
    whole.item_ids, whole.titles, whole.categories, np.arange(12, dtype='i4')
  )
  part = whole.take(np.array([7, 0, 11]))
  assert len(part) == 3
  assert part.item_ids == ('item-7', 'item-0', 'item-11')
  for place, row in enumerate((7, 0, 11)):
    assert part.titles[place] == whole.titles[row]
    assert part.categories[place] == whole.categories[row]
  np.testing.assert_array_equal(part.years, [7, 0, 11])
  assert part.years.dtype == np.int32
  assert len(whole.take(np.zeros(0, int))) == 0


def test_slates_of_some_rows_keep_every_field():
  whole = tiny_data.many()
  rows = np.array([9, 3, 3])
  part = whole.take(rows)
  assert len(part) == 3
  for name in slates.NAMES:
    np.testing.assert_array_equal(
      getattr(part, name), getattr(whole, name)[rows]
    )
    assert getattr(part, name).dtype == getattr(whole, name).dtype
