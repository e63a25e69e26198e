"""What each process measures, read from the code that measures it."""

from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from tasuki_engine.request import EngineStats
from tasuki_gateway import metrics as gateway_metrics
from tasuki_operator.metrics import Metrics as OperatorMetrics
from tasuki_pod.metrics import Metrics as PodMetrics

_SUFFIXES = {"counter": "_total"}


class Family(NamedTuple):
    """One metric as Prometheus names it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str

    def series(self) -> set[str]:
        """Names that queries may use."""
        if self.kind == "histogram":
            return {f"{self.name}_{part}" for part in ("bucket", "sum", "count")}
        return {self.name}


class _Engine:
    """What a pod's metrics read of the engine."""

    stats = EngineStats()
    leases = 0


def components() -> dict[str, list[Family]]:
    """The metrics of each component, by its name in docs/metrics.md."""
    registries = {
        "Gateway": gateway_metrics.registry,
        "Pods": _pod()._registry,
        "Operator": OperatorMetrics()._registry,
    }
    return {name: _families(registry) for name, registry in registries.items()}


def pod_text() -> str:
    """What a pod that has done nothing yet tells Prometheus."""
    return _pod().render().decode()


def series() -> set[str]:
    """All names that queries may use."""
    return {name for families in components().values() for f in families for name in f.series()}


def _pod() -> PodMetrics:
    pod = PodMetrics("decode")
    pod.watch(_Engine())  # type: ignore[arg-type]
    return pod


def _families(registry: CollectorRegistry) -> list[Family]:
    """A family without samples shows no labels: only prometheus_client's own fields have them."""
    declared = {
        collector._name: collector._labelnames
        for collector in registry._collector_to_names
        if isinstance(collector, MetricWrapperBase)
    }
    families = []
    for metric in registry.collect():
        seen = (name for sample in metric.samples for name in sample.labels if name != "le")
        labels = declared.get(metric.name, ()) or tuple(dict.fromkeys(seen))
        name = metric.name + _SUFFIXES.get(metric.type, "")
        families.append(Family(name, metric.type, tuple(labels), metric.documentation))
    return families
