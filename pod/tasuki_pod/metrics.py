"""A pod's Prometheus metrics, all in one place; every name begins with `tasuki_`.

What requests do is observed as it happens; what the engine counts is read from its last statistics
when Prometheus asks.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tasuki_common.messages import Role
from tasuki_pod.engine_client import EngineClient
from tasuki_pod.wire import PrefixReady

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = (0, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)

_GAUGES = {
    "tasuki_requests_running": ("running", "Requests in the running batch."),
    "tasuki_requests_waiting": ("waiting", "Requests admitted and not yet running."),
    "tasuki_prompt_tokens_waiting": ("waiting_tokens", "Prompt tokens still to compute."),
    "tasuki_blocks_capacity": ("blocks_total", "KV blocks of the pool."),
    "tasuki_blocks_used": ("blocks_used", "KV blocks held by requests and leases."),
    "tasuki_blocks_cached": ("blocks_cached", "KV blocks kept for prefix hits alone."),
    "tasuki_window_blocks_capacity": ("window_blocks_total", "Blocks of the sliding-window pool."),
    "tasuki_window_blocks_used": ("window_blocks_used", "Window blocks held by requests."),
    "tasuki_state_slots_capacity": ("slots_total", "State slots of the pool."),
    "tasuki_state_slots_used": ("slots_used", "State slots held by requests and leases."),
    "tasuki_state_slots_cached": ("slots_cached", "State slots kept as checkpoints alone."),
}
_COUNTERS = {
    "tasuki_prefix_query_tokens": ("prefix_query_tokens", "Prompt tokens looked up in the cache."),
    "tasuki_prefix_hit_tokens": ("prefix_hit_tokens", "Prompt tokens found in the cache."),
    "tasuki_preemptions": ("preemptions", "Requests put back to make room."),
    "tasuki_engine_steps": ("steps", "Steps of the engine."),
    "tasuki_engine_step_seconds": ("step_seconds", "Seconds spent in steps."),
    "tasuki_prompt_tokens_computed": ("prompt_tokens", "Prompt tokens computed."),
    "tasuki_generated_tokens": ("generated_tokens", "Tokens sampled."),
}


class Metrics:
    """Everything a pod measures, with its role as a label."""

    def __init__(self, role: Role) -> None:
        self._registry = CollectorRegistry()
        self._role = role

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, text, ["role"], buckets=buckets, registry=self._registry)
            return family.labels(role)

        self.time_to_first_token = histogram(
            "tasuki_time_to_first_token_seconds", "Arrival to first token.", _SECONDS
        )
        self.inter_token_seconds = histogram(
            "tasuki_inter_token_seconds", "Between two tokens of one choice.", _SECONDS
        )
        self.queue_seconds = histogram(
            "tasuki_queue_seconds", "Arrival to admission by the engine.", _SECONDS
        )
        self.hit_depth = histogram(
            "tasuki_prefix_hit_depth_tokens", "Prompt tokens not computed here.", _TOKENS
        )
        self._transfer_seconds = histogram(
            "tasuki_transfer_seconds",
            "Time of a hand-over's transfer, on the taking side.",
            _SECONDS,
        )
        self._transfer_bytes = self._counter(
            "tasuki_transfer_bytes", "Bytes taken over from other pods.", "backend"
        )
        self._transfer_failures = self._counter(
            "tasuki_transfer_failures",
            "Hand-overs after which the prompt was recomputed.",
            "reason",
        )
        self._leases_ended = self._counter(
            "tasuki_leases_ended", "Prefixes kept for other pods, by how that ended.", "outcome"
        )
        for outcome in ("released", "expired", "failed"):
            self._leases_ended.labels(role, outcome)  # rates need a zero to begin with
        self.event_loop_tasks = Gauge(
            "tasuki_event_loop_tasks",
            "Tasks of the event loop, now.",
            ["role"],
            registry=self._registry,
        ).labels(role)
        self._requests = self._counter("tasuki_requests", "Requests ended, by how.", "outcome")

    def watch(self, client: EngineClient) -> None:
        """Reads the engine's statistics from `client` whenever Prometheus asks."""
        self._registry.register(_EngineCollector(client, self._role))

    def transferred(self, prefix: PrefixReady) -> None:
        """A prefix was taken over."""
        self._transfer_seconds.observe(prefix.seconds)
        self._transfer_bytes.labels(self._role, prefix.backend).inc(prefix.bytes)

    def transfer_failed(self, reason: str) -> None:
        """A prefix was not; the prompt is computed here."""
        self._transfer_failures.labels(self._role, reason).inc()

    def prefix_ended(self, outcome: str) -> None:
        """A prefix kept for another pod was let go."""
        self._leases_ended.labels(self._role, outcome).inc()

    def request_ended(self, outcome: str) -> None:
        """A choice is over (stop, length), a prefix kept for another pod (prefill), or a whole
        request (cancelled, deadline, error, overloaded, refused, retry)."""
        self._requests.labels(self._role, outcome).inc()

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, ["role", label], registry=self._registry)


class _EngineCollector(Collector):
    def __init__(self, client: EngineClient, role: Role) -> None:
        self._client = client
        self._role = role

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        for name, (field, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["role"])
            gauge.add_metric([self._role], getattr(stats, field))
            yield gauge
        leases = GaugeMetricFamily("tasuki_leases", "Prefixes kept for others.", labels=["role"])
        leases.add_metric([self._role], self._client.leases)
        yield leases
        for name, (field, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["role"])
            counter.add_metric([self._role], getattr(stats, field))
            yield counter
