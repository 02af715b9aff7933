"""The service under load: what each mode costs, and what it gives.

python -m gr2_jax.bench.serve --artifact=runs/rl-1a2b3c4d

Starts `gr2_jax.serve` on the artifact, then asks it for one test slate of the
data set a request, from 1, 8 and 64 clients that each wait for their answer,
for so many seconds in every mode. Clients are those of wrk where it is
installed, else of this process; the first line says which. A row a mode and
number of clients:

  p50 p95 p99    milliseconds from request to answer
  slates/s       answered
  errors         answers other than 200, and connections that failed
  late           answers that were the incoming order, for want of time
  batch          slates of a batch, on average
  prefills       prompts encoded, a slate
  decoded        tokens written, a slate
  MB before, MB  resident memory of the service
  x slates/s     of mode `reason` with as many clients
  x p50          likewise

Then what each mode is worth, on the first test slates: mean N@5, beside that of
the incoming order.
"""

import asyncio
import collections
import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from gr2_jax import artifacts, environment, ranker, reporting
from gr2_jax.data import requests as requests_lib
from gr2_jax.data import slates as slates_lib

_ARTIFACT = flags.DEFINE_string(
  'artifact', None, 'Folder of a trained policy.', required=True
)
_SECONDS = flags.DEFINE_float('seconds', 60.0, 'Of each row.', 0.1)
_CLIENTS = flags.DEFINE_list('clients', ['1', '8', '64'], 'At a time.')
_MODES = flags.DEFINE_list('modes', list(ranker.MODES), 'Ways to answer.')
_BODIES = flags.DEFINE_integer('bodies', 512, 'Different slates asked.', 1)
_GRADED = flags.DEFINE_integer('graded', 1024, 'Slates for N@5.', 0)
_FLAGS = flags.DEFINE_multi_string(
  'serve', [], 'A flag for gr2_jax.serve, e.g. --serve=--largest_batch=32.'
)

COLUMNS = (
  'mode', 'clients', 'p50', 'p95', 'p99', 'slates/s', 'errors', 'late', 'batch',
  'prefills', 'decoded', 'MB before', 'MB', 'x slates/s', 'x p50',
)  # fmt: skip

_WRK = """
local bodies, place = {}, 0
for line in io.lines("%s") do bodies[#bodies + 1] = line end
local headers = {["content-type"] = "application/json"}
local threads = 0
function setup(thread)
  thread:set("place", threads * 17)
  threads = threads + 1
end
function request()
  place = place + 1
  return wrk.format("POST", "/rank", headers, bodies[place %% #bodies + 1])
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\n{"answers": %%d, "seconds": %%f, "errors": %%d, "p50": %%f, '
    .. '"p95": %%f, "p99": %%f}\\n',
    summary.requests, summary.duration / 1e6,
    e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(95) / 1e3,
    latency:percentile(99) / 1e3))
end
"""


