"""The counters of a service, for Prometheus."""

import functools
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

    def metric(kind: Any, name: str, text: str, *labels: str, **more: Any):
      return kind(f'gr2_{name}', text, labels, registry=self.registry, **more)

    counter = functools.partial(metric, prometheus.Counter)
    gauge = functools.partial(metric, prometheus.Gauge)
    histogram = functools.partial(metric, prometheus.Histogram)
    self.requests = counter('requests', 'HTTP requests.', 'route', 'status')
    self.slates = counter(
      'slates', 'Slates: ranked, timed_out, refused.', 'mode', 'outcome'
    )
    self.unknown = counter(
      'unknown_candidates', 'Candidates neither known nor described.'
    )
    self.described = counter(
      'described_candidates', 'Candidates known by description only.'
    )
    self.seconds = histogram(
      'rank_seconds', 'From request to answer.', 'mode', buckets=_SECONDS
    )
    self.batch_seconds = histogram(
      'batch_seconds', 'One batch, with evidence.', 'mode', buckets=_SECONDS
    )
    self.batch_slates = histogram(
      'batch_slates', 'Slates of a batch.', 'mode', buckets=_SIZES
    )
    self.prefills = counter('prefills', 'Prompts encoded.', 'mode')
    self.decoded = counter('decoded_tokens', 'Tokens decoded.', 'mode')
    self.memory_hits = counter('memory_hits', 'Prompts of known histories.')
    self.memory_misses = counter('memory_misses', 'Histories encoded.')
    self._memory_bytes = gauge('memory_bytes', 'Bytes of kept histories.')
    self.waiting = gauge('queue_slates', 'Slates that wait.')
    self.reloads = counter('reloads', 'Reloads of a policy.', 'outcome')
    self._policy = gauge('policy_info', 'The policy.', 'artifact')
    prometheus.ProcessCollector(registry=self.registry)

  def set_policy(self, policy: reranker_lib.Reranker) -> None:
    """Sets the policy that answers from now on."""
    self._policy.clear()
    self._policy.labels(policy.artifact.name).set(1)
    self._memory_bytes.set_function(lambda: policy.memories.bytes)

  def text(self) -> bytes:
    """The exposition that Prometheus scrapes."""
    return prometheus.generate_latest(self.registry)
