"""Bytes over sockets: scattered rows straight from the giver's region into the taker's.

System calls run in threads (they release the GIL, so several streams use several cores), never for
longer than a moment: when the peer stalls, the wait is the event loop's. One request asks for many
small spans, or for a piece of a large one.
"""

import asyncio
import select
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from itertools import islice

from tasuki_transfer import wire
from tasuki_transfer.base import Backend, Landing, TransferError
from tasuki_transfer.memory import Region
from tasuki_transfer.tasks import all_of, in_thread

STREAMS = 4
PART_BYTES = 4 << 20
MIN_PART_BYTES = 256 << 10
_CALL_VIEWS, _CALL_BYTES = 1024, 512 << 10
"""Limits of one system call: IOV_MAX of Linux, and about what a socket takes at once."""
_PATIENCE_MS = 10
"""How long a thread waits for the peer before it goes back to its pool."""


async def send(executor: Executor, sock: socket.socket, views: Sequence[memoryview]) -> None:
    """Send all views, in order. Raises TransferError("truncated")."""
    pending = deque(views)
    while not await in_thread(executor, _pump, sock, pending, _send_once, select.POLLOUT):
        await _until(sock, writable=True)


async def receive(executor: Executor, sock: socket.socket, views: Sequence[memoryview]) -> None:
    """Fill all views, in order. Raises TransferError("truncated")."""
    pending = deque(views)
    while not await in_thread(executor, _pump, sock, pending, _receive_once, select.POLLIN):
        await _until(sock, writable=False)


def _pump(
    sock: socket.socket,
    pending: deque[memoryview],
    move: Callable[[socket.socket, list[memoryview]], int],
    event: int,
) -> bool:
    """Move bytes until all are moved (True) or the peer makes us wait (False)."""
    poller = select.poll()
    poller.register(sock, event)
    views = _views_a_call(pending)
    while pending:
        try:
            count = move(sock, list(islice(pending, views)))
        except BlockingIOError:
            if not poller.poll(_PATIENCE_MS):
                return False
            continue
        except OSError as error:
            raise TransferError("truncated", f"A data stream broke: {error}.") from error
        if not count:
            raise TransferError("truncated", "The peer closed a data stream.")
        _advance(pending, count)
    return True


def _views_a_call(pending: deque[memoryview]) -> int:
    """How many views one system call will not get far beyond."""
    mean = sum(map(len, pending)) // max(len(pending), 1) + 1
    return min(_CALL_VIEWS, _CALL_BYTES // mean + 1)


def _send_once(sock: socket.socket, views: list[memoryview]) -> int:
    return sock.sendmsg(views)


def _receive_once(sock: socket.socket, views: list[memoryview]) -> int:
    return sock.recvmsg_into(views)[0]


def _advance(pending: deque[memoryview], count: int) -> None:
    while count:
        head = pending[0]
        if count < len(head):
            pending[0] = head[count:]
            return
        count -= len(head)
        pending.popleft()


async def _until(sock: socket.socket, *, writable: bool) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
    )
    add(sock, _wake, ready)
    try:
        await ready
    finally:
        remove(sock)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class TcpSource:
    """Reads one giver's spans over a few parallel streams, opened when first needed."""

    backend: Backend = "tcp"

    def __init__(
        self,
        connect: Callable[[], Awaitable[wire.Channel]],
        regions: dict[str, Region],
        executor: Executor,
    ) -> None:
        self._connect = connect
        self._regions = regions
        self._executor = executor
        self._free = asyncio.Semaphore(STREAMS)
        self._idle: list[wire.Channel] = []
        self._closed = False

    @property
    def alive(self) -> bool:
        """See base.Source."""
        return not self._closed

    async def fetch(self, request_id: str, pool: str, landings: list[Landing]) -> None:
        """See base.Source."""
        size = self._regions[pool].span_bytes
        await all_of(
            self._fetch_part(request_id, pool, part, start, stop)
            for part, start, stop in _parts(landings, size)
        )

    async def _fetch_part(
        self, request_id: str, pool: str, landings: list[Landing], start: int, stop: int
    ) -> None:
        ordinals = [landing.ordinal for landing in landings]
        rows = [landing.row for landing in landings]
        async with self._stream() as channel:
            await channel.write(wire.Fetch(request_id, pool, ordinals, start, stop))
            answer = await channel.read(wire.GRANT)
            if isinstance(answer, wire.Refused):
                raise TransferError(answer.reason, answer.message)
            if answer.num_bytes != len(landings) * (stop - start):
                raise TransferError("protocol", "The giver grants another number of bytes.")
            region = self._regions[pool]
            views, land = await in_thread(self._executor, region.writable, rows, start, stop)
            await receive(self._executor, channel.sock, views)
            await in_thread(self._executor, land)

    @asynccontextmanager
    async def _stream(self) -> AsyncIterator[wire.Channel]:
        """A stream of our own for a while; one that failed half-way is not used again."""
        async with self._free:
            channel = self._idle.pop() if self._idle else await self._connect()
            try:
                yield channel
            except BaseException:
                channel.close()
                raise
            if self._closed:
                channel.close()
            else:
                self._idle.append(channel)

    async def close(self) -> None:
        """See base.Source."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


def _parts(landings: list[Landing], span_bytes: int) -> Iterator[tuple[list[Landing], int, int]]:
    """Cut into requests of one stream each: (spans, first byte, end byte of each of them)."""
    if span_bytes > PART_BYTES:
        for landing in landings:
            for start in range(0, span_bytes, PART_BYTES):
                yield [landing], start, min(start + PART_BYTES, span_bytes)
        return
    even = -(-len(landings) // STREAMS)
    least, most = -(-MIN_PART_BYTES // span_bytes), PART_BYTES // span_bytes
    step = min(max(even, least), most, wire.SPANS_PER_MESSAGE)
    for first in range(0, len(landings), step):
        yield landings[first : first + step], 0, span_bytes
