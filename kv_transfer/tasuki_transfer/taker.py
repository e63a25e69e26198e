"""The decode side: pulls the spans of a ticket into its own regions.

All methods belong to one event loop. Either a pull returns, and the bytes are those that the giver
offered and its lease stood until then, or it raises, and nothing writes into the rows any more.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tasuki_common import logs
from tasuki_common.messages import Ticket
from tasuki_transfer import handshake, link as links, tcp, wire
from tasuki_transfer.base import Backend, Landing, Pulled, Regions, Source, TransferError
from tasuki_transfer.memory import open_region
from tasuki_transfer.nixl_backend import NixlAgent, usable
from tasuki_transfer.tasks import in_thread

_log = logs.get("tasuki.transfer")

Wanted = dict[str, dict[int, int]]
"""Pool, ordinal of the giver's span, row of the taker's region."""

_THREADS = 2 * tcp.STREAMS


class Taker:
    """Pulls from any number of givers; keeps one link to each incarnation that lives."""

    def __init__(
        self, *, regions: Regions, fingerprint: str, key: bytes, backends: Sequence[Backend]
    ) -> None:
        self._regions = {name: open_region(name, tensor) for name, tensor in regions.items()}
        self._fingerprint = fingerprint
        self._key = handshake.check_key(key)
        self._backends = usable(backends)
        self._nixl: asyncio.Task[NixlAgent] | None = None
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tasuki-receive")
        self._links: dict[tuple[str, int, str], asyncio.Task[links.Link]] = {}

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The transports it can use, best first."""
        return self._backends

    async def pull(self, ticket: Ticket, wanted: Wanted, timeout: float) -> Pulled:  # noqa: ASYNC109
        """Bring the wanted spans here; returns when they are verified and the lease is released.

        The giver may still be computing: spans are fetched as they are offered. `timeout` is in
        seconds and covers all of it. Raises TransferError.
        """
        started = time.monotonic()
        if ticket.fingerprint != self._fingerprint:
            raise TransferError(
                "refused_fingerprint",
                f"Pod {ticket.pod!r} has cache {ticket.fingerprint!r}, we {self._fingerprint!r}.",
            )
        try:
            async with asyncio.timeout(timeout):
                link = await self._link(ticket)
                note = await self._take(link, ticket.request_id, wanted)
        except TimeoutError as error:
            raise TransferError(
                "timeout", f"Pod {ticket.pod!r} did not hand over within {timeout} s."
            ) from error
        moved = {pool: len(rows) for pool, rows in wanted.items()}
        return Pulled(
            bytes=sum(count * self._regions[pool].span_bytes for pool, count in moved.items()),
            spans=sum(moved.values()),
            seconds=time.monotonic() - started,
            backend=link.source.backend,
            note=note,
        )

    async def close(self) -> None:
        """End every link; pulls under way fail. Idempotent."""
        tasks = list(self._links.values())
        self._links.clear()
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, TransferError):
                await (await task).close()
        if self._nixl is not None:
            with contextlib.suppress(TransferError):
                await (await self._nixl).close()
        self._threads.shutdown()

    async def _take(self, link: links.Link, request_id: str, wanted: Wanted) -> bytes:
        """The giver's note, once all that is wanted is here and the lease is released."""
        missing = {(pool, at): row for pool, rows in wanted.items() for at, row in rows.items()}
        async with link.watch(request_id) as watch:
            try:
                async with asyncio.TaskGroup() as group:
                    while isinstance(message := await watch.next(), wire.Offer):
                        for pool, landings in _match(message, missing).items():
                            group.create_task(self._land(link, request_id, pool, landings))
                    if missing:
                        pool, ordinal = next(iter(missing))
                        raise TransferError(
                            "incomplete", f"{pool} {ordinal} of {request_id!r} was never offered."
                        )
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            await watch.release()
        return message.note if isinstance(message, wire.Complete) else b""

    async def _land(
        self, link: links.Link, request_id: str, pool: str, landings: list[Landing]
    ) -> None:
        await link.source.fetch(request_id, pool, landings)
        rows = [landing.row for landing in landings]
        region = self._regions[pool]
        checksums = await in_thread(self._threads, region.checksums, rows, link.checksum)
        for landing, checksum in zip(landings, checksums, strict=True):
            if checksum != landing.checksum:
                raise TransferError(
                    "checksum", f"{pool} {landing.ordinal} of {request_id!r} arrived damaged."
                )

    async def _link(self, ticket: Ticket) -> links.Link:
        """The link to the ticket's giver, made by the first pull that needs it."""
        name = ticket.host, ticket.port, ticket.incarnation
        task = self._links.get(name)
        if task is None or _is_dead(task):
            dead = [
                self._links.pop(key) for key, link in list(self._links.items()) if _is_dead(link)
            ]
            task = self._links[name] = asyncio.create_task(self._connect(ticket, dead))
        await asyncio.wait({task})
        if task.cancelled():
            raise TransferError("truncated", "The taker was closed.")
        return task.result()

    async def _connect(self, ticket: Ticket, dead: list[asyncio.Task[links.Link]]) -> links.Link:
        """A new link, after `dead` ones are closed: nobody asks again for givers that are gone."""
        for task in dead:
            with contextlib.suppress(TransferError):
                await (await task).close()
        backends = [name for name in ticket.backends if name in self._backends]
        if not backends:
            raise TransferError(
                "no_backend",
                f"Pod {ticket.pod!r} offers {ticket.backends}, we have {self._backends}.",
            )
        terms = wire.Terms("control", self._fingerprint, ticket.incarnation)
        channel, welcome = await links.connect(ticket, self._key, terms)
        try:
            self._check_layout(welcome)
            source = await self._source(ticket, welcome, backends)
        except BaseException:
            channel.close()
            raise
        return links.Link(channel, welcome, source)

    def _check_layout(self, welcome: wire.Welcome) -> None:
        for name, region in self._regions.items():
            theirs = welcome.pools.get(name)
            if theirs is None or theirs.span_bytes != region.span_bytes:
                raise TransferError(
                    "refused_fingerprint", f"Region {name!r} has another span than at the giver."
                )

    async def _source(
        self, ticket: Ticket, welcome: wire.Welcome, backends: list[Backend]
    ) -> Source:
        """The first of `backends` that works between this pod and the giver."""
        if backends[0] == "nixl":
            try:
                if welcome.nixl:
                    return await (await self._agent()).connect(welcome)
            except TransferError as error:
                _log.warning("nixl_unavailable", pod=ticket.pod, error=str(error))
            backends = backends[1:]
        if "tcp" not in backends:
            raise TransferError("no_backend", f"Only NIXL is left, and {ticket.pod!r} has none.")

        async def open_stream() -> wire.Channel:
            terms = wire.Terms("data", self._fingerprint, ticket.incarnation)
            return (await links.connect(ticket, self._key, terms))[0]

        return tcp.TcpSource(open_stream, self._regions, self._threads)

    async def _agent(self) -> NixlAgent:
        """Our NIXL agent; a new one when the last was given up."""
        task = self._nixl
        if task is None or (task.done() and (task.exception() or task.result().given_up)):
            task = self._nixl = asyncio.create_task(NixlAgent.create("taker", self._regions))
        return await asyncio.shield(task)


def _is_dead(task: asyncio.Task[links.Link]) -> bool:
    return task.done() and (task.exception() is not None or not task.result().alive)


def _match(offer: wire.Offer, missing: dict[tuple[str, int], int]) -> dict[str, list[Landing]]:
    """The offered spans that are wanted, by pool; they are taken out of `missing`."""
    matched: dict[str, list[Landing]] = {}
    for span in offer.spans:
        row = missing.pop((span.pool, span.ordinal), None)
        if row is not None:
            landing = Landing(span.ordinal, span.index, row, span.checksum)
            matched.setdefault(span.pool, []).append(landing)
    return matched
