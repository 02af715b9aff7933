"""The service under load: what each mode costs, and what it gives.

python -m gr2_jax.bench.serve --artifact=runs/rl-1a2b3c4d

Starts `gr2_jax.serve` on the artifact, then asks it for one test slate of the
data set a request, from 1, 8 and 64 clients that each wait for their answer,
for so many seconds in every mode. Clients are those of wrk where it is
installed, else of this process; the first line says which.

Then the same for its peers, one after another, each a process of its own with
the same HTTP, checks, batches and evidence, see `serving_peers.py`:

  lightgbm      trees on the evidence, which read no prompt
  transformers  the same weights, which answer the same prompts in every mode

Two tables come out: what each mode bears, with the columns of
`serving_load.py`, and what it gives beside mode `reason`, with those of
`serving_table.gains` and mean N@5 on the first test slates. Last, for each mode
of `transformers`: how many of its orders are ours.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

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
  'peers', list(serving_load.PEERS), 'Who else is asked; may be empty.'
)
flags.register_validator(
  'peers',
  lambda peers: set(peers) <= set(serving_load.PEERS),
  f'known: {", ".join(serving_load.PEERS)}',
)
_TORCH_THREADS = flags.DEFINE_integer(
  'torch_threads', 2, 'Of the peer transformers.', 1
)
_BODIES = flags.DEFINE_integer('bodies', 512, 'Different slates asked.', 1)
_GRADED = flags.DEFINE_integer('graded', 1024, 'Slates for N@5.', 0)
_FLAGS = flags.DEFINE_multi_string(
  'serve',
  [],
  'A flag for gr2_jax.serve and the peers, e.g. --serve=--largest_batch=32.',
)


def _services() -> list[tuple[str, str, list[str], list[str]]]:
  """Prefix of the rows, module, flags and modes of each service."""
  found = [('', 'gr2_jax.serve', [], _MODES.value)]
  for peer in _PEERS.value:
    options = [f'--peer={peer}', f'--torch_threads={_TORCH_THREADS.value}']
    modes = ['score'] if peer == 'lightgbm' else _MODES.value
    found.append((f'{peer} ', 'gr2_jax.bench.serving_peers', options, modes))
  return found


def _ask(
  url: str, modes: Sequence[str], slates: Sequence[dict[str, Any]], bar
) -> tuple[list[dict[str, Any]], dict[str, serving_table.Orders]]:
  """Rows of the load table, and each mode's orders of the graded slates."""
  rows, orders = [], {}
  for mode in modes:
    for clients in map(int, _CLIENTS.value):
      asked = slates[: _BODIES.value]
      rows.append(
        serving_load.measure(url, asked, mode, clients, _SECONDS.value)
      )
      bar.update()
    orders[mode] = serving_load.orders(url, slates[: _GRADED.value], mode)
  return rows, orders


def main(argv: list[str]) -> None:
  """Prints the tables."""
  del argv
  environment.set_up('')
  artifact = pathlib.Path(_ARTIFACT.value).resolve()
  slates, grades, count = serving_load.slates_of(
    artifact, max(_BODIES.value, _GRADED.value)
  )
  few = slice(_GRADED.value)
  print(
    f'{artifact.name}, {_SECONDS.value:g} s a row, clients of '
    f'{serving_load.tool()}'
  )
  rows, orders = [], {'incoming': [list(range(n)) for n in count[few]]}
  services = _services()
  total = len(_CLIENTS.value) * sum(len(modes) for *_, modes in services)
  with reporting.progress(total, 'serve', unit='row') as bar:
    for prefix, module, options, modes in services:
      given = [f'--artifact={artifact}', f'--modes={",".join(modes)}']
      given += [*options, *_FLAGS.value]
      try:
        with serving_load.service(module, given) as url:
          found, answers = _ask(url, modes, slates, bar)
      except serving_load.NotServed as e:
        if not prefix:
          raise
        print(f'{prefix}is left out: {e}')
        continue
      rows += [row | {'mode': prefix + row['mode']} for row in found]
      orders |= {prefix + mode: found for mode, found in answers.items()}
  quality = {
    mode: serving_table.ndcg(found, grades[few], count[few])
    for mode, found in orders.items()
    if found
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
