"""What the HTTP process and the engine process say to each other over their socket pair.

Each message is u32 little-endian bytes of msgpack behind its length. The HTTP process sends a
`Command`, the engine process a `Report`; one `Stepped` a step speaks for all requests.
"""

import struct
from typing import Literal

import msgspec

from tasuki_common.hashing import HashAlgorithm
from tasuki_common.logs import Level
from tasuki_common.messages import Role, Ticket
from tasuki_engine.config import EngineConfig
from tasuki_engine.request import CacheEvent, EngineRequest, EngineStats, TokenOutput

Backend = Literal["nixl", "tcp"]

LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, tag="start", kw_only=True):
    """The first command: everything the engine process needs to come up."""

    engine: EngineConfig
    role: Role
    pod: str
    deployment: str
    incarnation: str
    transfer_key: bytes
    transfer_backends: tuple[Backend, ...]
    transfer_host: str
    transfer_port: int
    lease_seconds: float
    log_level: Level


class Add(msgspec.Struct, tag="add"):
    """Admit all `requests` or none; answered with `Admitted` or `Rejected` under `group`."""

    group: str
    requests: list[EngineRequest]


class Abort(msgspec.Struct, tag="abort"):
    """End these requests, and the leases they may have left."""

    request_ids: list[str]


class Pull(msgspec.Struct, tag="pull", kw_only=True):
    """Fetch a ticket's prefix; answered with `PrefixReady` or `PrefixFailed`."""

    prefix_id: str
    ticket: Ticket
    token_ids: list[int]
    cache_salt: str | None
    timeout: float


class DropPrefix(msgspec.Struct, tag="drop_prefix"):
    """Stop fetching the prefix, or unpin it."""

    prefix_id: str


class Drain(msgspec.Struct, tag="drain"):
    """Wait for the leases that stand, at most `timeout` seconds; answered with `Drained`."""

    timeout: float


class Stop(msgspec.Struct, tag="stop"):
    """Leave now."""


class Ready(msgspec.Struct, tag="ready", kw_only=True):
    """The engine is loaded; what the pod must know to announce itself."""

    fingerprint: str
    hash_revision: str
    hash_algorithm: HashAlgorithm
    block_size: int
    needs_checkpoint: bool
    max_model_len: int
    vocab_size: int
    folder: str
    transfer_host: str
    transfer_port: int
    transfer_backends: tuple[str, ...]
    stats: EngineStats


class Admitted(msgspec.Struct, tag="admitted"):
    """All requests of the group are in the engine's queue."""

    group: str


class Rejected(msgspec.Struct, tag="rejected", omit_defaults=True):
    """None of the group is; `retry_after` is set when it may be tried again later."""

    group: str
    message: str
    param: str | None = None
    retry_after: float | None = None


class PrefixReady(msgspec.Struct, tag="prefix_ready", kw_only=True):
    """The prefix is in the engine's cache, pinned until `DropPrefix`."""

    prefix_id: str
    num_tokens: int
    num_local_tokens: int
    num_cached_tokens: int
    """Tokens that the giver had not to compute either."""
    bytes: int
    seconds: float
    backend: str


class PrefixFailed(msgspec.Struct, tag="prefix_failed", kw_only=True):
    """The prefix is not here and nothing of it is kept; `reason` is a metric label."""

    prefix_id: str
    reason: str
    message: str


class PrefixEnded(msgspec.Struct, array_like=True):
    """A prefix computed for another pod was released, expired or failed: `outcome` says which."""

    request_id: str
    outcome: str


class Stepped(msgspec.Struct, tag="stepped", omit_defaults=True):
    """All that happened in the engine since the last one."""

    outputs: list[TokenOutput] = []
    cache_events: list[CacheEvent] = []
    ended: list[PrefixEnded] = []
    leases: int = 0
    stats: EngineStats | None = None


class Drained(msgspec.Struct, tag="drained"):
    """No lease is left, or the time for it is over and `leases` remain."""

    leases: int


class Crashed(msgspec.Struct, tag="crashed"):
    """The last report of an engine that cannot go on."""

    message: str


Command = Add | Abort | Pull | DropPrefix | Drain | Stop | Start
Report = Ready | Admitted | Rejected | PrefixReady | PrefixFailed | Stepped | Drained | Crashed

_encoder = msgspec.msgpack.Encoder()


def pack(message: Command | Report) -> bytes:
    """A message with its length in front."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body
