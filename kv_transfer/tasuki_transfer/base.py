"""What the parts of the transfer agree on: regions, outcomes, failures, a backend's shape."""

import dataclasses
from typing import Literal, NamedTuple, Protocol

import torch

from tasuki_common.errors import TasukiError

Regions = dict[str, torch.Tensor]
"""Pool name to its memory: uint8 [count, span_bytes], contiguous; row i is block or slot i."""

Backend = Literal["nixl", "tcp"]

Outcome = Literal["released", "expired", "failed"]
"""How a lease ended: acknowledged by its taker, run out, or given up by the giver."""

Reason = Literal[
    "unreachable",  # no connection to the giver
    "unauthorized",  # one side does not hold the other's key
    "refused_version",  # another protocol
    "refused_fingerprint",  # other weights, dtypes or layout
    "refused_incarnation",  # another process listens at that address
    "no_backend",  # no transport that both sides have
    "unknown_ticket",  # the giver never had it, or another taker released it
    "expired",  # the lease ended first
    "giver_failed",  # the prefix could not be computed
    "generation",  # a span was given out again while it was leased
    "checksum",  # the bytes that landed are not those that were offered
    "truncated",  # a connection ended early
    "incomplete",  # the giver is done and did not offer all that is wanted
    "timeout",  # the taker's deadline passed
    "protocol",  # a message that makes no sense
    "backend",  # the transport itself reported an error
]
"""Why a pull failed; the label of the failure metric."""


class TransferError(TasukiError):
    """A pull that brought nothing: the taker recomputes. Nothing writes into its spans any more."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


Note = bytes
"""What a giver says beside the spans; the transfer does not read it."""


@dataclasses.dataclass(frozen=True)
class Pulled:
    """A pull that succeeded: what moved, how long it took from the call on, and by what."""

    bytes: int
    spans: int
    seconds: float
    backend: Backend
    note: Note = b""
    """What the giver said when it completed the prefix."""


class Landing(NamedTuple):
    """One offered span that the taker wants, and the row of its own region where it goes."""

    ordinal: int
    giver_row: int
    row: int
    checksum: int


class Source(Protocol):
    """The taker's way to one giver's memory: one per giver and backend."""

    backend: Backend

    async def fetch(self, request_id: str, pool: str, landings: list[Landing]) -> None:
        """Copy the spans into the taker's region.

        Once it returns, raises or is cancelled, nothing writes into the rows any more.
        Raises TransferError.
        """

    @property
    def alive(self) -> bool:
        """False once it failed in a way that new pulls would meet again."""

    async def close(self) -> None:
        """Drop connections and remote handles; idempotent."""
