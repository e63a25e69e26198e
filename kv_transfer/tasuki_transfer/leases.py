"""What a giver has promised to keep, until when, and to whom it must say what.

All but `open` and `find` belong to the transfer loop's thread. Each lease ends exactly once.
"""

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from tasuki_transfer import wire
from tasuki_transfer.base import Outcome, Reason, TransferError
from tasuki_transfer.spans import Span

_REMEMBERED = 4096
"""Ended leases whose fate a late taker is told."""


class Watcher(NamedTuple):
    """A pull that is told of a lease's progress."""

    pull: int
    send: Callable[[msgspec.Struct], None]


@dataclasses.dataclass(eq=False)
class Lease:
    """One request's spans; `deadline` is monotonic seconds."""

    request_id: str
    deadline: float
    offered: list[wire.Offered] = dataclasses.field(default_factory=list)
    spans: dict[tuple[str, int], Span] = dataclasses.field(default_factory=dict)
    complete: bool = False
    note: bytes = b""
    ended: bool = False
    watchers: set[Watcher] = dataclasses.field(default_factory=set)

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` all there is and all that comes."""
        self.watchers.add(watcher)
        self._tell(watcher, self.offered)

    def publish(self, spans: list[Span], checksums: list[int]) -> None:
        """Spans are final: they may be fetched from now on."""
        offered = [
            wire.Offered(span.pool, span.index, span.ordinal, checksum)
            for span, checksum in zip(spans, checksums, strict=True)
        ]
        self.offered += offered
        self.spans.update(((span.pool, span.ordinal), span) for span in spans)
        for watcher in self.watchers:
            self._tell(watcher, offered)

    def finish(self, note: bytes = b"") -> None:
        """All spans have been published."""
        self.complete, self.note = True, note
        for watcher in self.watchers:
            watcher.send(wire.Complete(watcher.pull, note))

    def _tell(self, watcher: Watcher, offered: list[wire.Offered]) -> None:
        for first in range(0, len(offered), wire.SPANS_PER_MESSAGE):
            part = offered[first : first + wire.SPANS_PER_MESSAGE]
            watcher.send(wire.Offer(watcher.pull, part))
        if self.complete:
            watcher.send(wire.Complete(watcher.pull, self.note))


_ENDINGS: dict[Outcome, tuple[Reason, str]] = {
    "released": ("unknown_ticket", "Another taker has released it."),
    "expired": ("expired", "Its lease ran out."),
    "failed": ("giver_failed", "The giver gave it up."),
}


class Leases:
    """The open leases of one giver, by request."""

    def __init__(
        self,
        seconds: float,
        on_end: Callable[[str, Outcome], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = seconds
        self._on_end = on_end
        self._now = now
        self._open: dict[str, Lease] = {}
        self._ended: OrderedDict[str, Outcome] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request_id: str) -> Lease:
        """A new lease; from any thread. ValueError when the request has one."""
        lease = Lease(request_id, self._now() + self.seconds)
        if self._open.setdefault(request_id, lease) is not lease:
            raise ValueError(f"Request {request_id!r} holds a lease already.")
        return lease

    def find(self, request_id: str) -> Lease | None:
        """The open lease, if there is one; from any thread."""
        return self._open.get(request_id)

    def get(self, request_id: str) -> Lease:
        """The open lease; TransferError says why there is none."""
        lease = self._open.get(request_id)
        if lease is not None:
            return lease
        outcome = self._ended.get(request_id)
        if outcome is None:
            raise TransferError("unknown_ticket", f"There is no lease for {request_id!r}.")
        reason, message = _ENDINGS[outcome]
        raise TransferError(reason, f"The lease of {request_id!r} has ended. {message}")

    def extend(self, lease: Lease) -> None:
        """A taker is at it: the lease lasts a full term from now on."""
        lease.deadline = self._now() + self.seconds

    def end(self, lease: Lease, outcome: Outcome, message: str = "") -> None:
        """End the lease, once; tell those who watch it, then the owner."""
        if lease.ended:
            return
        lease.ended = True
        del self._open[lease.request_id]
        self._ended[lease.request_id] = outcome
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        reason, sentence = _ENDINGS[outcome]
        for watcher in lease.watchers:
            watcher.send(wire.Failed(watcher.pull, reason, message or sentence))
        lease.watchers.clear()
        self._on_end(lease.request_id, outcome)

    def expire(self) -> None:
        """End all whose term is over."""
        now = self._now()
        for lease in list(self._open.values()):
            if lease.deadline <= now:
                self.end(lease, "expired")

    def end_all(self) -> None:
        """End what is left, as failed."""
        for lease in list(self._open.values()):
            self.end(lease, "failed", "The giver is shutting down.")
