"""What the operator counts about itself."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """One registry for one operator process."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.reconcile_seconds = Histogram(
            "tasuki_operator_reconcile_seconds",
            "Time of one look at one InferenceDeployment.",
            ["result"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.reconcile_failures = Counter(
            "tasuki_operator_reconcile_failures",
            "Reconciles that failed and are tried again, by cause.",
            ["reason"],
            registry=registry,
        )
        self.failing_deployments = Gauge(
            "tasuki_operator_failing_deployments",
            "InferenceDeployments whose last reconcile failed.",
            registry=registry,
        )
        self.queue_depth = Gauge(
            "tasuki_operator_queue_depth",
            "InferenceDeployments that wait for their turn.",
            registry=registry,
        )
        self.api_requests = Counter(
            "tasuki_operator_api_requests",
            "Requests to the API server, watches aside.",
            ["verb", "code"],
            registry=registry,
        )
        self.api_seconds = Histogram(
            "tasuki_operator_api_request_seconds",
            "Time of a request to the API server.",
            ["verb"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.applied = Counter(
            "tasuki_operator_applied",
            "Children applied because they were missing, other than wanted, or not known yet.",
            ["kind"],
            registry=registry,
        )
        self.deployments = Gauge(
            "tasuki_operator_deployments",
            "InferenceDeployments by their condition Ready.",
            ["ready"],
            registry=registry,
        )
        self.deployment_ready = Gauge(
            "tasuki_operator_deployment_ready",
            "1 where the InferenceDeployment (namespace/name) has the condition Ready, else 0.",
            ["deployment"],
            registry=registry,
        )
        self.leader = Gauge(
            "tasuki_operator_leader", "1 in the replica that works, else 0.", registry=registry
        )

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
