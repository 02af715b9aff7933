"""Serves what `bench.serve` compares a policy with, as `gr2_jax.serve` does.

python -m gr2_jax.bench.serving_peers --artifact=runs/rl-1a2b3c4d \
  --peer=transformers

All flags of `gr2_jax.serve` hold; trees have mode `score` alone.
"""

import functools

from absl import app, flags

from gr2_jax.bench import serving_load
from gr2_jax.serving import command

_PEER = flags.DEFINE_enum(
  'peer', None, serving_load.PEERS, 'Who answers.', required=True
)
_TORCH_THREADS = flags.DEFINE_integer('torch_threads', 2, 'Of transformers.', 1)


def _load():
  """The peer, which knows what the policy knows."""
  from gr2_jax.serving import reranker as reranker_lib

  given = flags.FLAGS
  policy = reranker_lib.Reranker.load(
    given.artifact, modes=(), largest_batch=given.largest_batch
  )
  if _PEER.value == 'lightgbm':
    from gr2_jax.bench import serving_trees

    booster = serving_trees.fit(policy)
    print('lightgbm, with as many threads as it takes by itself')
    return serving_trees.beside(policy, booster, given.largest_batch)
  import torch
  import transformers

  from gr2_jax.bench import serving_torch

  torch.set_num_threads(_TORCH_THREADS.value)
  transformers.utils.logging.disable_progress_bar()
  print(
    f'transformers {transformers.__version__} on torch {torch.__version__}, '
    f'{_TORCH_THREADS.value} threads'
  )
  return serving_torch.beside(policy, given.modes, given.largest_batch)


if __name__ == '__main__':
  app.run(functools.partial(command.main, load=_load))
