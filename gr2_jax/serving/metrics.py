"""The counters of a service, for Prometheus."""

from collections.abc import Sequence
from typing import Any

import prometheus_client as prometheus

from gr2_jax.serving import reranker as reranker_lib

_SECONDS = tuple(
  digit * 10**power for power in (-3, -2, -1, 0) for digit in (1, 2.5, 5)
) + (10,)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST


class Metrics:
  """The counters of one service, in a registry of their own."""

  def __init__(self):
    self.registry = prometheus.CollectorRegistry()

    def add(
      kind: Any, name: str, help: str, labels: Sequence[str] = (), **options
    ) -> Any:
      return kind(
        f'gr2_{name}', help, labels, registry=self.registry, **options
      )

    counter, gauge = prometheus.Counter, prometheus.Gauge
    histogram = prometheus.Histogram
    mode, seconds = ('mode',), {'buckets': _SECONDS}
    self.requests = add(
      counter, 'requests', 'HTTP requests answered.', ('route', 'status')
    )
    self.slates = add(
      counter,
      'slates',
      'Slates by outcome: ranked, timed_out, refused.',
      ('mode', 'outcome'),
    )
    self.unknown = add(
      counter, 'unknown_candidates', 'Candidates neither known nor described.'
    )
    self.described = add(
      counter, 'described_candidates', 'Candidates known by description only.'
    )
    self.seconds = add(
      histogram,
      'rank_seconds',
      'From a checked request to its answer.',
      mode,
      **seconds,
    )
    self.batch_seconds = add(
      histogram,
      'batch_seconds',
      'One batch, evidence included.',
      mode,
      **seconds,
    )
    self.batch_slates = add(
      histogram, 'batch_slates', 'Slates of a batch.', mode, buckets=_SIZES
    )
    self.prefills = add(counter, 'prefills', 'Prompts encoded.', mode)
    self.decoded = add(counter, 'decoded_tokens', 'Tokens decoded.', mode)
    self.memory_hits = add(
      counter, 'memory_hits', 'Prompts whose history was not encoded again.'
    )
    self.memory_misses = add(
      counter, 'memory_misses', 'Histories encoded into memory tokens.'
    )
    self._memory_bytes = add(gauge, 'memory_bytes', 'Bytes of kept histories.')
    self.waiting = add(gauge, 'queue_slates', 'Slates that wait.')
    self.reloads = add(
      counter, 'reloads', 'Reloads of a policy by outcome.', ('outcome',)
    )
    self._policy = add(
      gauge, 'policy_info', 'The policy that answers.', ('artifact',)
    )
    prometheus.ProcessCollector(registry=self.registry)

  def set_policy(self, policy: reranker_lib.Reranker) -> None:
    """Sets the policy that answers from now on."""
    self._policy.clear()
    self._policy.labels(policy.artifact.name).set(1)
    self._memory_bytes.set_function(lambda: policy.memories.bytes)

  def text(self) -> bytes:
    """The exposition that Prometheus scrapes."""
    return prometheus.generate_latest(self.registry)
