"""Settings of the operator's process."""

import dataclasses
import importlib.metadata
from typing import Any, Literal

from tasuki_common.errors import ConfigError


def _setting(default: Any, text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatorConfig:
    """Keeps the pods of InferenceDeployments as their specs say."""

    namespaces: tuple[str, ...] = _setting(
        (), "Namespaces to serve; none named: the whole cluster."
    )
    engine_image: str = _setting(
        f"tasuki/engine:{importlib.metadata.version('tasuki')}",
        "Image of the engine, where a deployment names none.",
    )
    redis_url: str = _setting(
        "redis://tasuki-redis.tasuki-system.svc:6379", "Index of pods and prefixes.", secret=True
    )
    system_namespace: str = _setting("tasuki-system", "Where gateways and the operator run.")
    metrics_namespace: str = _setting("monitoring", "Where Prometheus runs; it may read metrics.")
    gateway: str = _setting(
        "tasuki-gateway", "Deployment of the gateways; empty: Ready does not depend on it."
    )
    endpoint: str = _setting(
        "http://tasuki-gateway.tasuki-system.svc/v1", "Base URL for OpenAI clients."
    )
    host: str = _setting("::", 'Address of metrics and probes; "::" is all, of IPv4 too.')
    port: int = _setting(8080, "Port of metrics and probes; 0: a free one.")
    workers: int = _setting(8, "Deployments looked at at once.")
    resync_seconds: float = _setting(8.0, "Between looks at a deployment that nothing is heard of.")
    relist_seconds: float = _setting(
        300.0, "Between full lists, which find what a watch lost, and APIs that came or went."
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "Least level.")

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; it must be 1 or more.")
        for name in ("resync_seconds", "relist_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0.")
