"""The service under load: speed and quality of each mode.

python -m gr2_jax.bench.serve --artifact=runs/rl-1a2b3c4d

Starts `gr2_jax.serving` on the artifact. In every mode, 1, 8 and 64 clients
send requests of one test slate each and wait for the answer. The clients are
those of wrk if it is installed, else of this process; the first line names
them. The peers follow, each in a process of its own with the same HTTP, checks,
batches and evidence (`serving_peers.py`):

  lightgbm      trees on the evidence, which read no prompt
  transformers  the same weights, which answer the same prompts in every mode

The first table has the columns of `serving_load.py`, the second those of
`serving_table.gains` with mean N@5 on the first test slates. The last lines
count how many orders of `transformers` equal ours.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import tqdm
from absl import app, flags

from gr2_jax.bench import serving_load, serving_table
from gr2_jax.pipeline import environment, reporting
from gr2_jax.policy import ranking

_ARTIFACT = flags.DEFINE_string(
  'artifact', None, 'Folder of a trained policy.', required=True
)
_SECONDS = flags.DEFINE_float('seconds', 60.0, 'Of each row.', 0.1)
_CLIENTS = flags.DEFINE_list('clients', ['1', '8', '64'], 'At a time.')
_MODES = flags.DEFINE_list('modes', list(ranking.MODES), 'Ways to answer.')
_PEERS = flags.DEFINE_list(
  'peers', list(serving_load.PEERS), 'Services to compare with; may be empty.'
)
flags.register_validator(
  'peers',
  lambda peers: set(peers) <= set(serving_load.PEERS),
  f'known: {", ".join(serving_load.PEERS)}',
)
_TORCH_THREADS = flags.DEFINE_integer(
  'torch_threads', 2, 'Of the peer transformers.', 1
)
_BODIES = flags.DEFINE_integer('bodies', 512, 'Different slates sent.', 1)
_GRADED = flags.DEFINE_integer('graded', 1024, 'Slates for N@5.', 0)
_FLAGS = flags.DEFINE_multi_string(
  'serve',
  [],
  'A flag of gr2_jax.serving for all services: --serve=--largest_batch=32.',
)


def _services() -> list[tuple[str, str, list[str], list[str]]]:
  """Prefix of the rows, module, flags and modes of each service."""
  services = [('', 'gr2_jax.serving', [], _MODES.value)]
  for peer in _PEERS.value:
    options = [f'--peer={peer}', f'--torch_threads={_TORCH_THREADS.value}']
    modes = ['score'] if peer == 'lightgbm' else _MODES.value
    services.append((f'{peer} ', 'gr2_jax.bench.serving_peers', options, modes))
  return services


def _measure(
  url: str,
  modes: Sequence[str],
  slates: Sequence[dict[str, Any]],
  bar: tqdm.tqdm,
) -> tuple[list[dict[str, Any]], dict[str, serving_table.Orders]]:
  """Rows of the load table, and each mode's orders of the graded slates."""
  rows, orders = [], {}
  for mode in modes:
    for clients in map(int, _CLIENTS.value):
      bodies = slates[: _BODIES.value]
      rows.append(
        serving_load.measure(url, bodies, mode, clients, _SECONDS.value)
      )
      bar.update()
    orders[mode] = serving_load.orders(url, slates[: _GRADED.value], mode)
  return rows, orders


def main(argv: list[str]) -> None:
  """Prints the tables."""
  del argv
  environment.set_up('')
  artifact = pathlib.Path(_ARTIFACT.value).resolve()
  graded = _GRADED.value
  slates, grades, count = serving_load.slates_of(
    artifact, max(_BODIES.value, graded)
  )
  print(
    f'{artifact.name}, {_SECONDS.value:g} s a row, clients of '
    f'{serving_load.tool()}'
  )
  rows, orders = [], {'incoming': [list(range(n)) for n in count[:graded]]}
  services = _services()
  total = len(_CLIENTS.value) * sum(len(modes) for *_, modes in services)
  with reporting.progress(total, 'serve', unit='row') as bar:
    for prefix, module, options, modes in services:
      options += [f'--artifact={artifact}', f'--modes={",".join(modes)}']
      try:
        with serving_load.service(module, options + _FLAGS.value) as url:
          new_rows, new_orders = _measure(url, modes, slates, bar)
      except serving_load.NotServed as e:
        if not prefix:
          raise
        print(f'{prefix}is left out: {e}')
        continue
      rows += [row | {'mode': prefix + row['mode']} for row in new_rows]
      orders |= {prefix + mode: new_orders[mode] for mode in modes}
  quality = {
    mode: serving_table.ndcg(results, grades[:graded], count[:graded])
    for mode, results in orders.items()
    if results
  }
  print(serving_table.load(rows))
  print(f'\n{len(orders["incoming"])} slates')
  print(serving_table.gains(rows, quality))
  for mode in filter(orders.get, _MODES.value):
    if theirs := orders.get(f'transformers {mode}'):
      same = serving_table.agreement(orders[mode], theirs)
      print(f'transformers, {mode}: {same}')


if __name__ == '__main__':
  app.run(main)
