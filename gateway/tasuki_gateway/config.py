"""Settings of the gateway's process."""

import dataclasses
import re
from typing import Any, Literal

from tasuki_common.errors import ConfigError

_SEED = re.compile(r"http://(\[[^\]]+\]|[^\s:/@?#]+)(:\d{1,5})?/?")


def _setting(default: Any, text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """The cluster's OpenAI endpoint: parses, tokenizes, routes, relays, fails over."""

    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(8000, "Port to listen on.")
    redis_url: str | None = _setting(None, "Index of pods and prefixes; none: seeds and load only.")
    seeds: tuple[str, ...] = _setting((), "Base URLs of pods to ask when the index is away.")
    api_key: str | None = _setting(None, "Bearer token that clients must show.", secret=True)
    prefill_threshold: int = _setting(
        256, "Missing prompt tokens up to which a decode pod prefills itself; a hop costs more."
    )
    max_requests: int = _setting(2048, "Client requests in flight beyond which the answer is 429.")
    max_prompts: int = _setting(256, "Prompts in one request.")
    max_body_bytes: int = _setting(64 << 20, "Size of a request's body beyond which it is a 413.")
    request_timeout: float = _setting(600.0, "Seconds that a request may take in all.")
    connect_timeout: float = _setting(2.0, "Seconds to connect to a pod.")
    admit_timeout: float = _setting(10.0, "Seconds for a prefill pod to give a ticket.")
    stall_timeout: float = _setting(
        60.0, "Seconds without a byte in a stream that has begun, until its pod is given up."
    )
    attempts: int = _setting(4, "Decode pods that one prompt may lose before it fails.")
    patience: float = _setting(
        30.0, "Seconds that a request waits for a decode pod, where one was lost a moment ago."
    )
    drain_timeout: float = _setting(
        30.0, "Seconds that streams get to finish after SIGTERM; then they end with an error."
    )
    inline_characters: int = _setting(
        16_384, "Prompts longer than this are tokenized in a thread; shorter ones at once."
    )
    trust_request_chat_template: bool = _setting(
        False, "Run chat templates that requests bring; one can take all CPU and memory."
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "Least level.")

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if not _SEED.fullmatch(seed):
                raise ConfigError(f"seeds holds {seed!r}; it must be like http://host:port.")