@contextlib.contextmanager
def service(artifact: str, more: Sequence[str]) -> Iterator[str]:
  """Runs `gr2_jax.serve` on a free port.

  Args:
    artifact: folder.
    more: flags.

  Yields:
    Its URL.

  Raises:
    RuntimeError: it ended before it served.
  """
  process = subprocess.Popen(
    [sys.executable, '-m', 'gr2_jax.serve', f'--artifact={artifact}',
     '--port=0', *more],
    stdout=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  try:
    for line in process.stdout:
      if found := re.search(r'serving .* at (http://\S+)', line):
        break
    else:
      raise RuntimeError('the service ended before it served')
    url = found.group(1)
    while True:  # The line is written just before it listens.
      try:
        _get(url, '/health')
        break
      except OSError:
        time.sleep(0.1)
    yield url
  finally:
    process.terminate()
    process.wait()


def drive(
  url: str, bodies: Sequence[str], clients: int, seconds: float
) -> dict[str, float]:
  """Asks as fast as the answers come.

  Args:
    url: of the service.
    bodies: of the requests, in turn.
    clients: connections, each with one request at a time.
    seconds: in which requests begin.

  Returns:
    answers, seconds, errors; p50, p95, p99 in milliseconds.
  """
  if not shutil.which('wrk'):
    return asyncio.run(_drive(url, bodies, clients, seconds))
  with tempfile.TemporaryDirectory() as folder:
    lines = pathlib.Path(folder, 'bodies.jsonl')
    lines.write_text(''.join(f'{body}\n' for body in bodies))
    script = pathlib.Path(folder, 'rank.lua')
    script.write_text(_WRK % lines)
    # wrk counts in whole seconds.
    duration = f'{max(1, round(seconds))}s'
    command = ['wrk', '-t1', f'-c{clients}', f'-d{duration}', '--timeout=60s']
    found = subprocess.run(
      [*command, '-s', str(script), url],
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
  return json.loads(found.stdout.strip().splitlines()[-1])


async def _drive(
  url: str, bodies: Sequence[str], clients: int, seconds: float
) -> dict[str, float]:
  """As `drive`, from this process."""
  host, port = urllib.parse.urlsplit(url).netloc.rsplit(':', 1)
  times, errors, begin = [], 0, time.monotonic()

  async def client(place: int) -> None:
    nonlocal errors
    reader, writer = await asyncio.open_connection(host, int(port))
    while (start := time.monotonic()) < begin + seconds:
      body = bodies[place % len(bodies)].encode()
      place += clients
      writer.write(
        b'POST /rank HTTP/1.1\r\nhost: bench\r\ncontent-length: %d\r\n\r\n%s'
        % (len(body), body)
      )
      head = await reader.readuntil(b'\r\n\r\n')
      length = int(re.search(rb'content-length: (\d+)', head).group(1))
      await reader.readexactly(length)
      errors += not head.startswith(b'HTTP/1.1 200')
      times.append(time.monotonic() - start)
    writer.close()

  for outcome in await asyncio.gather(
    *map(client, range(clients)), return_exceptions=True
  ):
    errors += outcome is not None
  p50, p95, p99 = np.percentile(times, [50, 95, 99]) * 1e3
  return dict(
    answers=len(times),
    seconds=time.monotonic() - begin,
    errors=errors,
    p50=p50,
    p95=p95,
    p99=p99,
  )


def measure(
  url: str,
  slates: Sequence[dict[str, Any]],
  mode: str,
  clients: int,
  seconds: float,
) -> dict[str, Any]:
  """One row of the table."""
  bodies = [json.dumps({'slates': [slate], 'mode': mode}) for slate in slates]
  before = _counters(url)
  found = drive(url, bodies, clients, seconds)
  after = _counters(url)

  def grown(name: str) -> float:
    return after[name] - before[name]

  ranked = f'gr2_slates_total{{mode="{mode}",outcome="ranked"}}'
  late = grown(f'gr2_slates_total{{mode="{mode}",outcome="timed_out"}}')
  slates_answered = max(1.0, grown(ranked) + late)
  batches = grown(f'gr2_batch_slates_count{{mode="{mode}"}}')
  memory = 'process_resident_memory_bytes'
  return {
    'mode': mode,
    'clients': clients,
    'p50': found['p50'],
    'p95': found['p95'],
    'p99': found['p99'],
    'slates/s': (found['answers'] - found['errors']) / found['seconds'],
    'errors': int(found['errors']),
    'late': int(late),
    'batch': grown(f'gr2_batch_slates_sum{{mode="{mode}"}}') / max(batches, 1),
    'prefills': grown(f'gr2_prefills_total{{mode="{mode}"}}') / slates_answered,
    'decoded': grown(f'gr2_decoded_tokens_total{{mode="{mode}"}}')
    / slates_answered,
    'MB before': round(before[memory] / 1e6),
    'MB': round(after[memory] / 1e6),
  }


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The rows, with what each gains over `reason` with as many clients."""
  reason = {row['clients']: row for row in rows if row['mode'] == 'reason'}
  found = []
  for row in rows:
    other = reason.get(row['clients'])
    more = {}
    if other:
      for name in ('slates/s', 'p50'):
        more[f'x {name}'] = row[name] / other[name] if other[name] else None
    found.append(row | more)
  return found


def grade(
  url: str,
  slates: Sequence[dict[str, Any]],
  grades_nxK: np.ndarray,
  count_n: np.ndarray,
  mode: str,
) -> float:
  """Mean N@5 of a mode's answers; NaN where one was late."""

  def ask(low: int) -> list[list[int]]:
    body = {'slates': slates[low : low + 16], 'mode': mode}
    request = urllib.request.Request(
      f'{url}/rank', json.dumps(body).encode(), method='POST'
    )
    with urllib.request.urlopen(request) as response:
      answers = json.load(response)['answers']
    return [None if a['timed_out'] else a['order'] for a in answers]

  orders = [o for low in range(0, len(slates), 16) for o in ask(low)]
  if None in orders:
    return float('nan')
  return _ndcg(orders, grades_nxK, count_n)


def _ndcg(orders, grades, count) -> float:
  """Mean N@5 of orders, lists of incoming ranks."""
  ranking = np.tile(
    np.arange(grades.shape[1], dtype=np.int32), (len(orders), 1)
  )
  for row, order in enumerate(orders):
    ranking[row, : len(order)] = order
  return float(ranker.watch(ranking, grades, count)['n@5'].mean())


def _slates(artifact: pathlib.Path, most: int):
  """Test slates as requests, with their grades."""
  run = artifacts.read_run(artifact)
  folder = artifact.parent / run['inputs']['slates']
  test, names = (
    slates_lib.read(folder, 'test'),
    slates_lib.read_catalog(folder).item_ids,
  )
  rows = np.random.default_rng(0).permutation(len(test))[:most]
  records = slates_lib.source(folder, 'test')
  asked = [requests_lib.of_record(records[row], names) for row in rows]
  return asked, test.grades[rows], test.count[rows]


def _get(url: str, path: str) -> str:
  with urllib.request.urlopen(url + path) as response:
    return response.read().decode()


def _counters(url: str) -> collections.Counter:
  """Lines of /metrics: name -> value."""
  found = collections.Counter()
  for line in _get(url, '/metrics').splitlines():
    if not line.startswith('#'):
      name, _, value = line.rpartition(' ')
      found[name] = float(value)
  return found


def main(argv: list[str]) -> None:
  """Prints the two tables."""
  del argv
  environment.set_up('')
  artifact = pathlib.Path(_ARTIFACT.value).resolve()
  slates, grades, count = _slates(artifact, max(_BODIES.value, _GRADED.value))
  tool = 'wrk' if shutil.which('wrk') else 'asyncio'
  print(f'{artifact.name}, {_SECONDS.value:g} s a row, clients of {tool}')
  rows, worth = [], []
  given = (f'--modes={",".join(_MODES.value)}', *_FLAGS.value)
  with service(str(artifact), given) as url:
    for mode in _MODES.value:
      for clients in map(int, _CLIENTS.value):
        asked = slates[: _BODIES.value]
        rows.append(measure(url, asked, mode, clients, _SECONDS.value))
    graded = slice(_GRADED.value)
    if _GRADED.value:
      incoming = [list(range(n)) for n in count[graded]]
      worth.append(
        {
          'mode': 'incoming',
          'N@5': _ndcg(incoming, grades[graded], count[graded]),
        }
      )
      for mode in _MODES.value:
        found = grade(url, slates[graded], grades[graded], count[graded], mode)
        worth.append({'mode': mode, 'N@5': found})
  print(reporting.table(_rounded(compare(rows)), COLUMNS))
  if worth:
    print(f'\n{min(_GRADED.value, len(slates))} slates')
    print(reporting.table(worth, ('mode', 'N@5')))


def _rounded(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Milliseconds and rates to what can be told apart."""
  return [
    {k: f'{v:.2f}' if isinstance(v, float) else v for k, v in row.items()}
    for row in rows
  ]


if __name__ == '__main__':
  app.run(main)
