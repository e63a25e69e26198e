"""The settings of a pod, from flags and environment; the engine's own travel as one JSON object."""

import dataclasses
import os
import socket
import typing
from typing import Any

import msgspec

from tasuki_common.errors import ConfigError
from tasuki_common.logs import Level
from tasuki_engine.config import EngineConfig
from tasuki_pod.wire import Backend

_WILDCARDS = ("0.0.0.0", "::", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodConfig:
    """Serves one model as a prefill or a decode pod."""

    model: str = dataclasses.field(metadata={"help": "Folder or Hugging Face id of the model."})
    served_name: str = dataclasses.field(
        default="", metadata={"help": "Name of the model in requests; empty: that of its source."}
    )
    aliases: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"help": "Other names of the model."}
    )
    host: str = dataclasses.field(
        default="127.0.0.1", metadata={"help": "Address the HTTP API listens on."}
    )
    port: int = dataclasses.field(
        default=0, metadata={"help": "Port of the HTTP API; 0: a free one."}
    )
    advertise_host: str = dataclasses.field(
        default="",
        metadata={"help": "Address others reach this pod at; empty: the listening one."},
    )
    redis_url: str | None = dataclasses.field(
        default=None, metadata={"help": "Redis of the index; none: no index."}
    )
    pod_name: str = dataclasses.field(
        default="", metadata={"help": "Name, unique among live pods; empty: the host's."}
    )
    deployment: str = dataclasses.field(
        default="", metadata={"help": "Namespace and name of the deployment, for the logs."}
    )
    transfer_backends: tuple[str, ...] = dataclasses.field(
        default=("nixl", "tcp"), metadata={"help": "Transports of the hand-over, best first."}
    )
    transfer_host: str = dataclasses.field(
        default="", metadata={"help": "Address the hand-over listens on; empty: as --host."}
    )
    transfer_port: int = dataclasses.field(
        default=0, metadata={"help": "Port of the hand-over; 0: a free one."}
    )
    transfer_key: str = dataclasses.field(
        default="",
        metadata={"help": "Key shared by all pods that hand over to each other.", "secret": True},
    )
    lease_seconds: float = dataclasses.field(
        default=30.0,
        metadata={"help": "How long a finished prefix is kept for a pod that does not come."},
    )
    pull_timeout: float = dataclasses.field(
        default=120.0,
        metadata={"help": "Seconds a decode pod waits for a hand-over, then computes the prompt."},
    )
    heartbeat_seconds: float = dataclasses.field(
        default=6.0, metadata={"help": "Life of the pod's entry in the index."}
    )
    drain_seconds: float = dataclasses.field(
        default=30.0,
        metadata={"help": "How long a stopping pod waits for its requests and leases."},
    )
    policy_file: str = dataclasses.field(
        default="",
        metadata={"help": "What gateways allow with the model, as JSON; empty: everything."},
    )
    engine: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"help": "Fields of the engine's configuration."}
    )
    log_level: Level = dataclasses.field(
        default="info", metadata={"help": "Least level of log lines."}
    )

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
        known = typing.get_args(Backend)
        if not self.transfer_backends or not set(self.transfer_backends) <= set(known):
            raise ConfigError(
                f"transfer_backends is {self.transfer_backends!r}; name some of {', '.join(known)}."
            )
        if not self.transfer_key:
            raise ConfigError(
                "transfer_key is empty; give all pods one secret in TASUKI_TRANSFER_KEY."
            )
        self.engine_config()

    @property
    def transfer_address(self) -> str:
        """Where other pods reach the hand-over."""
        return _reachable(self.transfer_host)

    def engine_config(self) -> EngineConfig:
        """The engine's configuration.

        Raises:
            ConfigError: a field is unknown or has a value that cannot work.
        """
        fields = {field.name for field in dataclasses.fields(EngineConfig)}
        unknown = sorted(set(self.engine) - fields)
        if unknown:
            raise ConfigError(
                f"engine.{unknown[0]} is no field of the engine; it has "
                f"{', '.join(sorted(fields))}."
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
