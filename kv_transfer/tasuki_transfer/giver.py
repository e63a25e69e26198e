"""The prefill side: offers spans of its regions under leases and serves them to takers.

Runs on the event loop that called `start`. `open`, `offer`, `complete`, `fail` and `leases` may be
called from any thread, and take effect in the order of the calls; `on_end` is called on the loop.
Checksums are computed on a thread of their own, so that the loop keeps answering.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import msgspec

from tasuki_common import logs
from tasuki_common.errors import ConfigError
from tasuki_transfer import handshake, tcp, wire
from tasuki_transfer.base import Backend, Outcome, Regions, TransferError
from tasuki_transfer.leases import Lease, Leases
from tasuki_transfer.memory import describe, open_region
from tasuki_transfer.nixl_backend import NixlAgent, usable
from tasuki_transfer.session import Session
from tasuki_transfer.spans import Span
from tasuki_transfer.tasks import in_thread

_log = logs.get("tasuki.transfer")
_BACKLOG = 512
_MAX_CONNECTIONS = 4096
_ACCEPT_PAUSE_SECONDS = 0.1


class TicketFields(TypedDict):
    """All of a `messages.Ticket` but the pod's name."""

    request_id: str
    num_tokens: int
    incarnation: str
    fingerprint: str
    host: str
    port: int
    backends: tuple[str, ...]
    lease_seconds: float


