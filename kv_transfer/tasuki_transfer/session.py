"""One taker's control connection, as the giver sees it: who watches what, and who releases."""

from collections.abc import Callable

import msgspec

from tasuki_transfer import wire
from tasuki_transfer.base import TransferError
from tasuki_transfer.leases import Lease, Leases, Watcher


class Session:
    """Applies a taker's messages to the leases; all methods are quick and run on the loop."""

    def __init__(
        self,
        leases: Leases,
        generation: Callable[[str, int], int] | None,
        send: Callable[[msgspec.Struct], None],
    ) -> None:
        self._leases = leases
        self._generation = generation
        self._send = send
        self._pulls: dict[int, tuple[Lease, Watcher]] = {}

    def handle(self, message: wire.FromTaker) -> None:
        """Answer one message. Raises TransferError("protocol") for what no taker would say."""
        match message:
            case wire.Subscribe():
                self._subscribe(message.pull, message.request_id)
            case wire.Heartbeat():
                for pull in message.pulls:
                    if pull in self._pulls:
                        self._leases.extend(self._pulls[pull][0])
            case wire.Release():
                self._release(message.pull)
            case wire.Leave():
                self._leave(message.pull)

    def end(self) -> None:
        """The connection is gone; its leases run on until released by another taker, or expired."""
        for pull in list(self._pulls):
            self._leave(pull)

    def _subscribe(self, pull: int, request_id: str) -> None:
        if pull in self._pulls:
            raise TransferError("protocol", f"Pull {pull} is already under way.")
        try:
            lease = self._leases.get(request_id)
        except TransferError as error:
            self._send(wire.Failed(pull, error.reason, str(error)))
            return
        watcher = Watcher(pull, self._send)
        self._pulls[pull] = lease, watcher
        self._leases.extend(lease)
        lease.watch(watcher)

    def _release(self, pull: int) -> None:
        if pull not in self._pulls:
            return
        lease, watcher = self._pulls.pop(pull)
        if lease.ended:  # its end was told when it came
            return
        lease.watchers.discard(watcher)
        if not lease.complete:
            raise TransferError("protocol", "A lease was released before it was complete.")
        stale = self._stale(lease)
        if stale:
            self._send(wire.Failed(pull, "generation", stale))
            self._leases.end(lease, "failed", stale)
        else:
            self._send(wire.Released(pull))
            self._leases.end(lease, "released")

    def _stale(self, lease: Lease) -> str:
        """A sentence about the first span that was given out again in spite of the lease, or ""."""
        if self._generation is None:
            return ""
        for span in lease.spans.values():
            if self._generation(span.pool, span.index) != span.generation:
                return (
                    f"{span.pool} {span.index} of {lease.request_id!r} was given out again "
                    "while it was leased."
                )
        return ""

    def _leave(self, pull: int) -> None:
        lease, watcher = self._pulls.pop(pull, (None, None))
        if lease is not None and watcher is not None:
            lease.watchers.discard(watcher)
