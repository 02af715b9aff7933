"""What a service counts, for Prometheus."""

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

    def make(kind, name, text, labels=(), **more):
      return kind(f'gr2_{name}', text, labels, registry=self.registry, **more)

    counter, gauge = prometheus.Counter, prometheus.Gauge
    histogram = prometheus.Histogram
    self.requests = make(
      counter, 'requests', 'HTTP requests answered.', ('route', 'status')
    )
    self.slates = make(
      counter,
      'slates',
      'Slates by outcome: ranked, timed_out, refused.',
      ('mode', 'outcome'),
    )
    self.unknown = make(
      counter, 'unknown_candidates', 'Candidates of which nothing is known.'
    )
    self.described = make(
      counter, 'described_candidates', 'Candidates known by description alone.'
    )
    self.seconds = make(
      histogram,
      'rank_seconds',
      'From a checked request to its answer.',
      ('mode',),
      buckets=_SECONDS,
    )
    self.batch_seconds = make(
      histogram,
      'batch_seconds',
      'One batch, evidence included.',
      ('mode',),
      buckets=_SECONDS,
    )
    self.batch_slates = make(
      histogram, 'batch_slates', 'Slates of a batch.', ('mode',), buckets=_SIZES
    )
    self.prefills = make(
      counter, 'prefills', 'Prompts that were encoded.', ('mode',)
    )
    self.decoded = make(
      counter, 'decoded_tokens', 'Tokens that were written.', ('mode',)
    )
    self.memory_hits = make(
      counter, 'memory_hits', 'Prompts whose history was not read again.'
    )
    self.memory_misses = make(
      counter, 'memory_misses', 'Histories that were read into memory tokens.'
    )
    self._memory_bytes = make(
      gauge, 'memory_bytes', 'Of histories that are kept.'
    )
    self.waiting = make(gauge, 'queue_slates', 'Slates that wait.')
    self.reloads = make(
      counter, 'reloads', 'Policies swapped in.', ('outcome',)
    )
    self._policy = make(
      gauge, 'policy_info', 'The policy that answers.', ('artifact',)
    )
    prometheus.ProcessCollector(registry=self.registry)

  def serves(self, policy: reranker_lib.Reranker) -> None:
    """Names the policy that answers from now on; its memories are counted."""
    self._policy.clear()
    self._policy.labels(policy.artifact.name).set(1)
    self._memory_bytes.set_function(lambda: policy.memories.bytes)

  def text(self) -> bytes:
    """What Prometheus reads."""
    return prometheus.generate_latest(self.registry)
