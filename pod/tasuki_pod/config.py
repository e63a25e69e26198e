"""The settings of a pod, from flags and environment; the engine's own travel as one JSON object."""

import dataclasses
import os
import socket
from typing import Any

import msgspec

from tasuki_common.errors import ConfigError
from tasuki_common.logs import Level
from tasuki_engine.config import EngineConfig

_WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104


def _field(help_text: str, **options: Any) -> Any:
    secret = options.pop("secret", False)
    return dataclasses.field(metadata={"help": help_text, "secret": secret}, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodConfig:
    """Serves one model as a prefill or a decode pod."""

    model: str = _field("Folder or Hugging Face id of the model.")
    served_name: str = _field("Name of the model in requests; empty: that of its source.", default="")
    aliases: tuple[str, ...] = _field("Other names of the model.", default=())
    host: str = _field("Address the HTTP API listens on.", default="127.0.0.1")
    port: int = _field("Port of the HTTP API; 0: a free one.", default=0)
    advertise_host: str = _field(
        "Address other pods and gateways reach this one at; empty: the listening address.",
        default="",
    )
    redis_url: str | None = _field("Redis of the index; none: no index.", default=None)
    pod_name: str = _field("Name, unique among live pods; empty: the host's.", default="")
    transfer_backends: tuple[str, ...] = _field(
        "Transports of the hand-over, best first.", default=("nixl", "tcp")
    )
    transfer_host: str = _field(
        "Address the hand-over listens on; empty: as --host.", default=""
    )
    transfer_port: int = _field("Port of the hand-over; 0: a free one.", default=0)
    transfer_key: str = _field(
        "Key shared by all pods that hand over to each other.", default="", secret=True
    )
    lease_seconds: float = _field(
        "How long a finished prefix is kept for a pod that does not come.", default=30.0
    )
    pull_timeout: float = _field(
        "Seconds a decode pod waits for a hand-over before it computes the prompt itself.",
        default=120.0,
    )
    heartbeat_seconds: float = _field("Life of the pod's entry in the index.", default=6.0)
    drain_seconds: float = _field(
        "How long a stopping pod waits for its requests and leases.", default=30.0
    )
    engine: dict[str, Any] = _field("Fields of the engine's configuration.", default_factory=dict)
    log_level: Level = _field("Least level of log lines.", default="info")

    def __post_init__(self) -> None:
        def fill(name: str, value: str) -> None:
            if not getattr(self, name):
                object.__setattr__(self, name, value)

        fill("served_name", self.model.rstrip("/").rsplit("/", 1)[-1])
        fill("pod_name", socket.gethostname())
        fill("advertise_host", _reachable(self.host))
        fill("transfer_host", self.host)
        for name in ("lease_seconds", "pull_timeout", "heartbeat_seconds", "drain_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be above 0.")
        if not self.transfer_backends:
            raise ConfigError("transfer_backends is empty; name at least one of nixl, tcp.")
        if not self.transfer_key:
            raise ConfigError(
                "transfer_key is empty; give all pods one secret in TASUKI_TRANSFER_KEY."
            )
        self.engine_config()

    def engine_config(self) -> EngineConfig:
        """The engine's configuration.

        Raises:
            ConfigError: a field is unknown or has a value that cannot work.
        """
        fields = {field.name for field in dataclasses.fields(EngineConfig)}
        unknown = sorted(set(self.engine) - fields)
        if unknown:
            raise ConfigError(
                f"engine.{unknown[0]} is no field of the engine; it has {', '.join(sorted(fields))}."
            )
        try:
            return msgspec.convert({**self.engine, "model": self.model}, EngineConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(f"engine: {error}.") from error


def _reachable(host: str) -> str:
    """What others connect to when this process listens on `host`."""
    if host not in _WILDCARDS:
        return host
    return os.environ.get("POD_IP") or socket.gethostbyname(socket.gethostname())
