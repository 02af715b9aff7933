"""Runs a service as a process, sends it requests, and measures the answers.

A row of the load table:

  p50 p95 p99    milliseconds from request to answer
  slates/s       answered
  errors         answers other than 200, and connections that failed
  late           answers that were the incoming order, because time ran out
  batch          slates of a batch, on average
  prefills       prompts encoded, a slate
  decoded        tokens decoded, a slate
  MB before, MB  resident memory of the service

Axes: n slates, K candidates.
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

from gr2_jax.data import slates as slates_lib
from gr2_jax.pipeline import artifacts
from gr2_jax.serving import request as requests_lib

PEERS = ('lightgbm', 'transformers')
_SLATES_A_REQUEST = 16  # where orders are compared
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


def slates_of(
  artifact: pathlib.Path, count: int
) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
  """Draws test slates of the data set that a policy was trained on.

  Returns:
    The slates as requests, their grades [n, K] and numbers of candidates [n].
  """
  run = artifacts.read_run(artifact)
  folder = artifact.parent / run['inputs']['slates']
  test = slates_lib.read(folder, 'test')
  names = slates_lib.read_catalog(folder).item_ids
  rows = np.random.default_rng(0).permutation(len(test))[:count]
  records = slates_lib.SlateSource(folder, 'test')
  slates = [requests_lib.of_record(records[row], names) for row in rows]
  return slates, test.grades[rows], test.count[rows]


class NotServed(Exception):
  """A service ended before it served."""


@contextlib.contextmanager
def service(module: str, options: Sequence[str]) -> Iterator[str]:
  """Runs a service on a free port, prints its log until it serves.

  Args:
    module: `gr2_jax.serving`, or one with the same flags.
    options: flags.

  Yields:
    Its URL.

  Raises:
    NotServed: it ended before that; its error is above.
  """
  process = subprocess.Popen(
    [sys.executable, '-m', module, '--port=0', *options],
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    for line in process.stdout:
      if match := re.search(r'serving .* at (http://\S+)', line):
        break
      print(line, end='')
    else:
      raise NotServed(f'{module} ended before it served')
    while True:  # It logs the line just before it listens.
      try:
        _get(match[1], '/health')
        break
      except OSError:
        time.sleep(0.1)
    yield match[1]
  finally:
    process.terminate()
    process.wait()


def tool() -> str:
  """The program that sends requests: `wrk` if installed, else `asyncio`."""
  return 'wrk' if shutil.which('wrk') else 'asyncio'


def drive(
  url: str, bodies: Sequence[str], clients: int, seconds: float
) -> dict[str, float]:
  """Sends requests as fast as the answers come.

  Args:
    url: of the service.
    bodies: of the requests, in turn.
    clients: connections, each with one request at a time.
    seconds: in which requests begin.

  Returns:
    answers, seconds, errors; p50, p95, p99 in milliseconds.
  """
  if tool() == 'asyncio':
    return asyncio.run(_drive(url, bodies, clients, seconds))
  with tempfile.TemporaryDirectory() as folder:
    lines = pathlib.Path(folder, 'bodies.jsonl')
    lines.write_text(''.join(f'{body}\n' for body in bodies))
    script = pathlib.Path(folder, 'rank.lua')
    script.write_text(_WRK % lines)
    duration = f'-d{max(1, round(seconds))}s'  # wrk counts whole seconds.
    command = ['wrk', '-t1', f'-c{clients}', duration, '--timeout=60s']
    done = subprocess.run(
      [*command, '-s', str(script), url],
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
  return json.loads(done.stdout.strip().splitlines()[-1])


async def _drive(
  url: str, bodies: Sequence[str], clients: int, seconds: float
) -> dict[str, float]:
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
      length = int(re.search(rb'content-length: (\d+)', head)[1])
      await reader.readexactly(length)
      errors += not head.startswith(b'HTTP/1.1 200')
      times.append(time.monotonic() - start)
    writer.close()

  for outcome in await asyncio.gather(
    *map(client, range(clients)), return_exceptions=True
  ):
    errors += outcome is not None
  percentiles = np.percentile(times, [50, 95, 99]) * 1e3
  return dict(
    answers=len(times),
    seconds=time.monotonic() - begin,
    errors=errors,
    **dict(zip(('p50', 'p95', 'p99'), percentiles, strict=True)),
  )


def measure(
  url: str,
  slates: Sequence[dict[str, Any]],
  mode: str,
  clients: int,
  seconds: float,
) -> dict[str, Any]:
  """One row of the load table, see the module."""
  bodies = [json.dumps({'slates': [slate], 'mode': mode}) for slate in slates]
  before = _counters(url)
  sent = drive(url, bodies, clients, seconds)
  after = _counters(url)

  def grown(name: str, labels: str = '') -> float:
    name = f'{name}{{mode="{mode}"{labels}}}'
    return after[name] - before[name]

  late = grown('gr2_slates_total', ',outcome="timed_out"')
  answered = max(1.0, grown('gr2_slates_total', ',outcome="ranked"') + late)
  batches = max(1.0, grown('gr2_batch_slates_count'))
  memory = 'process_resident_memory_bytes'
  return {
    'mode': mode,
    'clients': clients,
    **{name: sent[name] for name in ('p50', 'p95', 'p99')},
    'slates/s': (sent['answers'] - sent['errors']) / sent['seconds'],
    'errors': int(sent['errors']),
    'late': int(late),
    'batch': grown('gr2_batch_slates_sum') / batches,
    'prefills': grown('gr2_prefills_total') / answered,
    'decoded': grown('gr2_decoded_tokens_total') / answered,
    'MB before': round(before[memory] / 1e6),
    'MB': round(after[memory] / 1e6),
  }


def orders(
  url: str, slates: Sequence[dict[str, Any]], mode: str
) -> list[list[int] | None]:
  """A mode's answers in incoming ranks, best first; None for a late one.

  Every mode and every service shows a slate's candidates in the same order,
  which follows from the slate's place in its request.
  """
  results = []
  for low in range(0, len(slates), _SLATES_A_REQUEST):
    part = slates[low : low + _SLATES_A_REQUEST]
    request = urllib.request.Request(
      f'{url}/rank',
      json.dumps({'slates': part, 'mode': mode}).encode(),
      method='POST',
    )
    with urllib.request.urlopen(request) as response:
      answers = json.load(response)['answers']
    results += [None if a['timed_out'] else a['order'] for a in answers]
  return results


def _get(url: str, path: str) -> str:
  with urllib.request.urlopen(url + path) as response:
    return response.read().decode()


def _counters(url: str) -> collections.Counter:
  """Lines of /metrics: name -> value."""
  values = collections.Counter()
  for line in _get(url, '/metrics').splitlines():
    if not line.startswith('#'):
      name, _, value = line.rpartition(' ')
      values[name] = float(value)
  return values