class Giver:
    """Keeps spans for takers. `generation` reads an engine's counter, to prove that pins held."""

    def __init__(
        self,
        *,
        regions: Regions,
        fingerprint: str,
        incarnation: str,
        key: bytes,
        backends: Sequence[Backend],
        lease_seconds: float,
        on_end: Callable[[str, Outcome], None],
        generation: Callable[[str, int], int] | None = None,
    ) -> None:
        self._regions = {name: open_region(name, tensor) for name, tensor in regions.items()}
        self._checksum_kind = next(iter(self._regions.values())).checksum
        self._fingerprint = fingerprint
        self._incarnation = incarnation
        self._key = handshake.check_key(key)
        self._backends = usable(backends)
        self._generation = generation
        self._leases = Leases(lease_seconds, on_end)
        self._senders = ThreadPoolExecutor(tcp.STREAMS, thread_name_prefix="tasuki-send")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="tasuki-checksum")
        self._tasks: set[asyncio.Task[None]] = set()
        self._nixl: NixlAgent | None = None
        self._listener: socket.socket | None = None
        self._host, self._port = "", 0

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; port 0 finds a free one. Returns the address for tickets.

        Raises:
            ConfigError: the port cannot be listened on.
        """
        self._loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"transfer_port {port} on {host} cannot be used ({error.strerror}); choose another."
            ) from error
        listener.setblocking(False)
        self._listener = listener
        self._host, self._port = host, listener.getsockname()[1]
        await self._start_nixl()
        self._spawn(self._listen(listener))
        self._spawn(self._expire())
        return self._host, self._port

    async def _start_nixl(self) -> None:
        """A machine where UCX does not start offers what remains."""
        if "nixl" not in self._backends:
            return
        try:
            self._nixl = await NixlAgent.create("giver", self._regions)
        except TransferError as error:
            _log.warning("nixl_unavailable", error=str(error))
            self._backends = tuple(name for name in self._backends if name != "nixl")

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The transports it offers, best first; settled once started."""
        return self._backends

    def open(self, request_id: str, num_tokens: int) -> TicketFields:
        """Begin a lease before its spans exist. ValueError when the request has one."""
        self._leases.open(request_id)
        return TicketFields(
            request_id=request_id,
            num_tokens=num_tokens,
            incarnation=self._incarnation,
            fingerprint=self._fingerprint,
            host=self._host,
            port=self._port,
            backends=self._backends,
            lease_seconds=self._leases.seconds,
        )

    def offer(self, request_id: str, spans: list[Span]) -> None:
        """Spans are final and pinned until `on_end`. Ignored when the lease has ended."""
        lease = self._leases.find(request_id)
        if lease is not None and spans:
            self._hasher.submit(self._checksum, lease, spans)

    def complete(self, request_id: str, note: bytes = b"") -> None:
        """All spans have been offered; `note` reaches the taker with them, unread.

        Ignored when the lease has ended.
        """
        lease = self._leases.find(request_id)
        if lease is not None:
            self._hasher.submit(self._on_loop, self._finish, lease, note)

    def fail(self, request_id: str, reason: str) -> None:
        """The prefix will not come; `reason` is a sentence for the taker."""
        lease = self._leases.find(request_id)
        if lease is not None:
            self._on_loop(self._leases.end, lease, "failed", reason)

    def leases(self) -> int:
        """Requests whose spans must be kept."""
        return len(self._leases)

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109
        """Wait until no lease is left, up to `timeout` seconds; False when some are."""
        end = time.monotonic() + timeout
        while self._leases and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return not self._leases

    async def close(self) -> None:
        """End every lease and connection; idempotent."""
        self._leases.end_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        if self._nixl is not None:
            await self._nixl.close()
        self._senders.shutdown()
        self._hasher.shutdown()

    # Offers: engine's thread → checksum thread → loop.

    def _on_loop(self, function: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: so are all leases
            self._loop.call_soon_threadsafe(function, *args)

    def _checksum(self, lease: Lease, spans: list[Span]) -> None:
        try:
            checksums = self._checksums(spans)
        except Exception as error:
            sentence = f"Checksums of {lease.request_id!r} failed: {error}."
            self._on_loop(self._leases.end, lease, "failed", sentence)
            raise
        self._on_loop(self._publish, lease, spans, checksums)

    def _checksums(self, spans: list[Span]) -> list[int]:
        by_pool: dict[str, list[int]] = {}
        for span in spans:
            by_pool.setdefault(span.pool, []).append(span.index)
        computed = {
            pool: iter(self._regions[pool].checksums(indices, self._checksum_kind))
            for pool, indices in by_pool.items()
        }
        return [next(computed[span.pool]) for span in spans]

    def _publish(self, lease: Lease, spans: list[Span], checksums: list[int]) -> None:
        if not lease.ended:
            lease.publish(spans, checksums)

    def _finish(self, lease: Lease, note: bytes) -> None:
        if not lease.ended:
            lease.finish(note)

    # Connections.

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _expire(self) -> None:
        pause = min(max(self._leases.seconds / 20, 0.02), 1.0)
        while True:
            await asyncio.sleep(pause)
            self._leases.expire()

    async def _listen(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(listener)
            except OSError as error:  # no descriptor is left, or the caller is gone already
                _log.warning("accept_failed", error=str(error))
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            if len(self._tasks) > _MAX_CONNECTIONS:
                sock.close()
            else:
                self._spawn(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        channel = wire.Channel(sock)
        try:
            async with asyncio.timeout(handshake.HANDSHAKE_SECONDS):
                terms = await handshake.accept(channel, self._key, self._welcome)
            if terms.kind == "data":
                await self._serve_data(channel)
            else:
                await self._serve_control(channel)
        except (TransferError, TimeoutError):
            return
        finally:
            channel.close()

    def _welcome(self, terms: wire.Terms) -> wire.Welcome:
        if terms.fingerprint != self._fingerprint:
            raise TransferError(
                "refused_fingerprint",
                f"This pod's cache is {self._fingerprint!r}, not {terms.fingerprint!r}.",
            )
        if terms.incarnation != self._incarnation:
            raise TransferError(
                "refused_incarnation", "The process that wrote the ticket is not this one."
            )
        pools = {name: describe(region) for name, region in self._regions.items()}
        metadata = self._nixl.metadata if self._nixl is not None else b""
        return wire.Welcome(pools, self._leases.seconds, self._checksum_kind, metadata)

    async def _serve_data(self, channel: wire.Channel) -> None:
        while True:
            fetch = await channel.read(wire.FETCH)
            try:
                indices = self._granted(fetch)
            except TransferError as error:
                await channel.write(wire.Refused(error.reason, str(error)))
                continue
            await channel.write(wire.Granted(len(indices) * (fetch.stop - fetch.start)))
            region = self._regions[fetch.pool]
            views = await in_thread(
                self._senders, region.readable, indices, fetch.start, fetch.stop
            )
            await tcp.send(self._senders, channel.sock, views)

    def _granted(self, fetch: wire.Fetch) -> list[int]:
        """Rows of the spans asked for; TransferError when they are not on offer."""
        lease = self._leases.get(fetch.request_id)
        region = self._regions.get(fetch.pool)
        if region is None or not 0 <= fetch.start < fetch.stop <= region.span_bytes:
            raise TransferError("protocol", f"Region {fetch.pool!r} has no such bytes.")
        try:
            return [lease.spans[fetch.pool, ordinal].index for ordinal in fetch.ordinals]
        except KeyError as error:
            raise TransferError("protocol", f"Span {error} is not on offer.") from error

    async def _serve_control(self, channel: wire.Channel) -> None:
        outbox: asyncio.Queue[msgspec.Struct] = asyncio.Queue()
        writer = self._loop.create_task(channel.write_all(outbox))
        session = Session(self._leases, self._generation, outbox.put_nowait)
        try:
            while True:
                session.handle(await channel.read(wire.FROM_TAKER))
        finally:
            session.end()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
