"""Serves the peers of `bench.serve`.

python -m gr2_jax.bench.serving_peers --artifact=runs/rl-1a2b3c4d \
  --peer=transformers

Takes all flags of `gr2_jax.serving`; trees have the mode `score` only.
"""

import functools
from typing import Any

from absl import app, flags

from gr2_jax.bench import serving_load
from gr2_jax.serving import command

_PEER = flags.DEFINE_enum(
  'peer', None, serving_load.PEERS, 'Which one.', required=True
)
_TORCH_THREADS = flags.DEFINE_integer('torch_threads', 2, 'Of transformers.', 1)


def _load() -> Any:
  """The peer, with the data of the policy."""
  from gr2_jax.serving import reranker as reranker_lib

  policy = reranker_lib.Reranker.load(
    flags.FLAGS.artifact, modes=(), largest_batch=flags.FLAGS.largest_batch
  )
  if _PEER.value == 'lightgbm':
    from gr2_jax.bench import serving_trees

    booster = serving_trees.fit(policy)
    print('lightgbm, with its default number of threads')
    return serving_trees.beside(policy, booster, flags.FLAGS.largest_batch)
  import torch
  import transformers

  from gr2_jax.bench import serving_torch

  torch.set_num_threads(_TORCH_THREADS.value)
  transformers.utils.logging.disable_progress_bar()
  print(
    f'transformers {transformers.__version__} on torch {torch.__version__}, '
    f'{_TORCH_THREADS.value} threads'
  )
  return serving_torch.beside(
    policy, flags.FLAGS.modes, flags.FLAGS.largest_batch
  )


if __name__ == '__main__':
  app.run(functools.partial(command.main, load=_load))
