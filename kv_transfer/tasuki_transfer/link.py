"""A taker's control connection to one incarnation of a giver; all pulls from it share it."""

import asyncio
import contextlib
import functools
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec

from tasuki_common.messages import Ticket
from tasuki_transfer import handshake, wire
from tasuki_transfer.base import Source, TransferError

_HEARTBEATS_PER_LEASE = 4


async def connect(
    ticket: Ticket, key: bytes, terms: wire.Terms
) -> tuple[wire.Channel, wire.Welcome]:
    """Connect to the ticket's giver and shake hands. Raises TransferError."""
    family = socket.AF_INET6 if ":" in ticket.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    address = f"{ticket.host}:{ticket.port}"
    try:
        channel = wire.Channel(sock)
        async with asyncio.timeout(handshake.HANDSHAKE_SECONDS):
            await asyncio.get_running_loop().sock_connect(sock, (ticket.host, ticket.port))
            return channel, await handshake.connect(channel, key, terms)
    except BaseException as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise TransferError("unreachable", f"{address} did not answer in time.") from error
        if isinstance(error, OSError):
            raise TransferError("unreachable", f"{address} is unreachable: {error}.") from error
        raise


class Watch:
    """One pull's place on a link: what the giver says of it, in order."""

    def __init__(self, pull: int, send: Callable[[msgspec.Struct], None]) -> None:
        self.pull = pull
        self.news: asyncio.Queue[wire.FromGiver | TransferError] = asyncio.Queue()
        self._send = send

    async def next(self) -> wire.FromGiver:
        """The next message; TransferError when the giver or the connection failed."""
        news = await self.news.get()
        if isinstance(news, TransferError):
            raise news
        if isinstance(news, wire.Failed):
            raise TransferError(news.reason, news.message)
        return news

    async def release(self) -> None:
        """End the lease; returns once the giver has confirmed that it stood until now."""
        self._send(wire.Release(self.pull))
        while not isinstance(await self.next(), wire.Released):
            pass


class Link:
    """Sends heartbeats for its pulls and hands each what the giver says of it."""

    def __init__(self, channel: wire.Channel, welcome: wire.Welcome, source: Source) -> None:
        self.source = source
        self.checksum = welcome.checksum
        self._channel = channel
        self._outbox: asyncio.Queue[msgspec.Struct] = asyncio.Queue()
        self._watches: dict[int, Watch] = {}
        self._numbers = itertools.count()
        self._ended: TransferError | None = None
        self._tasks = [
            asyncio.create_task(self._until_broken(job))
            for job in (
                self._read,
                functools.partial(channel.write_all, self._outbox),
                functools.partial(self._beat, welcome.lease_seconds / _HEARTBEATS_PER_LEASE),
            )
        ]

    @property
    def alive(self) -> bool:
        """Whether new pulls may use it."""
        return self._ended is None and self.source.alive

    @contextlib.asynccontextmanager
    async def watch(self, request_id: str) -> AsyncIterator[Watch]:
        """Follow one request's lease; leaving does not end it. Raises TransferError."""
        if self._ended is not None:
            raise self._ended
        watch = Watch(next(self._numbers), self._outbox.put_nowait)
        self._watches[watch.pull] = watch
        self._outbox.put_nowait(wire.Subscribe(watch.pull, request_id))
        try:
            yield watch
        except BaseException:
            self._outbox.put_nowait(wire.Leave(watch.pull))
            raise
        finally:
            del self._watches[watch.pull]

    async def close(self) -> None:
        """End the connection and the source's; pulls under way fail. Idempotent."""
        self._end(TransferError("truncated", "The link was closed."))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._channel.close()
        await self.source.close()

    def _end(self, error: TransferError) -> None:
        if self._ended is None:
            self._ended = error
            for watch in self._watches.values():
                watch.news.put_nowait(error)

    async def _until_broken(self, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await job()
        except TransferError as error:
            self._end(error)

    async def _read(self) -> None:
        while True:
            message = await self._channel.read(wire.FROM_GIVER)
            watch = self._watches.get(message.pull)
            if watch is not None:
                watch.news.put_nowait(message)

    async def _beat(self, pause: float) -> None:
        while True:
            await asyncio.sleep(pause)
            if self._watches:
                self._outbox.put_nowait(wire.Heartbeat(list(self._watches)))
